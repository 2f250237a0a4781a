"""JobSignals: who is told when jobs are submitted and retired. The map; the code is in _signals.pyx."""

from libc.stdint cimport uint64_t

from kvortex._c cimport kv_monitor

cdef enum:
    MAX_LISTENERS = 64


cdef class JobSignals:
    cdef kv_monitor monitor          # guards everything below
    cdef int pid                     # process that created it, 0 when the monitor could not be made
    cdef uint64_t num_submitted      # the completion thread sleeps until it changes
    cdef bint stopping
    cdef readonly bint served        # a completion thread retires the jobs
    cdef int listeners[MAX_LISTENERS]   # eventfds of event loops that await a job; borrowed
    cdef int num_listeners

    cdef void submitted(self) noexcept nogil
    cdef void retired(self) noexcept nogil
    cdef void stop(self) noexcept nogil
