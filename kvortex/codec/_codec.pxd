"""The planes of a PackedBlock as the C structs that include/kvortex/codec.h and the kernel take."""

from libc.stdint cimport uint64_t

cimport kvortex._c as _c


cdef int fill_planes(object layout, uint64_t base, uint64_t block_stride, _c.kv_plane *planes) except -1
