"""The thread that puts copies of deferred jobs on their streams. It never takes the GIL or waits for the device."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint64_t
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex.driver._device cimport Device, require_timeout
from kvortex.transfer._job_table cimport ENTER_NS
from kvortex.transfer._queue_list cimport QueueList
from kvortex.transfer._signals cimport JobSignals
from kvortex.transfer._transfer_queue cimport TransferQueue

cdef uint64_t SLICE_NS = 100_000  # how long it issues copies of one queue before the next queue's
cdef uint64_t DRAIN_NS = 100_000
cdef uint64_t PATIENCE_NS = 50_000_000  # after the deadline, for its last call of the driver


@cython.no_gc_clear  # __dealloc__ and copies in flight need what the collector would clear before
cdef class Submitter:
    """Issue and seal the deferred jobs of some queues of one device, the queues in turn, 0.1 ms each.

    So a load of one block does not wait until all pieces of a long save are submitted. The thread waits for no other
    thread: while the next job of a queue must wait for a seal by another thread, the queue is passed over.

    Parameters
    ----------
    device : Device
    signals : JobSignals
        The signals of all these queues; they serve one submitter at a time.
    queues : sequence of TransferQueue
        At most 256.

    Raises
    ------
    ValueError
        Too many queues, a queue of other signals or another device, or there is a submitter already.
    MemoryError
        No thread could be started.
    """

    def __init__(self, Device device not None, JobSignals signals not None, queues):
        if self.device is not None:
            raise RuntimeError("Submitter.__init__ may be called once")
        issued = QueueList(device, signals, ())
        if signals.submitter_runs:
            raise ValueError("these queues have a submitter already")
        self.device, self.signals, self.issued = device, signals, issued
        self.add(queues)
        signals.submitter_stops = False
        if _c.pthread_create(&self.thread, NULL, submitter_main, <void *>self):
            self.remove(self.issued.queues)
            raise MemoryError("no thread for submitting could be started")
        self.running = signals.submitter_runs = signals.has_submitter = True

    cdef int add(self, object queues) except -1:
        self.issued.add(queues)
        for queue in queues:
            (<TransferQueue>queue).is_served = True
        return 0

    cdef bint remove(self, object queues) noexcept:
        for queue in queues:
            (<TransferQueue>queue).is_served = False
        return self.issued.remove(queues)

    cdef void run(self) noexcept nogil:
        cdef uint64_t seen
        cdef bint is_bound = False
        cdef int code, answer
        while True:
            _c.kv_monitor_lock(&self.signals.handing)
            if self.signals.submitter_stops:
                self.has_ended = True
                _c.kv_monitor_broadcast(&self.signals.handing)
                _c.kv_monitor_unlock(&self.signals.handing)
                return
            seen = self.signals.num_handed
            self.signals.is_held_up = True  # before the look at the queues, so that no seal after it is missed
            _c.kv_monitor_unlock(&self.signals.handing)
            if not is_bound:
                code = self.device.bind_thread()
                is_bound = code == 0 or _c.kv_result_is_sticky(code)
                if not is_bound:
                    _c.kv_nap_ns(ENTER_NS)
                    continue
            answer = self.issue_round()
            if answer == 1:
                continue
            _c.kv_monitor_lock(&self.signals.handing)
            self.signals.is_held_up = answer == 0
            while seen == self.signals.num_handed and not self.signals.submitter_stops:
                _c.kv_monitor_wait(&self.signals.handing, _c.KV_NEVER_NS)
            _c.kv_monitor_unlock(&self.signals.handing)

    cdef int issue_round(self) noexcept nogil:
        """Go on with each queue once. 1: copies were issued; 0: a queue waits for a seal; -1: nothing is to be done."""
        cdef int index, found, answer = -1
        for index in range(self.issued.begin_round()):
            found = (<TransferQueue>self.issued.round[index]).issue_next(SLICE_NS)
            answer = max(answer, found)
        self.issued.end_round()
        return answer

    def close(self, timeout_ms=5000):
        """Take no more jobs, submit those taken, and end the thread. Idempotent; releases the GIL.

        Jobs that are not submitted within `timeout_ms` never are: closing their queue fails them.
        """
        self.end(_c.kv_deadline_ns(require_timeout(timeout_ms)), True)

    cdef bint has_work(self) noexcept:
        """Whether a job of its queues has a turn and is not sealed."""
        for queue in self.issued.queues:
            if (<TransferQueue>queue).is_issuing():
                return True
        return False

    cdef int end(self, uint64_t deadline_ns, bint interruptible) except -1:
        """`close`. 0: the thread's call of the driver does not return, so nothing that the thread uses may be freed."""
        cdef bint ended
        cdef uint64_t until = deadline_ns if deadline_ns == _c.KV_NEVER_NS else deadline_ns + PATIENCE_NS
        if not self.running or self.device.pid != getpid():
            return 1
        _c.kv_monitor_lock(&self.signals.handing)
        self.signals.has_submitter = False
        _c.kv_monitor_unlock(&self.signals.handing)
        while self.has_work() and _c.kv_now_ns() < deadline_ns:
            with nogil:
                _c.kv_nap_ns(DRAIN_NS)
            if interruptible:
                PyErr_CheckSignals()
        if not self.running:  # by a signal handler
            return 1
        self.running = False
        with nogil:
            _c.kv_monitor_lock(&self.signals.handing)
            self.signals.submitter_stops = True
            _c.kv_monitor_broadcast(&self.signals.handing)
            while not self.has_ended and _c.kv_now_ns() < until:
                _c.kv_monitor_wait(&self.signals.handing, until)
            ended = self.has_ended
            _c.kv_monitor_unlock(&self.signals.handing)
            if ended:
                _c.pthread_join(self.thread, NULL)
        if ended:
            self.remove(self.issued.queues)
            self.signals.submitter_runs = False
        else:
            Py_INCREF(self)  # the thread uses it when the driver returns
        return ended

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __dealloc__(self):
        if self.running and self.device.pid == getpid() and not self.end(_c.kv_deadline_ns(5000), False):
            with nogil:
                _c.pthread_join(self.thread, NULL)  # otherwise it would go on in memory that is freed now


cdef void *submitter_main(void *thread) noexcept nogil:
    (<Submitter>thread).run()
    return NULL
