"""KVortex beside LMCache 0.5.6 and its LocalCPUBackend: 50 000 entries of 4 KiB, the same keys, payload and threads.

KVortex is BlockIndex and the memory of a PinnedPool, in batches of 1 to 256. LMCache's batch calls are loops over its
single calls, so it is measured once. Keys are made beforehand on both sides, and come in random order.

contains        nothing is moved
get             the entry is pinned, its place handed out, and released; nothing is moved
get and copy    the same, and its 4 KiB are copied out
put             a place is allocated, 4 KiB are copied into it, the entry is published and released

Rows "through the engine" move the same bytes by `save_blocks` and `load_blocks`, which only submit: the copies run on
the host device's streams. Up to 32 jobs are in flight, and the round ends when all are done. (What one job takes from
call to done is in bench_engine.py.)

LMCache's backend needs neither a GPU nor its CUDA extensions: without them it takes plain memory.
"""

import ctypes
import multiprocessing
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kvortex
from kvortex.index import BlockIndex

NUM_ENTRIES = 50_000
ENTRY_BYTES = 4096
NUM_PINNED = 8_000
IN_A_ROUND = 4096
RECORDS = np.random.default_rng(7).integers(0, 256, (IN_A_ROUND, ENTRY_BYTES), dtype=np.uint8)
BATCHES = [1, 8, 64, 256]
MOST_JOBS = 32

pytestmark = pytest.mark.filterwarnings("ignore:.LoggingHandler:DeprecationWarning")  # one of LMCache's own


def drawn_keys(rng, n):
    return rng.integers(0, 256, (n, 32), dtype=np.uint8)


def finished(job):
    job.wait(60_000)
    return job.num_blocks


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Ours:
    """Index and pool, joined as an engine joins them, and copied into by the CPU."""

    name = "KVortex"

    def __init__(self, num_entries):
        self.pool = kvortex.PinnedPool(num_entries * ENTRY_BYTES, ENTRY_BYTES, "host")
        self.pool.wait_ready(60_000)
        nbytes = num_entries * ENTRY_BYTES
        memory = (ctypes.c_uint8 * nbytes).from_address(self.pool.address(0))
        self.memory = np.frombuffer(memory, dtype=np.uint8).reshape(num_entries, ENTRY_BYTES)
        self.index = BlockIndex(num_entries)
        self.index.add_slots(0, num_entries)

    def prepared(self, keys, records, batch):
        """Batches of keys and records, as the methods below take them."""
        parts = [slice(first, min(first + batch, len(keys))) for first in range(0, len(keys), batch)]
        return [(keys[part], records[part]) for part in parts]

    def contains(self, batches):
        return sum(self.index.lookup(keys)[1] for keys, _ in batches)

    def get(self, batches):
        done = 0
        for keys, _ in batches:
            slots = self.index.acquire(keys, ENTRY_BYTES)
            done += slots.size
            self.index.release(slots)
        return done

    def get_and_copy(self, batches):
        done = 0
        for keys, out in batches:
            slots = self.index.acquire(keys, ENTRY_BYTES)
            np.take(self.memory, slots, axis=0, out=out[: slots.size], mode="clip")  # the default mode copies twice
            done += slots.size
            self.index.release(slots)
        return done

    def put(self, batches):
        done = 0
        for keys, records in batches:
            slots, statuses = self.index.reserve(keys, ENTRY_BYTES)
            if statuses.any():
                raise RuntimeError("no slot for a new key")
            self.memory[slots] = records
            self.index.commit(slots)
            done += slots.size
        return done

    def pin_oldest(self, keys):
        assert self.index.acquire(keys, ENTRY_BYTES).size == len(keys)

    def remove(self, keys):
        self.index.discard(keys)

    def holds(self, keys, records):
        slots = self.index.acquire(keys, ENTRY_BYTES)
        same = slots.size == len(keys) and (self.memory[slots] == records).all()
        self.index.release(slots)
        return same

    def __len__(self):
        return self.index.num_ready

    def close(self):
        del self.memory
        self.pool.close()


