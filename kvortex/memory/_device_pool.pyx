"""DevicePool: device memory up to a limit. The driver's own memory pools keep the order of streams."""

import threading
from contextlib import suppress
from typing import NamedTuple

from cython cimport auto_pickle, no_gc_clear
from libc.stdint cimport uint64_t
from libc.string cimport memset
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex._c cimport kv_devptr
from kvortex.driver._buffer cimport DeviceBuffer
from kvortex.driver._device cimport Device, check, try_again
from kvortex.driver._stream cimport Event, Stream, ask, order_streams
from kvortex.memory._device_arena cimport DeviceArena, fill_props
from kvortex.memory._device_limit cimport DeviceLimit, refuse, require_size, round_up, wait_for_device

from kvortex.errors import ConfigError, DriverError, EngineClosed

cdef size_t RESERVE_UNIT_BYTES = 32 << 20  # CUDA's unit of memory for a pool; a pool that may have less gets none
cdef int MAX_LOOKS = 4                     # how many of the idle_streams one allocation asks whether their work is over


class DevicePoolUsage(NamedTuple):
    """What a `DevicePool` holds at a moment, in bytes.

    `used_bytes` stops counting a buffer when `free` is called. `reserved_bytes` is what the pool has taken from the
    device, used or not. It may exceed the limit by a unit: the driver takes memory in units of 32 MiB (on CUDA), and
    arenas grow by 2 MiB. `reserved_high_bytes` is the sum of two highest values, that of the driver's pool and that of
    the arenas; with arenas it is an upper bound, because both need not have been reached at the same time.
    """

    limit_bytes: int
    used_bytes: int
    used_high_bytes: int
    reserved_bytes: int
    reserved_high_bytes: int


