"""KVLayout: where the blocks of a KV cache lie on the device. The map; the code is in _layout.pyx."""

from libc.stdint cimport uint32_t

from kvortex._c cimport kv_group


cdef class KVLayout:
    cdef kv_group *groups              # runs, merged and grouped; constant from creation
    cdef readonly uint32_t num_groups
    cdef readonly size_t num_blocks
    cdef readonly size_t block_bytes   # payload of one slot
    cdef readonly size_t block_size    # tokens of one block, 0 when unknown
    cdef readonly object runs          # tuple of (base, block_stride, piece_bytes), merged
    cdef readonly object owners        # tensors the addresses come from; held as long as the layout
    cdef bint strided                  # one copy for a whole group is legal: set by a probe, cleared by a refusal
    cdef object __weakref__
