"""PoolSlot: the payload of one slot, for others. The map; the code is in _pool_slot.pyx."""

from libc.stdint cimport uint32_t

from kvortex.driver._memory cimport Lender


cdef class PoolSlot:
    cdef readonly Lender pool       # a PinnedPool, kept alive; close() leaves it mapped while the slot's memory is out
    cdef readonly uint32_t slot
    cdef void *payload
    cdef size_t payload_bytes
    cdef bint is_host               # the pool is of the host device

    cdef int require_open(self) except -1
