"""Names of blocks that outlive the process, for callers without the GIL. The map; the code is in the .pyx."""

from libc.stdint cimport uint8_t, uint32_t


# Writes the names of n keys, 32 bytes each. `space` and `tag` have 32 bytes.
cdef void name_keys(const uint8_t *space, uint32_t rank, const uint8_t *tag, const uint8_t *keys, size_t n,
                    uint8_t *names) noexcept nogil

# `digest` as 32 bytes; ValueError that says how to make `what`.
cdef bytes as_digest(object digest, str what)
