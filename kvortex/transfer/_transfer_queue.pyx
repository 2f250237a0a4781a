# cython: nonecheck=False
"""One stream, one direction, FIFO: claims records, orders jobs, retires them in order."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex.driver._device cimport Device, check, require_timeout
from kvortex.driver._memory cimport whole_number
from kvortex.memory._device_pool cimport DevicePool
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._copier cimport D2H, H2D, Copier
from kvortex.transfer._gather cimport Gather
from kvortex.transfer._layout cimport KVLayout, as_block_ids, integers
from kvortex.transfer._signals cimport JobSignals

import numpy as np

from kvortex.errors import DriverError, EngineClosed
from kvortex.transfer.awaiting import wait_in_loop

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef uint32_t NO_RECORD = 0xFFFFFFFF
cdef int ENTER_ATTEMPTS = 3
cdef uint64_t SPIN_NS = 200_000  # a waiter polls without a pause first: one block takes 50 us, and so does a wake-up
cdef uint64_t POLL_NS = 50_000  # then it sleeps in between; it polls itself so that it depends on no other thread
cdef uint64_t SIGNALS_NS = 50_000_000  # how long a wait leaves Python's signal handlers (Ctrl-C) waiting
cdef uint64_t ENTER_NS = 1_000_000  # after which a wait tries again to enter a context that could not be entered

DIRECTIONS = {"D2H": D2H, "H2D": H2D}


@cython.no_gc_clear  # __dealloc__ waits for copies, which need all that the collector would clear before
cdef class TransferQueue:
    """Move blocks between a device and pinned slots on a stream of its own, in one direction, first in first out.

    Usable without an engine: `submit`, then `poll` from time to time (or `Job.wait`), and look at the jobs.

    Parameters
    ----------
    device : Device
        Held for the queue's life.
    direction : {"D2H", "H2D"}
        D2H saves, H2D loads.
    max_jobs : int, default 256
        Jobs in flight; one more is refused with `None`.
    signals : JobSignals, optional
        Wake-ups shared with other queues.

    Raises
    ------
    DriverError
        The stream or an event could not be created; nothing is left behind.

    Notes
    -----
    Thread-safe; every call releases the GIL around driver calls.
    """

    def __cinit__(self, *args, **kwargs):
        self.closed = self.ended = True
        self.free_head = self.fifo_head = self.fifo_tail = NO_RECORD
        if _c.kv_monitor_init(&self.monitor):
            raise MemoryError("pthread_mutex_init failed")
        if _c.kv_monitor_init(&self.submitting):
            _c.kv_monitor_destroy(&self.monitor)
            raise MemoryError("pthread_mutex_init failed")
        self.monitors_ready = True

    def __init__(self, Device device not None, direction, *, max_jobs=256, JobSignals signals=None):
        cdef uint32_t index
        cdef int mode = 0, code
        if self.records is not NULL:
            raise RuntimeError("TransferQueue.__init__ may be called once")
        if not isinstance(direction, str) or direction not in DIRECTIONS:
            raise ValueError(f"direction must be 'D2H' or 'H2D', got {direction!r}")
        max_jobs = whole_number(max_jobs, "max_jobs")
        if not 1 <= max_jobs <= 1 << 20:
            raise ValueError(f"max_jobs must be 1 to {1 << 20}, got {max_jobs}")
        device.require_open()
        self.device = device
        self.direction_ = DIRECTIONS[direction]
        self.copier = Copier(device, self.direction_)
        self.signals = signals if signals is not None else JobSignals()
        self.used = set()
        self.records = <JobRecord *>calloc(max_jobs, sizeof(JobRecord))
        if self.records is NULL:
            raise MemoryError(f"no memory for {max_jobs} job records")
        self.max_jobs = max_jobs
        self.closed = self.ended = False
        with nogil:
            code = device.enter(&mode)
            if code == 0:
                code = _c.kv_result_at(self.copier.open(), _c.KV_ROW_stream_create)
                for index in range(self.max_jobs):
                    if code == 0:
                        code = device.drv.event_create(&self.records[index].done_event, _c.KV_EVENT_DISABLE_TIMING)
                    if code == 0:
                        code = device.drv.event_create(&self.records[index].source_event, _c.KV_EVENT_DISABLE_TIMING)
                    self.records[index].next = index + 1 if index + 1 < self.max_jobs else NO_RECORD
                device.leave(mode)
        self.free_head = 0
        if code:
            self.end(0, False)
            check(device, code, b"cuEventCreate")

    # ---- a job's life: claim, submit, retire ------------------------------------------------------------------------

    cdef uint32_t claim(self, size_t num_slots) noexcept nogil:
        """A record for a job over `num_slots` slots, or NO_RECORD: all are in flight, no memory, closed, dead."""
        cdef uint32_t record
        cdef uint32_t *slots
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
        if job.slots_capacity < num_slots:
            slots = <uint32_t *>realloc(job.slots, num_slots * sizeof(uint32_t))
            if slots is NULL:
                self.unclaim(record)
                return NO_RECORD
            job.slots = slots
            job.slots_capacity = num_slots
        job.num_slots = 0
        job.start_ns = _c.kv_now_ns()
        return record

    cdef void unclaim(self, uint32_t record) noexcept nogil:
        _c.kv_monitor_lock(&self.monitor)
        self.recycle(record)
        _c.kv_monitor_broadcast(&self.monitor)
        _c.kv_monitor_unlock(&self.monitor)

    cdef void recycle(self, uint32_t record) noexcept nogil:
        """Back to the free list, or as far as somebody's hold allows. The monitor is held."""
        cdef JobRecord *job = &self.records[record]
        if job.holds:
            job.state = JOB_RETIRED
            return
        job.state = JOB_FREE
        job.outcome = NULL
        job.next = self.free_head
        self.free_head = record
        self.jobs_in_flight -= 1

    cdef int submit_plan(self, uint32_t record, _c.kv_plan *plan, KVLayout layout, void *caller, bint ordered,
                         void **waits, size_t num_waits, const char **call) noexcept nogil:
        """Put the copies of a claimed job on the stream, after the caller's stream and after `waits`. A CUresult.

        The context is current. When it fails, no copy is in flight any more, or the context is dead (`failure` is set).
        The record stays claimed: its owner gives the slots back and then calls `unclaim`.
        """
        cdef JobRecord *job = &self.records[record]
        cdef const _c.kv_driver *drv = self.device.drv
        cdef int code = 0, finished = 0
        cdef size_t index
        if ordered:
            call[0] = b"cuEventRecord"
            code = drv.event_record(job.source_event, caller)
        _c.kv_monitor_lock(&self.submitting)
        if code == 0 and ordered:
            call[0] = b"cuStreamWaitEvent"
            code = drv.stream_wait_event(self.copier.stream, job.source_event, 0)
        for index in range(num_waits):
            if code == 0:
                call[0] = b"cuStreamWaitEvent"
                code = drv.stream_wait_event(self.copier.stream, waits[index], 0)
        if code == 0:
            code = self.copier.copy(plan, layout, call)
        if code == 0:
            call[0] = b"cuEventRecord"
            code = drv.event_record(job.done_event, self.copier.stream)
        if code:
            # Copies may be running: the slots are the caller's again only when they are known to be over. And whoever
            # meets this job in the engine's words, instead of the jobs it met itself, must find those over too.
            finished = self.copier.synchronize()
            for index in range(num_waits):
                if finished == 0:
                    finished = drv.event_synchronize(waits[index])
            if finished:
                code = finished
        _c.kv_monitor_lock(&self.monitor)
        if code == 0:
            job.state = JOB_SUBMITTED
            job.sequence = self.num_submitted
            self.num_submitted += 1
            job.next = NO_RECORD
            if self.fifo_tail == NO_RECORD:
                self.fifo_head = record
            else:
                self.records[self.fifo_tail].next = record
            self.fifo_tail = record
        elif finished:
            self.failure = code
        _c.kv_monitor_broadcast(&self.monitor)
        _c.kv_monitor_unlock(&self.monitor)
        _c.kv_monitor_unlock(&self.submitting)
        if code == 0:
            self.signals.submitted()
        return code

    cdef int poll_once(self) noexcept nogil:
        """Retire the oldest job if its copies are over: 1 retired, 0 not yet, -1 none in flight.

        The context is current. Any number of threads may call it; the record's state decides who retires.
        """
        cdef uint32_t record
        cdef JobRecord *job
        cdef int code
        _c.kv_monitor_lock(&self.monitor)
        record = self.fifo_head
        if record == NO_RECORD:
            _c.kv_monitor_unlock(&self.monitor)
            return -1
        job = &self.records[record]
        job.holds += 1
        _c.kv_monitor_unlock(&self.monitor)
        code = self.device.drv.event_query(job.done_event)
        if code and code != _c.KV_CUDA_NOT_READY and not _c.kv_result_is_sticky(code):
            # The query failed, not the copies: if the whole stream is idle they are over, else ask again later.
            code = self.device.drv.stream_query(self.copier.stream)
            if code and not _c.kv_result_is_sticky(code):
                code = _c.KV_CUDA_NOT_READY
        _c.kv_monitor_lock(&self.monitor)
        job.holds -= 1
        if job.state == JOB_RETIRED:  # another party retired it meanwhile
            self.recycle(record)
        if code == _c.KV_CUDA_NOT_READY or job.state != JOB_SUBMITTED:
            _c.kv_monitor_unlock(&self.monitor)
            return 0
        job.state = JOB_RETIRING
        self.fifo_head = job.next
        if self.fifo_head == NO_RECORD:
            self.fifo_tail = NO_RECORD
        if code:
            self.failure = code
        _c.kv_monitor_unlock(&self.monitor)
        if self.hook is not NULL:
            self.hook(self.hook_owner, self.direction_, job, code)
        _c.kv_monitor_lock(&self.monitor)
        if job.outcome is not NULL:
            job.outcome.code = code
            job.outcome.state = OUTCOME_FAILED if code else OUTCOME_DONE
            job.outcome = NULL
        self.recycle(record)
        _c.kv_monitor_broadcast(&self.monitor)
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
        self.fifo_head = self.fifo_tail = NO_RECORD
        _c.kv_monitor_broadcast(&self.monitor)
        _c.kv_monitor_unlock(&self.monitor)
        self.signals.retired()

    cdef bint is_over(self, uint32_t record, uint32_t generation) noexcept nogil:
        """Whether no copy of the job can be running any more: never, once the context is dead."""
        cdef bint over
        _c.kv_monitor_lock(&self.monitor)
        over = not self.failure and (self.records[record].generation != generation
                                     or self.records[record].state in (JOB_FREE, JOB_RETIRED))
        _c.kv_monitor_unlock(&self.monitor)
        return over

    cdef bint hold_submitted(self, uint32_t record, uint32_t generation, uint64_t *sequence) noexcept nogil:
        """Hold a job's event if its copies may still be in flight; blocks while the job is being submitted."""
        cdef JobRecord *job = &self.records[record]
        cdef bint held
        _c.kv_monitor_lock(&self.monitor)
        while job.generation == generation and job.state == JOB_CLAIMED:
            _c.kv_monitor_wait(&self.monitor, <uint64_t>-1)
        held = job.generation == generation and job.state == JOB_SUBMITTED
        if held:
            job.holds += 1
            sequence[0] = job.sequence
        _c.kv_monitor_unlock(&self.monitor)
        return held

    cdef void drop_hold(self, uint32_t record) noexcept nogil:
        _c.kv_monitor_lock(&self.monitor)
        self.records[record].holds -= 1
        if self.records[record].state == JOB_RETIRED:
            self.recycle(record)
            _c.kv_monitor_broadcast(&self.monitor)
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
                sched_yield()  # whoever else wants this core has it; the copies need none

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

    # ---- use without an engine --------------------------------------------------------------------------------------

    def submit(self, KVLayout layout not None, block_ids, PinnedPool pool not None, slot_ids, *, stream):
        """Move blocks between the device and slots; returns at once.

        Parameters
        ----------
        layout : KVLayout
        block_ids : int64 array (n,)
            Device blocks, 0 to ``layout.num_blocks - 1``.
        pool : PinnedPool
        slot_ids : uint32 array (n,)
            Slots of the pool, registered ones. A target (slot or block) named twice ends up with a mix of both.
        stream : int or stream object
            The copies wait for its work so far; 0 is the legacy default stream.

        Returns
        -------
        Job or None
            None when `max_jobs` are in flight: poll, or try later.

        Raises
        ------
        ValueError
            Arrays of different length, ids out of range, a block larger than a slot's payload, an unfit stream; a
            layout over read-only memory for a load, or over a GPU's for the host device.
        DriverError
            The driver refused; no copy is in flight, unless the context is dead.
        """
        cdef int64_t[::1] ids = as_block_ids(block_ids, layout)
        cdef uint32_t[::1] slots = as_slot_ids(slot_ids, pool)
        cdef size_t n = ids.shape[0]
        cdef const char *call = NULL
        cdef uint32_t record
        cdef int code
        self._require_open()
        cdef void *caller = self.device.borrow_stream(stream)
        cdef Job job = Job.__new__(Job)
        self.used.update((pool, layout))
        self._require_open()  # again: what came before may run other people's code, and from here on nothing does
        pool._require_open()
        if slots.shape[0] != <Py_ssize_t>n:
            raise ValueError(f"{n} block ids but {slots.shape[0]} slots; they must pair up")
        if layout.block_bytes > pool.slots.payload_bytes:
            raise ValueError(f"blocks of {layout.block_bytes} bytes exceed the payload of a slot "
                             f"({pool.payload_bytes})")
        layout.require_reachable(self.device, self.direction_ == H2D)
        if n == 0:
            return job
        with nogil:
            record = self.claim_blocks(layout, &slots[0], n)
        if record == NO_RECORD:
            self._require_open()
            check(self.device, self.failure, b"an earlier transfer")
            return None
        self.attach(job, record, self)
        job.count = n
        with nogil:
            code = self.submit_claimed(record, layout, &ids[0], pool, caller, &call)
        check(self.device, code, call)
        return job

    cdef uint32_t claim_blocks(self, KVLayout layout, const uint32_t *slot_ids, size_t n) noexcept nogil:
        """`claim`, with what the job is about."""
        cdef uint32_t record = self.claim(n)
        if record != NO_RECORD:
            memcpy(self.records[record].slots, slot_ids, n * sizeof(uint32_t))
            self.records[record].num_slots = n
            self.records[record].nbytes = n * layout.block_bytes
        return record

    cdef int submit_claimed(self, uint32_t record, KVLayout layout, const int64_t *block_ids, PinnedPool pool,
                            void *caller, const char **call) noexcept nogil:
        """`submit_plan` with the blocks of a claimed record; unclaims it where that fails. A CUresult."""
        cdef int mode = 0, code
        cdef _c.kv_plan plan = _c.kv_plan_of_blocks(
            layout.groups, layout.num_groups, layout.strided_bit(self.direction_), block_ids, &pool.slots,
            self.records[record].slots, self.records[record].num_slots)
        call[0] = b"cuCtxPushCurrent"
        code = self.device.enter(&mode)
        if code == 0:
            code = self.submit_plan(record, &plan, layout, caller, True, NULL, 0, call)
            self.device.leave(mode)
        if code:
            self.unclaim(record)
        return code

    cdef int submit_blocks(self, KVLayout layout, const int64_t *block_ids, PinnedPool pool, const uint32_t *slot_ids,
                           size_t n, void *stream, JobOutcome *outcome) noexcept nogil:
        cdef const char *call = NULL
        cdef uint32_t record = self.claim_blocks(layout, slot_ids, n)
        cdef int code
        outcome.state = OUTCOME_PENDING
        outcome.code = 0
        if record != NO_RECORD:
            self.records[record].outcome = outcome
            code = self.submit_claimed(record, layout, block_ids, pool, stream, &call)
        elif self.failure:
            code = self.failure
        else:
            code = _c.KV_CUDA_DEINITIALIZED if self.closed else _c.KV_CUDA_NOT_READY
        code = _c.kv_result_code(code)
        if code:  # from here on nobody else knows of it; otherwise whoever retires the job writes
            outcome.state = OUTCOME_FAILED
            outcome.code = code
        return code

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

    def use_gather(self, KVLayout layout not None, num_ctas, DevicePool pool=None):
        """Move blocks of `layout` by a kernel and whole-block copies from now on, instead of piece by piece.

        For small pieces in separate allocations, where copy engines alone stay far below the link; it takes streaming
        multiprocessors from whatever else runs on the device. `gather_pays` says what it is for.

        Parameters
        ----------
        layout : KVLayout
            Bases, strides and pieces in multiples of 16 bytes. One layout a queue.
        num_ctas : int
            Thread blocks of the kernel, 1 to 1024; four are enough for the link of an H200.
        pool : DevicePool, optional
            Where the staging memory comes from, and goes back to when the queue is closed.

        Raises
        ------
        ValueError
            Numbers that do not fit, or the queue gathers already.
        DriverError
            The driver refused kernel, stream or memory (16 MiB, or two blocks); nothing has changed.
        PoolExhausted
            The pool has no such memory; nothing has changed.
        """
        self._require_open()
        if self.copier.gather is not None:
            raise ValueError("this queue gathers already; use one queue a layout")
        self.copier.gather = Gather(self.device, layout, num_ctas, pool)
        layout.planner = tuple([row._replace(backend="gather") if row.direction == self.direction else row
                                for row in layout.planner])

    cdef void attach(self, Job job, uint32_t record, object owner):
        """Let `job` be the handle of a claimed record; before the copies are submitted, so that it misses no outcome.

        Raises nothing and runs no Python code: from the claim on, somebody must submit or unclaim.
        """
        job.queue = self
        job.owner = owner
        job.record = record
        job.generation = self.records[record].generation
        job.outcome.state = OUTCOME_PENDING
        self.records[record].outcome = &job.outcome

    def poll(self):
        """Retire the jobs whose copies are over; returns how many. Never blocks on one.

        Where the driver cannot be asked for the moment, that is none.

        Raises
        ------
        DriverError
            The context is dead, and so are all jobs.
        """
        cdef int retired
        self._require_open()
        with nogil:
            retired = self.poll_jobs()
        if retired < 0:
            check(self.device, self.failure, b"an earlier transfer")
        return retired

    @property
    def gather(self):
        """The `Gather` of `use_gather`, or None."""
        return None if self.copier is None else self.copier.gather

    @property
    def direction(self):
        """"D2H" or "H2D"."""
        return "D2H" if self.direction_ == D2H else "H2D"

    def _require_open(self):
        if self.closed:
            raise EngineClosed("the transfer queue is closed; create another one")
        self.device.require_open()

    def close(self, timeout_ms=5000):
        """Wait for the jobs in flight, then destroy the stream and the events. Idempotent; releases the GIL.

        Jobs that do not end within `timeout_ms` are failed and their stream and events leaked: a copy that is still
        running must find them. Ctrl-C ends the wait: then no job is accepted any more, those in flight go on, and
        another call does the rest.
        """
        cdef int64_t limit = require_timeout(timeout_ms)
        self.end(_c.kv_deadline_ns(limit), True)

    cdef int end(self, uint64_t deadline_ns, bint interruptible) except -1:
        """`close`; only if it is `interruptible` do signal handlers run, and may raise."""
        cdef uint32_t index
        cdef int mode = 0, code, _attempt
        cdef bint empty = False
        cdef uint64_t now, pause
        cdef const _c.kv_driver *drv
        if self.ended or self.device.pid != getpid():
            return 0
        drv = self.device.drv
        _c.kv_monitor_lock(&self.monitor)
        self.closed = True  # nothing is claimed from here on
        _c.kv_monitor_unlock(&self.monitor)
        while True:
            with nogil:
                now = _c.kv_now_ns()
                pause = min(now + SIGNALS_NS, deadline_ns)
                code = self.device.enter(&mode)
                if code == 0:
                    empty = self.wait_empty(pause) == 0
                    self.device.leave(mode)
                else:
                    _c.kv_nap_ns(ENTER_NS)
            if interruptible:
                PyErr_CheckSignals()
            if self.ended:  # by a signal handler, or another thread
                return 0
            if empty or now >= deadline_ns or self.device.closed or _c.kv_result_is_sticky(code):
                break
        self.ended = True
        with nogil:
            for _attempt in range(ENTER_ATTEMPTS):  # one passing error is no reason to leak stream and events
                code = self.device.enter(&mode)
                if code == 0 or _c.kv_result_is_sticky(code):
                    break
            if code or not empty or self.failure:  # a dead context empties itself
                self.fail_all(code or self.failure or _c.KV_CUDA_DEINITIALIZED)
            else:
                for index in range(self.max_jobs):
                    if self.records[index].done_event is not NULL:
                        self.device.give_back(drv.event_destroy, self.records[index].done_event)
                    if self.records[index].source_event is not NULL:
                        self.device.give_back(drv.event_destroy, self.records[index].source_event)
                self.copier.close()
            if code == 0:
                self.device.leave(mode)
        self.used.clear()
        return 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __dealloc__(self):
        cdef uint32_t index
        if self.device is not None and self.device.pid != getpid():
            return
        if not self.ended:
            self.end(_c.kv_deadline_ns(5000), False)
        for index in range(self.max_jobs):
            free(self.records[index].slots)
        free(self.records)
        if self.monitors_ready:
            _c.kv_monitor_destroy(&self.submitting)
            _c.kv_monitor_destroy(&self.monitor)


