"""What is coded of a block, for whoever encodes and decodes without the GIL."""

from libc.stdint cimport uint32_t

cimport kvortex._c as _c


cdef class Coded:
    cdef _c.kv_ecsq ecsq  # as long as this object lives, and never changed: any thread may read it
    cdef _c.kv_ecsq_plane *planes  # owned
    cdef uint32_t *segments  # owned
    cdef readonly object max_coded_bytes, scratch_bytes
