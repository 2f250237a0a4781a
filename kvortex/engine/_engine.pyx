# cython: nonecheck=False
"""The verbs of the engine: each one reserves or acquires, submits, and leaves the rest to the retire hook.

Longer than other files: more than a quarter is what the verbs promise, and all of them share one way to make a job.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex.driver._device cimport Device, check
from kvortex.index._block_index cimport BlockIndex
from kvortex.keys._arrays cimport as_keys
from kvortex.memory._device_pool cimport DevicePool
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._carrier cimport DEFER_ALL, DEFER_LONG, DEFER_NONE, Carrier
from kvortex.transfer._carriers cimport Carriers
from kvortex.transfer._copier cimport D2H, H2D, Direction
from kvortex.transfer._job cimport Job, Loan
from kvortex.transfer._job_table cimport NO_RECORD, JobRecord
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._packing cimport Packing
from kvortex.transfer._source cimport Source, make_source, part_of, require_disjoint
from kvortex.transfer._submitter cimport Submitter
from kvortex.transfer._transfer_queue cimport TransferQueue

import contextlib
import hashlib
import logging
import os
from typing import NamedTuple

import numpy as np

from kvortex.arguments import require_ms
from kvortex.errors import DriverError, EngineClosed
from kvortex.keys import digest_of, ram_keys
from kvortex.log import log
from kvortex.stats import EngineStats


HOLD_MS = 60_000  # for a call that promotes and loads: it unpins the blocks itself


class BlockHits(NamedTuple):
    """The answer of `check_blocks`."""

    leading: int           # blocks of the leading run in RAM: what `load_blocks` brings at once
    mask: np.ndarray       # bool (n,): which keys are in RAM
    where: np.ndarray      # uint8 (n,): 0 nowhere, 1 in RAM, from 2 on the lower tiers: names of levels, not an order
    leading_anywhere: int  # blocks of the leading run over all levels


cdef class Admission:
    """How much of a tier's write budget a save was granted, and how much of that it used."""

    def __init__(self, num_blocks, bint ram_only):
        self.num_blocks, self.ram_only = num_blocks, ram_only

    def grant(self, num_blocks):
        """Let the first `num_blocks` new blocks be written to the tier."""
        self.granted = num_blocks


