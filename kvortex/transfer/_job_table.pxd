"""JobTable: the jobs of one stream, first in first out. The map; the code is in _job_table.pyx."""

from libc.stdint cimport uint32_t, uint64_t

from kvortex._c cimport kv_monitor
from kvortex.driver._device cimport Device
from kvortex.transfer._copier cimport Direction
from kvortex.transfer._signals cimport JobSignals

cdef extern from *:
    """
    #define KV_NO_RECORD UINT32_MAX
    """
    const uint32_t NO_RECORD "KV_NO_RECORD"

cdef enum:
    SIGNALS_NS = 50_000_000  # how long a wait leaves Python's signal handlers (Ctrl-C) waiting
    ENTER_NS = 1_000_000     # after which a wait tries again to enter a context that could not be entered

cdef enum JobState:
    JOB_FREE       # on the free list
    JOB_CLAIMED    # its copies are being submitted
    JOB_SUBMITTED  # every copy and then its event are on the stream; in the FIFO
    JOB_RETIRING   # one party found the event complete and runs the hook
    JOB_RETIRED    # over, but somebody is inside a driver call on its event

cdef enum OutcomeState:
    OUTCOME_PENDING
    OUTCOME_DONE
    OUTCOME_FAILED

cdef struct JobOutcome:                # lives in the Python handle, or with the caller of submit_blocks
    OutcomeState state
    int code                           # CUresult when failed

cdef struct JobRecord:
    void *done_event                   # complete when every copy is; the record's for life
    void *source_event                 # the caller's stream as it stood at the call
    JobState state
    uint32_t generation                # of the job; a handle with another one asks for a job long retired
    uint32_t holds                     # callers inside a driver call on done_event: it is not re-recorded meanwhile
    uint32_t next                      # FIFO or free list
    uint64_t sequence                  # place in the FIFO order of the stream
    JobOutcome *outcome                # NULL once the handle is gone
    uint32_t *slots                    # what the hook commits or releases; capacity kept from job to job
    size_t num_slots, slots_capacity
    uint64_t nbytes, start_ns

# Called once a job, by the party that retires it, before anyone sees it done. Runs without the GIL.
ctypedef void (*retire_hook)(void *owner, Direction direction, const JobRecord *record, int code) noexcept nogil


cdef class JobTable:
    cdef readonly Device device
    cdef readonly JobSignals signals
    cdef Direction direction_
    cdef void *stream                  # of the copies; borrowed
    cdef JobRecord *records
    cdef readonly uint32_t max_jobs
    cdef kv_monitor monitor            # guards records, lists, outcomes; broadcast when a job is submitted or retired
    cdef bint has_monitor
    cdef uint32_t free_head, fifo_head, fifo_tail
    cdef uint64_t num_submitted
    cdef readonly uint32_t jobs_in_flight   # claimed and not yet free
    cdef int failure                   # sticky CUresult: the context is dead
    cdef bint closed                   # nothing is claimed any more
    cdef retire_hook hook
    cdef void *hook_owner              # borrowed: outlives every job, see EngineCore

    # -> jobs retired, or minus a CUresult: the context is dead. Never blocks on a job; where the driver cannot be asked
    # for the moment, none is retired.
    cdef int poll_jobs(self) noexcept nogil
    cdef OutcomeState ask(self, JobOutcome *outcome) noexcept nogil   # what `outcome` says now

    cdef int reserve_records(self, uint32_t max_jobs) except -1
    cdef int create_events(self) noexcept nogil
    cdef void destroy_events(self) noexcept nogil
    cdef uint32_t claim(self, size_t num_slots) noexcept nogil
    cdef void unclaim(self, uint32_t record) noexcept nogil
    cdef void recycle(self, uint32_t record) noexcept nogil
    cdef int enter(self, int *mode) noexcept nogil
    cdef int poll_once(self) noexcept nogil
    cdef bint is_over(self, uint32_t record, uint32_t generation) noexcept nogil
    cdef bint hold_submitted(self, uint32_t record, uint32_t generation, uint64_t *sequence) noexcept nogil
    cdef void drop_hold(self, uint32_t record) noexcept nogil
    cdef OutcomeState wait_outcome(self, JobOutcome *outcome, uint64_t deadline_ns, bint is_entered) noexcept nogil
    cdef int wait_empty(self, uint64_t deadline_ns) noexcept nogil
    cdef void fail_all(self, int code) noexcept nogil