@auto_pickle(False)  # copy.copy would make a second owner
@no_gc_clear  # buffers that are collected with it still give their memory back
cdef class DevicePool(DeviceLimit):
    """Device memory up to a limit, allocated and freed in the order of streams.

    `PooledBuffer.free` never blocks: the memory is free when the stream gets to that point, and the next allocation
    gets it without a system call. If another stream wants it before, the driver lets that stream wait or takes other
    memory.

    Parameters
    ----------
    limit_bytes : int
        Bytes that may be handed out at once, arenas included.
    device : Device or str, default "auto"
        A name is opened by `Device.open`; that device is closed with the pool, when all buffers and arenas were given
        back.
    release_threshold_bytes : int, optional
        Whenever a stream or an event is waited for, the driver gives free memory of the pool back to the device, down
        to this size. By default the limit, so that a steady state never asks the system for memory; 0 keeps none.

    Attributes
    ----------
    device : Device
    limit_bytes, release_threshold_bytes : int
    closed : bool

    Raises
    ------
    ConfigError
        A size is outside its limits, there is no such device, or the device has no memory pools.
    DriverError

    Notes
    -----
    Usable from any thread; every driver call is made without the GIL, and only `DeviceArena.close` blocks. In a forked
    child pool and buffers count as closed.
    """

    def __cinit__(self, *args, **kwargs):
        self.idle_streams = ()

    def __init__(self, limit_bytes, device="auto", *, release_threshold_bytes=None):
        if self.device is not None:
            raise TypeError("a DevicePool cannot be initialised twice")
        require_size("limit_bytes", limit_bytes, 1)
        if release_threshold_bytes is not None:
            require_size("release_threshold_bytes", release_threshold_bytes, 0)
        from_name = not isinstance(device, Device)
        cdef Device opened = Device.open(device) if from_name else device
        opened.require_open()
        if not supports(opened, _c.KV_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED):
            raise ConfigError(f"{opened.name} has no memory pools (device attribute 115); leave gpu_pool_size_bytes at "
                              f"0, or use DeviceBuffer")
        self.limit_bytes = limit_bytes
        self.release_threshold_bytes = limit_bytes if release_threshold_bytes is None else release_threshold_bytes
        cdef _c.kv_mem_pool_props props
        cdef uint64_t threshold = self.release_threshold_bytes
        cdef int code, mode = 0
        memset(&props, 0, sizeof(props))
        props.allocation_type = _c.KV_MEM_ALLOCATION_TYPE_PINNED
        props.location.type, props.location.id = _c.KV_MEM_LOCATION_TYPE_DEVICE, opened.ordinal
        props.max_bytes = round_up(self.limit_bytes, RESERVE_UNIT_BYTES)
        if release_threshold_bytes is None:  # whole units: with less, each wait would give the last unit back
            threshold = props.max_bytes
        with nogil:
            code = opened.enter(&mode)
            if code == 0:
                code = _c.kv_call(opened.drv, _c.mem_pool_create, &self.pool, &props)
                if code == 0:
                    code = _c.kv_call(opened.drv, _c.mem_pool_set_attribute, self.pool,
                                      _c.KV_MEMPOOL_RELEASE_THRESHOLD, &threshold)
                    if code:
                        opened.drv.mem_pool_destroy(self.pool)
                        self.pool = NULL
                opened.leave(mode)
        check(opened, code)
        self.device = opened
        self.owns_device = from_name
        self.closed = False

    def alloc(self, nbytes, stream):
        """Allocate memory that later work on a stream may use; it is not initialised. Does not block.

        Before you use the memory on another stream, make that stream wait for this one. The buffer's own calls do so.

        Parameters
        ----------
        nbytes : int
            At least 1.
        stream : Stream, int or object
            As `Stream.borrow` takes it. Needed: 0 is the legacy default stream, None is an error.

        Returns
        -------
        PooledBuffer
            A `DeviceBuffer`. `free(stream)`, `close()` or the end of the object give the memory back.

        Raises
        ------
        PoolExhausted
            The limit does not allow it, or the driver found no memory; nothing has changed.
        ConfigError
            `nbytes` is outside its limits.
        ValueError
            The stream is refused.
        DriverError, EngineClosed
        """
        cdef PooledBuffer buffer = PooledBuffer.__new__(PooledBuffer)
        cdef Stream own
        cdef Event ready_event
        cdef kv_devptr start
        cdef int code, mode = 0
        cdef void *handle
        require_size("nbytes", nbytes, 1)
        self.require_open()
        handle = self.device.borrow_stream(stream)
        own, ready_event = self.idle_pair()
        buffer.device, buffer.pool, buffer.stream, buffer.ready_event = self.device, self, own, ready_event
        buffer.start = self.take(nbytes, handle)
        buffer.nbytes = nbytes
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = _c.kv_call(self.device.drv, _c.event_record, ready_event.event, handle)
                if code == 0:
                    code = _c.kv_call(self.device.drv, _c.stream_wait_event, own.stream, ready_event.event, 0)
                self.device.leave(mode)
        if code:  # no other stream can be made to wait for the memory, so it is freed on its own
            start, buffer.start = buffer.start, 0
            self.give(start, nbytes, handle)
        check(self.device, code)
        buffer.is_pending = buffer.worked_elsewhere = True
        buffer.closed = False
        return buffer

    def arena(self, reserve_bytes):
        """Reserve addresses for memory that grows without moving: for a cache whose layers are made one by one.

        Parameters
        ----------
        reserve_bytes : int
            The most that it will ever hold, rounded up to units (2 MiB). It costs no memory, so be generous.

        Returns
        -------
        DeviceArena

        Raises
        ------
        ConfigError
            `reserve_bytes` is outside its limits, or the device has no virtual memory management.
        DriverError, EngineClosed
        """
        cdef DeviceArena arena = DeviceArena.__new__(DeviceArena)
        cdef _c.kv_mem_allocation_props props
        cdef size_t unit = 0, size
        cdef int code, mode = 0
        require_size("reserve_bytes", reserve_bytes, 1)
        self.require_open()
        if not supports(self.device, _c.KV_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED):
            raise ConfigError(f"{self.device.name} has no virtual memory management (device attribute 102), which an "
                              f"arena needs; allocate the whole cache with alloc")
        arena.stream = Stream.create(self.device)
        arena.device = self.device
        arena.mappings, arena.growing = (), threading.Lock()
        size = reserve_bytes
        fill_props(&props, self.device)
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = _c.kv_call(self.device.drv, _c.mem_get_allocation_granularity, &unit, &props,
                                  _c.KV_MEM_GRANULARITY_MINIMUM)
                if code == 0:
                    size = round_up(size, unit)
                    code = _c.kv_call(self.device.drv, _c.mem_address_reserve, &arena.start, size, 0, 0, 0)
                self.device.leave(mode)
        check(self.device, code)
        arena.unit, arena.reserve_bytes = unit, size
        arena.pool = self
        self.num_out += 1
        arena.closed = False
        return arena

    def usage(self):
        """Return how much is handed out and how much the pool has taken from the device. Does not block.

        Returns
        -------
        DevicePoolUsage

        Raises
        ------
        DriverError, EngineClosed
        """
        self.require_open()
        self.sweep(False)
        return DevicePoolUsage(
            self.limit_bytes, self.used, self.used_high,
            self.reserved(_c.KV_MEMPOOL_RESERVED_CURRENT) + self.arenas,
            self.reserved(_c.KV_MEMPOOL_RESERVED_HIGH) + self.arenas_high)

    def trim(self, keep_bytes=0):
        """Give unused memory back to the device, down to `keep_bytes`. Does not block.

        Synchronise the streams of earlier frees before: memory stays if its stream has not got to the free yet.

        Raises
        ------
        ConfigError
            `keep_bytes` is outside its limits.
        DriverError, EngineClosed
        """
        cdef int code, mode = 0
        require_size("keep_bytes", keep_bytes, 0)
        cdef size_t keep = keep_bytes
        self.require_open()
        self.sweep(False)
        self.num_out += 1
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = _c.kv_call(self.device.drv, _c.mem_pool_trim_to, self.pool, keep)
                self.device.leave(mode)
        self.end_use()
        check(self.device, code)

    def close(self):
        """Hand out no more, and give back what nobody holds. Idempotent.

        Buffers and arenas that were handed out stay usable until their holders let go; the driver's pool ends with the
        last of them. The call blocks only while copies of freed buffers still run. Ctrl-C ends that wait: then the pool
        hands out no more, and another call of `close`, or the end of the object, does the rest.
        """
        self.closed = True
        if self.pool is NULL or self.device.closed or getpid() != self.device.pid:
            return
        for own, _, lent in self.idle_streams:
            if lent is not None:
                with suppress(DriverError, EngineClosed):  # then the copies may still run: `sweep` keeps their memory
                    (<Stream>own).synchronize()
        self.end()

    cdef void end(self) noexcept:
        """Do what `close` does after its wait. Runs no signal handlers; may be called more than once."""
        cdef uint64_t threshold = 0
        cdef int mode = 0
        cdef bint is_out = self.num_out != 0
        self.closed = True
        if self.pool is NULL or self.device.closed or getpid() != self.device.pid:
            return
        self.num_out += 1
        self.sweep(True)
        with nogil:
            if is_out and self.device.enter(&mode) == 0:  # then each buffer goes back when its holder lets go
                self.device.drv.mem_pool_set_attribute(self.pool, _c.KV_MEMPOOL_RELEASE_THRESHOLD, &threshold)
                self.device.drv.mem_pool_trim_to(self.pool, 0)
                self.device.leave(mode)
        self.end_use()

    cdef void abandon(self) noexcept:
        self.closed = True
        self.pool = NULL

    cdef void sweep(self, bint waiting) noexcept:
        """Release the memory that retired buffers copied from or to, if the copies are over; `waiting` waits for them.
        """
        cdef void *stream
        cdef int code
        before, self.idle_streams = self.idle_streams, ()
        for own, ready_event, lent in before:
            if lent is not None:
                stream = (<Stream>own).stream
                with nogil:
                    code = ask(self.device, stream, NULL, waiting)
                    while waiting and code == _c.KV_CUDA_NOT_READY:
                        code = ask(self.device, stream, NULL, waiting)
                if code == 0:  # else the copies may still run, so their memory is kept
                    lent = None
            self.idle_streams += ((own, ready_event, lent),)

    cdef void end_use(self) noexcept:
        """Count one buffer, arena or call less. If the pool was closed, the last one ends it."""
        cdef void *pool = self.pool
        self.num_out -= 1
        if self.num_out or not self.closed or getpid() != self.device.pid:
            return
        self.pool = NULL
        for own, ready_event, _ in self.idle_streams:
            (<Stream>own).close()
            (<Event>ready_event).close()
        self.idle_streams = ()
        if pool is not NULL and not self.device.closed:
            with nogil:
                self.device.give_back(self.device.drv.mem_pool_destroy, pool)
        if self.owns_device:
            self.device.close()

    def __dealloc__(self):
        if self.device is not None:
            self.end()  # nothing is handed out: a buffer or an arena would keep the pool alive

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        if self.closed:
            return "<DevicePool closed>"
        return f"<DevicePool {self.used} of {self.limit_bytes} bytes of {self.device.name} in use>"

    cdef kv_devptr take(self, size_t nbytes, void *stream) except 0:
        cdef kv_devptr start = 0
        cdef int code, mode = 0
        self.require_open()
        self.claim(nbytes)
        self.num_out += 1
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = _c.kv_call(self.device.drv, _c.mem_alloc_from_pool_async, &start, nbytes, self.pool, stream)
                self.device.leave(mode)
        if code:
            self.unclaim(nbytes)
            used = self.used
            self.end_use()
            if code == _c.kv_answer(_c.KV_CUDA_OUT_OF_MEMORY, _c.mem_alloc_from_pool_async):
                refuse(self.device, code, nbytes, used, self.limit_bytes)
            check(self.device, code)
        return start

    cdef void give(self, kv_devptr start, size_t nbytes, void *stream) noexcept:
        cdef int code = 0, mode = 0, attempts = 0
        if not self.device.closed and getpid() == self.device.pid:
            with nogil:
                while try_again(&attempts, code):
                    code = self.device.enter(&mode)
                    if code == 0:
                        code = self.device.drv.mem_free_async(start, stream)
                        self.device.leave(mode)
        if code == 0:  # memory that could not be freed counts as used
            self.unclaim(nbytes)
        self.end_use()

    cdef size_t reserved(self, int attribute) except? 0xFFFFFFFF:
        """Return how much the driver holds for the pool, arenas not included."""
        cdef uint64_t value = 0
        cdef int code, mode = 0
        self.require_open()
        self.num_out += 1
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = _c.kv_call(self.device.drv, _c.mem_pool_get_attribute, self.pool, attribute, &value)
                self.device.leave(mode)
        self.end_use()
        check(self.device, code)
        return value

    cdef tuple idle_pair(self):
        """Return a stream and an event for a new buffer: those of a retired buffer whose work is over, or new ones."""
        cdef int _
        for _ in range(min(MAX_LOOKS, len(self.idle_streams))):
            if not self.idle_streams:  # taken by another thread meanwhile
                break
            first, self.idle_streams = self.idle_streams[0], self.idle_streams[1:]
            if (<Stream>first[0]).query():
                return first[:2]
            self.idle_streams += (first,)
        return Stream.create(self.device), Event.create(self.device)


