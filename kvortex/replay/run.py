"""Drives an engine with a trace as a serving engine would: check, load the prefix, compute and save the rest, touch."""

import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
import tempfile
import time
import urllib.parse
import uuid
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import kvortex
from kvortex.arguments import shown, whole_number
from kvortex.config import bytes_text
from kvortex.replay.cache import ModelCache
from kvortex.replay.oracle import STAMP_BYTES, Oracle, key_words
from kvortex.slots import PAGE_BYTES, stride_bytes
from kvortex.tiers.disk.segments import disk_bytes_of

_PROMOTE_TIMEOUT_MS = 60_000  # a replay counts hits; how fast a disk is, stands in its rates
_PINNING_MS = 100  # how often the share of the pool that is pinned is told
MOST_PIECES = 1 << 16  # each costs Python objects
_PACE_BLOCKS = 100  # a second of the write budget where saved blocks are its clock
_REMOVING_MS = 60_000  # at the end, what was written to a server; one that hangs keeps nobody longer


_LIMITS = {  # least and most; where sys.maxsize is the most, something else is in the way first
    "block_bytes": (1, (1 << 32) - 1),
    "num_pieces": (2, MOST_PIECES),
    "inflight": (1, 256),  # the jobs of a queue: with more in flight, calls would move nothing
    "engines": (1, 64),  # each has a pool, and threads
    "corrupt_slots": (0, sys.maxsize),
    "pool_blocks": (1, sys.maxsize),
    "pool_bytes": (1, sys.maxsize),
    "disk_blocks": (1, sys.maxsize),
    "disk_bytes": (1, sys.maxsize),
    "write_bytes_per_s": (0, sys.maxsize),
}


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay with.

    Attributes
    ----------
    block_bytes : int
        Bytes of one block, below 4 GiB, a multiple of 16 times the number of pieces.
    num_pieces : int, optional
        Pieces of a block, an even number (K and V of half as many layers). By default pieces of 64 KiB, at least 8.
    pool_blocks, pool_bytes : int, optional
        Size of the pool, one of the two; 1024 blocks by default.
    device : str
        As in `kvortex.KVortexConfig`.
    inflight : int
        Requests whose transfers may overlap, 1 to 256.
    verify : bool
        Fill what is saved and compare what is loaded. Without it no byte is written or looked at.
    corrupt_slots : int
        Flip one byte in so many slots, each just before it is loaded; as many as there are requests at the most.
    disk : path-like, optional
        A folder, for a disk tier below the pool. What the replay writes goes into a folder of its own in there, which
        is deleted at the end.
    disk_blocks, disk_bytes : int, optional
        Size of that tier, one of the two.
    remote : RemoteTier, optional
        Instead of a disk: a server or a folder below the pool. What others have there is not found, and what the
        replay writes is removed at the end, as far as the server does that within a minute.
    engines : int
        So many engines with a pool each share `remote`, and take the requests in turn.
    flush : bool
        Write all that RAM has to the tier after each request.
    write_bytes_per_s : int, optional
        As in `kvortex.DiskTier`.
    write_share : float, optional
        Instead of that: what may be written, as a share of what is saved. No time counts then, nor idleness.
    """

    block_bytes: int = 256 << 10
    num_pieces: int | None = None
    pool_blocks: int | None = None
    pool_bytes: int | None = None
    device: str = "auto"
    inflight: int = 1
    verify: bool = True
    corrupt_slots: int = 0
    disk: str | os.PathLike | None = None
    disk_blocks: int | None = None
    disk_bytes: int | None = None
    remote: object = None
    engines: int = 1
    flush: bool = False
    write_bytes_per_s: int | None = None
    write_share: float | None = None

    def __post_init__(self):
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value is None:
                continue
            object.__setattr__(self, name, value := whole_number(value, name))
            if not least <= value <= most:
                limits = f"{least} or more" if most == sys.maxsize else f"{least} to {most}"
                raise kvortex.ConfigError(f"{name} must be {limits}, got {shown(value)}")
        if self.write_share is not None and not 0 <= self.write_share <= 1:
            raise kvortex.ConfigError(f"write_share must be 0 to 1, got {self.write_share}")
        if self.num_pieces is None:
            object.__setattr__(self, "num_pieces", max(8, self.block_bytes // (64 << 10) & ~1))
        if self.num_pieces % 2:
            raise kvortex.ConfigError(f"num_pieces must be even (K and V of each layer), got {self.num_pieces}")
        unit = STAMP_BYTES * self.num_pieces
        if self.block_bytes % unit:
            raise kvortex.ConfigError(
                f"block_bytes must be a multiple of {unit} ({self.num_pieces} pieces of whole {STAMP_BYTES} bytes), "
                f"got {self.block_bytes}; the nearest are {self.block_bytes // unit * unit} and "
                f"{(self.block_bytes // unit + 1) * unit}"
            )
        if self.pool_blocks is not None and self.pool_bytes is not None:
            raise kvortex.ConfigError("give pool_blocks or pool_bytes, not both")
        if self.corrupt_slots and not self.verify:
            raise kvortex.ConfigError("corrupt slots can only be seen with verification on")
        sizes = self.disk_blocks, self.disk_bytes
        if self.disk is None and sizes != (None, None):
            raise kvortex.ConfigError("disk_blocks and disk_bytes need a disk: name its folder")
        if not self.has_tier and (self.flush, self.write_bytes_per_s, self.write_share) != (False, None, None):
            raise kvortex.ConfigError("flush and write budget need a disk or a remote, below the pool")
        if self.disk is not None and self.remote is not None:
            raise kvortex.ConfigError("give a disk or a remote, not both: an engine has one tier")
        if self.disk is not None and sum(size is None for size in sizes) != 1:
            raise kvortex.ConfigError("a disk needs a size: give disk_blocks or disk_bytes, one of the two")
        if self.engines > 1 and self.remote is None:
            raise kvortex.ConfigError("several engines need a remote, which they share")
        if self.write_bytes_per_s is not None and self.write_share is not None:
            raise kvortex.ConfigError("give write_bytes_per_s or write_share, not both")

    @property
    def has_tier(self):
        """Whether there is a tier below the pool."""
        return self.disk is not None or self.remote is not None

    @property
    def stride_bytes(self):
        """Bytes that a block takes in the pool, and on the disk."""
        return stride_bytes(self.block_bytes, PAGE_BYTES if self.has_tier else 0)

    @property
    def cpu_pool_size_bytes(self):
        """Exact bytes of an engine's pool."""
        if self.pool_bytes is not None:
            return self.pool_bytes
        return (1024 if self.pool_blocks is None else self.pool_blocks) * self.stride_bytes

    @property
    def folder(self):
        """Where the tier gets a folder of its own; None where it is on a server, or there is none."""
        if self.remote is None or self.remote.name != "file":
            return self.disk
        return urllib.parse.unquote(urllib.parse.urlsplit(self.remote.url).path)

    def tier(self, folder):
        """Settings of the tier, in a folder of its own where it is in one."""
        rate = self.write_bytes_per_s if self.write_share is None else _PACE_BLOCKS * self.stride_bytes
        budget = {} if rate is None else {"write_bytes_per_s": rate}
        if self.remote is not None:
            place = {} if folder is None else {"url": Path(folder).absolute().as_uri()}
            return dataclasses.replace(self.remote, **place, **budget)
        disk_bytes = self.disk_bytes or disk_bytes_of(self.disk_blocks, self.stride_bytes)
        free_bytes = shutil.disk_usage(folder).free
        if disk_bytes > free_bytes:
            raise kvortex.ConfigError(
                f"a disk tier of {bytes_text(disk_bytes)} does not fit into {self.disk}: {bytes_text(free_bytes)} are "
                "free there; make it smaller"
            )
        return kvortex.DiskTier(folder, disk_bytes, **budget)


