"""TransferQueue and Job: one stream, one direction, FIFO. The map; the code is in _transfer_queue.pyx."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvortex._c cimport kv_monitor, kv_plan
from kvortex.driver._device cimport Device
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._copier cimport Copier, Direction
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._signals cimport JobSignals

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


cdef class TransferQueue:
    cdef readonly Device device
    cdef readonly JobSignals signals
    cdef Copier copier                 # the stream, and how copies get there; under `submitting`
    cdef Direction direction_
    cdef JobRecord *records
    cdef readonly uint32_t max_jobs
    cdef kv_monitor monitor            # guards records, lists, outcomes; broadcast when a job is submitted or retired
    # Serialises submitters, since a stream is FIFO: the one lock that is held over driver calls. Only the monitor above
    # is taken inside it; neither the completion thread nor a holder of the GIL ever waits for it.
    cdef kv_monitor submitting
    cdef bint monitors_ready
    cdef uint32_t free_head, fifo_head, fifo_tail
    cdef uint64_t num_submitted
    cdef readonly uint32_t jobs_in_flight   # claimed and not yet free
    cdef int failure                   # sticky CUresult: the context is dead
    cdef bint closed                   # nothing is claimed any more
    cdef bint ended                    # given back, or leaked on purpose
    cdef set used                      # pools and layouts that jobs were submitted with; kept until close
    cdef retire_hook hook
    cdef void *hook_owner              # borrowed: outlives every job, see EngineCore

    # For callers without the GIL, who keep queue, layout and pool alive, and `outcome` in its place, until it is no
    # longer pending. Nothing is checked: blocks within the layout, slots that are registered, no larger than a payload,
    # a stream of the device that is not capturing, n not 0.
    # 0, or why nothing was submitted, as outcome.code says too: NOT_READY when all jobs are in flight, else a CUresult.
    cdef int submit_blocks(self, KVLayout layout, const int64_t *block_ids, PinnedPool pool, const uint32_t *slot_ids,
                           size_t n, void *stream, JobOutcome *outcome) noexcept nogil
    # -> jobs retired, or minus a CUresult: the context is dead. Never blocks on a job; where the driver cannot be asked
    # for the moment, none is retired.
    cdef int poll_jobs(self) noexcept nogil
    cdef OutcomeState ask(self, JobOutcome *outcome) noexcept nogil   # what `outcome` says now

    cdef uint32_t claim(self, size_t num_slots) noexcept nogil
    cdef uint32_t claim_blocks(self, KVLayout layout, const uint32_t *slot_ids, size_t n) noexcept nogil
    cdef int submit_claimed(self, uint32_t record, KVLayout layout, const int64_t *block_ids, PinnedPool pool,
                            void *caller, const char **call) noexcept nogil
    cdef void unclaim(self, uint32_t record) noexcept nogil
    cdef int submit_plan(self, uint32_t record, kv_plan *plan, KVLayout layout, void *caller, bint ordered,
                         void **waits, size_t num_waits, const char **call) noexcept nogil
    cdef int enter(self, int *mode) noexcept nogil
    cdef int poll_once(self) noexcept nogil
    cdef bint is_over(self, uint32_t record, uint32_t generation) noexcept nogil
    cdef bint hold_submitted(self, uint32_t record, uint32_t generation, uint64_t *sequence) noexcept nogil
    cdef void drop_hold(self, uint32_t record) noexcept nogil
    cdef void recycle(self, uint32_t record) noexcept nogil
    cdef OutcomeState wait_outcome(self, JobOutcome *outcome, uint64_t deadline_ns, bint is_entered) noexcept nogil
    cdef int wait_empty(self, uint64_t deadline_ns) noexcept nogil
    cdef void fail_all(self, int code) noexcept nogil
    cdef int end(self, uint64_t deadline_ns, bint interruptible) except -1
    cdef void attach(self, Job job, uint32_t record, object owner)


cdef class Loan:
    """Memory of the caller that a job copies from or to, held until it is over, however soon its handle is dropped."""
    cdef tuple memory                  # BorrowedMemory; () when given back
    cdef TransferQueue queue           # None: not submitted yet
    cdef uint32_t record, generation

    cdef void give_back_if_over(self) noexcept


cdef class Job:
    cdef TransferQueue queue           # kept alive; None for a job that moved nothing: it is done from the start
    cdef object owner                  # the engine, kept alive while its job is
    cdef JobOutcome outcome
    cdef uint32_t record, generation
    cdef size_t count
    cdef readonly object statuses
    cdef Loan loan                     # None: addresses, or blocks of a layout, which the engine holds

    cdef void give_loan_back(self) noexcept
    cdef OutcomeState _state(self) noexcept nogil
