"""DevicePool: device memory with a limit, in the order of streams. The map; the code is in _device_pool.pyx."""

from kvortex._c cimport kv_devptr
from kvortex.driver._buffer cimport DeviceBuffer
from kvortex.driver._stream cimport Event
from kvortex.memory._device_limit cimport DeviceLimit


cdef class DevicePool(DeviceLimit):
    cdef readonly size_t release_threshold_bytes
    cdef bint owns_device             # opened here from its name, so closed here, at the end
    # Streams and events of buffers that are freed, as (Stream, Event, what their last copies still use); the next ones
    # get them once the stream is idle. No list, which the collector would empty while copies run.
    cdef tuple idle_streams
    cdef object __weakref__

    # Memory without an object around it, freed by `give` alone. Raises what `alloc` does.
    cdef kv_devptr take(self, size_t nbytes, void *stream) except 0
    # Free it in the order of the stream. In a forked child, and on a closed device, it only counts.
    cdef void give(self, kv_devptr start, size_t nbytes, void *stream) noexcept
    cdef size_t reserved(self, int attribute) except? 0xFFFFFFFF
    cdef tuple idle_pair(self)
    cdef void end(self) noexcept
    cdef void sweep(self, bint waiting) noexcept
    # Close without a driver call: the context is dead.
    cdef void abandon(self) noexcept


cdef class PooledBuffer(DeviceBuffer):
    cdef readonly DevicePool pool     # kept open for what is out of it
    cdef Event ready_event            # recorded when the memory was there
    cdef bint is_pending              # the event was not seen complete yet

    cdef int wait_ready(self, void *handle) except -1
    cdef void retire(self) noexcept
