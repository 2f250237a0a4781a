"""Submitter: the thread that issues what is handed over. The map; the code is in _submitter.pyx."""

from libc.stdint cimport uint64_t

from kvortex._c cimport pthread_t
from kvortex.driver._device cimport Device
from kvortex.transfer._signals cimport JobSignals

cdef enum:
    MAX_QUEUES = 64


cdef class Submitter:
    cdef Device device
    cdef JobSignals signals
    cdef tuple queues                 # kept alive; the thread reads them through `issued`
    cdef void *issued[MAX_QUEUES]
    cdef int num_queues
    cdef pthread_t thread
    cdef bint running
    cdef bint has_ended               # under the monitor of `signals`

    cdef void run(self) noexcept nogil
    cdef int issue_round(self) noexcept nogil
    cdef bint has_work(self) noexcept nogil
    cdef int end(self, uint64_t deadline_ns, bint interruptible) except -1