@dataclass
class ReplayResult:
    """What a replay did.

    Attributes
    ----------
    blocks_loaded : int
        Sum of `Job.num_blocks` over the loads: the leading runs as really transferred.
    blocks_from_tier : int
        Those of them that RAM did not have when the request came.
    wrong_blocks : int
        Targets whose bytes were not those of the block asked for, or that a load touched beyond its run.
    save_busy_s, load_busy_s : float
        Time in which at least one save (load) was between its call and the moment its end was noticed: at once with one
        request in flight, only after other requests' filling and comparing with more.
    corrupted_slots : int
        Slots in which a byte was flipped on purpose.
    stats : object
        The last `get_stats()` of the engine, or of the first of several.
    tiers : list
        The last `TierStats` of each engine; empty without a tier.
    blocks_dropped : int
        Blocks that were evicted before the tier had them.
    samples : list of tuple
        After each request: ``(seconds, blocks_touched, blocks_loaded, blocks_saved, load_busy_s, save_busy_s)``, all
        cumulative.
    """

    device: str
    block_bytes: int
    device_description: str = ""
    pool_blocks: int = 0
    requests: int = 0
    blocks_touched: int = 0
    blocks_loaded: int = 0
    blocks_from_tier: int = 0
    blocks_saved: int = 0
    blocks_evicted: int = 0
    tokens: int = 0
    tokens_loaded: int = 0
    wrong_blocks: int = 0
    corrupted_slots: int = 0
    save_busy_s: float = 0.0
    load_busy_s: float = 0.0
    seconds: float = 0.0
    ready_seconds: float = 0.0
    stats: object = None
    tiers: list = field(default_factory=list)
    blocks_dropped: int = 0
    samples: list = field(default_factory=list)


