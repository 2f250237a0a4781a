"""DeviceLimit: the bytes of a device pool, counted. The map; the code is in _device_limit.pyx."""

from kvortex.driver._device cimport Device


cdef class DeviceLimit:
    cdef readonly Device device
    cdef readonly size_t limit_bytes
    cdef readonly bint closed
    cdef void *pool                   # the driver's; NULL: destroyed, which it is when closed and nothing is out
    cdef size_t used, used_high       # handed out, arenas included; these and the rest change under the GIL
    cdef size_t arenas, arenas_high   # mapped into arenas, which the driver's pool knows nothing of
    cdef Py_ssize_t num_out           # buffers, arenas and calls that still need the pool

    cdef int require_open(self) except -1
    # Count bytes as used, or raise PoolExhausted.
    cdef int claim(self, size_t nbytes) except -1
    cdef void unclaim(self, size_t nbytes) noexcept
    cdef void end_use(self) noexcept  # of one that is out; the last one ends a closed pool


cdef int require_size(str name, object nbytes, int least) except -1
cdef size_t round_up(size_t nbytes, size_t unit) noexcept nogil
# Raises PoolExhausted: the device itself has no such memory.
cdef object refuse(Device device, int code, size_t nbytes, size_t used, size_t limit)
# Waits for all work of the context (GIL released); False if that cannot be.
cdef bint wait_for_device(Device device) noexcept
