"""JobTable: the jobs of one stream, first in first out. The map; the code is in _job_table.pyx."""

from libc.stdint cimport uint32_t, uint64_t

from kvortex._c cimport kv_monitor, kv_plan
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

cdef enum:
    MAX_WAITS = 32           # queues whose jobs one job waits for, one of each

cdef enum JobState:
    JOB_FREE       # on the free list
    JOB_CLAIMED    # its caller fills it; it has no turn yet
    JOB_QUEUED     # it has its turn; not all of its copies are on the stream
    JOB_SEALED     # every copy and then its event are on the stream, or it failed on the way
    JOB_RETIRING   # one party found it over and runs the hook
    JOB_RETIRED    # over, but somebody is inside a driver call on its event

cdef enum OutcomeState:
    OUTCOME_PENDING
    OUTCOME_DONE
    OUTCOME_FAILED

cdef struct JobOutcome:                # lives in the Python handle, or with the caller of submit_blocks
    OutcomeState state
    int code                           # CUresult when failed

cdef struct JobWait:                   # for an earlier turn of another queue; held until it is on the stream
    void *queue
    uint32_t record

cdef struct JobRecord:
    void *done_event                   # complete when every copy is; the record's for life
    void *source_event                 # the caller's stream as it stood at the call
    JobState state
    uint32_t generation                # of the job; a handle with another one asks for a job long retired
    uint32_t holds                     # callers inside a driver call on done_event: it is not re-recorded meanwhile
    uint32_t next                      # FIFO or free list
    uint64_t turn                      # place in the FIFO
    JobOutcome *outcome                # NULL once the handle is gone
    # What it moves: filled by its caller, read by whoever puts the copies on the stream.
    uint64_t *places                   # device blocks, or addresses
    uint32_t *slots                    # what the hook commits or releases
    uint32_t *lengths                  # of addresses
    size_t num_slots, capacity         # the arrays are kept from job to job
    kv_plan plan                       # and how far the copies have come
    void *layout                       # KVLayout of the blocks, borrowed; NULL: addresses
    void *packing                      # how they lie in their slots, borrowed; NULL: as they are
    JobWait waits[MAX_WAITS]           # not yet on the stream
    uint32_t num_waits
    bint is_ordered                    # after source_event
    bint is_handed_over                # the submitter puts its copies on the stream, not its caller
    bint is_begun                      # some of it may be on the stream
    bint is_withdrawn                  # before it was begun: nothing is copied
    int code                           # why it failed, if it did: it retires like others, when its copies are over
    bint is_synchronized               # it failed, and the host waited for its copies: its event says nothing
    uint64_t nbytes, start_ns

# Called once a job, by the party that retires it, before anyone sees it done. `code`, if it is not 0, says that the
# context is dead, and nothing may be reused. Runs without the GIL.
ctypedef void (*retire_hook)(void *owner, Direction direction, const JobRecord *record, int code) noexcept nogil


cdef class JobTable:
    cdef readonly Device device
    cdef readonly JobSignals signals
    cdef Direction direction_
    cdef void *stream                  # of the copies; borrowed
    cdef JobRecord *records
    cdef readonly uint32_t max_jobs
    cdef kv_monitor monitor            # guards records, lists, outcomes; broadcast when a job is sealed or retired
    cdef bint has_monitor
    cdef uint32_t free_head
    cdef uint32_t fifo_head, fifo_tail  # jobs that have a turn, in the order in which they are issued and retired
    cdef uint32_t issue_head           # the first of them that is not sealed
    cdef uint64_t num_turns
    cdef readonly uint32_t num_waiting  # for a turn or a seal since the last broadcast; for tests that order threads
    cdef readonly uint32_t jobs_in_flight   # claimed and not yet free
    cdef int failure                   # sticky CUresult: the context is dead
    cdef bint closed                   # nothing is claimed any more
    cdef bint is_served                # a submitter has the queue in its list
    cdef bint is_abandoned             # every job was failed, whatever its copies do: no turn comes any more
    cdef retire_hook hook
    cdef void *hook_owner              # borrowed: outlives every job, see EngineCore

    # -> jobs retired, or minus a CUresult: the context is dead. Never blocks on a job; where the driver cannot be asked
    # for the moment, none is retired.
    cdef int poll_jobs(self) noexcept nogil
    cdef OutcomeState ask(self, JobOutcome *outcome) noexcept nogil   # what `outcome` says now

    cdef int reserve_records(self, uint32_t max_jobs) except -1
    cdef int create_events(self) noexcept nogil
    cdef void destroy_events(self) noexcept nogil
    cdef void refuse(self) noexcept nogil               # nothing is claimed from here on
    cdef bint any_in_flight(self) noexcept nogil
    cdef uint32_t claim(self, size_t num_slots) noexcept nogil
    cdef void watch(self, uint32_t record, JobOutcome *outcome) noexcept nogil
    cdef void unclaim(self, uint32_t record) noexcept nogil
    cdef void recycle(self, uint32_t record) noexcept nogil
    cdef int enter(self, int *mode) noexcept nogil
    cdef int poll_once(self) noexcept nogil
    cdef bint is_over(self, uint32_t record, uint32_t generation) noexcept nogil
    cdef void wake(self) noexcept nogil
    cdef void keep_slots(self, uint32_t record, size_t n) noexcept nogil
    cdef void draw_turn(self, uint32_t record) noexcept nogil
    cdef int await_turn(self, uint32_t record) noexcept nogil
    cdef void seal_record(self, uint32_t record, int code, bint is_synchronized, bint is_dead) noexcept nogil
    cdef bint is_sealed(self, uint32_t record) noexcept nogil
    cdef bint is_submitted(self, uint32_t record, uint32_t generation) noexcept nogil
    cdef bint is_first(self, uint32_t record) noexcept nogil
    cdef bint is_issuing(self) noexcept nogil
    cdef int await_sealed(self, uint32_t record) noexcept nogil
    cdef bint withdraw_job(self, uint32_t record, uint32_t generation) noexcept nogil
    cdef bint hold(self, uint32_t record, uint32_t generation, uint64_t *turn) noexcept nogil
    cdef int hold_sealed(self, uint32_t record, uint32_t generation, uint64_t deadline_ns) noexcept nogil
    cdef void drop_hold(self, uint32_t record) noexcept nogil
    cdef OutcomeState wait_outcome(self, JobOutcome *outcome, uint64_t deadline_ns, bint is_entered) noexcept nogil
    cdef int wait_empty(self, uint64_t deadline_ns) noexcept nogil
    cdef void fail_all(self, int code) noexcept nogil
