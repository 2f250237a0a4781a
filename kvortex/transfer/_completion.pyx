"""The one thread that retires jobs as they end. It never takes the GIL and never blocks on one event."""

cimport cython
from libc.stdint cimport uint64_t
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex.driver._device cimport Device
from kvortex.transfer._queue_list cimport QueueList
from kvortex.transfer._signals cimport JobSignals
from kvortex.transfer._transfer_queue cimport TransferQueue

cdef uint64_t SHORTEST_NAP_NS = 20_000
cdef uint64_t LONGEST_NAP_NS = 50_000
cdef uint64_t PATIENCE_NS = 200_000_000  # after the deadline, for the thread's last call of the driver


@cython.no_gc_clear  # __dealloc__ and copies in flight need what the collector would clear before
cdef class CompletionThread:
    """Poll the oldest job of each queue: at once while jobs end, then in naps of 20-50 us; sleep while none has any."""

    def __init__(self, Device device not None, JobSignals signals not None, queues):
        if self.device is not None:
            raise RuntimeError("CompletionThread.__init__ may be called once")
        self.polled = QueueList(device, signals, queues)
        self.device, self.signals = device, signals
        if _c.pthread_create(&self.thread, NULL, completion_main, <void *>self):
            raise MemoryError("no completion thread could be started")
        self.running = signals.served = True

    cdef void run(self) noexcept nogil:
        cdef uint64_t seen, nap_ns = SHORTEST_NAP_NS
        cdef bint busy, progressed, is_bound = False
        cdef int index, answer, code
        while True:
            _c.kv_monitor_lock(&self.signals.monitor)
            if self.signals.stopping:
                self.has_ended = True
                _c.kv_monitor_broadcast(&self.signals.monitor)
                _c.kv_monitor_unlock(&self.signals.monitor)
                return
            seen = self.signals.num_sealed
            _c.kv_monitor_unlock(&self.signals.monitor)
            if not is_bound:  # until then answers say nothing about jobs; a dead context shows in the first query
                code = self.device.bind_thread()
                is_bound = code == 0 or _c.kv_result_is_sticky(code)
            busy = not is_bound
            progressed = False
            for index in range(self.polled.begin_round() if is_bound else 0):
                answer = (<TransferQueue>self.polled.round[index]).poll_once()
                busy |= answer >= 0
                progressed |= answer == 1
            self.polled.end_round()
            if progressed:
                nap_ns = SHORTEST_NAP_NS
            elif busy:
                _c.kv_nap_ns(nap_ns)
                nap_ns = min(nap_ns + 5_000, LONGEST_NAP_NS)
            else:
                nap_ns = SHORTEST_NAP_NS
                _c.kv_monitor_lock(&self.signals.monitor)
                while seen == self.signals.num_sealed and not self.signals.stopping:
                    _c.kv_monitor_wait(&self.signals.monitor, <uint64_t>-1)
                _c.kv_monitor_unlock(&self.signals.monitor)

    cdef bint stop(self, uint64_t deadline_ns) noexcept nogil:
        """End the thread; jobs in flight are not retired. False: a call of the driver does not return, so nothing that
        the thread uses may be freed.
        """
        cdef uint64_t until = deadline_ns if deadline_ns == _c.KV_NEVER_NS else deadline_ns + PATIENCE_NS
        cdef bint ended
        if not self.running:
            return True
        self.signals.stop()
        _c.kv_monitor_lock(&self.signals.monitor)
        while not self.has_ended and _c.kv_now_ns() < until:
            _c.kv_monitor_wait(&self.signals.monitor, until)
        ended = self.has_ended
        _c.kv_monitor_unlock(&self.signals.monitor)
        if ended:
            _c.pthread_join(self.thread, NULL)
            self.running = False
        return ended

    def __dealloc__(self):
        if self.running and self.device.pid == getpid():
            self.stop(_c.KV_NEVER_NS)


cdef void *completion_main(void *thread) noexcept nogil:
    (<CompletionThread>thread).run()
    return NULL