class Engine(Ours):
    """The same through a KVortexEngine and its host device; the CPU's memory is source and target."""

    name = "KVortex engine"

    def __init__(self, num_entries):
        config = kvortex.KVortexConfig(
            cpu_pool_size_bytes=num_entries * ENTRY_BYTES, block_bytes=ENTRY_BYTES, device="host"
        )
        self.engine = kvortex.KVortexEngine.create(config)
        self.engine.wait_ready(60_000)
        self.index, self.pool = self.engine.index, self.engine.pool

    def prepared(self, keys, records, batch):
        places = records.ctypes.data + ENTRY_BYTES * np.arange(len(keys), dtype=np.uint64)
        parts = [slice(first, min(first + batch, len(keys))) for first in range(0, len(keys), batch)]
        return [(keys[part], places[part]) for part in parts]

    def put(self, batches):
        return self.move(self.engine.save_blocks, batches)

    def get_and_copy(self, batches):
        return self.move(self.engine.load_blocks, batches)

    def move(self, verb, batches):
        jobs, done = deque(), 0
        for keys, places in batches:
            if len(jobs) == MOST_JOBS:
                done += finished(jobs.popleft())
            jobs.append(verb(keys, data_ptrs=places, sizes=ENTRY_BYTES))
        return done + sum(map(finished, jobs))

    def holds(self, keys, records):
        out = np.zeros_like(records)
        return self.get_and_copy(self.prepared(keys, out, len(keys))) == len(keys) and (out == records).all()

    def close(self):
        self.engine.shutdown()


class LMCache:
    """LocalCPUBackend over its own allocator, as its storage manager calls it; needs no GPU and no CUDA extension."""

    name = "LMCache 0.5.6"

    def __init__(self, num_entries):
        os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR")
        try:
            import torch
            from lmcache.utils import CacheEngineKey
            from lmcache.v1.config import LMCacheEngineConfig
            from lmcache.v1.metadata import LMCacheMetadata
            from lmcache.v1.pin_monitor import PinMonitor
            from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        except ImportError as error:
            pytest.skip(f"LMCache cannot be imported, its rows are left out; pip install lmcache==0.5.6 ({error})")
        config = LMCacheEngineConfig.from_defaults(local_cpu=True, max_local_cpu_size=num_entries * ENTRY_BYTES / 2**30)
        # One layer of K and V, 16 tokens, 8 heads of 16 bytes: 4 KiB.
        metadata = LMCacheMetadata("model", 1, 1, 0, 0, torch.uint8, (1, 2, 16, 8, 16))
        self.backend = LocalCPUBackend(config, metadata)
        PinMonitor.GetOrCreate(config)
        self.backend.memory_allocator.buffer.fill_(0)  # touched, as a pool of ours is
        self.shape, self.dtype = torch.Size([2, 1, 16, 128]), torch.uint8
        self.key_class, self.from_numpy = CacheEngineKey, torch.from_numpy

    def keys_of(self, keys):
        hashes = np.ascontiguousarray(keys[:, :8]).view(np.uint64).ravel().tolist()
        return [self.key_class("model", 1, 0, chunk_hash, self.dtype) for chunk_hash in hashes]

    def prepared(self, keys, records, batch):
        return list(zip(self.keys_of(keys), self.from_numpy(records[: len(keys)]), strict=True))

    def contains(self, entries):
        contains, done = self.backend.contains, 0
        for key, _ in entries:
            done += contains(key)
        return done

    def get(self, entries):
        get_blocking, done = self.backend.get_blocking, 0
        for key, _ in entries:
            found = get_blocking(key)
            found.ref_count_down()
            done += 1
        return done

    def get_and_copy(self, entries):
        get_blocking, done = self.backend.get_blocking, 0
        for key, out in entries:
            found = get_blocking(key)
            out.copy_(found.raw_data)
            found.ref_count_down()
            done += 1
        return done

    def put(self, entries):
        backend, shape, dtype, done = self.backend, self.shape, self.dtype, 0
        for key, record in entries:
            made = backend.allocate(shape, dtype, busy_loop=False)
            made.raw_data.copy_(record)
            backend.submit_put_task(key, made)
            made.ref_count_down()
            done += 1
        return done

    def pin_oldest(self, keys):
        assert all(self.backend.pin(key) for key in self.keys_of(keys))

    def remove(self, keys):
        self.backend.batched_remove(self.keys_of(keys))

    def holds(self, keys, records):
        for key, record in zip(self.keys_of(keys), records, strict=True):
            found = self.backend.get_blocking(key)
            if found is None or not np.array_equal(found.raw_data.numpy(), record):
                return False
            found.ref_count_down()
        return True

    def __len__(self):
        return len(self.backend.hot_cache)

    def close(self):
        for key in self.backend.get_keys():  # an object that outlives its allocator writes into what was freed
            while self.backend.hot_cache[key].is_pinned:
                self.backend.unpin(key)
        self.backend.clear()
        self.backend.close()


