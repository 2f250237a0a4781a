"""DeviceArena: contiguous device memory that grows. The map; the code is in _device_arena.pyx."""

from kvortex._c cimport kv_devptr, kv_mem_allocation_props
from kvortex.driver._buffer cimport DeviceBuffer
from kvortex.driver._device cimport Device
from kvortex.memory._device_limit cimport DeviceLimit


cdef class DeviceArena(DeviceBuffer):
    cdef readonly DeviceLimit pool    # a DevicePool, kept open for what is out of it
    cdef readonly size_t reserve_bytes
    cdef readonly size_t mapped_bytes  # the pool's limit counts these; a multiple of the unit
    cdef size_t unit
    cdef tuple mappings               # their sizes, in the order of their addresses; no list, as above
    cdef bint is_unmapped             # and the pool has yet to count that
    cdef object growing               # lock: one thread at a time, as parts lie behind each other

    cdef int map_more(self, size_t nbytes) except -1
    cdef int map_at(self, kv_devptr address, size_t nbytes) noexcept nogil


cdef int fill_props(kv_mem_allocation_props *props, Device device) noexcept nogil
