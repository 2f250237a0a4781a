"""DevicePool: device memory with a limit, in the order of streams. The map; the code is in _device_pool.pyx."""

from kvortex._c cimport kv_devptr
from kvortex.driver._buffer cimport DeviceBuffer
from kvortex.driver._device cimport Device
from kvortex.driver._stream cimport Event


cdef class DevicePool:
    cdef readonly Device device
    cdef readonly size_t limit_bytes
    cdef readonly size_t release_threshold_bytes
    cdef readonly bint closed
    cdef bint owns_device             # opened here from its name, so closed here, at the end
    cdef void *pool                   # the driver's; NULL: destroyed, which it is when closed and nothing is out
    cdef size_t used, used_high       # handed out, arenas included; these and the rest change under the GIL
    cdef size_t arenas, arenas_high   # mapped into arenas, which the driver's pool knows nothing of
    cdef Py_ssize_t num_out           # buffers, arenas and calls that still need the pool
    # Streams and events of buffers that are freed, as (Stream, Event, what their last copies still use); the next ones
    # get them once the stream is idle. No list, which the collector would empty while copies run.
    cdef tuple idle_streams
    cdef object __weakref__

    cdef int require_open(self) except -1
    # Count bytes as used, or raise PoolExhausted.
    cdef int claim(self, size_t nbytes) except -1
    cdef void unclaim(self, size_t nbytes) noexcept
    # Memory without an object around it, freed by `give` alone. Raises what `alloc` does.
    cdef kv_devptr take(self, size_t nbytes, void *stream) except 0
    # Free it in the order of the stream. In a forked child, and on a closed device, it only counts.
    cdef void give(self, kv_devptr start, size_t nbytes, void *stream) noexcept
    cdef size_t reserved(self, int attribute) except? 0xFFFFFFFF
    cdef tuple idle_pair(self)
    cdef void end(self) noexcept
    cdef void sweep(self, bint waiting) noexcept
    cdef void end_use(self) noexcept
    # Close without a driver call: the context is dead.
    cdef void abandon(self) noexcept


cdef class PooledBuffer(DeviceBuffer):
    cdef readonly DevicePool pool     # kept open for what is out of it
    cdef Event ready_event            # recorded when the memory was there
    cdef bint is_pending              # the event was not seen complete yet

    cdef int wait_ready(self, void *handle) except -1
    cdef void pass_stream_on(self) noexcept


cdef class DeviceArena(DeviceBuffer):
    cdef readonly DevicePool pool     # as above
    cdef readonly size_t reserve_bytes
    cdef readonly size_t mapped_bytes  # the pool's limit counts these; a multiple of the unit
    cdef size_t unit
    cdef tuple mappings               # their sizes, in the order of their addresses; no list, as above
    cdef bint is_unmapped             # and the pool has yet to count that
    cdef object growing               # lock: one thread at a time, as parts lie behind each other

    cdef int map_more(self, size_t nbytes) except -1
    cdef int map_at(self, kv_devptr address, size_t nbytes) noexcept nogil
