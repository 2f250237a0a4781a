"""The store of the disk tier: it checks a batch, hands it to the I/O threads, and tells what became of it."""

import os
from operator import index

import numpy as np

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex.codec._coder cimport BlockCoder
from kvortex.keys._arrays cimport as_keys
from kvortex.keys._persistent_names cimport as_digest, name_keys
from kvortex.memory._pinned_pool cimport PinnedPool

from kvortex.errors import ConfigError, EngineClosed, TierError
from kvortex.log import warn_once
from kvortex.tiers._record import BlockStatus

cdef uint64_t SIGNALS_NS = 50_000_000  # how long a wait leaves Python's signal handlers (Ctrl-C) waiting
cdef uint32_t SUBMITTERS = 2  # threads that begin AIO, of which each is over before the next
cdef tuple VERBS = ("put", "get", "erase", "scan", "sync")


@cython.no_gc_clear  # __dealloc__ needs what the collector would clear before
cdef class DiskStore:
    """Move blocks between slots of a pinned pool and slots of segments, by threads that never take the GIL.

    The contract is `kvortex.tiers.base.Store`.

    Parameters
    ----------
    pool : PinnedPool
        With a header page before each payload.
    segments : Segments
        Open, with the stride of a record, which without a coder is the pool's; the store closes them.
    namespace : bytes
        32 bytes that name the model as loaded.
    rank : int, default 0
    num_threads : int, default 4
        Blocks in flight, 1 to 64.
    queue_blocks : int, default 4096
        Blocks that may wait; what comes beyond is DROPPED.
    io : {"threads", "aio"}, default "threads"
        By system calls that block, or by Linux AIO; by threads, too, if the kernel refuses AIO or there is a coder.
    coder : BlockCoder, optional
        What makes records of blocks. Each thread then has memory for a record and for what the coder needs. A block
        whose record would be too large is answered TOO_LARGE.

    Raises
    ------
    ConfigError
        A number outside its limits, a pool without header pages, segments of another stride, a coder of longer blocks.
    MemoryError
        No thread could be started, with its memory.
    """

    def __init__(self, PinnedPool pool not None, segments, *, namespace, rank=0, num_threads=4, queue_blocks=4096,
                 io="threads", BlockCoder coder=None):
        cdef int i
        if self.core is not NULL:
            raise RuntimeError("DiskStore.__init__ may be called once")
        rank, num_threads, queue_blocks = index(rank), index(num_threads), index(queue_blocks)
        if not 1 <= num_threads <= _c.KV_IO_MAX_THREADS:
            raise ConfigError(f"num_threads must be 1 to {_c.KV_IO_MAX_THREADS}, got {num_threads}")
        if not 1 <= queue_blocks < 1 << 31:
            raise ConfigError(f"queue_blocks must be 1 to 2^31 - 1, got {queue_blocks}")
        if io not in ("threads", "aio"):
            raise ConfigError(f"io must be 'threads' or 'aio', got {io!r}")
        if pool.slots.header_bytes != _c.KV_RECORD_HEADER_BYTES:
            raise ConfigError(f"a pool above a tier needs header_bytes={_c.KV_RECORD_HEADER_BYTES}, "
                              f"got {pool.slots.header_bytes}")
        stride = pool.slots.stride_bytes if coder is None else coder.stride_bytes
        if segments.stride_bytes != stride:
            raise ConfigError(f"segments must have a stride of {stride} bytes, that of the "
                              f"{'pool' if coder is None else 'coder'}, got {segments.stride_bytes}")
        if coder is not None and coder.payload_bytes > pool.slots.payload_bytes:
            raise ConfigError(f"the coder is of blocks of {coder.payload_bytes} bytes, and slots of the pool have "
                              f"{pool.slots.payload_bytes}")
        self.space = as_digest(namespace, "namespace")
        self.pool, self.segments, self.calls, self.coder = pool, segments, segments.calls, coder
        self.num_slots = segments.num_slots
        cdef size_t num_files = len(segments.files)
        self.core = <DiskCore *>calloc(1, sizeof(DiskCore))
        cdef int *files = <int *>malloc((num_files + 1) * sizeof(int))
        if self.core is NULL or files is NULL:
            free(files)
            raise MemoryError("no memory for a store")
        for i in range(<int>num_files):
            files[i] = segments.files[i]
        self.core.disk.calls, self.core.disk.memory, self.core.disk.files = self.calls.table, pool.slots, files
        self.core.disk.slots_per_segment, self.core.disk.rank = segments.slots_per_segment, rank
        self.core.disk.stride_bytes = stride
        self.core.disk.coder = NULL if coder is None else coder.get()
        self.core.disk.vectors = _c.kv_has_vectors()
        memcpy(self.core.disk.space, <const uint8_t *>self.space, _c.KV_DIGEST_BYTES)
        try:
            self.start(num_threads, queue_blocks, io)
        except BaseException:
            self.free_core()
            raise
        pool.exports += 1
        self.running = True

    def __cinit__(self, *args, **kwargs):
        self.pid = getpid()

    cdef int start(self, uint32_t num_threads, uint32_t queue_blocks, object io) except -1:
        """Make the queue and its threads."""
        cdef _c.kv_io_queue *queue = &self.core.queue
        self.is_aio = io == "aio" and self.set_up_aio(num_threads)
        cdef _c.kv_disk *disk = &self.core.disk
        cdef _c.kv_io_run run = _c.kv_disk_aio_run if self.is_aio else _c.kv_disk_run
        cdef void *owner = <void *>&self.core.aio if self.is_aio else <void *>&self.core.disk
        if _c.kv_io_queue_init(queue, self.num_slots, queue_blocks, run, owner):
            raise MemoryError("no memory for a queue")
        queue.scratch_bytes = _c.kv_disk_scratch_bytes(disk)
        if ((self.is_aio and _c.kv_io_start_reaper(queue, _c.kv_disk_aio_reap, num_threads))
                or _c.kv_io_start(queue, min(num_threads, SUBMITTERS) if self.is_aio else num_threads) == 0):
            _c.kv_io_stop(queue, 0)
            _c.kv_io_queue_destroy(queue)
            raise MemoryError(f"no thread for I/O could be started, with {queue.scratch_bytes} bytes for each")
        return 0

    cdef bint set_up_aio(self, uint32_t depth) except -1:
        """Whether the kernel does AIO for this process; if not, that is logged."""
        if self.coder is not None:
            self.threads_reason = f"records of {self.coder.name} are made by the threads"
            return False
        self.core.aio.disk = &self.core.disk
        error = self.calls.table.aio_setup(depth, &self.core.aio.context)
        if error >= 0:
            return True
        self.core.aio.context = 0
        self.threads_reason = f"AIO was refused: {os.strerror(-error)}"
        warn_once("disk_aio_refused", "the kernel refuses AIO, so threads do the disk tier's I/O",
                  reason=os.strerror(-error))
        return False

    cdef void end_aio(self) noexcept:
        if self.core.aio.context:
            self.calls.table.aio_destroy(self.core.aio.context)
        self.core.aio.context = 0

    cdef void free_core(self) noexcept:
        self.end_aio()
        free(<void *>self.core.disk.files)
        free(self.core)
        self.core = NULL

    # ---- verbs ------------------------------------------------------------------------------------------------------

    def put(self, slots, pool_slots, keys, lengths, *, tag, group=0, timeout_ms):
        """Write blocks from slots of the pool; see `Store.put`."""
        cdef _c.kv_io_batch *batch = self.new_batch(_c.KV_IO_PUT, slots, timeout_ms)
        try:
            self.name_blocks(batch, pool_slots, keys, lengths, tag, group)
        except BaseException:
            _c.kv_io_let_go(batch)
            raise
        return self.submit(batch)

    def get(self, slots, pool_slots, keys, lengths, *, tag, timeout_ms):
        """Read blocks into slots of the pool, and verify them; see `Store.get`."""
        cdef _c.kv_io_batch *batch = self.new_batch(_c.KV_IO_GET, slots, timeout_ms)
        try:
            self.name_blocks(batch, pool_slots, keys, lengths, tag, 0)
        except BaseException:
            _c.kv_io_let_go(batch)
            raise
        return self.submit(batch)

    def erase(self, slots, *, timeout_ms):
        """Make the records in these slots unreadable; see `Store.erase`."""
        return self.submit(self.new_batch(_c.KV_IO_ERASE, slots, timeout_ms))

    def scan(self, slots, *, tag, timeout_ms):
        """Read which blocks these slots announce; see `Store.scan`."""
        cdef bytes weights = as_digest(tag, "tag")
        cdef _c.kv_io_batch *batch = self.new_batch(_c.KV_IO_SCAN, slots, timeout_ms)
        memcpy(batch.tag, <const uint8_t *>weights, _c.KV_DIGEST_BYTES)
        return self.submit(batch)

    def flush(self, timeout_ms, *, bint durable=True):
        """Wait for all that was given, then make it durable; see `Store.flush`.

        Raises
        ------
        TierError
            A segment could not be synchronised.
        """
        cdef uint64_t deadline = _c.kv_deadline_ns(timeout_of(timeout_ms)), pause
        cdef uint32_t left = 1
        self.require_open()
        while left and _c.kv_now_ns() < deadline:
            with nogil:
                pause = min(_c.kv_now_ns() + SIGNALS_NS, deadline)
                left = _c.kv_io_wait_idle(&self.core.queue, pause)
            PyErr_CheckSignals()
        if left or not durable:
            return left
        firsts = range(0, self.num_slots, self.segments.slots_per_segment)
        left_ms = None if timeout_ms is None else max(0, (<int64_t>deadline - <int64_t>_c.kv_now_ns()) // 1_000_000)
        statuses = self.submit(self.new_batch(_c.KV_IO_SYNC, firsts, left_ms)).wait()
        for number, status in enumerate(statuses):
            if status and status != _c.KV_BLOCK_LATE:
                raise TierError(f"segment {number} of {self.segments.folders} could not be made durable: "
                                f"{BlockStatus(status).name}{self.error_text()}")
        return int((statuses == _c.KV_BLOCK_LATE).any())  # written, and nobody knows whether durable

    def notify(self, event_fd):
        """Write to an eventfd whenever a batch is over; see `Store.notify`."""
        cdef int fd = -1 if event_fd is None else index(event_fd)
        self.require_made()
        _c.kv_monitor_lock(&self.core.queue.monitor)
        self.core.queue.event_fd = fd
        _c.kv_monitor_unlock(&self.core.queue.monitor)

    def stats(self):
        """What was done, and how the disk behaves.

        Returns
        -------
        dict
            `put`, `get`, `erase`, `scan`, `sync`: dicts of how many blocks were answered what, by `BlockStatus` name.
            `waiting`, `running`, `most_waiting`: blocks. `bytes_written`, `bytes_read`. `io`: "direct" or "buffered",
            with `io_reason`. `io_engine`: "threads" or "aio", with `io_engine_reason`. `read_only`: the reason, or
            None. `last_error`: text, or None. Of `Segments`: `folders`, `sparse_segments`, `new_segments`,
            `dropped_segments`, and `expelled_folders`, of other models.
        """
        cdef int verb, status
        self.require_made()
        cdef _c.kv_io_queue *queue = &self.core.queue
        facts = {}
        _c.kv_monitor_lock(&queue.monitor)
        counts = [[queue.counts[verb][status] for status in range(_c.KV_BLOCK_NUM_STATUSES)]
                  for verb in range(_c.KV_IO_NUM_VERBS)]
        facts["waiting"], facts["running"], facts["most_waiting"] = (queue.num_waiting, queue.num_running,
                                                                     queue.most_waiting)
        _c.kv_monitor_unlock(&queue.monitor)
        for name, row in zip(VERBS, counts):
            facts[name] = {BlockStatus(status).name: count for status, count in enumerate(row) if count}
        facts["bytes_written"], facts["bytes_read"] = self.core.disk.bytes_written, self.core.disk.bytes_read
        buffered = self.core.disk.buffered_error
        reason = f"direct I/O was refused: {os.strerror(buffered)}" if buffered else self.segments.buffered_reason
        facts["io"], facts["io_reason"] = ("buffered" if reason else "direct"), reason
        facts["io_engine"] = "aio" if self.is_aio else "threads"
        facts["io_engine_reason"] = self.threads_reason
        error = self.core.disk.read_only_error
        facts["read_only"] = os.strerror(error) if error else None
        error = self.core.disk.last_error
        facts["last_error"] = os.strerror(error) if error else None
        return facts | self.segments.facts()

    @property
    def payload_bytes(self):
        """Bytes of the longest block."""
        return self.pool.payload_bytes

    @property
    def codec(self):
        """Of the records."""
        return "exact" if self.coder is None else self.coder.name

    @property
    def record_bytes(self):
        """Bytes of the longest record, with its header page."""
        return self.segments.stride_bytes

    # ---- batches ----------------------------------------------------------------------------------------------------

    cdef _c.kv_io_batch *new_batch(self, uint8_t verb, object slots, object timeout_ms) except NULL:
        self.require_open()
        cdef uint64_t deadline = _c.kv_deadline_ns(timeout_of(timeout_ms))
        cdef const uint32_t[::1] view = as_numbers(slots, "slots", self.num_slots)
        cdef uint32_t n = view.shape[0]
        cdef _c.kv_io_batch *batch = _c.kv_io_batch_new(verb, n, deadline)
        if batch is NULL:
            raise MemoryError(f"no memory for a batch of {n} blocks")
        if n:
            memcpy(batch.slots, &view[0], n * sizeof(uint32_t))
        return batch

    cdef int name_blocks(self, _c.kv_io_batch *batch, object pool_slots, object keys, object lengths, object tag,
                         object group) except -1:
        """Fill in what says which blocks these are, checked."""
        cdef uint32_t n = batch.num_blocks, i
        cdef const uint32_t[::1] memory = as_numbers(pool_slots, "pool_slots", self.pool.num_ready)
        cdef const uint32_t[::1] sizes = as_numbers(np.broadcast_to(lengths, n) if np.ndim(lengths) == 0 else lengths,
                                                    "lengths", self.pool.slots.payload_bytes + 1)
        cdef const uint8_t[:, ::1] key_view = as_keys(keys)
        cdef bytes weights = as_digest(tag, "tag")
        cdef uint32_t number = group
        for name, count in (("pool_slots", memory.shape[0]), ("lengths", sizes.shape[0]), ("keys", key_view.shape[0])):
            if count != n:
                raise ValueError(f"{name} must be {n}, one a slot, got {count}")
        memcpy(batch.tag, <const uint8_t *>weights, _c.KV_DIGEST_BYTES)
        for i in range(n):
            if sizes[i] == 0:
                raise ValueError(f"lengths[{i}] must be 1 to {self.pool.slots.payload_bytes}, got 0")
            batch.memory[i], batch.lengths[i], batch.groups[i] = memory[i], sizes[i], number
        if n:
            memcpy(batch.keys, &key_view[0, 0], <size_t>n * _c.KV_DIGEST_BYTES)
            name_keys(self.space, self.core.disk.rank, batch.tag, batch.keys, n, batch.names)
        return 0

    cdef DiskBatch submit(self, _c.kv_io_batch *batch):
        cdef DiskBatch made = DiskBatch.__new__(DiskBatch)
        made.store, made.batch = self, batch
        with nogil:
            _c.kv_io_submit(&self.core.queue, batch)
        return made

    cdef str error_text(self):
        """The last error of the system, to be put behind a message."""
        error = self.core.disk.last_error
        return f" ({os.strerror(error)})" if error else ""

    # ---- end --------------------------------------------------------------------------------------------------------

    cdef int require_made(self) except -1:
        if self.core is NULL:
            raise EngineClosed("this store was never made; use DiskTier.open(pool, ...)")
        if self.pid != getpid():
            raise EngineClosed("this store belongs to the parent process; start workers with the spawn method")
        return 0

    cdef int require_open(self) except -1:
        self.require_made()
        if self.closed:
            raise EngineClosed("the store is closed; open another one")
        return 0

    def close(self, timeout_ms=5000):
        """Drop what waits and end the threads; see `Store.close`."""
        self.end(_c.kv_deadline_ns(timeout_of(timeout_ms)))

    cdef int end(self, uint64_t deadline) except -1:
        cdef bint is_over
        self.closed = True
        if not self.running or self.pid != getpid():
            return 0
        self.running = False
        with nogil:
            is_over = _c.kv_io_stop(&self.core.queue, deadline)
        if is_over:
            self.end_aio()
            self.pool.take_back()
            self.segments.close()
        else:  # memory, files and lock stay: the disk may still write into them, or from them
            self.is_lost = True
            Py_INCREF(self.coder)
            warn_once("disk_hangs", "I/O does not return; its memory and files are kept until the process ends",
                      folders=self.segments.folders)
        return 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __dealloc__(self):
        if self.core is NULL or self.pid != getpid():
            return
        self.end(_c.kv_deadline_ns(5000))
        if not self.is_lost:
            _c.kv_io_queue_destroy(&self.core.queue)
            self.free_core()


@cython.no_gc_clear  # as above
cdef class DiskBatch:
    """Blocks that a store was given in one call; see `kvortex.tiers.base.Batch`."""

    def __init__(self):
        raise TypeError("DiskBatch has no constructor; a store's put, get, erase and scan return one")

    cdef bint wait_until(self, uint64_t until) noexcept nogil:
        return _c.kv_io_wait(&self.store.core.queue, self.batch, until)

    def wait(self, timeout_ms=None):
        """Block (GIL released) until each block has its status, or for `timeout_ms`; return `statuses`.

        The batch's own deadline ends every wait; Ctrl-C ends it, not the I/O.
        """
        cdef uint64_t deadline = _c.kv_deadline_ns(timeout_of(timeout_ms)), now
        cdef bint over = False
        self.store.require_made()
        while True:
            with nogil:
                over = self.wait_until(min(_c.kv_now_ns() + SIGNALS_NS, deadline))
                now = _c.kv_now_ns()
            if over or now >= deadline:
                return self.copy(self.batch.statuses, 1, np.uint8)
            statuses = self.copy(self.batch.statuses, 1, np.uint8)
            if not (statuses == _c.KV_BLOCK_PENDING).any():
                return statuses
            PyErr_CheckSignals()

    def done(self):
        """Whether all I/O of the batch has returned, so that its slots may be used for something else."""
        self.store.require_made()
        return self.wait_until(0)

    @property
    def seconds(self):
        """From the call to the end of its I/O, of which somebody may hear later; None until `done`."""
        return (self.batch.over_ns - self.batch.begun_ns) / 1e9 if self.done() else None

    @property
    def statuses(self):
        """(n,) uint8 array, a `BlockStatus` each, as they are now."""
        self.done()
        return self.copy(self.batch.statuses, 1, np.uint8)

    @property
    def keys(self):
        """(n, 32) uint8 array; of a scan: the keys that were found."""
        return self.copy(self.batch.keys, _c.KV_DIGEST_BYTES, np.uint8).reshape(-1, _c.KV_DIGEST_BYTES)

    @property
    def lengths(self):
        """(n,) uint32 array, bytes of each block."""
        return self.copy(self.batch.lengths, sizeof(uint32_t), np.uint32)

    @property
    def groups(self):
        """(n,) uint32 array, the KV cache group of each block."""
        return self.copy(self.batch.groups, sizeof(uint32_t), np.uint32)

    cdef object copy(self, const void *source, size_t item_bytes, object dtype):
        return np.frombuffer((<const char *>source)[:self.batch.num_blocks * item_bytes], dtype).copy()

    def __dealloc__(self):
        if self.batch is NULL or self.store.pid != getpid():
            return
        _c.kv_monitor_lock(&self.store.core.queue.monitor)
        _c.kv_io_let_go(self.batch)
        _c.kv_monitor_unlock(&self.store.core.queue.monitor)


cdef int64_t timeout_of(object timeout_ms) except? -2:
    if timeout_ms is None:
        return -1
    timeout_ms = index(timeout_ms)
    if not 0 <= timeout_ms < 1 << 62:
        raise ValueError(f"timeout_ms must be 0 to 2^62, or None for ever, got {timeout_ms}")
    return timeout_ms


# A contiguous uint32 array of numbers below `limit`.
cdef object as_numbers(object numbers, str name, object limit):
    given = np.asarray(numbers)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a one-dimensional array of integers, got {given.dtype} {given.shape}")
    if given.size and not (0 <= int(given.min()) and int(given.max()) < limit):
        bad = int(given.min()) if given.min() < 0 else int(given.max())
        raise ValueError(f"{name} must be 0 to {limit - 1}, got {bad}")
    return np.ascontiguousarray(given, np.uint32)
