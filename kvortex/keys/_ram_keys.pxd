"""RAM keys for callers without the GIL. The map; the code is in _ram_keys.pyx."""

from libc.stdint cimport uint8_t


# keys[i] = hashes[i] xor the digest that is i * digest_step bytes into `digests`: step 0 for one digest, 32 for one
# each. `keys` may be `hashes`.
cdef void xor_keys(const uint8_t *hashes, const uint8_t *digests, size_t digest_step, size_t n,
                   uint8_t *keys) noexcept nogil
