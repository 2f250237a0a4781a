"""BlockCoder: what a lower tier makes of a slot's block. The map; code in _coder.pyx, its C in ecsq_coder.h."""

from libc.stdint cimport uint32_t

from kvortex._c cimport kv_coder, kv_ecsq_coder, kv_plane
from kvortex.codec._ecsq cimport Coded


cdef class BlockCoder:
    cdef kv_ecsq_coder core           # never changed once it is made: any thread may read it
    cdef kv_plane *planes             # owned
    cdef readonly Coded coded         # whose numbers the core uses
    cdef readonly str name            # of the codec
    cdef readonly bytes identity      # what tells its records from all others
    cdef readonly uint32_t stride_bytes

    cdef kv_coder *get(self) noexcept
