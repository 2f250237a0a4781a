# cython: nonecheck=False
"""One stream, one direction, FIFO: puts the copies of jobs on the stream."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int64_t, uint32_t, uint64_t
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
from kvortex.transfer._packing cimport Packing, Packings
from kvortex.transfer._job cimport Job
from kvortex.transfer._job_table cimport (
    ENTER_NS,
    NO_RECORD,
    OUTCOME_FAILED,
    SIGNALS_NS,
    JobOutcome,
    JobRecord,
    JobTable,
    JobWait,
)
from kvortex.transfer._signals cimport JobSignals

import numpy as np

from kvortex.errors import EngineClosed

cdef int ENTER_ATTEMPTS = 3

DIRECTIONS = {"D2H": D2H, "H2D": H2D}


@cython.no_gc_clear  # __dealloc__ waits for copies, which need all that the collector would clear before
cdef class TransferQueue(JobTable):
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
        self.ended = True

    def __init__(self, Device device not None, direction, *, max_jobs=256, JobSignals signals=None):
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
        self.reserve_records(max_jobs)
        self.closed = self.ended = False
        with nogil:
            code = device.enter(&mode)
            if code == 0:
                code = self.copier.open()
                self.stream = self.copier.stream
                if code == 0:
                    code = self.create_events()
                device.leave(mode)
        if code:
            self.end(0, False)
            check(device, code)

    # ---- a job's turn: order, issue, seal ---------------------------------------------------------------------------
    # A job that is claimed and filled is ordered after its caller's stream, draws its turn, and is then issued and
    # sealed, by its caller or by the submitter. Only the thread whose job has its turn uses stream and copier: no lock.

    cdef int order(self, uint32_t record, void *caller) noexcept nogil:
        """Let the job come after the stream `caller` as it stands now. A CUresult; the context is current."""
        self.records[record].is_ordered = True
        return _c.kv_call(self.device.drv, _c.event_record, self.records[record].source_event, caller)

    cdef int issue(self, uint32_t record, uint64_t until_ns) noexcept nogil:
        """Put copies of the job on the stream until the time is over. A CUresult; the context is current.

        It is the job's turn, and the jobs that it waits for are sealed. The waits come before its first copy.
        """
        cdef JobRecord *job = &self.records[record]
        cdef JobWait *wait
        cdef int code = self.failure
        if not job.is_begun:
            _c.kv_monitor_lock(&self.monitor)
            job.is_begun = True  # from here on it cannot be withdrawn
            _c.kv_monitor_unlock(&self.monitor)
            if code == 0 and job.is_ordered:
                code = self.copier.wait_for(self.stream, job.source_event)
            while code == 0 and job.num_waits:
                wait = &job.waits[job.num_waits - 1]
                code = self.copier.wait_for(self.stream, event_of(wait))
                if code == 0:
                    drop(wait)
                    job.num_waits -= 1
        if code == 0 and not job.is_withdrawn:
            code = self.copier.copy(&job.plan, <KVLayout>job.layout, job.packing, until_ns)
        return code

    cdef int seal(self, uint32_t record, int code) noexcept nogil:
        """Record the job's event and let the next job have its turn. `code`: the error so far; return the final one.

        A failed job is over when the copies that it did submit are over, and the jobs that it waits for, too: a later
        job on the same device blocks meets this one instead of those.
        """
        cdef JobRecord *job = &self.records[record]
        cdef uint32_t index
        cdef int finished = self.failure
        cdef bint is_synchronized = False
        if code == 0:
            code = _c.kv_call(self.device.drv, _c.event_record, job.done_event, self.stream)
        if code and finished == 0:
            if (self.copier.gather is not None or job.num_waits
                    or _c.kv_call(self.device.drv, _c.event_record, job.done_event, self.stream) != 0):
                finished = self.copier.synchronize()
                for index in range(job.num_waits):
                    if finished == 0:
                        finished = _c.kv_call(self.device.drv, _c.event_synchronize, event_of(&job.waits[index]))
                is_synchronized = finished == 0
        if finished:
            code = finished
        drop_waits(job)
        self.seal_record(record, code, is_synchronized, finished != 0)
        return code

    cdef int issue_in_turn(self, uint32_t record) noexcept nogil:
        """Issue and seal a job that is not handed over. A CUresult: of the job, or why its turn never came."""
        cdef JobRecord *job = &self.records[record]
        cdef uint32_t index
        cdef int code = self.await_turn(record)
        if code:
            drop_waits(job)
            return code
        for index in range(job.num_waits):
            if code == 0:
                code = (<JobTable>job.waits[index].queue).await_sealed(job.waits[index].record)
        return self.seal(record, code if code else self.issue(record, _c.KV_NEVER_NS))

    cdef int hand_over(self, uint32_t record) noexcept nogil:
        """Leave issue and seal to the submitter. If it takes no more, the caller does both: a CUresult of that.

        Both are decided under one lock: a submitter that is being closed issues every job that was marked before.
        """
        cdef bint taken
        _c.kv_monitor_lock(&self.signals.handing)
        taken = self.signals.has_submitter and self.is_served
        if taken:
            _c.kv_monitor_lock(&self.monitor)
            self.records[record].is_handed_over = True
            _c.kv_monitor_unlock(&self.monitor)
            self.signals.num_handed += 1
            _c.kv_monitor_broadcast(&self.signals.handing)
        _c.kv_monitor_unlock(&self.signals.handing)
        return 0 if taken else self.issue_in_turn(record)

    cdef int issue_next(self, uint64_t slice_ns) noexcept nogil:
        """Go on with the first job, for the submitter. 1: copies were issued; 0: another thread must seal a job first;
        -1: there is nothing to do.

        The context is current.
        """
        cdef JobRecord *job
        cdef uint32_t record, index
        cdef bint is_handed_over
        cdef int code
        _c.kv_monitor_lock(&self.monitor)
        record = self.issue_head
        is_handed_over = record != NO_RECORD and self.records[record].is_handed_over
        _c.kv_monitor_unlock(&self.monitor)
        if not is_handed_over:
            return -1 if record == NO_RECORD else 0
        job = &self.records[record]
        if not job.is_begun:
            for index in range(job.num_waits):
                if not (<JobTable>job.waits[index].queue).is_sealed(job.waits[index].record):
                    return 0
        code = self.issue(record, _c.kv_now_ns() + slice_ns)
        if code or job.is_withdrawn or _c.kv_plan_is_done(&job.plan):
            self.seal(record, code)
        return 1

    # ---- use without an engine --------------------------------------------------------------------------------------

    def submit(self, KVLayout layout not None, block_ids, PinnedPool pool not None, slot_ids, *, stream,
               bint deferred=False):
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
        deferred : bool, default False
            Leave the copies to the queue's `Submitter` and return in microseconds; the driver takes a microsecond for
            each piece. Until `Job.submitted` a synchronisation of the device does not cover them; all memory must live
            until `Job.done`.

        Returns
        -------
        Job or None
            None if `max_jobs` are in flight: poll, or try later.

        Raises
        ------
        ValueError
            Arrays of different length, ids out of range, a block larger than a slot's payload, an unfit stream; a
            layout over read-only memory for a load, or over a GPU's for the host device; `deferred` without a
            `Submitter`; if the queue packs, a layout that is neither the packed one nor a part of it.
        DriverError
            The driver refused; no copy is in flight, unless the context is dead.
        """
        cdef int64_t[::1] ids = as_block_ids(block_ids, layout)
        cdef uint32_t[::1] slots = as_slot_ids(slot_ids, pool)
        cdef size_t n = ids.shape[0]
        cdef uint32_t record
        cdef Packing packing
        cdef int code
        self._require_open()
        cdef void *caller = self.device.borrow_stream(stream)
        cdef Job job = Job.__new__(Job)
        packing = None if self.copier.gather is None else self.copier.gather.packing_of(layout)
        self.used.update((pool, layout, packing))
        self._require_open()  # again: what came before may run other people's code, and from here on nothing does
        pool._require_open()
        if slots.shape[0] != <Py_ssize_t>n:
            raise ValueError(f"{n} block ids but {slots.shape[0]} slots; they must pair up")
        block_bytes = layout.block_bytes if packing is None else packing.packed_bytes
        if block_bytes > pool.slots.payload_bytes:
            raise ValueError(f"blocks of {block_bytes} bytes exceed the payload of a slot ({pool.payload_bytes})")
        layout.require_reachable(self.device, self.direction_ == H2D)
        if deferred and not (self.signals.has_submitter and self.is_served):
            raise ValueError("deferred jobs need a Submitter over this queue; make one, or leave `deferred` out")
        if n == 0:
            return job
        with nogil:
            record = self.claim_blocks(layout, NULL if packing is None else <void *>packing, &ids[0], pool,
                                       &slots[0], n)
        if record == NO_RECORD:
            self._require_open()
            check(self.device, self.failure)
            return None
        job.attach(self, record, self)
        job.count = n
        with nogil:
            code = self.submit_claimed(record, caller, deferred, &job.outcome)
        check(self.device, code)
        return job

    cdef uint32_t claim_blocks(self, KVLayout layout, void *packing, const int64_t *block_ids, PinnedPool pool,
                               const uint32_t *slot_ids, size_t n) noexcept nogil:
        """`claim`, and fill the record."""
        cdef uint32_t record = self.claim(n)
        cdef JobRecord *job = &self.records[record]
        if record != NO_RECORD:
            memcpy(job.places, block_ids, n * sizeof(uint64_t))
            memcpy(job.slots, slot_ids, n * sizeof(uint32_t))
            job.num_slots = n
            job.nbytes = n * layout.block_bytes
            self.plan_blocks(record, layout, packing, pool)
        return record

    cdef void plan_blocks(self, uint32_t record, KVLayout layout, void *packing, PinnedPool pool) noexcept nogil:
        """Make the plan of a filled job. Without a packing, blocks are in their slots as they are."""
        cdef JobRecord *job = &self.records[record]
        job.layout, job.packing = <void *>layout, packing
        job.plan = _c.kv_plan_of_blocks(layout.groups, layout.num_groups, layout.strided_bit(self.direction_),
                                        <const int64_t *>job.places, &pool.slots, job.slots, job.num_slots)

    cdef int submit_claimed(self, uint32_t record, void *caller, bint deferred, JobOutcome *outcome) noexcept nogil:
        """Order a filled record, draw its turn, issue and seal it. A CUresult: the job failed, and is over if begun."""
        cdef int mode = 0, code
        code = self.device.enter(&mode)
        if code == 0:
            code = self.order(record, caller)
            if code == 0:
                self.draw_turn(record)
                code = self.hand_over(record) if deferred else self.issue_in_turn(record)
                if code:
                    self.wait_outcome(outcome, _c.KV_NEVER_NS, True)
                self.device.leave(mode)
                return code
            self.device.leave(mode)
        self.unclaim(record)
        return code

    cdef int submit_blocks(self, KVLayout layout, const int64_t *block_ids, PinnedPool pool, const uint32_t *slot_ids,
                           size_t n, void *stream, JobOutcome *outcome) noexcept nogil:
        cdef void *packing = NULL
        cdef uint32_t record
        cdef int code
        if self.copier.gather is not None and layout is self.copier.gather.layout:
            packing = <void *>self.copier.gather.whole
        elif self.copier.gather is not None and self.copier.gather.whole.flags_offset:  # a part, or another layout
            outcome.state, outcome.code = OUTCOME_FAILED, _c.KV_CUDA_INVALID_VALUE
            return _c.KV_CUDA_INVALID_VALUE
        record = self.claim_blocks(layout, packing, block_ids, pool, slot_ids, n)
        if record != NO_RECORD:
            self.watch(record, outcome)
            code = self.submit_claimed(record, stream, False, outcome)
        elif self.failure:
            code = self.failure
        else:
            code = _c.KV_CUDA_DEINITIALIZED if self.closed else _c.KV_CUDA_NOT_READY
        code = _c.kv_result_code(code)
        if code:  # no thread will retire it, and so write the outcome
            outcome.state = OUTCOME_FAILED
            outcome.code = code
        return code

    def withdraw(self, Job job not None):
        """Let a job that was handed over copy nothing, if none of its copies is on the stream yet.

        Parameters
        ----------
        job : Job
            Of this queue, submitted with ``deferred=True``.

        Returns
        -------
        bool
            True: nothing was or will be copied. `Job.num_blocks` is 0 from now on, the job ends in its turn, and later
            calls return True, too. (Blocks that an engine saves are dropped, though `Job.statuses` says NEW.) False: it
            is too late (DMA cannot be recalled), or the job was never handed over.

        Raises
        ------
        ValueError
            The job is another queue's.

        Notes
        -----
        Thread-safe; waits for nothing. A queue that is closed, or is being closed, answers, too.
        """
        if job.queue is not None and job.queue is not self:
            raise ValueError("the job is of another queue")
        if job.queue is None:
            return False
        job._require_owner_process()
        if not job.is_withdrawn and self.withdraw_job(job.record, job.generation):
            job.count = 0
            job.is_withdrawn = True
        return job.is_withdrawn

    def use_gather(self, KVLayout layout not None, num_ctas, DevicePool pool=None, *, codec="exact", exact_layers=()):
        """Move blocks of `layout` by a kernel and whole-block copies from now on, instead of piece by piece.

        Use it for small pieces in separate allocations, where copy engines alone stay far below the link (`gather_pays`
        says whether), and for blocks that a codec packs. It takes streaming multiprocessors from whatever else runs on
        the device.

        Parameters
        ----------
        layout : KVLayout
            Bases, strides and pieces in multiples of 16 bytes. One layout a queue.
        num_ctas : int
            Thread blocks of the kernel, 1 to 1024; four are enough for the link of an H200.
        pool : DevicePool, optional
            Lends the staging memory until the queue is closed.
        codec : str, default "exact"
            With another codec, blocks of the layout and of its parts are packed in their slots (`kvortex.codec`). A
            block that could not be packed must not be kept: ask `Carrier.refused_slots`; a queue does not know.
        exact_layers : sequence of int, default ()
            Layers that the codec leaves as they are; negative numbers count from the last.

        Raises
        ------
        ValueError
            A number is out of range, the queue gathers already, or copies of a job are just being submitted; the codec
            cannot pack any of the layout.
        DriverError
            The driver refused kernel, stream or memory (16 MiB, or two blocks); nothing has changed.
        PoolExhausted
            The pool has no such memory; nothing has changed.
        """
        self._require_open()
        self.gather_by(Packings(self.device, layout, codec, exact_layers), num_ctas, pool)

    cdef int gather_by(self, Packings packings, object num_ctas, DevicePool pool) except -1:
        """`use_gather`, with packings that other queues may use as well."""
        cdef KVLayout layout = packings.layout
        if self.copier.gather is not None:
            raise ValueError("this queue gathers already; use one queue a layout")
        cdef Gather gather = Gather(packings, num_ctas, pool)
        _c.kv_monitor_lock(&self.monitor)
        if self.issue_head == NO_RECORD:
            self.copier.gather = gather
        _c.kv_monitor_unlock(&self.monitor)
        if self.copier.gather is None:
            close_gather(self.device, gather)
            raise ValueError("copies of a job are being submitted; call use_gather before, or when they are")
        layout.planner = tuple([row._replace(backend="gather") if row.direction == self.direction else row
                                for row in layout.planner])
        return 0

    def poll(self):
        """Retire the jobs whose copies are over; returns how many. Never blocks on one.

        If the driver cannot be asked at the moment, it retires none.

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
            check(self.device, self.failure)
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

        Jobs that do not end within `timeout_ms` are failed, and their stream and events leaked, because a copy may
        still run and needs them. If Ctrl-C ends the wait, no job is accepted any more, those in flight go on, and
        another call does the rest.
        """
        cdef int64_t limit = require_timeout(timeout_ms)
        self.end(_c.kv_deadline_ns(limit), True)

    cdef int end(self, uint64_t deadline_ns, bint interruptible) except -1:
        """`close`. Only if `interruptible`, signal handlers run, and may raise."""
        cdef int mode = 0, code, _attempt
        cdef bint empty = False
        cdef uint64_t now, pause
        if self.ended or self.device.pid != getpid():
            return 0
        self.refuse()
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
            if code or not empty or self.failure:  # a dead context: jobs ended without their copies
                self.fail_all(code or self.failure or _c.KV_CUDA_DEINITIALIZED)
            else:
                self.destroy_events()
                self.copier.close()
            if code == 0:
                self.device.leave(mode)
        if self.is_abandoned:
            Py_INCREF(self.used)  # copies may still use them, and a submitter
            Py_INCREF(self.copier)  # and kernels the tables of its gather
        else:
            self.used.clear()
        return 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __dealloc__(self):
        if self.device is not None and self.device.pid != getpid():
            return
        if self.device is not None and not self.ended:  # without a device nothing was made, not even `ended`
            self.end(_c.kv_deadline_ns(5000), False)


cdef uint32_t[::1] as_slot_ids(object slot_ids, PinnedPool pool) except *:
    """Slots of a pool as a uint32 array, each of them registered."""
    array = integers(slot_ids, "slot_ids")
    for index in np.flatnonzero((array < 0) | (array >= pool.num_ready))[:1]:
        raise ValueError(f"slot_ids[{index}] is {array[index]}, and {pool.num_ready} slots are registered")
    return np.asarray(array, dtype=np.uint32)


cdef inline void *event_of(const JobWait *wait) noexcept nogil:
    return (<JobTable>wait.queue).records[wait.record].done_event


cdef inline void drop(const JobWait *wait) noexcept nogil:
    (<JobTable>wait.queue).drop_hold(wait.record)


cdef inline void drop_waits(JobRecord *job) noexcept nogil:
    while job.num_waits:
        job.num_waits -= 1
        drop(&job.waits[job.num_waits])


cdef int close_gather(Device device, Gather gather) except -1:
    cdef int mode = 0
    with nogil:
        if device.enter(&mode) == 0:
            gather.close()
            device.leave(mode)
    return 0