class Threads:
    """A method run by n threads at once, each on its share of what there is to do."""

    def __init__(self, n):
        self.n = n
        self.threads = ThreadPoolExecutor(n) if n > 1 else None

    def run(self, method, shares):
        if self.n == 1:
            return method(shares[0])
        return sum(self.threads.map(method, shares))

    def close(self):
        if self.threads:
            self.threads.shutdown()


def on(threads, *sides):
    """Parameters: who, in which batches, by how many threads."""
    return [
        pytest.param(side, batch, threads, marks=pytest.mark.peer if side is LMCache else ())
        for side, batches in sides
        for batch in batches
    ]


ENTRIES = ("side", "batch", "num_threads")
PLACES = [*on(1, (Ours, BATCHES), (LMCache, [None])), *on(8, (Ours, [8, 64]), (LMCache, [None]))]
COPIES = [*on(1, (Ours, BATCHES), (Engine, BATCHES), (LMCache, [None]))]


@pytest.fixture
def num_entries(smoke):
    return NUM_ENTRIES // 8 if smoke else NUM_ENTRIES


@pytest.fixture
def filled(request, num_entries):
    """Make a cache of a side that lacks `room` entries to be full; and the keys in it, oldest first."""

    def fill(side, room=0):
        cache = side(num_entries)
        request.addfinalizer(cache.close)
        keys = drawn_keys(np.random.default_rng(1), num_entries - room)
        for first in range(0, len(keys), IN_A_ROUND):
            part = keys[first : first + IN_A_ROUND]
            assert cache.put(cache.prepared(part, RECORDS, 64)) == len(part)
        return cache, keys

    return fill


@pytest.fixture
def by_threads(num_threads):
    """Run a method by n threads at once, each on its share of the batches; the sum of what they return."""
    with ThreadPoolExecutor(num_threads) as threads:

        def run(method, batches):
            if num_threads == 1:
                return method(batches)
            return sum(threads.map(method, [batches[number::num_threads] for number in range(num_threads)]))

        yield run


@pytest.fixture
def describe(row, side, batch, num_threads):
    def name(operation, operations, target):
        group = f"{operation}, {num_threads} thread{'s' if num_threads > 1 else ''}"
        through = " through the engine" if side is Engine else ""
        row(
            f"{group}{through}, {'single calls' if batch == 1 else f'batch of {batch}'}",
            side=side.name,
            group=group,
            operations=operations,
            unit="keys",
            batch=batch,
            target=target if batch and batch >= 8 else None,
        )

    return name


@pytest.mark.parametrize("operation", ["contains", "get"])
@pytest.mark.parametrize(ENTRIES, PLACES)
def test_read(benchmark, describe, filled, by_threads, side, batch, operation):
    cache, keys = filled(side)
    describe(operation, IN_A_ROUND, "> 1x")
    rng = np.random.default_rng(2)

    def next_round():
        drawn = keys[rng.choice(len(keys), IN_A_ROUND, replace=False)]
        return (getattr(cache, operation), cache.prepared(drawn, RECORDS, batch)), {}

    assert benchmark.pedantic(by_threads, setup=next_round, rounds=30, warmup_rounds=3) == IN_A_ROUND
    assert cache.holds(keys[:IN_A_ROUND], RECORDS)


