"""JobSignals: who is woken when jobs are handed over, sealed and retired. The map; the code is in _signals.pyx."""

from libc.stdint cimport uint64_t

from kvortex._c cimport kv_monitor

cdef enum:
    MAX_LISTENERS = 64


cdef class JobSignals:
    cdef kv_monitor monitor          # guards what follows, up to `handing`
    cdef int pid                     # process that created it, 0 when the monitor could not be made
    cdef uint64_t num_sealed         # the completion thread sleeps until it changes
    cdef bint stopping
    cdef readonly bint served        # a completion thread retires the jobs
    cdef int listeners[MAX_LISTENERS]   # eventfds of event loops that await a job; borrowed
    cdef int num_listeners

    cdef kv_monitor handing          # guards the rest
    cdef uint64_t num_handed         # the submitter sleeps until it changes
    cdef bint is_held_up             # what it could do depends on a job that somebody else seals
    cdef bint submitter_runs         # from its start until its thread was joined
    cdef bint has_submitter          # it takes what is handed over
    cdef bint submitter_stops

    cdef void sealed(self) noexcept nogil
    cdef void retired(self) noexcept nogil
    cdef void stop(self) noexcept nogil