@auto_pickle(False)
@no_gc_clear  # __dealloc__ needs pool and stream, which the collector would clear first
cdef class PooledBuffer(DeviceBuffer):
    """A `DeviceBuffer` of a `DevicePool`; made by `DevicePool.alloc`.

    Copies and protocols are those of `DeviceBuffer`. The end differs: `free` and `close` return at once, and other
    buffers get the memory in the order of streams. If a GPU's protocol handed the memory out
    (``__cuda_array_interface__``, DLPack), others may use it in work that is not known here. Without `free` it then
    goes back only after all work of the device, and `close`, or the end of the object, blocks until that is over. If
    you gave the bare address to others, call `free`: the buffer does not know of them.

    Attributes
    ----------
    pool : DevicePool
    """

    def __init__(self):
        raise TypeError("PooledBuffer has no constructor; use DevicePool.alloc(nbytes, stream)")

    def free(self, stream):
        """Free the memory when a stream gets there and the buffer's calls on other streams are over. Does not block.

        If others work on the memory, what is on the stream now must already wait for their work. If others hold the
        memory (a buffer, a DLPack tensor, a layout over it), it is freed when the last of them lets go, and not before
        the stream gets there.

        Parameters
        ----------
        stream : Stream, int or object
            As `Stream.borrow` takes it.

        Raises
        ------
        ValueError
            The stream is None or refused; nothing was freed.
        DriverError, EngineClosed
        """
        cdef void *handle
        cdef kv_devptr start
        self.require_open()
        handle = self.device.borrow_stream(stream)
        self.require_open()  # the stream's own code may have freed it
        self.wait_ready(handle)
        if self.followed:
            order_streams(self.device, handle, self.stream.stream)
        if self.exports:
            self.follow(handle)
            self.close()
        elif not self.closed:  # which another thread may have done meanwhile
            self.closed = True
            start, self.start = self.start, 0
            self.retire()
            self.pool.give(start, self.nbytes, handle)

    cdef void *stream_for(self, object stream) except? NULL:
        cdef void *handle = DeviceBuffer.stream_for(self, stream)
        if stream is not None:
            self.wait_ready(handle)
        return handle

    cdef int wait_ready(self, void *handle) except -1:
        """Make a stream wait, on the device, until the memory is there."""
        cdef int code, mode = 0
        if not self.is_pending:
            return 0
        if self.ready_event.query():
            self.is_pending = False
            return 0
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = _c.kv_call(self.device.drv, _c.stream_wait_event, handle, self.ready_event.event, 0)
                self.device.leave(mode)
        return check(self.device, code)

    cdef void give_back(self) noexcept:
        if self.start != 0:
            self.retire()  # first, because the pool may end when it gets the memory back
            self.release()

    cdef void release(self) noexcept:
        cdef kv_devptr start = self.start
        self.start = 0  # taken under the GIL, so that nobody frees it twice
        if start != 0 and (not self.shown or self.device.is_host or wait_for_device(self.device)):
            self.pool.give(start, self.nbytes, self.stream.stream)
        # else: the context is dead, and its work cannot be waited for; memory that may be in use is not given back

    cdef void retire(self) noexcept:
        """Give stream and event to the pool's idle_streams, with the memory that the last copies may still use."""
        self.pool.idle_streams += ((self.stream, self.ready_event, self.lent),)
        self.lent = None
        if self.pool.closed:  # no later allocation would look at them
            self.pool.sweep(True)

    def __dealloc__(self):
        if self.start != 0:
            self.give_back()


cdef bint supports(Device device, int attribute) except -1:
    """Tell whether the device has a feature, by the number of its attribute."""
    cdef int code, number = 0, value = 0
    with nogil:
        code = _c.kv_call(device.drv, _c.device_get, &number, device.ordinal)
        if code == 0:
            code = _c.kv_call(device.drv, _c.device_get_attribute, &value, attribute, number)
    if code == _c.kv_answer(_c.KV_CUDA_INVALID_VALUE, _c.device_get_attribute):  # the driver has no such attribute
        return False
    check(device, code)
    return value != 0