@cython.no_gc_clear  # __dealloc__ stops the threads that use the parts, so they must still be there
cdef class EngineCore:
    """The joined parts; `KVortexEngine` is what users create."""

    def __cinit__(self, *args, **kwargs):
        self.closing = self.ended = True
        self.loans = ()
        if _c.kv_monitor_init(&self.counting):
            raise MemoryError("pthread_mutex_init failed")
        self.has_counting = True

    def __init__(self, Device device not None, PinnedPool pool not None, BlockIndex index not None,
                 Carrier carrier not None, DevicePool device_pool=None, deferred=False):
        if self.carriers is not None:
            raise RuntimeError("an engine is created once")
        require_parts(device, pool, index, carrier)
        self.device, self.pool, self.index, self.device_pool = device, pool, index, device_pool
        self.deferred, self.carriers = deferred, Carriers(pool)
        self.carriers.start(carrier, retire, <void *>self)
        self.choose()
        pool.attach(add_ready_slots, <void *>index)  # last, as it cannot fail: from here on `_close` undoes everything
        self.closing = self.ended = False

    def _attach_tiering(self, tiering):
        """Use a tier from now on, for good. To be called before any verb.

        What a tier keeps outlives the order in which layouts were added. So, if `create` had no layout, keys of layouts
        that are added later must differ from those of raw memory.
        """
        self.tiering, self.catalogue = tiering, tiering.tier.catalogue
        if self.carriers.fingerprint is None:
            self.carriers.fingerprint = b""

    # ---- verbs ------------------------------------------------------------------------------------------------------

    def save_blocks(self, keys, block_ids=None, *, data_ptrs=None, sizes=None, stream=None, after=None, deferred=None,
                    layout=None):
        """Copy device blocks into the pool; returns once the copies are submitted, or, `deferred`, at once.

        The copies wait on the device for `stream` as it stands at the call. The source must not be overwritten before
        they are over: order the next writer with ``job.wait_on(stream)`` (device-side) or ``job.wait()``.

        Parameters
        ----------
        keys : uint8 array (n, 32)
        block_ids : integer array (n,)
            Blocks of the layout; or instead of it:
        data_ptrs : integer array (n,) or sequence, sizes : int or integer array (n,)
            Device addresses (multiples of 4) and bytes, 1 to the slot's payload each; the caller orders its own jobs on
            them. Instead of an address, a list may hold an object of contiguous memory that says where it is
            (``data_ptr()``, ``__cuda_array_interface__``, a buffer, DLPack). The object is held until `done`, `wait` or
            a later call sees that the job is over, and `stream` waits for the stream that its owner names. If all
            entries are such objects, `sizes` may be left out.
        stream : int or stream object
            Required for device memory; 0 is the legacy default stream. None means that the memory is the CPU's and is
            ready.
        after : uint8 array (m, 32), optional
            The keys that these blocks continue, from the first block of the prefix on: ``keys[:n]`` where ``keys[n:]``
            is saved. Those of them and of `keys` that are in RAM become most recently used and are not evicted for a
            later block of the prefix: if the pool is smaller than the prompt, its tail gets FULL and its head stays.
            Without `after` a prompt longer than the pool evicts its own head.
        deferred : bool or "auto", optional
            Whether a thread of the engine submits the copies, so that the call returns within microseconds: the driver
            takes a microsecond for each piece, 65 ms for a long prompt. "auto": only if there are many pieces. By
            default `KVortexConfig.deferred`. Until ``job.submitted`` a synchronisation of the device or of `stream`
            does not cover the copies, and ``cudaFree`` does not wait for them; the memory must live until
            ``job.done()``. ``job.wait_on`` right after the call waits until they are submitted.
        layout : KVLayout, optional
            Which of the engine's layouts the blocks are of, or a part of one; by default ``engine.layout``. Keys belong
            to it: layouts of one `KVLayout.fingerprint` whose blocks are packed alike share blocks, and for any other
            layout a key names another block.

        Returns
        -------
        Job
            ``job.statuses`` has a `ReserveStatus` for each key: NEW, PRESENT, PENDING (another save of the key is in
            flight) or FULL (no slot could be freed, or too many jobs); ``job.num_blocks`` counts the NEW ones. A NEW
            block is visible once the job is done, unless it has a number that the codec cannot pack: then it is not
            kept (`get_stats().blocks_not_packed`), though its status stays NEW.

        Raises
        ------
        ValueError, TypeError
            Keys, ids, addresses, memory, sizes or the stream are unfit; nothing was changed.
        DriverError
            The driver refused; nothing was saved.
        EngineClosed
            After `shutdown`, or in a forked child.

        Notes
        -----
        Thread-safe; the GIL is released. The call waits only while another thread submits on the same stream or on the
        same device blocks, and, if the driver refuses, until the copies already issued are over.
        """
        cdef Source source
        cdef const uint8_t[:, ::1] rows, before
        cdef Carrier carrier = self.carrier_of(layout)  # with the digest, before Python code of the caller runs
        cdef bytes digest = self.digest if layout is None else self.digest_for(layout)
        rows = as_keys(keys) if digest is None else ram_keys(keys, digest)
        if after is not None:
            before = as_keys(after) if digest is None else ram_keys(after, digest)
        self.require_open()
        source = self.source_of(carrier, layout, D2H, rows.shape[0], block_ids, data_ptrs, sizes, stream)
        if after is not None:
            source.chained, source.after = True, before
        statuses = np.full(rows.shape[0], _c.KV_RESERVE_FULL, dtype=np.uint8)
        cdef Admission admission = None
        if self.tiering is not None:
            # Only blocks as the first layout has them go to a tier that codes them: it was made for these.
            admission = Admission(self.num_missing(rows), digest is not None and self.tiering.tier.codec != "exact")
            self.tiering.admit(admission)
        try:
            return self.run(carrier, D2H, rows, source, statuses, self.deferral(deferred), admission, None, -1)
        finally:  # no Python code runs once copies are under way: a signal handler that raises would lose the job
            if admission is not None:
                admission.is_over = True

    def load_blocks(self, keys, block_ids=None, *, data_ptrs=None, sizes=None, stream=None, deferred=None, layout=None,
                    prefetched=None, promote_timeout_ms=None):
        """Copy blocks from the pool back to the device; returns once the copies are submitted, or, `deferred`, at once.

        The leading run of keys that are in RAM (with the size asked for) is loaded; targets beyond it are untouched.
        The copies wait on the device for `stream` as it stands at the call; order what reads the targets with
        ``job.wait_on(stream)`` or ``job.wait()``.

        Parameters
        ----------
        keys, block_ids, data_ptrs, sizes, stream
            As for `save_blocks`. A target named twice is refused, and so is read-only memory (`BufferError`, if it is
            one of `data_ptrs`).
        deferred : bool or "auto", optional
            As for `save_blocks`.
        layout : KVLayout, optional
            As for `save_blocks`. What was saved under another fingerprint is a miss.
        prefetched : Prefetch, optional
            The prefetch of these keys. When this call has pinned blocks itself, it closes the prefetch.
        promote_timeout_ms : int, optional
            First read blocks that only a lower tier has into RAM, and wait for them so long at the most, the GIL
            released; then load what is in RAM. By default the tier is not read.

        Returns
        -------
        Job
            ``job.num_blocks`` is the length of the run, final once ``job.submitted``; blocks may have been evicted
            since the check.

        Raises
        ------
        ValueError, TypeError, DriverError, EngineClosed
            As for `save_blocks`. After a `DriverError` the content of the targets is undefined.
        """
        cdef Source source
        cdef const uint8_t[:, ::1] rows
        cdef Carrier carrier = self.carrier_of(layout)  # as in save_blocks
        cdef bytes digest = self.digest if layout is None else self.digest_for(layout)
        rows = as_keys(keys) if digest is None else ram_keys(keys, digest)
        self.require_open()
        source = self.source_of(carrier, layout, H2D, rows.shape[0], block_ids, data_ptrs, sizes, stream)
        if not source.by_block:
            require_disjoint(np.asarray(source.addresses), np.asarray(source.lengths))
        if promote_timeout_ms is not None and prefetched is not None:
            raise ValueError("prefetched and promote_timeout_ms exclude each other; name one of them")
        if promote_timeout_ms is not None:
            require_ms("promote_timeout_ms", promote_timeout_ms)
        if promote_timeout_ms is not None and self.tiering is not None:
            return self.load_as_it_comes(carrier, rows, source, promote_timeout_ms, self.deferral(deferred))
        if prefetched is None:
            return self.run(carrier, H2D, rows, source, None, self.deferral(deferred), None, None, -1)
        close, promotion = self.tiering_of(prefetched)
        cdef Job job = self.run(carrier, H2D, rows, source, None, self.deferral(deferred), None, None, -1)
        if job.count:
            close(promotion)  # compiled, as no Python code may run now
        return job

    def check_blocks(self, keys, *, layout=None):
        """Which of the keys are in RAM, and how long the leading run is; changes nothing in the cache.

        Parameters
        ----------
        keys, layout
            As for `save_blocks`.

        Returns
        -------
        BlockHits
            ``leading``, how many keys from the first on are in RAM without a gap; ``mask``, a bool for each key: in RAM
            or not; ``where``, for each key the level that has it, 0 for none, 1 for RAM and 2 for the tier below;
            ``leading_anywhere``, how many keys from the first on some level has. No I/O is done. A block may be evicted
            before it is loaded; `Job.num_blocks` is the truth.

        Raises
        ------
        ValueError, TypeError
            Those are not keys.
        EngineClosed
            After `shutdown`, or in a forked child.

        Notes
        -----
        Thread-safe; reads the index without a lock and waits for no copy. The GIL is released.
        """
        cdef const uint8_t[:, ::1] rows
        rows = as_keys(keys) if layout is None and self.digest is None else self.keys_of(keys, layout)
        cdef size_t n = rows.shape[0], leading = 0, anywhere
        cdef uint64_t start
        where = np.zeros(n, dtype=np.uint8)
        cdef uint8_t[::1] bits = where, levels
        self.enter_call()
        try:
            with nogil:
                start = _c.kv_now_ns()
                if n and not self.failure:
                    leading = self.index.lookup_keys(&rows[0, 0], n, &bits[0])
                _c.kv_monitor_lock(&self.counting)
                self.count.blocks_checked += n
                self.count.blocks_hit += leading
                _c.kv_histogram_add(&self.count.lookup_ns, _c.kv_now_ns() - start)
                _c.kv_monitor_unlock(&self.counting)
        finally:
            self.calls -= 1
        mask = where.view(np.bool_)
        if self.tiering is None or leading == n or self.failure or not self.tiering.answers():
            return BlockHits(leading, mask, where, leading)
        where = np.empty(n, dtype=np.uint8)
        levels = where
        with nogil:
            self.catalogue.lookup_keys(&rows[0, 0], n, &levels[0])
            anywhere = join_levels(&bits[0], &levels[0], n)
        return BlockHits(leading, mask, where, anywhere)

    def touch_blocks(self, keys, *, layout=None):
        """Make the keys the most recent ones, tail-first, so that heads of prefixes outlive their tails.

        Parameters
        ----------
        keys, layout
            As for `save_blocks`.

        Returns
        -------
        int
            How many are in RAM.

        Raises
        ------
        ValueError, TypeError, EngineClosed
            As for `check_blocks`.

        Notes
        -----
        Thread-safe; waits for the index's lock at the most. The GIL is released.
        """
        cdef const uint8_t[:, ::1] rows
        rows = as_keys(keys) if layout is None and self.digest is None else self.keys_of(keys, layout)
        cdef size_t n = rows.shape[0], touched = 0
        self.enter_call()
        try:
            if n:
                with nogil:
                    touched = self.index.touch_keys(&rows[0, 0], n)
        finally:
            self.calls -= 1
        return touched

    def discard_blocks(self, keys, *, layout=None):
        """Forget the keys at once on every level, saves in flight included.

        A slot that is being written or read is reused only when its copy is over. On a disk the blocks are erased in
        the background; `flush` makes that durable.

        Parameters
        ----------
        keys, layout
            As for `save_blocks`.

        Returns
        -------
        int
            How many of the keys were there.

        Raises
        ------
        ValueError, TypeError, EngineClosed
            As for `check_blocks`.

        Notes
        -----
        Thread-safe; waits for the index's lock at the most, never for a copy. The GIL is released.
        """
        cdef const uint8_t[:, ::1] rows
        rows = as_keys(keys) if layout is None and self.digest is None else self.keys_of(keys, layout)
        cdef size_t n = rows.shape[0], discarded = 0
        if self.tiering is not None:
            self.require_open()
            return self.tiering.discard(np.asarray(rows))
        self.enter_call()
        try:
            if n:
                with nogil:
                    discarded = self.index.discard_keys(&rows[0, 0], n)
        finally:
            self.calls -= 1
        return discarded

    def clear(self, weights=None):
        """Forget every block at once, saves in flight included: after a weight update nothing older is ever served.

        Call it after the last save of old KV was called and before the first save of new KV.

        Parameters
        ----------
        weights : str, optional
            Names the weights that blocks are computed with from now on: a later engine of this
            ``KVortexConfig(weights=...)`` finds them in a lower tier. Without a name no other process can use them.

        Raises
        ------
        TypeError
            `weights` is no str.
        EngineClosed
            After `shutdown`, or in a forked child.

        Notes
        -----
        Thread-safe; waits for the index's lock at the most, never for a copy. The GIL is released.
        """
        cdef bytes tag
        if weights is not None and (not isinstance(weights, str) or not weights):
            raise TypeError(f"weights must be a str that names them, got {weights!r}")
        tier = None
        if self.tiering is not None:
            self.require_open()
            tag = os.urandom(32) if weights is None else hashlib.sha256(weights.encode()).digest()
            tier = self.tiering.tier
            tier.adoption.clear(tag)
        self.enter_call()
        try:
            with nogil:
                self.index.clear_all()
            if tier is not None:
                tier.tag = tag  # after RAM was cleared, or its old blocks could be written under this tag
                with nogil:
                    self.catalogue.clear_all()
                    self.index.clear_all()  # again: blocks may have come from the tier in between
        finally:
            self.calls -= 1

    def get_stats(self):
        """All counters and latencies as one `EngineStats`, without stopping anything.

        Raises
        ------
        EngineClosed
            After `shutdown`, or in a forked child.
        """
        cdef Counters *count = <Counters *>malloc(sizeof(Counters))
        if count is NULL:
            raise MemoryError("no memory for a snapshot of the counters")
        try:
            if self.device is None:
                raise EngineClosed("this engine was never created; use KVortexEngine.create")
            self.require_open()
            self.log_failures()
            _c.kv_monitor_lock(&self.counting)
            count[0] = self.count
            _c.kv_monitor_unlock(&self.counting)
            index = self.index.counters()
            limit, used, reserved = device_pool_bytes(self.device_pool)
            return EngineStats(
                blocks_checked=count.blocks_checked, blocks_hit=count.blocks_hit, blocks_saved=count.blocks_saved,
                blocks_loaded=count.blocks_loaded, blocks_present=count.blocks_present,
                blocks_pending=count.blocks_pending, blocks_refused=count.blocks_refused,
                blocks_evicted=index["evictions"], blocks_discarded=index["discards"],
                blocks_dropped=0 if self.tiering is None else index["dirty_evictions"],
                blocks_not_packed=count.blocks_not_packed,
                length_mismatches=index["length_mismatches"], bytes_saved=count.bytes_saved,
                bytes_loaded=count.bytes_loaded, packed_bytes_saved=count.packed_bytes_saved,
                packed_bytes_loaded=count.packed_bytes_loaded, jobs_failed=count.jobs_failed,
                jobs_in_flight=sum([(<TransferQueue>queue).jobs_in_flight for queue in self.queues]),
                pool_blocks=self.pool.slots_usable, pool_blocks_used=index["slots_added"] - index["num_free"],
                pool_blocks_clean=index["num_clean"],
                pool_bytes=self.pool.bytes_usable, pool_bytes_ready=self.pool.bytes_ready,
                device_pool_bytes=limit, device_pool_bytes_used=used, device_pool_bytes_reserved=reserved,
                strided=any([(<KVLayout>layout).strided for layout in self.layouts]),
                planner=tuple([row for layout in self.layouts for row in (<KVLayout>layout).planner]),
                tiers=() if self.tiering is None else (
                    self.tiering.stats(count.blocks_admitted, count.blocks_not_admitted),),
                device=self.device.name,
                failed=self.failure != 0,
                **latencies("lookup", &count.lookup_ns), **latencies("save", &count.save_ns),
                **latencies("load", &count.load_ns))
        finally:
            free(count)

    def _keys_of(self, keys, layout):
        """The caller's keys as the index knows them, copied so that nobody can change them."""
        return np.array(self.keys_of(keys, layout))

    @property
    def is_closed(self):
        """True once `shutdown` was called."""
        return self.closing

    @property
    def failed(self):
        """True after a sticky driver error: the context is dead, jobs fail, lookups miss, nothing is reused."""
        return self.failure != 0

    # ---- one job ----------------------------------------------------------------------------------------------------

    cdef int require_open(self) except -1:
        if self.closing:
            raise EngineClosed("the engine is shut down; create another one")
        return self.device.require_open()

    cdef int enter_call(self) except -1:
        self.require_open()  # before any lock: a forked child may find it held for ever
        if self.loans:
            self.give_loans_back()  # may run Python code of their owners
            self.require_open()
        if self.log_failures():  # ran Python code, which may have shut the engine down
            self.require_open()
        self.calls += 1  # shutdown() waits until this is undone, so no Python code that could call it may run
        return 0

    cdef int log_failures(self) except -1:
        """Log, once each, what the threads without the GIL could not: a dead context, a pool that stays incomplete,
        blocks that could not be packed.

        Returns 1 if there was something to log.
        """
        if self.failure and not self.logged_failure:
            self.logged_failure = True
            log(logging.ERROR, "engine_failed", "the device's context is dead: jobs fail and lookups miss from now on; "
                "shut this engine down", device=self.device.name, error=error_name(self.device, self.failure))
            return 1
        if self.count.blocks_not_packed and not self.logged_refusal:
            self.logged_refusal = True
            log(logging.WARNING, "blocks_not_packed", "blocks have numbers that no codec can pack (Inf, NaN, or 2^100 "
                "and more), and are not kept; get_stats counts them", device=self.device.name,
                num_blocks=self.count.blocks_not_packed)
            return 1
        if not self.failure and self.pool.failure and not self.logged_pool:
            self.logged_pool = True
            log(logging.WARNING, "pool_incomplete", "registering memory failed, so the pool stays smaller than "
                "asked for; see PinnedPool.wait_ready", device=self.device.name, pool_bytes=self.pool.nbytes,
                pool_bytes_ready=self.pool.bytes_ready, error=error_name(self.device, self.pool.failure))
            return 1
        return 0

    cdef int deferral(self, object deferred) except -1:
        """Which thread submits the copies of a call. The first call that needs the submitter starts it."""
        if deferred is None:
            deferred = self.deferred
        if deferred is False:
            return DEFER_NONE
        if deferred is not True and deferred != "auto":
            raise ValueError(f"deferred must be False, True or 'auto', got {deferred!r}")
        self.require_open()  # else a submitter would be made for nothing
        self.carriers.require_submitter()
        return DEFER_ALL if deferred is True else DEFER_LONG

    cdef const uint8_t[:, ::1] keys_of(self, object keys, object layout):
        """The caller's keys as the index knows them: layouts that cannot hold each other's blocks share none.

        Not called where keys stay as they are, as that costs a quarter of a short call.
        """
        cdef bytes digest = self.digest
        if layout is not None:
            self.carrier_of(layout)  # refuses what is no layout of ours
            digest = self.digest_for(layout)
        return as_keys(keys) if digest is None else ram_keys(keys, digest)

    cdef Carrier carrier_of(self, object layout):
        if layout is None and self.carrier is not None:
            return self.carrier
        if self.carriers is None:
            raise EngineClosed("this engine was never created; use KVortexEngine.create")
        return self.carriers.of(layout)

    cdef Source source_of(self, Carrier carrier, object layout, Direction direction, Py_ssize_t n, object block_ids,
                          object data_ptrs, object sizes, object stream):
        """Check what a call moves. If the engine was shut down meanwhile, the error says so."""
        try:
            return make_source(self.device, carrier.layout if layout is None else layout, carrier.packings, self.pool,
                               carrier.device_memory, direction, n, block_ids, data_ptrs, sizes, stream)
        except (DriverError, EngineClosed):
            self.require_open()
            raise

    @cython.boundscheck(False)  # from the claim on nothing may raise
    @cython.wraparound(False)
    @cython.initializedcheck(False)
    cdef Job run(self, Carrier carrier, Direction direction, const uint8_t[:, ::1] keys, Source source, object statuses,
                 int deferred, Admission admission, const uint32_t[::1] expected, int number):
        """Reserve or acquire, submit, and return the job. If that fails, undo what was reserved or acquired.

        The job goes on the queue `number`, or on any if that is -1. If `expected` is given, a load ends before the
        first block that is in another slot than the expected one.
        """
        cdef size_t n = keys.shape[0], num_before = source.after.shape[0] if source.chained else 0, moved, index
        cdef TransferQueue queue
        cdef JobRecord *record_of_job
        cdef bint twice = False, has_turn = False
        cdef size_t num_admitted = 0 if admission is None else admission.granted
        cdef bint ram_only = admission is not None and admission.ram_only
        cdef uint32_t record = NO_RECORD
        cdef int code = 0, failure
        cdef Loan loan = None
        cdef Job job = Job.__new__(Job)  # done from the start, until it is attached to a record
        job.statuses = statuses
        if direction == D2H and n:
            source.statuses = statuses
            keys = keys.copy()  # the index reads a key twice, and nobody may change it in between
        if source.memory is not None or (source.by_block and source.layout.whole is not None):
            loan = Loan.__new__(Loan)
            loan.memory = (source.layout, source.packing) if source.memory is None else source.memory
            self.loans = (*self.loans, loan)
        try:
            self.enter_call()
        except BaseException:
            if loan is not None:
                loan.memory = ()
            raise
        failure = self.failure
        if n and not failure:
            with nogil:
                if direction == H2D and source.by_block:
                    twice = carrier.names_block_twice(&source.block_ids[0], n)
                if not twice:
                    record = carrier.claim_job(direction, n, &number)
        if record == NO_RECORD:
            self.calls -= 1
            if loan is not None:
                loan.memory = ()
            if twice:
                raise ValueError("block_ids names a target twice; each target of a load must be its own block")
            self.require_open()  # else shut down meanwhile
            check(self.device, failure if n else 0)
            if n and carrier.refuses:
                raise ValueError(f"{carrier.layout!r} was removed meanwhile; nothing was moved")
            _c.kv_monitor_lock(&self.counting)
            self.count.blocks_refused += n if direction == D2H else 0
            _c.kv_monitor_unlock(&self.counting)
            return job  # every status says FULL from the start
        queue = <TransferQueue>carrier.queue[number]
        job.attach(queue, record, self)
        record_of_job = &queue.records[record]
        if loan is not None:
            loan.queue, loan.record, loan.generation = job.queue, record, job.generation
            job.loan = loan
        with nogil:
            carrier.fill(number, record, source, n)
            if direction == D2H:
                self.index.reserve_keys(&keys[0, 0], &source.lengths[0], source.length_step, n,
                                        record_of_job.slots, &source.statuses[0], source.chained,
                                        &source.after[0, 0] if num_before else NULL, num_before, NULL, num_admitted,
                                        NULL, ram_only)
                queue.keep_slots(record, n)
                if admission is not None:
                    admission.num_used = min(admission.granted, <size_t>record_of_job.num_slots)
            else:
                moved = self.index.acquire_keys(&keys[0, 0], &source.lengths[0], source.length_step, n,
                                                record_of_job.slots)
                record_of_job.num_slots = moved
                if expected is not None:
                    for index in range(moved):
                        if record_of_job.slots[index] != expected[index]:
                            self.index.release_slots(record_of_job.slots + index, moved - index)
                            record_of_job.num_slots = index
                            break
            moved = record_of_job.num_slots
            record_of_job.nbytes = moved * source.layout.block_bytes if source.by_block else 0
            for index in range(0 if source.by_block else moved):
                record_of_job.nbytes += record_of_job.lengths[index]
            if moved:
                code = carrier.submit(number, record, source, deferred, &has_turn)
            if code and has_turn:
                queue.wait_outcome(&job.outcome, _c.KV_NEVER_NS, False)
            elif not has_turn:
                if moved and direction == D2H:
                    self.index.abort_slots(record_of_job.slots, moved)
                elif moved:
                    self.index.release_slots(record_of_job.slots, moved)
                queue.unclaim(record)
            _c.kv_monitor_lock(&self.counting)
            self.count.jobs_failed += code != 0 and not has_turn
            if admission is not None:
                self.count.blocks_admitted += admission.num_used
                self.count.blocks_not_admitted += record_of_job.num_slots - admission.num_used
            if direction == D2H:
                for index in range(n):
                    self.count.blocks_present += source.statuses[index] == _c.KV_RESERVE_PRESENT
                    self.count.blocks_pending += source.statuses[index] == _c.KV_RESERVE_PENDING
                    self.count.blocks_refused += source.statuses[index] == _c.KV_RESERVE_FULL
            _c.kv_monitor_unlock(&self.counting)
        self.calls -= 1
        check(self.device, code)
        job.count = moved
        if not moved:
            job.queue = None
        return job

    cdef size_t num_missing(self, const uint8_t[:, ::1] keys) except? 0:
        """How many of the keys RAM does not have now."""
        cdef size_t n = keys.shape[0], i, count = 0
        cdef uint8_t[::1] bits = np.zeros(n, dtype=np.uint8)
        if n:
            with nogil:
                self.index.lookup_keys(&keys[0, 0], n, &bits[0])
                for i in range(n):
                    count += not bits[i]
        return count

    cdef tuple tiering_of(self, object prefetched):
        """The function and its argument that close a prefetch of this engine."""
        if self.tiering is None or not isinstance(prefetched, self.tiering.Prefetch):
            raise TypeError(f"prefetched must be a Prefetch of this engine, got {prefetched!r}")
        return self.tiering.let_go, prefetched._promotion

    cdef Job load_as_it_comes(self, Carrier carrier, const uint8_t[:, ::1] keys, Source source, object timeout_ms,
                              int deferred):
        """Promote the run and load it window by window on one queue, each window when it is in RAM.

        The last job stands for all, because its event comes after theirs. All windows are of blocks that one promotion
        pins, so that a `clear` cannot mix two sets of weights. Other blocks are loaded only if no window was before.
        """
        cdef Py_ssize_t n = keys.shape[0], first = 0, end = 0, window
        cdef Job job = None, last = None
        cdef size_t moved = 0
        cdef bint is_over = False
        cdef const uint32_t[::1] expected
        keys = np.array(keys)  # they are read for a while: nobody may change them
        if source.by_block and len(np.unique(source.block_ids)) < n:
            raise ValueError("block_ids names a target twice; each target of a load must be its own block")
        prefetch = self.tiering.prefetch(np.asarray(keys), timeout_ms, HOLD_MS)
        close, promotion = self.tiering_of(prefetch)
        window = self.tiering.window_blocks()
        earlier = []
        try:
            while True:
                end, is_over = prefetch.wait_for_more(first + window)
                if is_over and last is None:
                    job = self.run(carrier, H2D, keys, source, None, deferred, None, None, -1)
                    close(promotion)  # compiled: from here on no Python code runs
                    return job
                if end > first:
                    expected = promotion.slots[first:end].copy()
                    job = self.run(carrier, H2D, keys[first:end], part_of(source, first, end - first), None, deferred,
                                   None, expected, -1 if last is None else carrier.queues.index(last.queue))
                    moved += job.count
                    if job.count:
                        earlier += [] if last is None else [last]
                        last = job
                if is_over or job.count < <size_t>(end - first):
                    break
                first = end
        except BaseException:
            for job in earlier + [last]:
                if job is not None:  # nothing may still be written into the targets of a call that failed
                    with contextlib.suppress(DriverError, EngineClosed):
                        job.wait()
            prefetch.close()
            raise
        close(promotion)
        if last is None:
            return job
        last.count, last.earlier = moved, tuple(earlier) or None
        return last

    cdef void give_loans_back(self) noexcept:
        """Release the caller's memory that is held for jobs which are over."""
        cdef Loan loan
        for loan in self.loans:
            loan.give_back_if_over()
        self.loans = tuple([loan for loan in self.loans if loan.memory])

    cdef void retire_job(self, Direction direction, const JobRecord *job, int code) noexcept nogil:
        """The copies of a job are over: make its slots visible, or unpin them. Runs before anyone sees the job done."""
        cdef size_t committed = 0
        cdef uint64_t nbytes = 0
        cdef bint copied = code == 0 and job.code == 0 and not job.is_withdrawn
        cdef uint64_t elapsed_ns
        if code:
            self.failure = code  # the context is dead: slots stay as they are, nothing is reused
        elif direction == H2D:
            self.index.release_slots(job.slots, job.num_slots)
        elif copied:
            committed = self.commit(job, &nbytes)
        else:
            self.index.abort_slots(job.slots, job.num_slots)
        elapsed_ns = _c.kv_now_ns() - job.start_ns
        _c.kv_monitor_lock(&self.counting)
        if code or job.code:
            self.count.jobs_failed += 1
        elif copied and direction == D2H:
            self.count.blocks_saved += committed
            self.count.packed_bytes_saved += nbytes
            self.count.bytes_saved += nbytes if job.packing is NULL else committed * (<Packing>job.packing).block_bytes
            _c.kv_histogram_add(&self.count.save_ns, elapsed_ns)
        elif copied:
            self.count.blocks_loaded += job.num_slots
            self.count.bytes_loaded += job.nbytes
            self.count.packed_bytes_loaded += (job.nbytes if job.packing is NULL
                                               else job.num_slots * (<Packing>job.packing).packed_bytes)
            _c.kv_histogram_add(&self.count.load_ns, elapsed_ns)
        _c.kv_monitor_unlock(&self.counting)

    cdef size_t commit(self, const JobRecord *job, uint64_t *nbytes) noexcept nogil:
        """Make saved blocks visible, but not those that the codec could not pack. Return how many became visible."""
        cdef size_t first, end = job.num_slots, committed = 0, refused = 0
        cdef uint64_t added = 0
        if job.packing is NULL:
            return self.index.commit_slots(job.slots, job.num_slots, False, NULL, nbytes)
        while end:  # from the tail on, as `commit_slots` links them: heads outlive tails
            first = end
            while first and not (<Packing>job.packing).is_refused(self.pool, job.slots[first - 1]):
                first -= 1
            if end > first:
                committed += self.index.commit_slots(job.slots + first, end - first, False, NULL, &added)
                nbytes[0] += added
            if first:
                first -= 1
                self.index.abort_slots(job.slots + first, 1)
                refused += 1
            end = first
        if refused:
            _c.kv_monitor_lock(&self.counting)
            self.count.blocks_not_packed += refused
            _c.kv_monitor_unlock(&self.counting)
        return committed

    # ---- layouts ----------------------------------------------------------------------------------------------------

    @property
    def layouts(self):
        """The layouts that calls may name, in the order of adding."""
        return () if self.carriers is None else self.carriers.layouts

    cdef int choose(self) except -1:
        """Take over from the carriers which carrier and which keys are meant if a call names no layout."""
        cdef KVLayout layout
        self.carrier, self.queues = self.carriers.first, self.carriers.queues
        self.layout = layout = None if self.carrier is None else self.carrier.layout
        self.digest = None if layout is None else self.digest_for(layout)
        return 0

    cdef bytes digest_for(self, KVLayout layout):
        """The digest that keys of a layout are xored with; None: nothing, for the first layout that there ever was."""
        fingerprint = self.carriers.fingerprint_of(layout)
        if fingerprint == self.carriers.fingerprint:
            return None
        return digest_of(tag=hashlib.sha256(b"layout" + fingerprint).digest())

    @property
    def _signals(self):
        return self.carriers.signals

    def _require_fit(self, KVLayout layout not None, codec, exact_layers):
        """Refuse a layout that cannot be added."""
        self.require_open()
        self.carriers.require_fit(layout, codec, exact_layers)

    def _fingerprint_of(self, KVLayout layout not None):
        """The fingerprint of a layout's blocks in their slots. If they are packed, it is not that of the layout."""
        return self.carriers.fingerprint_of(layout)

    def _add_carrier(self, Carrier carrier not None):
        """Let calls name the layout of a carrier. If this raises, nothing has changed."""
        self.require_open()
        self.carriers.add(carrier)
        self.choose()

    def _retire_carrier(self, KVLayout layout not None, timeout_ms):
        """Let no call use the carrier of a layout any more, and wait for its jobs; returns it."""
        self.require_open()
        cdef Carrier carrier = self.carriers.refuse(layout)
        self.choose()  # calls that name no layout go on meanwhile, by another one
        try:
            self.carriers.await_jobs(carrier, timeout_ms, &self.closing)
        finally:
            self.require_open()  # else shut down meanwhile
        return carrier

    def _drop_carrier(self, Carrier carrier not None):
        """Give back a carrier that has no jobs, whether it was added or not."""
        self.carriers.drop(carrier, self.ended)
        self.choose()

    # ---- end --------------------------------------------------------------------------------------------------------

    def _refuse_calls(self):
        """Refuse new calls. Jobs go on."""
        self.closing = True

    def _close(self, timeout_ms):
        """Refuse new calls, end the ones under way and the jobs in flight, give everything back. Idempotent."""
        if self.device is None or self.device.pid != getpid() or self.ended:
            return
        self.log_failures()
        self.closing = True
        if self.close_parts(timeout_ms, True) and self.leaked:
            log(logging.WARNING, "memory_leaked", "pinned memory is leaked on purpose, because copies may still run "
                "into it", device=self.device.name, pool_bytes_ready=self.pool.bytes_ready, timeout_ms=timeout_ms)

    cdef bint any_in_flight(self) noexcept:
        for queue in self.queues:
            if (<TransferQueue>queue).jobs_in_flight:
                return True
        return False

    cdef bint close_parts(self, int64_t timeout_ms, bint interruptible) except -1:
        """Do the work of `_close`; False if another call did it meanwhile.

        If `interruptible`, an exception of a signal handler ends it, while it waits for jobs (the completion thread
        goes on retiring them) or gives the pool back. Each step may be done again.
        """
        cdef uint64_t deadline = _c.kv_deadline_ns(timeout_ms)
        cdef bint dead = self.failure != 0  # the queue that failed may be gone with its layout
        cdef bint stuck
        cdef Submitter submitter
        while (self.calls or self.any_in_flight()) and _c.kv_now_ns() < deadline:
            with nogil:
                _c.kv_nap_ns(100_000)
            if interruptible:
                PyErr_CheckSignals()
            if self.ended:  # by a signal handler
                return False
        submitter = self.carriers.submitter
        stuck = submitter is not None and not submitter.end(deadline, False)
        with nogil:
            stuck |= not self.carriers.thread.stop(deadline)
        if self.calls or stuck:
            # A call, the submitter or the completion thread does not end: leave it the parts that it uses.
            for queue in self.queues:
                (<TransferQueue>queue).fail_all(_c.KV_CUDA_DEINITIALIZED)
            self.leaked = self.ended = True
            Py_INCREF(self.loans)
            Py_INCREF(self.carriers)  # pool and layouts, which these threads may still use
            self.pool.abandon()
            return True
        if self.any_in_flight():  # giving device memory back waits for all copies, and these may never end
            for queue in self.queues:
                (<TransferQueue>queue).fail_all(_c.KV_CUDA_DEINITIALIZED)
        for queue in self.queues:
            (<TransferQueue>queue).end(deadline, False)
            dead |= (<TransferQueue>queue).failure != 0
        if dead:
            self.leaked = True
            Py_INCREF(self.loans)
            self.pool.abandon()
            if self.device_pool is not None:
                self.device_pool.abandon()
        else:
            self.loans = ()
            self.pool.end(interruptible)
            if self.device_pool is not None and interruptible:
                self.device_pool.close()
            elif self.device_pool is not None:
                self.device_pool.end()
        self.device.close()
        if self.ended:  # by a signal handler
            return False
        self.ended = True
        return True

    def __dealloc__(self):
        if self.device is not None and self.device.pid != getpid():
            return  # a forked child owns none of this
        if not self.ended:
            self.closing = True
            self.close_parts(1000, False)
        for queue in self.queues or ():
            (<TransferQueue>queue).hook = NULL  # a queue that was left open retires its jobs without us
        if self.has_counting:
            _c.kv_monitor_destroy(&self.counting)


