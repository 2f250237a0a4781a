"""DevicePool: device memory with a limit, in the order of streams. The map; the code is in _device_pool.pyx."""

from kvortex._c cimport kv_devptr
from kvortex.driver._buffer cimport DeviceBuffer
from kvortex.driver._stream cimport Event
from kvortex.memory._device_limit cimport DeviceLimit


cdef class DevicePool(DeviceLimit):
    cdef readonly size_t release_threshold_bytes
    cdef bint owns_device             # opened here from its name, so closed here, at the end
    # Of retired buffers: (Stream, Event, memory that their last copies may still use). A new buffer gets stream and
    # event when the stream's work is over. A tuple, because the collector would empty a list while copies run.
    cdef tuple idle_streams
    cdef object __weakref__

    # Allocate without a buffer object; only `give` frees it. Raises what `alloc` does.
    cdef kv_devptr take(self, size_t nbytes, void *stream) except 0
    # Free when the stream gets there. In a forked child, and on a closed device, only the counts change.
    cdef void give(self, kv_devptr start, size_t nbytes, void *stream) noexcept
    cdef size_t reserved(self, int attribute) except? 0xFFFFFFFF
    cdef tuple idle_pair(self)
    cdef void end(self) noexcept
    cdef void sweep(self, bint waiting) noexcept
    # Close without a driver call: the context is dead.
    cdef void abandon(self) noexcept


cdef class PooledBuffer(DeviceBuffer):
    cdef readonly DevicePool pool     # which does not end before its buffers
    cdef Event ready_event            # recorded when the memory was there
    cdef bint is_pending              # nobody has seen ready_event complete yet

    cdef int wait_ready(self, void *handle) except -1
    cdef void retire(self) noexcept
