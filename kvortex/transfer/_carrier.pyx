# cython: nonecheck=False
"""Carrier: moves the blocks of one layout between its device and one pool, and orders jobs on the same blocks."""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

cimport kvortex._c as _c
from kvortex.driver._device cimport Device, check, require_timeout
from kvortex.driver._memory cimport whole_number
from kvortex.memory._device_pool cimport DevicePool
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._copier cimport D2H, Direction
from kvortex.transfer._job_table cimport NO_RECORD, JobRecord
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._packing cimport Packings
from kvortex.transfer._signals cimport JobSignals
from kvortex.transfer._source cimport Source
from kvortex.transfer._transfer_queue cimport TransferQueue, as_slot_ids

import logging
import weakref

from kvortex.log import log
from kvortex.transfer._gather import gather_pays
from kvortex.transfer._probe import probe_layout


CODEC_CTAS = 12  # thread blocks that pack, by default
cdef size_t LONG_COPIES = 256  # from this many on, the caller does not issue the copies of an "auto" job


cdef object known = weakref.WeakKeyDictionary()  # device -> what probes measured, for later layouts of the same shape


cdef inline uint64_t job_word(int queue, uint32_t record, uint32_t generation) noexcept nogil:
    """A job in one word: 8 bits of queue, 24 of record, 32 of generation; never 0, since generations start at 1."""
    return <uint64_t>queue << 56 | <uint64_t>record << 32 | generation


