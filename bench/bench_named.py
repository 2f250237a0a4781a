"""Six workloads that cache makers publish figures of, by their usual names, so that anyone can compare.

On the host device sizes are scaled down to what a small machine holds; the names say the real ones. Data is random.
"""

import ctypes
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from kvcache import DeviceCache, keys_of, make_engine

import kvortex

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NOISE = np.random.default_rng(11).integers(0, 256, 2 * MIB, dtype=np.uint8)


def record(number, nbytes):
    """Random bytes that differ for every number below 16 384."""
    start = number * 64
    return NOISE[start : start + nbytes]


def size_text(nbytes):
    return f"{nbytes // GIB} GiB" if nbytes >= GIB else f"{nbytes // MIB} MiB"


@pytest.fixture
def scaled(device, smoke):
    """The size for this device, and a far smaller one where nothing is timed."""

    def choose(cuda, host, in_smoke):
        return in_smoke if smoke else host if device.is_host else cuda

    return choose


@pytest.fixture
def named(benchmark, row):
    """Name a benchmark after the size it really has."""

    def name(what, **extra):
        benchmark.name = what
        row(what, **extra)

    return name


def test_pin(benchmark, named, scaled, device):
    nbytes = scaled(16 * GIB, 1 * GIB, 64 * MIB)
    named(f"pin {size_text(nbytes)}", operations=nbytes, unit="bytes")
    pools = []

    def close_the_last():
        while pools:
            pools.pop().close()

    def pin():
        pools.append(kvortex.PinnedPool(nbytes, 2 * MIB, device))
        pools[0].wait_ready(600_000)

    benchmark.pedantic(pin, setup=close_the_last, rounds=3)
    (pool,) = pools
    assert pool.bytes_ready == nbytes
    # The driver's copies reach the pool, and find there what the CPU wrote: first, last and 30 other slots.
    slots = np.random.default_rng(10).permutation(np.arange(1, pool.num_slots - 1))[:30]
    with kvortex.DeviceBuffer(2 * MIB, device) as there:
        found = np.empty(2 * MIB, dtype=np.uint8)
        for slot in (0, *slots, pool.num_slots - 1):
            with pool.view(slot) as view:
                view[:] = np.roll(NOISE, slot).tobytes()
                there.copy_from(view)
            there.copy_to(found)
            assert (found == np.roll(NOISE, slot)).all()
    close_the_last()


def test_d2h_on_three_streams(benchmark, named, scaled, device, stream):
    nbytes = scaled(1 * GIB, 256 * MIB, 8 * MIB)
    named(f"{size_text(nbytes)} D2H on 3 streams", operations=nbytes, unit="bytes")
    num_blocks = nbytes // MIB
    cache = DeviceCache(device, "cross_layer", num_blocks, 16, 32 * KIB)
    rng = np.random.default_rng(12)
    blocks, slots = rng.permutation(num_blocks), rng.permutation(num_blocks)
    for block in range(num_blocks):
        cache.write(block, record(block, MIB))
    queues = [kvortex.TransferQueue(device, "D2H") for _ in range(3)]
    with kvortex.PinnedPool(nbytes, MIB, device) as pool:
        pool.wait_ready(600_000)
        shares = list(zip(queues, np.array_split(blocks, 3), np.array_split(slots, 3), strict=True))

        def save():
            jobs = [queue.submit(cache.layout, ours, pool, places, stream=stream) for queue, ours, places in shares]
            for job in jobs:
                job.wait(60_000)
            return sum(job.num_blocks for job in jobs)

        assert benchmark.pedantic(save, rounds=10, warmup_rounds=1) == num_blocks
        for block, slot in zip(blocks, slots, strict=True):
            with pool.view(slot) as view:
                assert (np.frombuffer(view, dtype=np.uint8) == record(block, MIB)).all()
    for queue in queues:
        queue.close()
    cache.close()


def test_blocks_of_one_mib_saved_and_loaded(benchmark, named, scaled, device, stream):
    num_blocks = scaled(1000, 1000, 20)
    named(f"{num_blocks} blocks of 1 MiB saved and loaded", operations=2 * num_blocks * MIB, unit="bytes")
    cache = DeviceCache(device, "one_allocation", num_blocks, 16, 32 * KIB)
    rng, keys = np.random.default_rng(13), keys_of(range(num_blocks))
    sources, targets = rng.permutation(num_blocks), rng.permutation(num_blocks)
    with make_engine(cache, num_blocks) as engine:

        def renew():
            engine.discard_blocks(rng.permutation(keys))  # which shuffles the slots
            for number, block in enumerate(sources):
                cache.write(block, record(number, MIB))

        def save_and_load():
            saved = engine.save_blocks(keys, sources, stream=stream)
            saved.wait(60_000)
            loaded = engine.load_blocks(keys, targets, stream=stream)
            loaded.wait(60_000)
            return saved.num_blocks, loaded.num_blocks

        moved = benchmark.pedantic(save_and_load, setup=renew, rounds=5, warmup_rounds=1)
        assert moved == (num_blocks, num_blocks)
    for number, block in enumerate(targets):
        assert cache.read(block) == record(number, MIB).tobytes()
    cache.close()


