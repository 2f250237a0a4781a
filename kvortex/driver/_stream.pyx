"""Stream and Event: ours or borrowed."""

from cpython.exc cimport PyErr_CheckSignals
from cython cimport no_gc_clear
from libc.stdint cimport uint64_t
from posix.unistd cimport getpid

from kvortex._c cimport (
    KV_CUDA_NOT_READY,
    KV_EVENT_DISABLE_TIMING,
    KV_STREAM_NON_BLOCKING,
    event_create,
    event_query,
    event_record,
    event_synchronize,
    kv_answer,
    kv_call,
    kv_driver,
    kv_nap_ns,
    kv_now_ns,
    stream_create,
    stream_query,
    stream_synchronize,
    stream_wait_event,
)
from kvortex.driver._device cimport Device, check

from kvortex.errors import EngineClosed

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef uint64_t SPIN_NS = 200_000  # a wait asks without a pause first: short work is over sooner than a thread wakes up
cdef uint64_t NAP_NS = 50_000
cdef uint64_t SIGNALS_NS = 50_000_000  # how long a wait leaves Python's signal handlers (Ctrl-C) waiting


@no_gc_clear  # __dealloc__ needs the device, which the collector would clear before it
cdef class Stream:
    """A stream of a device: work submitted to it runs in order.

    Get one with `create` (ours: non-blocking, destroyed by `close`) or `borrow` (someone else's: never destroyed).
    Usable from any thread. Passes anywhere a stream is wanted, as it has ``__cuda_stream__``.

    Attributes
    ----------
    device : Device
    is_owned : bool
    closed : bool
    """

    def __init__(self):
        raise TypeError("Stream has no constructor; use Stream.create(device) or Stream.borrow(device, stream)")

    @staticmethod
    def create(Device device not None):
        """Create a non-blocking stream: it does not synchronise with the legacy default stream.

        Raises
        ------
        DriverError, EngineClosed
        """
        device.require_open()
        cdef Stream self = Stream.__new__(Stream)
        cdef int code, mode = 0
        with nogil:
            code = device.enter(&mode)
            if code == 0:
                code = kv_call(device.drv, stream_create, &self.stream, KV_STREAM_NON_BLOCKING)
                device.leave(mode)
        check(device, code)
        self.device = device
        self.is_owned = True
        self.closed = False
        return self

    @staticmethod
    def borrow(Device device not None, stream):
        """Wrap a stream of someone else, and keep the object it came from alive.

        Parameters
        ----------
        device : Device
        stream : int or object
            A handle (0 is the legacy default stream), or an object with ``__cuda_stream__``, ``cuda_stream`` (torch)
            or ``ptr`` (CuPy).

        Raises
        ------
        ValueError
            It is None, capturing, or of another device.
        """
        cdef Stream self = Stream.__new__(Stream)
        self.stream = device.borrow_stream(stream)
        self.device = device
        self.owner = stream
        self.closed = False
        return self

    def __cinit__(self):
        self.closed = True

    @property
    def handle(self):
        """The ``CUstream`` as an int; 0 is the legacy default stream."""
        return <size_t>self.stream

    def __cuda_stream__(self):
        """Return (protocol version, handle)."""
        self.require_open()
        return 0, <size_t>self.stream

    def synchronize(self):
        """Block until everything submitted so far is complete. Releases the GIL; Ctrl-C ends the wait.

        Raises
        ------
        DriverError, EngineClosed
            Whether it is complete is not known.
        """
        self.require_open()
        while not wait_a_while(self.device, self.stream, NULL):
            self.require_open()  # a signal handler may have closed it

    def query(self):
        """Tell whether everything submitted so far is complete. Does not block."""
        cdef int code, mode = 0
        self.require_open()
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = kv_call(self.device.drv, stream_query, self.stream)
                self.device.leave(mode)
        if code == kv_answer(KV_CUDA_NOT_READY, stream_query):
            return False
        check(self.device, code)
        return True

    def wait_event(self, Event event not None):
        """Let later work of this stream wait, on the device, for the event as it stands now. Does not block.

        A later record of the event does not change that; an event never recorded is complete.

        Raises
        ------
        ValueError
            The stream is capturing.
        DriverError, EngineClosed
            Nothing was ordered.
        """
        cdef int code, mode = 0
        self.require_open()
        event.require_open()
        self.device.borrow_stream(<size_t>self.stream)
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = kv_call(self.device.drv, stream_wait_event, self.stream, event.event, 0)
                self.device.leave(mode)
        check(self.device, code)

    def close(self):
        """Destroy the stream if it is ours. Idempotent, does not block: what was submitted still runs."""
        if not self.closed:
            self.closed = True
            self.destroy()

    cdef void destroy(self) noexcept:
        if self.is_owned and not self.device.closed and getpid() == self.device.pid:
            with nogil:
                self.device.give_back(self.device.drv.stream_destroy, self.stream)
        self.owner = None

    def __dealloc__(self):
        if not self.closed:
            self.destroy()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        if self.device is None:
            return "<Stream never created>"
        state = "closed" if self.closed else "owned" if self.is_owned else "borrowed"
        return f"<Stream {<size_t>self.stream:#x} of {self.device.name}, {state}>"

    cdef int require_open(self) except -1:
        if self.closed:
            raise EngineClosed(f"{self!r} cannot be used any more; create another with Stream.create(device)")
        return self.device.require_open()


