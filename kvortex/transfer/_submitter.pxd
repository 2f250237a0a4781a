"""Submitter: the thread that issues what is handed over. The map; the code is in _submitter.pyx."""

from libc.stdint cimport uint64_t

from kvortex._c cimport pthread_t
from kvortex.driver._device cimport Device
from kvortex.transfer._queue_list cimport QueueList
from kvortex.transfer._signals cimport JobSignals


cdef class Submitter:
    cdef Device device
    cdef JobSignals signals
    cdef QueueList issued
    cdef pthread_t thread
    cdef bint running
    cdef bint has_ended               # under the monitor of `signals`

    cdef void run(self) noexcept nogil
    cdef int add(self, object queues) except -1
    cdef bint remove(self, object queues) noexcept    # as that of QueueList
    cdef int issue_round(self) noexcept nogil
    cdef bint has_work(self) noexcept
    cdef int end(self, uint64_t deadline_ns, bint interruptible) except -1