@pytest.mark.parametrize(ENTRIES, COPIES)
def test_get_and_copy(benchmark, describe, filled, by_threads, side, batch):
    cache, keys = filled(side)
    describe("get and copy 4 KiB", IN_A_ROUND, "> 1x")
    rng, out = np.random.default_rng(2), np.zeros_like(RECORDS)

    def next_round():
        out[:] = 0
        next_round.drawn = rng.choice(len(keys), IN_A_ROUND, replace=False)
        return (cache.get_and_copy, cache.prepared(keys[next_round.drawn], out, batch)), {}

    assert benchmark.pedantic(by_threads, setup=next_round, rounds=30, warmup_rounds=3) == IN_A_ROUND
    assert (out == RECORDS[next_round.drawn % IN_A_ROUND]).all()


@pytest.mark.parametrize(ENTRIES, COPIES + on(8, (Ours, [8, 64]), (LMCache, [None])))
def test_put(benchmark, describe, filled, by_threads, side, batch):
    cache, _ = filled(side, room=IN_A_ROUND)
    describe("put 4 KiB", IN_A_ROUND, ">= 10x")
    rng, before = np.random.default_rng(3), len(cache)
    drawn = drawn_keys(rng, 0)

    def next_round():
        nonlocal drawn
        cache.remove(drawn)
        drawn = drawn_keys(rng, IN_A_ROUND)
        return (cache.put, cache.prepared(drawn, RECORDS, batch)), {}

    assert benchmark.pedantic(by_threads, setup=next_round, rounds=10, warmup_rounds=1) == IN_A_ROUND
    assert cache.holds(drawn, RECORDS) and len(cache) == before + IN_A_ROUND


@pytest.mark.parametrize("num_pinned", [0, NUM_PINNED])
@pytest.mark.parametrize(ENTRIES, on(1, (Ours, BATCHES), (LMCache, [None])))
def test_put_into_full(benchmark, describe, filled, by_threads, smoke, num_entries, side, batch, num_pinned):
    cache, keys = filled(side)
    num_pinned = min(num_pinned, num_entries // 4)
    cache.pin_oldest(keys[:num_pinned])
    # LMCache looks past every pinned entry for each put: a round of 4 096 would take half a minute.
    operations = 64 if num_pinned and side is LMCache else IN_A_ROUND
    pinned = f"{num_pinned} oldest pinned" if num_pinned else "none pinned"
    describe(f"put 4 KiB into a full pool, {pinned}", operations, ">= 10x")
    rng = np.random.default_rng(4)

    def next_round():
        next_round.drawn = drawn_keys(rng, operations)
        return (cache.put, cache.prepared(next_round.drawn, RECORDS, batch)), {}

    assert benchmark.pedantic(by_threads, setup=next_round, rounds=5, warmup_rounds=1) == operations
    assert cache.holds(next_round.drawn, RECORDS[:operations]) and len(cache) == num_entries
    assert cache.holds(keys[:num_pinned], RECORDS[np.arange(num_pinned) % IN_A_ROUND])


def bytes_beside_payload(side, num_entries):
    """Growth of the resident set by a full cache, less its payload; the keys that the cache keeps are part of it."""
    side(64).close()  # whatever is loaded and made on first use
    before = resident_bytes()
    cache = side(num_entries)
    keys = drawn_keys(np.random.default_rng(1), num_entries)
    for first in range(0, num_entries, 64):
        cache.put(cache.prepared(keys[first : first + 64], RECORDS, 64))
    del keys
    assert len(cache) == num_entries
    return resident_bytes() - before - num_entries * ENTRY_BYTES


@pytest.mark.parametrize("side", [Ours, pytest.param(LMCache, marks=pytest.mark.peer)])
def test_memory_of_an_entry(benchmark, row, num_entries, side):
    side(64).close()  # or skips
    # In a process of its own: memory that other benchmarks gave back would be used again, and not be seen.
    with multiprocessing.get_context("spawn").Pool(1) as process:
        grown = benchmark.pedantic(process.apply, args=(bytes_beside_payload, (side, num_entries)), rounds=1)
    row(
        "host memory of an entry beyond its payload",
        side=side.name,
        group="memory",
        value=grown / num_entries,
        unit="B",
        target="> 1x",
    )
    assert 0 < grown / num_entries < ENTRY_BYTES
