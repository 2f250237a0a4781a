# cython: nonecheck=False
"""Carrier: what moves the blocks of one layout between its device and one pool, in the order that the blocks demand."""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

cimport kvortex._c as _c
from kvortex.driver._device cimport Device, check, require_timeout
from kvortex.memory._device_pool cimport DevicePool
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._copier cimport D2H, Direction
from kvortex.transfer._job_table cimport NO_RECORD, JobRecord
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._signals cimport JobSignals
from kvortex.transfer._source cimport Source
from kvortex.transfer._transfer_queue cimport TransferQueue

import logging

from kvortex.log import log
from kvortex.transfer._gather import gather_pays
from kvortex.transfer._probe import probe_layout


cdef inline uint64_t job_word(int queue, uint32_t record, uint32_t generation) noexcept nogil:
    """A job in one word: 8 bits of queue, 24 of record, 32 of generation; never 0, since generations start at 1."""
    return <uint64_t>queue << 56 | <uint64_t>record << 32 | generation


cdef class Carrier:
    """The queues of one layout over one pool, how its pieces move best, and the order of jobs on its blocks.

    Parameters
    ----------
    device : Device
    pool : PinnedPool
    layout : KVLayout, optional
        Probed here: its memory is only read. Without one the queues move raw addresses.
    num_savers, num_loaders : int, default 1
        Queues, and so streams, in each direction; together at most 32.
    max_jobs : int, default 256
        In flight on each queue.
    signals : JobSignals, optional
        Wake-ups shared with other carriers.
    gather_ctas : int, default 0
        Thread blocks of the kernel that moves small pieces (`TransferQueue.use_gather`), where that pays; 0 never.
    device_pool : DevicePool, optional
        Where the staging memory of that kernel comes from.

    Raises
    ------
    ValueError
        Too many queues, or a number out of range.
    DriverError, MemoryError, PoolExhausted
        There was no stream, event or memory to be had; nothing is left behind.

    Attributes
    ----------
    queues : tuple of TransferQueue
        Those that save, then those that load.
    """

    def __cinit__(self, *args, **kwargs):
        if _c.kv_monitor_init(&self.hazards):
            raise MemoryError("pthread_mutex_init failed")
        self.has_hazards = True

    def __init__(self, Device device not None, PinnedPool pool not None, KVLayout layout=None, *, num_savers=1,
                 num_loaders=1, max_jobs=256, JobSignals signals=None, gather_ctas=0, DevicePool device_pool=None):
        cdef bint on_device = False
        if self.queues is not None:
            raise RuntimeError("Carrier.__init__ may be called once")
        if num_savers < 1 or num_loaders < 1 or num_savers + num_loaders > MAX_STREAMS:
            raise ValueError(f"a carrier has a queue or more each way, {MAX_STREAMS} at most; got {num_savers} that "
                             f"save and {num_loaders} that load")
        self.device, self.pool, self.layout = device, pool, layout
        self.signals = signals if signals is not None else JobSignals()
        if layout is not None:
            self.last_job = <uint64_t *>calloc(layout.num_blocks, sizeof(uint64_t))
            self.stamps = <uint32_t *>calloc(layout.num_blocks, sizeof(uint32_t))
            if self.last_job is NULL or self.stamps is NULL:
                raise MemoryError(f"no memory for the words of {layout.num_blocks} device blocks")
            for base, _, _ in layout.runs:
                check(self.device, self.device.lies_on_device(base, &on_device), b"cuPointerGetAttribute")
                self.device_memory |= on_device
        queues = []
        try:
            for direction in ("D2H",) * num_savers + ("H2D",) * num_loaders:
                queues.append(TransferQueue(device, direction, max_jobs=max_jobs, signals=self.signals))
            if layout is not None:
                probe_layout(layout, queues[0])
                probe_layout(layout, queues[num_savers])
                self._use_gather(queues, gather_ctas, device_pool)
        except BaseException:
            for queue in queues:
                queue.close()
            raise
        for queue in queues:
            self.queue[self.num_queues] = <void *>queue
            self.num_queues += 1
        self.num_savers = num_savers
        self.queues = tuple(queues)

    def _use_gather(self, queues, num_ctas, pool):
        """Move small pieces by a kernel where that was asked for and pays."""
        gathered = [queue for queue in queues if gather_pays(self.layout, queue.direction)]
        for queue in gathered if num_ctas else ():
            queue.use_gather(self.layout, num_ctas, pool)
        if num_ctas and not gathered:
            message = "gather_ctas has no effect: strided copies move this layout, or its pieces are not small"
            log(logging.INFO, "gather_unused", message, device=self.device.name, piece_bytes=self.layout.piece_bytes)

    def close(self, timeout_ms=5000):
        """`TransferQueue.close` of each queue, `timeout_ms` at the most in all."""
        cdef uint64_t deadline = _c.kv_deadline_ns(require_timeout(timeout_ms))
        for queue in self.queues or ():
            (<TransferQueue>queue).end(deadline, True)

    def __dealloc__(self):
        free(self.last_job)
        free(self.stamps)
        if self.has_hazards:
            _c.kv_monitor_destroy(&self.hazards)

    # ---- one job ----------------------------------------------------------------------------------------------------

    cdef uint32_t claim_job(self, Direction direction, size_t n, int *number) noexcept nogil:
        """A free record on a queue of this direction, taking queues in turn; NO_RECORD when all are full."""
        cdef int first = 0 if direction == D2H else self.num_savers
        cdef int count = self.num_savers if direction == D2H else self.num_queues - self.num_savers
        cdef int _attempt
        cdef uint32_t record = NO_RECORD
        for _attempt in range(count):
            number[0] = first + <int>(self.next_queue[<int>direction] % <uint32_t>count)
            self.next_queue[<int>direction] += 1
            record = (<TransferQueue>self.queue[number[0]]).claim(n)
            if record != NO_RECORD:
                break
        return record

    @cython.boundscheck(False)
    @cython.wraparound(False)
    @cython.initializedcheck(False)
    cdef int submit(self, int number, uint32_t record, Source source, const char **call) noexcept nogil:
        """Submit after the jobs in flight on the same device blocks: one event a queue says it all, as queues are FIFO.

        A CUresult, as of `TransferQueue.submit_plan`.
        """
        cdef JobRecord *job = &(<TransferQueue>self.queue[number]).records[record]
        cdef size_t n = job.num_slots, index, num_met = 0, num_waits = 0
        cdef void *waits[MAX_STREAMS]
        cdef uint32_t held[MAX_STREAMS]      # record held on each queue
        cdef uint64_t sequences[MAX_STREAMS]
        cdef uint64_t *met = NULL
        cdef uint64_t sequence = 0
        cdef uint32_t other
        cdef int other_queue, mode = 0
        cdef _c.kv_plan plan
        # Before the blocks are claimed: from then on a failure has to be waited out, which needs the context.
        cdef int code = self.device.enter(&mode)
        if code:
            call[0] = b"cuCtxPushCurrent"
            return code
        for other_queue in range(self.num_queues):
            held[other_queue] = NO_RECORD
        if source.by_block:
            met = <uint64_t *>malloc(n * sizeof(uint64_t))
            if met is NULL:
                self.device.leave(mode)
                call[0] = b"malloc"
                return _c.KV_CUDA_OUT_OF_MEMORY
            num_met = self.claim_blocks(&source.block_ids[0], n, job_word(number, record, job.generation), met)
            for index in range(num_met):
                other_queue = <int>(met[index] >> 56)
                other = <uint32_t>(met[index] >> 32) & 0xFFFFFF
                if not (<TransferQueue>self.queue[other_queue]).hold_submitted(other, <uint32_t>met[index], &sequence):
                    continue
                if other_queue == number or (held[other_queue] != NO_RECORD and sequences[other_queue] > sequence):
                    (<TransferQueue>self.queue[other_queue]).drop_hold(other)
                    continue
                if held[other_queue] != NO_RECORD:
                    (<TransferQueue>self.queue[other_queue]).drop_hold(held[other_queue])
                held[other_queue] = other
                sequences[other_queue] = sequence
            free(met)
            for other_queue in range(self.num_queues):
                if held[other_queue] != NO_RECORD:
                    waits[num_waits] = (<TransferQueue>self.queue[other_queue]).records[held[other_queue]].done_event
                    num_waits += 1
            plan = _c.kv_plan_of_blocks(self.layout.groups, self.layout.num_groups,
                                        self.layout.strided_bit((<TransferQueue>self.queue[number]).direction_),
                                        &source.block_ids[0], &self.pool.slots, job.slots, n)
        else:
            plan = _c.kv_plan_of_addresses(&source.addresses[0], &source.lengths[0], &self.pool.slots, job.slots, n)
        code = (<TransferQueue>self.queue[number]).submit_plan(record, &plan, self.layout, source.stream,
                                                               source.ordered, waits, num_waits, call)
        for other_queue in range(self.num_queues):
            if held[other_queue] != NO_RECORD:
                (<TransferQueue>self.queue[other_queue]).drop_hold(held[other_queue])
        self.device.leave(mode)
        return code

    cdef bint names_block_twice(self, const int64_t *ids, size_t n) noexcept nogil:
        cdef size_t index
        cdef bint twice = False
        _c.kv_monitor_lock(&self.hazards)
        self.stamp += 1
        if self.stamp == 0:  # wrapped around: old stamps would look new
            for index in range(self.layout.num_blocks):
                self.stamps[index] = 0
            self.stamp = 1
        for index in range(n):
            twice |= self.stamps[ids[index]] == self.stamp
            self.stamps[ids[index]] = self.stamp
        _c.kv_monitor_unlock(&self.hazards)
        return twice

    cdef size_t claim_blocks(self, const int64_t *ids, size_t n, uint64_t word, uint64_t *met) noexcept nogil:
        """Name the job in the words of its blocks, all at once, and list the jobs named there before.

        One lock for the whole job gives jobs a total order, so that two that meet in several blocks never wait for
        each other.
        """
        cdef size_t index, num_met = 0
        cdef uint64_t before
        _c.kv_monitor_lock(&self.hazards)
        for index in range(n):
            before = self.last_job[ids[index]]
            self.last_job[ids[index]] = word
            if before != 0 and before != word and (num_met == 0 or met[num_met - 1] != before):
                met[num_met] = before
                num_met += 1
        _c.kv_monitor_unlock(&self.hazards)
        return num_met
