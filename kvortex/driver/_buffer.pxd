"""DeviceBuffer: memory of a device, for callers without a framework. The map; the code is in _buffer.pyx."""

from kvortex._c cimport kv_devptr
from kvortex.driver._device cimport Device
from kvortex.driver._stream cimport Stream


cdef class DeviceBuffer:
    cdef readonly Device device
    cdef readonly size_t nbytes
    cdef bint owns_device             # opened here from its name, so closed here
    cdef kv_devptr start              # 0: closed
    cdef Stream stream                # our own, for the calls without a stream
    cdef object __weakref__

    cdef int require_open(self) except -1
    cdef int require_inside(self, size_t offset, size_t nbytes) except -1
    cdef void *stream_for(self, object stream) except? NULL
    cdef void release(self) noexcept
