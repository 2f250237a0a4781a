# cython: nonecheck=False
"""The jobs of one stream: each record is claimed, draws a turn, is sealed, queried and retired, in this order."""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from posix.unistd cimport getpid

cimport kvortex._c as _c

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef uint64_t SPIN_NS = 200_000  # a waiter polls without a pause first: one block takes 50 us, and so does a wake-up
cdef uint64_t POLL_NS = 50_000  # then it sleeps in between; it polls itself so that it depends on no other thread


@cython.no_gc_clear  # what subclasses do in __dealloc__ needs what the collector would clear before
cdef class JobTable:
    def __cinit__(self, *args, **kwargs):
        self.closed = True
        self.free_head = self.fifo_head = self.fifo_tail = self.issue_head = NO_RECORD
        if _c.kv_monitor_init(&self.monitor):
            raise MemoryError("pthread_mutex_init failed")
        self.has_monitor = True

    cdef int reserve_records(self, uint32_t max_jobs) except -1:
        """Make the table; none of its records has events yet."""
        cdef uint32_t index
        self.records = <JobRecord *>calloc(max_jobs, sizeof(JobRecord))
        if self.records is NULL:
            raise MemoryError(f"no memory for {max_jobs} job records")
        self.max_jobs = max_jobs
        for index in range(max_jobs):
            self.records[index].next = index + 1 if index + 1 < max_jobs else NO_RECORD
        self.free_head = 0
        return 0

    cdef int create_events(self) noexcept nogil:
        """Create the events of each record. A CUresult. If it fails, `destroy_events` destroys what was made."""
        cdef const _c.kv_driver *drv = self.device.drv
        cdef unsigned int flags = _c.KV_EVENT_DISABLE_TIMING
        cdef uint32_t index
        cdef int code = 0
        for index in range(self.max_jobs):
            if code == 0:
                code = _c.kv_call(drv, _c.event_create, &self.records[index].done_event, flags)
            if code == 0:
                code = _c.kv_call(drv, _c.event_create, &self.records[index].source_event, flags)
        return code

    cdef void destroy_events(self) noexcept nogil:
        cdef uint32_t index
        for index in range(self.max_jobs):
            if self.records[index].done_event is not NULL:
                self.device.give_back(self.device.drv.event_destroy, self.records[index].done_event)
            if self.records[index].source_event is not NULL:
                self.device.give_back(self.device.drv.event_destroy, self.records[index].source_event)

    def __dealloc__(self):
        cdef uint32_t index
        if self.device is not None and self.device.pid != getpid():
            return
        for index in range(self.max_jobs):
            free(self.records[index].places)
        free(self.records)
        if self.has_monitor:
            _c.kv_monitor_destroy(&self.monitor)

    # ---- a job's life: claim, turn, seal, retire --------------------------------------------------------------------

    cdef uint32_t claim(self, size_t num_slots) noexcept nogil:
        """A record for a job over `num_slots` slots, or NO_RECORD: all are in flight, no memory, closed, dead."""
        cdef uint32_t record
        cdef uint64_t *places
        cdef JobRecord *job
        _c.kv_monitor_lock(&self.monitor)
        record = self.free_head
        if record == NO_RECORD or self.failure or self.closed:
            _c.kv_monitor_unlock(&self.monitor)
            return NO_RECORD
        job = &self.records[record]
        self.free_head = job.next
        job.state = JOB_CLAIMED
        job.generation += 1
        job.outcome = NULL
        self.jobs_in_flight += 1
        _c.kv_monitor_unlock(&self.monitor)
        if job.capacity < num_slots:
            places = <uint64_t *>malloc(num_slots * (sizeof(uint64_t) + 2 * sizeof(uint32_t)))
            if places is NULL:
                self.unclaim(record)
                return NO_RECORD
            free(job.places)
            job.places = places
            job.slots = <uint32_t *>(places + num_slots)
            job.lengths = job.slots + num_slots
            job.capacity = num_slots
        job.num_slots = job.num_waits = 0
        job.layout = NULL
        job.is_ordered = job.is_handed_over = job.is_begun = job.is_withdrawn = job.is_synchronized = False
        job.code = 0
        job.start_ns = _c.kv_now_ns()
        return record

    cdef void wake(self) noexcept nogil:
        """Wake all waiting threads. The monitor is held."""
        self.num_waiting = 0
        _c.kv_monitor_broadcast(&self.monitor)

    cdef void keep_slots(self, uint32_t record, size_t n) noexcept nogil:
        """Keep those of a claimed job's `n` blocks that got a slot."""
        cdef JobRecord *job = &self.records[record]
        cdef size_t index
        job.num_slots = 0
        for index in range(n):
            if job.slots[index] == _c.KV_NO_SLOT:
                continue
            job.slots[job.num_slots] = job.slots[index]
            job.places[job.num_slots] = job.places[index]
            job.lengths[job.num_slots] = job.lengths[index]
            job.num_slots += 1

    cdef void draw_turn(self, uint32_t record) noexcept nogil:
        """Take the last place in the FIFO. From here on the job must be issued and sealed, whatever happens."""
        cdef JobRecord *job = &self.records[record]
        _c.kv_monitor_lock(&self.monitor)
        job.state = JOB_QUEUED
        job.turn = self.num_turns
        self.num_turns += 1
        job.next = NO_RECORD
        if self.fifo_tail == NO_RECORD:
            self.fifo_head = record
        else:
            self.records[self.fifo_tail].next = record
        self.fifo_tail = record
        if self.issue_head == NO_RECORD:
            self.issue_head = record
        _c.kv_monitor_unlock(&self.monitor)

    cdef int await_turn(self, uint32_t record) noexcept nogil:
        """Wait until every earlier job is sealed. 0, or a CUresult: the turn will not come."""
        cdef int code
        _c.kv_monitor_lock(&self.monitor)
        while self.issue_head != record and not self.is_abandoned:
            self.num_waiting += 1
            _c.kv_monitor_wait(&self.monitor, _c.KV_NEVER_NS)
        code = 0 if self.issue_head == record else self.failure
        _c.kv_monitor_unlock(&self.monitor)
        return code

    cdef void seal_record(self, uint32_t record, int code, bint is_synchronized, bint is_dead) noexcept nogil:
        """Let the next turn come. This job is over with its event, or, if `is_synchronized`, now. `code`: its error."""
        cdef JobRecord *job = &self.records[record]
        _c.kv_monitor_lock(&self.monitor)
        job.code = code
        job.is_synchronized = is_synchronized
        if is_dead:
            self.failure = code
        job.state = JOB_SEALED
        if self.issue_head == record:
            self.issue_head = job.next
        self.wake()
        _c.kv_monitor_unlock(&self.monitor)
        self.signals.sealed()

    cdef void watch(self, uint32_t record, JobOutcome *outcome) noexcept nogil:
        """Have the end of a claimed job written to `outcome`. Called before it has a turn, so that no end is missed."""
        outcome.state = OUTCOME_PENDING
        outcome.code = 0
        _c.kv_monitor_lock(&self.monitor)
        if self.is_abandoned:  # since the claim: outcomes are not written any more
            outcome.state = OUTCOME_FAILED
            outcome.code = self.failure
        else:
            self.records[record].outcome = outcome
        _c.kv_monitor_unlock(&self.monitor)

    cdef void unclaim(self, uint32_t record) noexcept nogil:
        _c.kv_monitor_lock(&self.monitor)
        self.recycle(record)
        self.wake()
        _c.kv_monitor_unlock(&self.monitor)

    cdef void recycle(self, uint32_t record) noexcept nogil:
        """Put a record on the free list; if it is held, the last `drop_hold` does so. The monitor is held."""
        cdef JobRecord *job = &self.records[record]
        if job.holds:
            job.state = JOB_RETIRED
            return
        job.state = JOB_FREE
        job.outcome = NULL
        job.next = self.free_head
        self.free_head = record
        self.jobs_in_flight -= 1

    cdef int poll_once(self) noexcept nogil:
        """Retire the oldest job if its copies are over: 1 retired, 0 not yet, -1 none is sealed.

        The context is current. Any number of threads may call it; the record's state decides who retires.
        """
        cdef uint32_t record
        cdef JobRecord *job
        cdef bint is_over
        cdef int code
        _c.kv_monitor_lock(&self.monitor)
        record = self.fifo_head
        if record == NO_RECORD or self.records[record].state == JOB_QUEUED:
            _c.kv_monitor_unlock(&self.monitor)
            return -1
        job = &self.records[record]
        job.holds += 1
        is_over = job.is_synchronized
        _c.kv_monitor_unlock(&self.monitor)
        code = 0 if is_over else self.device.drv.event_query(job.done_event)
        if code and code != _c.KV_CUDA_NOT_READY and not _c.kv_result_is_sticky(code):
            # The query failed, not the copies: if the whole stream is idle they are over, else ask again later.
            code = self.device.drv.stream_query(self.stream)
            if code and not _c.kv_result_is_sticky(code):
                code = _c.KV_CUDA_NOT_READY
        _c.kv_monitor_lock(&self.monitor)
        job.holds -= 1
        if job.state == JOB_RETIRED:  # another party retired it meanwhile
            self.recycle(record)
        if code == _c.KV_CUDA_NOT_READY or job.state != JOB_SEALED or self.is_abandoned:
            _c.kv_monitor_unlock(&self.monitor)
            return 0
        job.state = JOB_RETIRING
        self.fifo_head = job.next
        if self.fifo_head == NO_RECORD:
            self.fifo_tail = NO_RECORD
        if code:
            self.failure = code
        code = self.failure
        _c.kv_monitor_unlock(&self.monitor)
        if self.hook is not NULL:
            self.hook(self.hook_owner, self.direction_, job, code)
        _c.kv_monitor_lock(&self.monitor)
        if job.outcome is not NULL:
            job.outcome.code = code if code else job.code
            job.outcome.state = OUTCOME_FAILED if job.outcome.code else OUTCOME_DONE
            job.outcome = NULL
        self.recycle(record)
        self.wake()
        _c.kv_monitor_unlock(&self.monitor)
        self.signals.retired()
        return 1

    cdef void fail_all(self, int code) noexcept nogil:
        """Wake every waiter with an error. Slots and events stay as they are: copies may still be running."""
        cdef uint32_t record
        cdef JobRecord *job
        _c.kv_monitor_lock(&self.monitor)
        self.failure = code
        for record in range(self.max_jobs):
            job = &self.records[record]
            if job.outcome is not NULL:
                job.outcome.code = code
                job.outcome.state = OUTCOME_FAILED
                job.outcome = NULL
        self.fifo_head = self.fifo_tail = self.issue_head = NO_RECORD
        self.is_abandoned = True
        self.wake()
        _c.kv_monitor_unlock(&self.monitor)
        self.signals.retired()
        self.signals.sealed()  # a submitter may wait for a job of this queue

    cdef bint is_over(self, uint32_t record, uint32_t generation) noexcept nogil:
        """Whether no copy of the job can be running any more: never, once the context is dead."""
        cdef bint over
        _c.kv_monitor_lock(&self.monitor)
        over = not self.failure and (self.records[record].generation != generation
                                     or self.records[record].state in (JOB_FREE, JOB_RETIRED))
        _c.kv_monitor_unlock(&self.monitor)
        return over

    cdef bint is_sealed(self, uint32_t record) noexcept nogil:
        """Whether a held job is sealed, or will never be."""
        cdef bint sealed
        _c.kv_monitor_lock(&self.monitor)
        sealed = self.records[record].state != JOB_QUEUED or self.is_abandoned
        _c.kv_monitor_unlock(&self.monitor)
        return sealed

    cdef bint is_submitted(self, uint32_t record, uint32_t generation) noexcept nogil:
        cdef bint submitted
        _c.kv_monitor_lock(&self.monitor)
        submitted = (self.records[record].generation != generation
                     or self.records[record].state not in (JOB_CLAIMED, JOB_QUEUED) or self.is_abandoned)
        _c.kv_monitor_unlock(&self.monitor)
        return submitted

    cdef bint is_first(self, uint32_t record) noexcept nogil:
        """Whether it is the turn of the job."""
        cdef bint first
        _c.kv_monitor_lock(&self.monitor)
        first = self.issue_head == record
        _c.kv_monitor_unlock(&self.monitor)
        return first

    cdef bint is_issuing(self) noexcept nogil:
        """Whether a job has its turn and is not sealed."""
        cdef bint issuing
        _c.kv_monitor_lock(&self.monitor)
        issuing = self.issue_head != NO_RECORD
        _c.kv_monitor_unlock(&self.monitor)
        return issuing

    cdef int await_sealed(self, uint32_t record) noexcept nogil:
        """Wait until a job that is held is sealed. 0, or a CUresult: it will not be."""
        cdef int code = 0
        _c.kv_monitor_lock(&self.monitor)
        while self.records[record].state == JOB_QUEUED and not self.is_abandoned:
            self.num_waiting += 1
            _c.kv_monitor_wait(&self.monitor, _c.KV_NEVER_NS)
        if self.records[record].state == JOB_QUEUED:
            code = self.failure
        _c.kv_monitor_unlock(&self.monitor)
        return code

    cdef bint withdraw_job(self, uint32_t record, uint32_t generation) noexcept nogil:
        """Let the job copy nothing, if that is still possible."""
        cdef JobRecord *job = &self.records[record]
        cdef bint withdrawn
        _c.kv_monitor_lock(&self.monitor)
        withdrawn = (job.generation == generation and job.is_handed_over
                     and (job.is_withdrawn or job.state == JOB_QUEUED and not job.is_begun))
        if withdrawn:
            job.is_withdrawn = True
        _c.kv_monitor_unlock(&self.monitor)
        return withdrawn

    cdef bint hold(self, uint32_t record, uint32_t generation, uint64_t *turn) noexcept nogil:
        """Hold a job that has a turn, unless its copies are known to be over."""
        cdef JobRecord *job = &self.records[record]
        cdef bint held
        _c.kv_monitor_lock(&self.monitor)
        held = job.generation == generation and job.state in (JOB_QUEUED, JOB_SEALED)
        if held:
            job.holds += 1
            turn[0] = job.turn
        _c.kv_monitor_unlock(&self.monitor)
        return held

    cdef int hold_sealed(self, uint32_t record, uint32_t generation, uint64_t deadline_ns) noexcept nogil:
        """Hold a job once it is sealed: 1; 0: it is over; -1: the deadline passed; -2: it will not be sealed."""
        cdef JobRecord *job = &self.records[record]
        cdef int answer = 0
        _c.kv_monitor_lock(&self.monitor)
        # While a job is being retired, it is not known yet whether it failed.
        while (job.generation == generation and job.state in (JOB_CLAIMED, JOB_QUEUED, JOB_RETIRING)
               and answer == 0):
            if self.failure:
                answer = -2
            elif _c.kv_now_ns() >= deadline_ns:
                answer = -1
            else:
                _c.kv_monitor_wait(&self.monitor, deadline_ns)
        if answer == 0 and job.generation == generation and job.state == JOB_SEALED:
            job.holds += 1
            answer = 1
        _c.kv_monitor_unlock(&self.monitor)
        return answer

    cdef void drop_hold(self, uint32_t record) noexcept nogil:
        _c.kv_monitor_lock(&self.monitor)
        self.records[record].holds -= 1
        if self.records[record].state == JOB_RETIRED:
            self.recycle(record)
            self.wake()
        _c.kv_monitor_unlock(&self.monitor)

    cdef OutcomeState wait_outcome(self, JobOutcome *outcome, uint64_t deadline_ns, bint is_entered) noexcept nogil:
        """Wait for a job's end, polling as well in a context that is entered. OUTCOME_PENDING: the deadline passed."""
        cdef OutcomeState state
        cdef uint64_t now = _c.kv_now_ns(), until
        cdef uint64_t spin_until = now + SPIN_NS if is_entered else now
        while True:
            if is_entered:
                self.poll_once()
            _c.kv_monitor_lock(&self.monitor)
            state = outcome.state
            if state == OUTCOME_PENDING:
                now = _c.kv_now_ns()
                if spin_until <= now < deadline_ns:
                    until = now + POLL_NS
                    _c.kv_monitor_wait(&self.monitor, until if until < deadline_ns else deadline_ns)
                    state = outcome.state
            _c.kv_monitor_unlock(&self.monitor)
            if state != OUTCOME_PENDING or now >= deadline_ns:
                return state
            if now < spin_until:
                sched_yield()  # another thread may have this core: the copies need none

    cdef int wait_empty(self, uint64_t deadline_ns) noexcept nogil:
        """Retire until no job is in flight. 0, or -1 when the deadline passed first."""
        cdef bint empty
        while True:
            while self.poll_once() == 1:
                pass
            _c.kv_monitor_lock(&self.monitor)
            empty = self.jobs_in_flight == 0
            _c.kv_monitor_unlock(&self.monitor)
            if empty:
                return 0
            if _c.kv_now_ns() >= deadline_ns:
                return -1
            _c.kv_nap_ns(POLL_NS)

    cdef void refuse(self) noexcept nogil:
        _c.kv_monitor_lock(&self.monitor)
        self.closed = True
        _c.kv_monitor_unlock(&self.monitor)

    # ---- questions --------------------------------------------------------------------------------------------------

    cdef bint any_in_flight(self) noexcept nogil:
        cdef bint found
        _c.kv_monitor_lock(&self.monitor)
        found = self.jobs_in_flight != 0
        _c.kv_monitor_unlock(&self.monitor)
        return found

    cdef OutcomeState ask(self, JobOutcome *outcome) noexcept nogil:
        cdef OutcomeState state
        _c.kv_monitor_lock(&self.monitor)
        state = outcome.state
        _c.kv_monitor_unlock(&self.monitor)
        return state

    cdef int enter(self, int *mode) noexcept nogil:
        """`Device.enter`, for a look at the jobs. If it fails, nothing is known of them, unless the context is dead."""
        cdef int code = self.device.enter(mode)
        if _c.kv_result_is_sticky(code) and not self.signals.served:
            self.fail_all(code)  # no event will ever be seen complete: wake whoever polls for one
        return code

    cdef int poll_jobs(self) noexcept nogil:
        cdef int mode = 0, retired = 0
        if self.enter(&mode):
            return -_c.kv_result_code(self.failure)
        while self.poll_once() == 1:
            retired += 1
        self.device.leave(mode)
        return retired