def test_pool_of_ten_kib_evicts(benchmark, named, device, stream):
    """Slots are aligned to 4 KiB, so 10 KiB hold two blocks of 512 bytes: of 20 saved one by one the last two stay."""
    named("a 10 KiB pool, 20 blocks of 512 bytes saved, 18 evicted", operations=20, unit="blocks")
    cache = DeviceCache(device, "one_allocation", num_blocks=40, num_layers=1, piece_bytes=256)
    for block in range(20):
        cache.write(block, record(block, 512))
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=10 * KIB, device=device.name)
    keys = keys_of(range(20))
    with kvortex.KVortexEngine.create(config, layout=cache.layout) as engine:
        assert engine.pool.num_slots == 2
        evicted_before = 0

        def forget():
            nonlocal evicted_before
            engine.clear()
            evicted_before = engine.index.counters()["evictions"]

        def save():
            for block in range(20):
                engine.save_blocks(keys[block : block + 1], [block], stream=stream).wait(60_000)

        benchmark.pedantic(save, setup=forget, rounds=50, warmup_rounds=5)
        assert engine.index.counters()["evictions"] - evicted_before == 18
        assert engine.check_blocks(keys).mask.tolist() == [False] * 18 + [True] * 2
        cache.fill(0xEE)
        engine.load_blocks(keys[18:], [38, 39], stream=stream).wait(60_000)
        assert [cache.read(block) for block in (38, 39)] == [record(block, 512).tobytes() for block in (18, 19)]
    cache.close()


def test_keys_of_a_thousand_tokens(benchmark, named):
    named("keys of 1 000 tokens, blocks of 16", operations=1000, unit="tokens")
    tokens = np.random.default_rng(14).integers(0, 128_000, 1000).astype(np.uint32)
    keys = benchmark.pedantic(kvortex.block_keys, args=(tokens, 16), rounds=200, iterations=50, warmup_rounds=2)
    assert keys.shape == (62, 32)  # the last 8 tokens fill no block
    parent = hashlib.sha256(b"kvortex-keys-v1" + bytes([16, 0, 0, 0, 0, 0, 0, 0])).digest()
    for number, key in enumerate(keys):
        parent = hashlib.sha256(parent + tokens[16 * number : 16 * number + 16].astype("<u4").tobytes()).digest()
        assert key.tobytes() == parent


def held(engine):
    """Everything that a leak would show in: resident bytes, file descriptors, slots by state, jobs in flight."""
    ctypes.CDLL(None).malloc_trim(0)  # or a leak would first use up what other benchmarks have freed
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    index = engine.index
    slots = (index.num_free + index.num_ready, index.num_writing, index.num_pinned)
    return resident, len(os.listdir("/proc/self/fd")), slots, sum(queue.jobs_in_flight for queue in engine.queues)


def test_eight_threads_without_a_leak(benchmark, named, smoke, device):
    """Save, check, load into another block, touch and discard, in turn; each thread on blocks and keys of its own."""
    num_operations, rounds = (50, 1) if smoke else (1000, 10)
    named(f"8 threads x {num_operations} operations", operations=8 * num_operations, unit="operations")
    cache = DeviceCache(device, "one_allocation", num_blocks=8 * 8, num_layers=2, piece_bytes=1 * KIB)
    for block in range(8 * 8):
        cache.write(block, record(block, 4 * KIB))

    def work(engine, thread):
        """Blocks 0 to 3 of the thread's eight are sources, the others targets."""
        first, wrong = 8 * thread, 0
        sources, targets = np.arange(first, first + 4), np.arange(first + 4, first + 8)
        keys = keys_of(sources)
        with kvortex.Stream.create(device) as stream:
            for number in range(num_operations // 5):
                engine.save_blocks(keys, sources, stream=stream).wait(60_000)
                run = engine.check_blocks(keys).leading
                job = engine.load_blocks(keys[:run], np.roll(targets, number)[:run], stream=stream)
                job.wait(60_000)
                engine.touch_blocks(keys)
                if job.num_blocks != 4:  # nothing is evicted: the pool holds every key
                    wrong += 1
                elif number % 50 == 0 or number == num_operations // 5 - 1:
                    places = np.roll(targets, number)
                    wrong += sum(cache.read(at) != cache.read(of) for at, of in zip(places, sources, strict=True))
                engine.discard_blocks(keys)
        return wrong

    with make_engine(cache, 64) as engine, ThreadPoolExecutor(8) as threads:

        def run():
            return sum(threads.map(work, [engine] * 8, range(8)))

        assert run() == 0  # threads, their stacks and their arenas are there from now on
        before = held(engine)
        assert benchmark.pedantic(run, rounds=rounds, warmup_rounds=0) == 0
        after = held(engine)
        assert after[1:] == before[1:] == (before[1], (64, 0, 0), 0), (before, after)
        # A clean run grows by some 10 KiB; 64 bytes lost in each of the 16 000 turns would be 1 MB.
        assert after[0] - before[0] < 512 * KIB, (before, after)
    for block in range(8 * 8):
        assert block % 8 >= 4 or cache.read(block) == record(block, 4 * KIB).tobytes()
    cache.close()