@cython.no_gc_clear  # in a garbage cycle the memory must outlive the copies
cdef class Loan:
    cdef void give_back_if_over(self) noexcept:
        if self.queue is not None and self.queue.is_over(self.record, self.generation):
            self.memory = ()


@cython.no_gc_clear  # __dealloc__ takes the pointer to `outcome` back from the queue
cdef class Job:
    """What a save or a load did, and when it is over.

    Made by `save_blocks`, `load_blocks` and `TransferQueue.submit`. Dropping it neither stops nor waits for the copies.
    """

    @property
    def num_blocks(self):
        """Blocks moved. Load: the leading run really transferred; targets beyond it are untouched. Save: the NEW ones.

        Raises `DriverError` when the job failed.
        """
        self._raise_failed()
        return self.count

    @property
    def submitted(self):
        """True when every copy is on its stream, so that `wait_on` will not block the host."""
        return True

    def done(self):
        """Whether the job is over, well or badly. Never blocks on the device.

        The one word that memory may be reused: where the driver cannot be asked, that is False. Only a job that a dead
        context failed, or a shutdown or close that did not wait long enough, counts as over while a copy may still run:
        then `wait` raises, and memory that the job was given must not be used again.
        """
        cdef int mode = 0
        if self.queue is None:
            self.give_loan_back()
            return True
        self._require_owner_process()
        with nogil:
            if self._state() == OUTCOME_PENDING and self.queue.enter(&mode) == 0:
                self.queue.poll_once()
                self.queue.device.leave(mode)
        cdef bint is_over = self._state() != OUTCOME_PENDING
        self.give_loan_back()  # after the last look: who sees the job over finds its memory let go
        return is_over

    def wait(self, timeout_ms=None):
        """Block the calling thread (GIL released) until the copies are complete and their slots committed or released.

        Raises
        ------
        TimeoutError
            `timeout_ms` passed first; the job goes on.
        DriverError
            The job failed. Trouble of the waiting itself is not raised: it goes on.
        EngineClosed
            The device was closed before the job was over: nobody knows of it any more.
        """
        cdef int mode = 0, code
        cdef OutcomeState state
        cdef int64_t limit = require_timeout(timeout_ms)
        cdef uint64_t deadline = _c.kv_deadline_ns(limit), pause
        if self.queue is None:
            self.give_loan_back()
            return
        self._require_owner_process()
        state = self._state()
        while state == OUTCOME_PENDING:
            with nogil:
                code = self.queue.enter(&mode)  # where that fails an engine's thread asks, or we do a little later
                pause = _c.kv_now_ns() + (ENTER_NS if code else SIGNALS_NS)
                state = self.queue.wait_outcome(&self.outcome, min(pause, deadline), code == 0)
                if code == 0:
                    self.queue.device.leave(mode)
            PyErr_CheckSignals()
            if state == OUTCOME_PENDING:
                state = self._state()  # a signal handler may have ended the job, and closed its device
            if state == OUTCOME_PENDING:
                self.queue.device.require_open()
            if state == OUTCOME_PENDING and _c.kv_now_ns() >= deadline:
                raise TimeoutError(f"the job is not done after {timeout_ms} ms")
        self.give_loan_back()
        self._raise_failed()

    def wait_on(self, stream):
        """Make later work on `stream` wait for this job, on the device; the host does not block.

        Only where the driver refuses to make the stream wait, the host does, as in `wait`: either way what is submitted
        after this call comes after the job.

        Parameters
        ----------
        stream : int or stream object
            Of the same device and not capturing; 0 is the legacy default stream.

        Raises
        ------
        ValueError
            The stream is missing, capturing, or another device's.
        DriverError
            The job failed.
        """
        cdef TransferQueue queue = self.queue
        cdef void *caller
        cdef uint64_t sequence = 0
        cdef int mode = 0, code = 0
        if queue is None:
            return
        self._require_owner_process()
        try:
            caller = queue.device.borrow_stream(stream)
        except DriverError:  # it could not be asked whether the stream is fit
            return self.wait()
        with nogil:
            if queue.hold_submitted(self.record, self.generation, &sequence):
                code = queue.device.enter(&mode)
                if code == 0:
                    code = queue.device.drv.stream_wait_event(caller, queue.records[self.record].done_event, 0)
                    queue.device.leave(mode)
                queue.drop_hold(self.record)
        if code:
            return self.wait()
        self._raise_failed()

    def __await__(self):
        """Wait in an asyncio event loop; the result is the job. Cancelling stops the waiting, never the copies."""
        if not self.done():
            yield from wait_in_loop(self, self.queue.signals).__await__()
        self._raise_failed()
        return self

    cdef void give_loan_back(self) noexcept:
        if self.loan is not None:
            self.loan.give_back_if_over()

    cdef OutcomeState _state(self) noexcept nogil:
        return self.queue.ask(&self.outcome)

    def _require_owner_process(self):
        if self.queue.device.pid != getpid():
            raise EngineClosed("this job belongs to the parent process")

    def _raise_failed(self):
        if self.queue is not None:
            self._require_owner_process()
            if self._state() == OUTCOME_FAILED:
                check(self.queue.device, self.outcome.code, b"a transfer")

    def __dealloc__(self):
        cdef JobRecord *job
        if self.queue is None or self.queue.device.pid != getpid():
            return
        _c.kv_monitor_lock(&self.queue.monitor)
        job = &self.queue.records[self.record]
        if job.outcome == &self.outcome:
            job.outcome = NULL
        _c.kv_monitor_unlock(&self.queue.monitor)


cdef uint32_t[::1] as_slot_ids(object slot_ids, PinnedPool pool) except *:
    """Slots of a pool as a uint32 array, each of them registered."""
    array = integers(slot_ids, "slot_ids")
    for index in np.flatnonzero((array < 0) | (array >= pool.num_ready))[:1]:
        raise ValueError(f"slot_ids[{index}] is {array[index]}, and {pool.num_ready} slots are registered")
    return np.asarray(array, dtype=np.uint32)
