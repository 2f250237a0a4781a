"""Keys for callers without the GIL. The map; the code is in _block_keys.pyx."""

from libc.stdint cimport uint8_t, uint32_t


# The 32 bytes that stand in front of a prompt's first block: one for each block size and salt, made once, with the GIL.
# Raises ValueError, TypeError.
cdef bytes hash_root(object block_size, object salt)

# Writes the keys of the num_tokens // block_size whole blocks, 32 bytes each. `parent` is the root, or the key of the
# block before where a prompt goes on; block_size is not 0. False if there is no memory for one padded block.
cdef bint chain_keys(const uint32_t *tokens, size_t num_tokens, size_t block_size, const uint8_t *parent,
                     uint8_t *keys) noexcept nogil
