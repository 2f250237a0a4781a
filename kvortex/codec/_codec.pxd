"""The planes of a PackedBlock as the C structs that include/kvortex/codec.h and the kernel take."""

from libc.stdint cimport uint64_t

cimport kvortex._c as _c


# Fills one kv_plane for each plane of `layout`, a PackedBlock; `base` is where block 0 begins. ValueError if the
# offsets are not those that C computes, so that no hand-made PackedBlock leads outside a block.
cdef int fill_planes(object layout, uint64_t base, uint64_t block_stride, _c.kv_plane *planes) except -1
