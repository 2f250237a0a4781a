# cython: nonecheck=False
"""One stream, one direction, FIFO: puts the copies of jobs on the stream."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
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
from kvortex.transfer._job cimport Job
from kvortex.transfer._job_table cimport (
    ENTER_NS,
    JOB_SUBMITTED,
    NO_RECORD,
    OUTCOME_FAILED,
    OUTCOME_PENDING,
    SIGNALS_NS,
    JobOutcome,
    JobRecord,
    JobTable,
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
        if _c.kv_monitor_init(&self.submitting):
            raise MemoryError("pthread_mutex_init failed")
        self.has_submitting = True

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
                code = _c.kv_result_at(self.copier.open(), _c.KV_ROW_stream_create)
                self.stream = self.copier.stream
                if code == 0:
                    code = self.create_events()
                device.leave(mode)
        if code:
            self.end(0, False)
            check(device, code, b"cuEventCreate")

    # ---- a job's life: claim, submit, retire ------------------------------------------------------------------------

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
        job.attach(self, record, self)
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
        cdef int mode = 0, code, _attempt
        cdef bint empty = False
        cdef uint64_t now, pause
        if self.ended or self.device.pid != getpid():
            return 0
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
                self.destroy_events()
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
        if self.device is not None and self.device.pid != getpid():
            return
        if self.device is not None and not self.ended:  # without a device nothing of ours was made, not even `ended`
            self.end(_c.kv_deadline_ns(5000), False)
        if self.has_submitting:
            _c.kv_monitor_destroy(&self.submitting)


cdef uint32_t[::1] as_slot_ids(object slot_ids, PinnedPool pool) except *:
    """Slots of a pool as a uint32 array, each of them registered."""
    array = integers(slot_ids, "slot_ids")
    for index in np.flatnonzero((array < 0) | (array >= pool.num_ready))[:1]:
        raise ValueError(f"slot_ids[{index}] is {array[index]}, and {pool.num_ready} slots are registered")
    return np.asarray(array, dtype=np.uint32)