@no_gc_clear  # __dealloc__ needs the device, which the collector would clear before it
cdef class Event:
    """A point in a stream: what was submitted before `record`. Made by `create`; usable from any thread.

    Attributes
    ----------
    device : Device
    closed : bool
    """

    def __init__(self):
        raise TypeError("Event has no constructor; use Event.create(device)")

    @staticmethod
    def create(Device device not None):
        """Create an event without timing. Until its first `record` it counts as complete.

        Raises
        ------
        DriverError, EngineClosed
        """
        device.require_open()
        cdef Event self = Event.__new__(Event)
        cdef int code, mode = 0
        with nogil:
            code = device.enter(&mode)
            if code == 0:
                code = kv_call(device.drv, event_create, &self.event, KV_EVENT_DISABLE_TIMING)
                device.leave(mode)
        check(device, code)
        self.device = device
        self.closed = False
        return self

    def __cinit__(self):
        self.closed = True

    @property
    def handle(self):
        """The ``CUevent`` as an int."""
        return <size_t>self.event

    def record(self, stream):
        """Let the event stand for everything submitted to the stream so far. Does not block.

        Parameters
        ----------
        stream : Stream, int or object
            As `Stream.borrow` takes it; a capturing stream is refused before anything is recorded on it.

        Raises
        ------
        ValueError, DriverError, EngineClosed
        """
        cdef int code, mode = 0
        self.require_open()
        cdef void *handle = self.device.borrow_stream(stream)
        self.require_open()  # the stream's own code may have closed the event
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = kv_call(self.device.drv, event_record, self.event, handle)
                self.device.leave(mode)
        check(self.device, code)

    def query(self):
        """Tell whether the last record is complete. Does not block."""
        cdef int code, mode = 0
        self.require_open()
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = kv_call(self.device.drv, event_query, self.event)
                self.device.leave(mode)
        if code == kv_answer(KV_CUDA_NOT_READY, event_query):
            return False
        check(self.device, code)
        return True

    def synchronize(self):
        """Block until the last record is complete. Releases the GIL; Ctrl-C ends the wait.

        Raises
        ------
        DriverError, EngineClosed
            Whether it is complete is not known.
        """
        self.require_open()
        while not wait_a_while(self.device, NULL, self.event):
            self.require_open()  # a signal handler may have closed it

    def close(self):
        """Destroy the event. Idempotent, does not block; waits that were submitted for it still hold."""
        if not self.closed:
            self.closed = True
            self.destroy()

    cdef void destroy(self) noexcept:
        if not self.device.closed and getpid() == self.device.pid:
            with nogil:
                self.device.give_back(self.device.drv.event_destroy, self.event)

    def __dealloc__(self):
        if not self.closed:
            self.destroy()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        if self.device is None:
            return "<Event never created>"
        return f"<Event {<size_t>self.event:#x} of {self.device.name}{' closed' if self.closed else ''}>"

    cdef int require_open(self) except -1:
        if self.closed:
            raise EngineClosed(f"{self!r} cannot be used any more; create another with Event.create(device)")
        return self.device.require_open()


cdef bint wait_a_while(Device device, void *stream, void *event) except -1:
    cdef int code
    with nogil:
        code = ask(device, stream, event, True)
    PyErr_CheckSignals()
    if code == KV_CUDA_NOT_READY:
        return False
    check(device, code)
    return True


cdef int ask(Device device, void *stream, void *event, bint waiting) noexcept nogil:
    cdef uint64_t now, spin_until, wait_until
    cdef int mode = 0, code = device.enter(&mode)
    if code:
        return code
    code = query(device.drv, stream, event)
    if waiting and code == KV_CUDA_NOT_READY:  # the clock is not asked for what is over already
        now = kv_now_ns()
        spin_until, wait_until = now + SPIN_NS, now + SIGNALS_NS
        while code == KV_CUDA_NOT_READY and now < wait_until:
            if now < spin_until:
                sched_yield()
            else:
                kv_nap_ns(NAP_NS)
            now = kv_now_ns()
            code = query(device.drv, stream, event)
    if waiting and code == 0:  # only at a wait of its own does the driver give back what its memory pools may not keep
        if event is not NULL:
            code = kv_call(device.drv, event_synchronize, event)
        else:
            code = kv_call(device.drv, stream_synchronize, stream)
    device.leave(mode)
    return code


cdef int query(const kv_driver *drv, void *stream, void *event) noexcept nogil:
    """A CUresult, with its row unless it is NOT_READY."""
    cdef int code = drv.event_query(event) if event is not NULL else drv.stream_query(stream)
    if code == KV_CUDA_NOT_READY:
        return code
    return kv_answer(code, event_query) if event is not NULL else kv_answer(code, stream_query)


cdef int order_streams(Device device, void *later, void *earlier) except -1:
    cdef Event event = Event.create(device)
    cdef int code, mode = 0
    with nogil:
        code = device.enter(&mode)
        if code == 0:
            code = kv_call(device.drv, event_record, event.event, earlier)
            if code == 0:
                code = kv_call(device.drv, stream_wait_event, later, event.event, 0)
            device.leave(mode)
    event.close()  # what waits for it goes on waiting
    return check(device, code)