def replay(requests, options, progress=None, pinning=None):
    """Replay `requests` through an engine of its own, or several, and return a `ReplayResult`.

    Parameters
    ----------
    requests : sequence of Request
    options : ReplayOptions
    progress : callable, optional
        Called with the result so far after each request.
    pinning : callable, optional
        Called with the share of the pool that is pinned, 0 to 1, until all of it is; requests begin then.

    Raises
    ------
    kvortex.KVortexError
        The device, the pool or the pretended model's cache cannot be had, the tier's server does not answer, or a
        transfer failed.
    """
    most_blocks = max((len(request.hash_ids) for request in requests), default=0) or 1
    num_lanes = max(1, min(options.inflight, len(requests)))
    oracle = Oracle(options.block_bytes // options.num_pieces)
    with contextlib.ExitStack() as stack:  # unwinds in reverse: the engine ends before the memory it copies to goes
        device = stack.enter_context(kvortex.Device.open(options.device))
        cache = ModelCache(device, most_blocks * num_lanes, options.num_pieces, oracle, most_blocks)
        stack.callback(cache.close)
        lanes = [_Lane(device, index * most_blocks, most_blocks) for index in range(num_lanes)]
        for lane in lanes:
            stack.callback(lane.stream.close)
        below = _open_tier(options, stack)
        config = kvortex.KVortexConfig(cpu_pool_size_bytes=options.cpu_pool_size_bytes, device=device.name, **below)
        engines = [
            stack.enter_context(kvortex.KVortexEngine.create(config, layout=cache.layout))
            for _ in range(options.engines)
        ]
        if options.remote is not None and options.folder is None:
            stack.callback(_remove, engines[0], requests)
        started = time.perf_counter()
        for engine in engines:
            _wait_ready(engine, pinning)
        result = ReplayResult(
            device.name,
            options.block_bytes,
            device_description=device.description,
            ready_seconds=time.perf_counter() - started,
        )
        _Replay(engines, cache, options, len(requests), result, progress).run(requests, lanes)
    return result


def _open_tier(options, stack):
    """What an engine's config says of the tier, which is nobody else's."""
    if not options.has_tier:
        return {}
    folder = None
    if options.folder is not None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvortex-replay-", dir=options.folder))
    tier = options.tier(folder)
    if options.remote is not None:
        _require_answer(tier, options.block_bytes)
    return {"tiers": (tier,), "namespace": f"replay {uuid.uuid4()}"}


def _require_answer(tier, block_bytes):
    """Refuse a server that takes no value: an engine would go on without it, and nothing would be found there."""
    client = tier.client(PAGE_BYTES + block_bytes)
    name = tier.name_format(uuid.uuid4().bytes).format(name=bytes(32).hex())
    try:
        client.put(name, bytes(PAGE_BYTES))
        client.delete(name)
    except Exception as error:  # of the client, whatever it was
        raise kvortex.TierError(f"{tier.url} does not take a value: {error}") from error
    finally:
        client.close()


def _remove(engine, requests):
    """Remove what the requests left on a server."""
    if requests:
        engine.discard_blocks(np.unique(np.concatenate([request.keys() for request in requests]), axis=0))
    engine.flush(_REMOVING_MS)


def _wait_ready(engine, pinning):
    """Wait for the pool, and tell how far it is."""
    while pinning is not None:
        try:
            return engine.wait_ready(_PINNING_MS)
        except TimeoutError:
            pinning(engine.pool.bytes_ready / engine.pool.nbytes)
    return engine.wait_ready()


class _Lane:
    """Device blocks and a stream of their own for one request in flight."""

    def __init__(self, device, first, count):
        self.first = first
        self.block_ids = np.arange(first, first + count, dtype=np.int64)
        self.stream = kvortex.Stream.create(device)


class _BusyTime:
    """Time in which at least one job of a kind was in flight, so that overlapping jobs are not counted twice."""

    def __init__(self):
        self.seconds = 0.0
        self._in_flight = 0
        self._since = 0.0

    def begin(self):
        if self._in_flight == 0:
            self._since = time.perf_counter()
        self._in_flight += 1

    def end(self):
        self._in_flight -= 1
        if self._in_flight == 0:
            self.seconds += time.perf_counter() - self._since


class _Replay:
    def __init__(self, engines, cache, options, num_requests, result, progress):
        self._engines = engines
        self._cache = cache
        self._verify = options.verify
        self._has_tier, self._is_remote, self._flush = options.has_tier, options.remote is not None, options.flush
        self._result = result
        self._progress = progress
        self._loads = _BusyTime()
        self._saves = _BusyTime()
        # Key word -> how often the key was saved as NEW. READY bytes are those of the last NEW save, so this is what
        # a load must find, also for a key that was evicted and saved again. With a tier, which may have an earlier save
        # of the key and need not write it again, every save has the same content.
        self._generations = {}
        # How many requests must be done before each corruption is due; the first is due at once, so that any trace
        # with a hit sees at least one.
        count = min(options.corrupt_slots, num_requests)
        self._corruptions_due = deque(index * num_requests // count for index in range(count))
        self._corrupted_stamps = set()
        self._last_byte = options.block_bytes - 1
        if options.write_share is not None:
            for engine in engines:
                engine.tiering.pace(lambda: options.write_share * result.blocks_saved / _PACE_BLOCKS / len(engines))

    def run(self, requests, lanes):
        """Keep one request in flight on each lane until all are done."""
        result = self._result
        waiting = zip(requests, itertools.cycle(self._engines), strict=False)
        active = []
        started = time.perf_counter()
        while True:
            while lanes and (turn := next(waiting, None)) is not None:
                request, engine = turn
                lane = lanes.pop()
                active.append([self._steps(request, engine, lane), None, lane, request])
            if not active:
                break
            moved = False
            for entry in list(active):
                steps, job, lane, request = entry
                if job is not None and not job.done():
                    continue
                moved = True
                entry[1] = next(steps, None)
                if entry[1] is None:
                    active.remove(entry)
                    lanes.append(lane)
                    self._finish(request, time.perf_counter() - started)
            if not moved:
                active[0][1].wait()
        result.seconds = time.perf_counter() - started
        all_stats = [engine.get_stats() for engine in self._engines]
        result.stats, result.pool_blocks = all_stats[0], all_stats[0].pool_blocks
        result.tiers = [tier for stats in all_stats for tier in stats.tiers]
        result.blocks_evicted = sum(stats.blocks_evicted for stats in all_stats)
        result.blocks_dropped = sum(stats.blocks_dropped for stats in all_stats)

    def _steps(self, request, engine, lane):
        """One request; yields each job that must be done before the next step."""
        num_blocks = len(request.hash_ids)
        if num_blocks == 0:
            return
        result = self._result
        keys = request.keys()
        words = key_words(keys)
        block_ids = lane.block_ids[:num_blocks]

        loaded = 0
        hits = engine.check_blocks(keys)
        leading, prefetched = hits.leading, None
        if self._is_remote and leading < num_blocks:  # what others wrote there is known when it has been asked for
            prefetched = engine.prefetch(keys, _PROMOTE_TIMEOUT_MS, _PROMOTE_TIMEOUT_MS)
            yield prefetched
            leading = prefetched.num_blocks
        elif hits.leading_anywhere > leading:
            leading = hits.leading_anywhere
            prefetched = engine.prefetch(keys[:leading], _PROMOTE_TIMEOUT_MS, _PROMOTE_TIMEOUT_MS)
            yield prefetched
        if leading:
            if self._verify:
                self._cache.poison(lane.first, leading, lane.stream)
                lane.stream.synchronize()  # so that the load's time is its own
                generations = self._generations_of(words[:leading])
                self._corrupt(engine, words[:leading], generations)
            self._loads.begin()
            job = engine.load_blocks(keys[:leading], block_ids[:leading], stream=lane.stream, prefetched=prefetched)
            yield job
            job.wait()
            self._loads.end()
            loaded = job.num_blocks
            if self._verify:
                result.wrong_blocks += self._cache.count_wrong(lane.first, words[:leading], generations, loaded)

        if loaded < num_blocks:
            if self._verify:
                generations = self._generations_of(words[loaded:]) + 1
                if self._has_tier:
                    generations[:] = 1
                self._cache.write(lane.first + loaded, words[loaded:], generations)
            self._saves.begin()
            job = engine.save_blocks(keys[loaded:], block_ids[loaded:], stream=lane.stream, after=keys[:loaded])
            if self._verify:
                new = job.statuses == kvortex.ReserveStatus.NEW
                self._generations.update(zip(words[loaded:][new].tolist(), generations[new].tolist(), strict=True))
            yield job
            job.wait()
            self._saves.end()
            result.blocks_saved += job.num_blocks

        engine.touch_blocks(keys)
        if self._flush:
            engine.flush()
        result.blocks_loaded += loaded
        result.blocks_from_tier += int(np.count_nonzero(~hits.mask[:loaded]))
        result.tokens_loaded += request.tokens(loaded)

    def _finish(self, request, seconds):
        result = self._result
        result.requests += 1
        result.blocks_touched += len(request.hash_ids)
        result.tokens += request.input_length
        result.seconds = seconds
        result.load_busy_s = self._loads.seconds
        result.save_busy_s = self._saves.seconds
        result.samples.append(
            (
                seconds,
                result.blocks_touched,
                result.blocks_loaded,
                result.blocks_saved,
                result.load_busy_s,
                result.save_busy_s,
            )
        )
        if self._progress is not None:
            self._progress(result)

    def _generations_of(self, words):
        known = self._generations
        return np.array([known.get(word, 0) for word in words.tolist()], dtype=np.uint32)

    def _corrupt(self, engine, words, generations):
        """Flip a byte in the slot of one block about to be loaded, for each corruption that is due."""
        pool, index, due = engine.pool, engine.index, self._corruptions_due
        for stamp in Oracle.stamps(words, generations, 0):
            if not due or due[0] > self._result.requests:
                return
            stamp = stamp.tobytes()
            if stamp in self._corrupted_stamps:
                continue
            for slot in range(pool.num_slots):
                block = pool.view(slot)
                if block[:STAMP_BYTES] == stamp and index.slot_info(slot)["state"] == "ready":
                    block[self._last_byte] ^= 0xFF
                    due.popleft()
                    self._corrupted_stamps.add(stamp)
                    self._result.corrupted_slots += 1
                    break
