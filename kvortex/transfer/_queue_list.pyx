# cython: nonecheck=False
"""A list of queues that others may change while a thread loops over it."""

cimport cython
from libc.string cimport memcpy
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex.driver._device cimport Device
from kvortex.transfer._signals cimport JobSignals
from kvortex.transfer._transfer_queue cimport TransferQueue


@cython.no_gc_clear  # in a garbage cycle a thread may still read the list
cdef class QueueList:
    """Each round works on a copy of the list. Who takes queues out asks again until no round has them in its copy.

    So no lock is held over a driver call, and no round sees a list that is half changed. One thread makes the rounds;
    callers that change the list have the GIL.
    """

    def __cinit__(self, Device device not None, JobSignals signals not None, queues=()):
        self.device, self.signals, self.queues = device, signals, ()
        if _c.kv_monitor_init(&self.monitor):
            raise MemoryError("pthread_mutex_init failed")
        self.has_monitor = True
        self.add(queues)

    def __dealloc__(self):
        # In a forked child a waiter may be counted for ever, and destroying would wait for it.
        if self.has_monitor and self.device.pid == getpid():
            _c.kv_monitor_destroy(&self.monitor)

    cdef int add(self, object queues) except -1:
        cdef tuple more = tuple(queues), longer
        if self.num_listed + len(more) > MAX_QUEUES:
            raise ValueError(f"at most {MAX_QUEUES} queues, got {self.num_listed} and {len(more)} more")
        for queue in more:
            if (<TransferQueue?>queue).signals is not self.signals or (<TransferQueue>queue).device is not self.device:
                raise ValueError("a queue has other signals or another device than its thread")
        longer = self.queues + more
        _c.kv_monitor_lock(&self.monitor)
        for queue in more:
            self.listed[self.num_listed] = <void *>queue
            self.num_listed += 1
        _c.kv_monitor_unlock(&self.monitor)
        self.queues = longer
        return 0

    cdef bint remove(self, object queues) noexcept:
        cdef int kept = 0, index
        cdef bint is_left = True
        self.queues = tuple([queue for queue in self.queues if queue not in queues])
        _c.kv_monitor_lock(&self.monitor)
        for queue in self.queues:
            self.listed[kept] = <void *>queue
            kept += 1
        self.num_listed = kept
        for queue in queues:
            for index in range(self.num_in_round):
                is_left &= self.round[index] != <void *>queue
        _c.kv_monitor_unlock(&self.monitor)
        return is_left

    cdef int begin_round(self) noexcept nogil:
        _c.kv_monitor_lock(&self.monitor)
        self.num_in_round = self.num_listed
        memcpy(self.round, self.listed, self.num_in_round * sizeof(void *))
        _c.kv_monitor_unlock(&self.monitor)
        return self.num_in_round

    cdef void end_round(self) noexcept nogil:
        _c.kv_monitor_lock(&self.monitor)
        self.num_in_round = 0
        _c.kv_monitor_unlock(&self.monitor)