@cython.no_gc_clear  # in a garbage cycle the engine still closes its queues through it
cdef class Carrier:
    """The queues of one layout over one pool, how its pieces move best, and the order of jobs on its blocks.

    Parameters
    ----------
    device : Device
    pool : PinnedPool
    layout : KVLayout, optional
        Probed here: its memory is only read. A shape that was probed on this device before is not probed again. Without
        a layout the queues move raw addresses.
    num_savers, num_loaders : int, default 1
        Queues, and so streams, in each direction; together at most 32.
    max_jobs : int, default 256
        In flight on each queue.
    signals : JobSignals, optional
        Wake-ups shared with other carriers.
    gather_ctas : int, default 0
        Thread blocks of the kernel that moves small pieces (`TransferQueue.use_gather`), where that pays; 0 never.
        With a codec, of the kernel that packs; 0: `CODEC_CTAS`.
    device_pool : DevicePool, optional
        Where the staging memory of that kernel comes from.
    codec, exact_layers
        As for `TransferQueue.use_gather`.

    Raises
    ------
    ValueError
        Too many queues, or a number out of range; the codec cannot pack any of the layout.
    DriverError, MemoryError, PoolExhausted
        A stream, an event or memory could not be had; what was made by then is given back.

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
                 num_loaders=1, max_jobs=256, JobSignals signals=None, gather_ctas=0, DevicePool device_pool=None,
                 codec="exact", exact_layers=()):
        cdef bint on_device = False
        if self.queues is not None:
            raise RuntimeError("Carrier.__init__ may be called once")
        num_savers, num_loaders = whole_number(num_savers, "num_savers"), whole_number(num_loaders, "num_loaders")
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
                check(self.device, self.device.lies_on_device(base, &on_device))
                self.device_memory |= on_device
        queues = []
        try:
            for direction in ("D2H",) * num_savers + ("H2D",) * num_loaders:
                queues.append(TransferQueue(device, direction, max_jobs=max_jobs, signals=self.signals))
            if layout is not None:
                for queue in (queues[0], queues[num_savers]):
                    probe_layout(layout, queue, known=known.setdefault(device, {}))
                self._use_gather(queues, gather_ctas, device_pool, codec, exact_layers)
        except BaseException:
            for queue in queues:
                queue.close()
            raise
        for queue in queues:
            self.queue[self.num_queues] = <void *>queue
            self.num_queues += 1
        self.num_savers = num_savers
        self.queues = tuple(queues)

    def _use_gather(self, queues, num_ctas, pool, codec, exact_layers):
        """Move blocks by a kernel if a codec packs them, or if it was asked for and pays."""
        cdef TransferQueue queue
        if codec == "exact":
            gathered = [queue for queue in queues if gather_pays(self.layout, queue.direction)] if num_ctas else []
        else:
            gathered, num_ctas = queues, num_ctas or CODEC_CTAS
        if gathered:
            self.packings = Packings(self.device, self.layout, codec, exact_layers)
        for queue in gathered:
            queue.gather_by(self.packings, num_ctas, pool)
        if num_ctas and not gathered:
            message = "gather_ctas has no effect: strided copies move this layout, or its pieces are not small"
            log(logging.INFO, "gather_unused", message, device=self.device.name, piece_bytes=self.layout.piece_bytes)

    def refused_slots(self, slot_ids):
        """List those of these slots, into which blocks of the layout were saved, whose block the codec could not pack.

        Ask when the job is done. The bytes in such a slot are no block, and must not be kept.
        """
        cdef uint32_t slot
        cdef const uint32_t[::1] slots = as_slot_ids(slot_ids, self.pool)
        if self.packings is None:
            return []
        return [slot for slot in slots if self.packings.whole.is_refused(self.pool, slot)]

    def close(self, timeout_ms=5000):
        """`TransferQueue.close` of each queue, `timeout_ms` at the most in all."""
        cdef uint64_t deadline = _c.kv_deadline_ns(require_timeout(timeout_ms))
        # Busy queues first: if one must be abandoned, the idle ones may not give device memory back, since that would
        # wait for the copies of that one. They leak their memory.
        for queue in sorted(self.queues or (), key=lambda queue: not queue.jobs_in_flight):
            (<TransferQueue>queue).end(deadline, True)
            if (<TransferQueue>queue).is_abandoned:
                for other in self.queues:
                    if not (<TransferQueue>other).ended:
                        (<TransferQueue>other).fail_all(_c.KV_CUDA_DEINITIALIZED)

    cdef void refuse(self) noexcept nogil:
        """Take no more jobs. A call that claims one at the same time either is refused, or counts as in flight."""
        cdef int index
        self.refuses = True
        for index in range(self.num_queues):
            (<TransferQueue>self.queue[index]).refuse()

    cdef bint any_in_flight(self) noexcept nogil:
        cdef int index
        for index in range(self.num_queues):
            if (<TransferQueue>self.queue[index]).any_in_flight():
                return True
        return False

    def __dealloc__(self):
        free(self.last_job)
        free(self.stamps)
        if self.has_hazards:
            _c.kv_monitor_destroy(&self.hazards)

    # ---- one job ----------------------------------------------------------------------------------------------------

    cdef uint32_t claim_job(self, Direction direction, size_t n, int *number) noexcept nogil:
        """A free record on a queue of this direction, taking queues in turn; NO_RECORD when all are full.

        If `number` is not negative, only on that queue.
        """
        cdef int first = 0 if direction == D2H else self.num_savers
        cdef int count = self.num_savers if direction == D2H else self.num_queues - self.num_savers
        cdef int _attempt
        cdef uint32_t record = NO_RECORD
        if number[0] >= 0:
            return (<TransferQueue>self.queue[number[0]]).claim(n)
        for _attempt in range(count):
            number[0] = first + <int>(self.next_queue[<int>direction] % <uint32_t>count)
            self.next_queue[<int>direction] += 1
            record = (<TransferQueue>self.queue[number[0]]).claim(n)
            if record != NO_RECORD:
                break
        return record

    cdef void fill(self, int number, uint32_t record, Source source, size_t n) noexcept nogil:
        """Copy into a claimed job which blocks its `n` keys are to move."""
        cdef JobRecord *job = &(<TransferQueue>self.queue[number]).records[record]
        if source.by_block:
            memcpy(job.places, &source.block_ids[0], n * sizeof(uint64_t))
        else:
            memcpy(job.places, &source.addresses[0], n * sizeof(uint64_t))
            memcpy(job.lengths, &source.lengths[0], n * sizeof(uint32_t))

    cdef int submit(self, int number, uint32_t record, Source source, int deferred, bint *has_turn) noexcept nogil:
        """Put a filled job on its stream, or hand it over, after the jobs in flight on the same device blocks.

        Return a CUresult. If `has_turn` stays False, nothing was done; otherwise the job retires as every job does.
        """
        cdef JobRecord *job = &(<TransferQueue>self.queue[number]).records[record]
        cdef uint64_t *met = NULL
        cdef size_t num_met
        cdef int mode = 0
        cdef int code = self.device.enter(&mode)
        has_turn[0] = False
        if code:
            return code
        if source.by_block:
            met = <uint64_t *>malloc(job.num_slots * sizeof(uint64_t))
            if met is NULL:
                code = _c.KV_CUDA_OUT_OF_MEMORY
            (<TransferQueue>self.queue[number]).plan_blocks(record, source.layout, self.packing_on(number, source),
                                                            self.pool)
        else:
            job.packing = NULL
            job.plan = _c.kv_plan_of_addresses(job.places, job.lengths, &self.pool.slots, job.slots, job.num_slots)
        if code == 0 and source.ordered:
            code = (<TransferQueue>self.queue[number]).order(record, source.stream)
        if code == 0:
            has_turn[0] = True  # from here on nothing may fail without a seal
            if source.by_block:
                num_met = self.claim_blocks(number, record, met)
                self.hold_met(number, job, met, num_met)
            else:
                (<TransferQueue>self.queue[number]).draw_turn(record)
            if deferred == DEFER_LONG:
                deferred = (job.num_slots * self.copies_of_block(number, source) >= LONG_COPIES
                            or not (<TransferQueue>self.queue[number]).is_first(record))
            if deferred:
                code = (<TransferQueue>self.queue[number]).hand_over(record)
            else:
                code = (<TransferQueue>self.queue[number]).issue_in_turn(record)
        free(met)
        self.device.leave(mode)
        return code

    cdef void *packing_on(self, int number, Source source) noexcept nogil:
        """The `Packing` by which a queue moves the blocks; NULL: it has no kernel, and moves them piece by piece."""
        if source.packing is None or (<TransferQueue>self.queue[number]).copier.gather is None:
            return NULL
        return <void *>source.packing

    cdef size_t copies_of_block(self, int number, Source source) noexcept nogil:
        """Calls or descriptors that one block takes."""
        cdef uint32_t index, bit
        cdef size_t copies = 0
        if not source.by_block or self.packing_on(number, source) is not NULL:
            return 1
        bit = source.layout.strided_bit((<TransferQueue>self.queue[number]).direction_)
        for index in range(source.layout.num_groups):
            copies += 1 if source.layout.groups[index].strided & bit else source.layout.groups[index].rows
        return copies

    cdef void hold_met(self, int number, JobRecord *job, const uint64_t *met, size_t num_met) noexcept nogil:
        """Hold the jobs that this one waits for: of each other queue the latest that it met, as queues are FIFO."""
        cdef uint32_t held[MAX_STREAMS]
        cdef uint64_t turns[MAX_STREAMS]
        cdef uint64_t turn = 0
        cdef uint32_t other
        cdef int at
        cdef size_t index
        for at in range(self.num_queues):
            held[at] = NO_RECORD
        for index in range(num_met):
            at = <int>(met[index] >> 56)
            other = <uint32_t>(met[index] >> 32) & 0xFFFFFF
            if at == number or not (<TransferQueue>self.queue[at]).hold(other, <uint32_t>met[index], &turn):
                continue
            if held[at] != NO_RECORD and turns[at] > turn:
                (<TransferQueue>self.queue[at]).drop_hold(other)
                continue
            if held[at] != NO_RECORD:
                (<TransferQueue>self.queue[at]).drop_hold(held[at])
            held[at] = other
            turns[at] = turn
        for at in range(self.num_queues):
            if held[at] != NO_RECORD:
                job.waits[job.num_waits].queue = self.queue[at]
                job.waits[job.num_waits].record = held[at]
                job.num_waits += 1

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

    cdef size_t claim_blocks(self, int number, uint32_t record, uint64_t *met) noexcept nogil:
        """Name the job in the words of its blocks, list the jobs named there before, and draw its turn, all at once.

        One lock for all of that gives jobs one order, by blocks and by queues alike. So every job waits for earlier
        turns only, and two that meet in several blocks, or in a block and a queue, never wait for each other.
        """
        cdef const JobRecord *job = &(<TransferQueue>self.queue[number]).records[record]
        cdef uint64_t word = job_word(number, record, job.generation), before
        cdef size_t index, num_met = 0
        _c.kv_monitor_lock(&self.hazards)
        for index in range(job.num_slots):
            before = self.last_job[job.places[index]]
            self.last_job[job.places[index]] = word
            if before != 0 and before != word and (num_met == 0 or met[num_met - 1] != before):
                met[num_met] = before
                num_met += 1
        (<TransferQueue>self.queue[number]).draw_turn(record)
        _c.kv_monitor_unlock(&self.hazards)
        return num_met
