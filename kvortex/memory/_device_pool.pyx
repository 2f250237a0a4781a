"""The device pool: a limit, stream order kept by the driver's pools."""

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

cdef size_t RESERVE_UNIT_BYTES = 32 << 20  # in which CUDA takes memory for a pool; a smaller limit would stop the first
cdef int MAX_LOOKS = 4                     # streams of freed buffers that one allocation asks whether they are idle


class DevicePoolUsage(NamedTuple):
    """What a `DevicePool` holds at a moment, in bytes.

    A free counts from its call. `reserved_bytes` is what the device misses, used or not: the driver takes memory for a
    pool in units of its own (32 MiB on CUDA) and arenas grow in others (2 MiB), so that it may exceed the limit by as
    much. `reserved_high_bytes` adds the marks of both, and is an upper bound where there are arenas.
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

    A free takes effect when its stream gets there, and never blocks; the memory then serves the next allocation without
    a call to the system. Where another stream wants it before, the driver makes that stream wait or takes other memory.

    Parameters
    ----------
    limit_bytes : int
        Bytes that may be handed out at once, arenas included.
    device : Device or str, default "auto"
        A name is opened as `Device.open` does, and closed when the pool is closed and nothing is out any more.
    release_threshold_bytes : int, optional
        What the pool keeps for later allocations when a stream or event is waited for; more than that goes back to the
        device. By default the limit: a steady state then never asks the system for memory. 0 keeps nothing.

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
        if release_threshold_bytes is None:  # in whole units, or each wait would give the last one back
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
        """Allocate memory that work on a stream may use from now on; not initialised. Does not block.

        Work that the buffer puts on other streams waits for that moment; work that others put there must.

        Parameters
        ----------
        nbytes : int
            At least 1.
        stream : Stream, int or object
            As `Stream.borrow` takes it. Needed: 0 is the legacy default stream, None is an error.

        Returns
        -------
        PooledBuffer
            A `DeviceBuffer`, to be given back by `free(stream)`, `close()` or its end.

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
        if code:  # no other stream can come after the allocation, so it is freed on its own
            start, buffer.start = buffer.start, 0
            self.give(start, nbytes, handle)
        check(self.device, code)
        buffer.is_pending = buffer.worked_elsewhere = True
        buffer.closed = False
        return buffer

    def arena(self, reserve_bytes):
        """Reserve address space in which memory grows without moving, for a cache whose layers are made one by one.

        Parameters
        ----------
        reserve_bytes : int
            The most that it will ever hold, rounded up to units (2 MiB); costs no memory, so be generous.

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
        """What is handed out and what is taken from the device, as a `DevicePoolUsage`. Does not block.

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
        """Give memory that nobody uses back to the device, down to `keep_bytes`. Does not block.

        Memory whose free no one has waited for yet may stay: synchronise the stream before.

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

        Buffers and arenas that are out stay usable until their holders let go; the driver's pool ends with the last of
        them. That blocks only for copies that freed buffers left on other streams. Ctrl-C ends the wait: then the pool
        hands out no more, and another call, or its end, does the rest.
        """
        self.closed = True
        if self.pool is NULL or self.device.closed or getpid() != self.device.pid:
            return
        for own, _, lent in self.idle_streams:
            if lent is not None:
                with suppress(DriverError, EngineClosed):  # nobody knows: then `sweep` keeps it
                    (<Stream>own).synchronize()
        self.end()

    cdef void end(self) noexcept:
        """The rest of `close`, without signal handlers and more than once."""
        cdef uint64_t threshold = 0
        cdef int mode = 0
        cdef bint is_out = self.num_out != 0
        self.closed = True
        if self.pool is NULL or self.device.closed or getpid() != self.device.pid:
            return
        self.num_out += 1
        self.sweep(True)
        with nogil:
            if is_out and self.device.enter(&mode) == 0:  # what others hold goes back when they let go
                self.device.drv.mem_pool_set_attribute(self.pool, _c.KV_MEMPOOL_RELEASE_THRESHOLD, &threshold)
                self.device.drv.mem_pool_trim_to(self.pool, 0)
                self.device.leave(mode)
        self.end_use()

    cdef void abandon(self) noexcept:
        self.closed = True
        self.pool = NULL

    cdef void sweep(self, bint waiting) noexcept:
        """Let go of what freed buffers copied from or to, where that is over; with `waiting`, when it is."""
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
                if code == 0:  # else it is in use, or nobody knows, so it is kept
                    lent = None
            self.idle_streams += ((own, ready_event, lent),)

    cdef void end_use(self) noexcept:
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
            self.end()  # nothing is out: that would keep it

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
        if code == 0:  # what could not be freed stays used
            self.unclaim(nbytes)
        self.end_use()

    cdef size_t reserved(self, int attribute) except? 0xFFFFFFFF:
        """What the driver holds for the pool, without arenas."""
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
        """A stream and an event for a new buffer: of one that was freed and whose work is over, or new ones."""
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
@no_gc_clear  # __dealloc__ needs pool and stream, which the collector would clear before it
cdef class PooledBuffer(DeviceBuffer):
    """A `DeviceBuffer` of a `DevicePool`; made by `DevicePool.alloc`.

    Everything about copies and protocols is as for `DeviceBuffer`; how it ends is not: `free` and `close` return at
    once, and other buffers get the memory in the order of streams. Memory that a GPU's protocol handed out
    (``__cuda_array_interface__``, DLPack) may be in use by work that nobody here knows of, so without a `free` it goes
    back only after all work of the device, for which `close` and the buffer's end then block. Who gave the bare address
    to others must use `free`.

    Attributes
    ----------
    pool : DevicePool
    """

    def __init__(self):
        raise TypeError("PooledBuffer has no constructor; use DevicePool.alloc(nbytes, stream)")

    def free(self, stream):
        """Free the memory in the order of a stream, after the buffer's own calls on others. Does not block.

        Nobody else's work on the memory may come later than the stream as it stands now. Memory that others hold (a
        buffer, a DLPack tensor, a layout over it) is freed when the last of them lets go, and after the stream, too.

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
        elif not self.closed:  # by another thread, meanwhile
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
        """Let work on another stream than that of the allocation come after it."""
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
            self.retire()  # first: with the memory the pool may end
            self.release()

    cdef void release(self) noexcept:
        cdef kv_devptr start = self.start
        self.start = 0  # taken under the GIL, so that nobody frees it twice
        if start != 0 and (not self.shown or self.device.is_host or wait_for_device(self.device)):
            self.pool.give(start, self.nbytes, self.stream.stream)
        # else: a dead context forbids to wait, and memory that may be in use is nobody's to reuse

    cdef void retire(self) noexcept:
        self.pool.idle_streams += ((self.stream, self.ready_event, self.lent),)
        self.lent = None
        if self.pool.closed:  # nobody would ask later
            self.pool.sweep(True)

    def __dealloc__(self):
        if self.start != 0:
            self.give_back()


cdef bint supports(Device device, int attribute) except -1:
    cdef int code, number = 0, value = 0
    with nogil:
        code = _c.kv_call(device.drv, _c.device_get, &number, device.ordinal)
        if code == 0:
            code = _c.kv_call(device.drv, _c.device_get_attribute, &value, attribute, number)
    if code == _c.kv_answer(_c.KV_CUDA_INVALID_VALUE, _c.device_get_attribute):  # the driver does not know it
        return False
    check(device, code)
    return value != 0