cdef int require_parts(Device device, PinnedPool pool, BlockIndex index, Carrier carrier) except -1:
    """Refuse parts that do not fit. A thread without the GIL could not say so later."""
    device.require_open()
    pool._require_open()
    if pool.is_attached:
        raise ValueError("the pool serves another engine; make one for each")
    if index.num_slots < pool.num_slots:
        raise ValueError(f"the index has {index.num_slots} slots and the pool {pool.num_slots}; make it as large")
    if carrier.device is not device or carrier.pool is not pool:
        raise ValueError("the carrier is of another device or pool; make one of these")
    for queue in carrier.queues:
        queue._require_open()
    return 0


cdef str error_name(Device device, int code):
    try:
        check(device, code)
    except DriverError as error:
        return error.name


cdef size_t join_levels(const uint8_t *in_ram, uint8_t *levels, size_t n) noexcept nogil:
    """Write which level has each key into `levels`; return the length of the leading run over all levels."""
    cdef size_t i, leading = n
    for i in range(n):
        levels[i] = 1 if in_ram[i] else 2 * levels[i]
        if not levels[i] and leading == n:
            leading = i
    return leading


cdef void retire(void *owner, Direction direction, const JobRecord *job, int code) noexcept nogil:
    (<EngineCore>owner).retire_job(direction, job, code)


cdef void add_ready_slots(void *index, uint32_t first, uint32_t count) noexcept nogil:
    (<BlockIndex>index).add_slot_range(first, count)


cdef tuple device_pool_bytes(DevicePool pool):
    """Limit, use, and what the pool takes from the device, in bytes. Without a pool zeros; after an error the limit."""
    if pool is None:
        return 0, 0, 0
    try:
        usage = pool.usage()
    except (DriverError, EngineClosed):
        return pool.limit_bytes, 0, 0
    return usage.limit_bytes, usage.used_bytes, usage.reserved_bytes


cdef dict latencies(str what, const _c.kv_histogram *histogram):
    return {f"{what}_latency_us_p{percent}": _c.kv_histogram_percentile(histogram, percent / 100.0) / 1000.0
            for percent in (50, 99)}
