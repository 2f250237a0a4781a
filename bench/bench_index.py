"""Index: batches of 512 keys against a million blocks, at random.

The order of the blocks in memory, of their use and of the lookups have nothing to do with each other, so that nearly
every block is a cache miss; what is shown includes the Python call.
"""

import os
import statistics
import threading
import time

import numpy as np
import pytest

from kvortex.index import BlockIndex

NUM_SLOTS = 1 << 20
BATCH = 512
LENGTH = 4096
ROUNDS = {"rounds": 2000, "warmup_rounds": 50}
RATE = {"operations": BATCH, "unit": "keys"}


def random_keys(seed, n):
    return np.random.default_rng(seed).integers(0, 256, (n, 32), dtype=np.uint8)


@pytest.fixture(scope="module")
def keys():
    return random_keys(1, NUM_SLOTS)


@pytest.fixture(scope="module")
def batches(keys):
    """A function: endlessly the next batch, so that its entries are not in the processor's cache already."""
    order = np.random.default_rng(2).permutation(NUM_SLOTS).reshape(-1, BATCH)
    shuffled = [keys[rows] for rows in order]

    def next_batch():
        shuffled.append(shuffled.pop(0))
        return (shuffled[-1],), {}

    return next_batch


@pytest.fixture
def index(keys):
    full = BlockIndex(NUM_SLOTS)
    fill(full, keys)
    return full


def fill(index, keys):
    index.add_slots(0, NUM_SLOTS)
    index.commit(index.reserve(keys, LENGTH)[0])
    index.touch(np.random.default_rng(3).permutation(keys))


def fresh_batches(seed):
    fresh = random_keys(seed, 64 * BATCH).reshape(64, BATCH, 32)
    turn = 0

    def next_batch():
        nonlocal turn
        turn += 1
        fresh[turn % 64, :, :8] += 1  # another word in every key: none of them was there before
        return (fresh[turn % 64],), {}

    return next_batch


def save(index, batch):
    return index.commit(index.reserve(batch, LENGTH)[0])


def test_lookup(benchmark, row, index, batches):
    row("lookup of 512 among 1 M entries", **RATE, target=">= 20 M")
    _, leading = benchmark.pedantic(index.lookup, setup=batches, **ROUNDS)
    assert leading == BATCH


def test_lookup_of_missing_keys(benchmark, row, index):
    row("lookup of 512 missing keys among 1 M entries", **RATE)
    mask, leading = benchmark.pedantic(index.lookup, setup=fresh_batches(4), **ROUNDS)
    assert leading == 0
    assert not mask.any()


def test_python_call_of_a_lookup(benchmark, index, keys):
    """What a call costs beside the keys: a batch of none. Divide nothing."""
    assert benchmark(index.lookup, keys[:0])[1] == 0


def test_touch(benchmark, row, index, batches):
    row("touch of 512 among 1 M entries", **RATE)
    assert benchmark.pedantic(index.touch, setup=batches, **ROUNDS) == BATCH


def test_lookup_with_touch(benchmark, row, index, batches):
    row("lookup with touch and bitmask of 512 among 1 M entries", **RATE, target=">= 12 M")
    mask, leading = benchmark.pedantic(lambda batch: index.lookup(batch, touch=True), setup=batches, **ROUNDS)
    assert leading == BATCH == mask.sum()


def test_acquire_and_release(benchmark, row, index, batches):
    row("acquire and release of 512 among 1 M entries", **RATE)

    def pin_and_unpin(batch):
        slots = index.acquire(batch, LENGTH)
        index.release(slots)
        return slots

    assert benchmark.pedantic(pin_and_unpin, setup=batches, **ROUNDS).size == BATCH
    assert index.num_pinned == 0


def test_reserve_and_commit_with_eviction(benchmark, row, index):
    row("reserve and commit of 512, evicting", **RATE, target=">= 4 M")
    statuses = benchmark.pedantic(lambda batch: save(index, batch), setup=fresh_batches(5), **ROUNDS)
    assert not statuses.any()
    require_full(index)


def test_reserve_and_commit_with_the_oldest_blocks_pinned(benchmark, row, index, keys):
    """No save may have to step over a pinned block. In turn with an index where none is pinned, or else what is seen is
    how the machine was doing a second ago."""
    pinned, oldest = BlockIndex(NUM_SLOTS), np.random.default_rng(3).permutation(keys)[-8000:]
    fill(pinned, keys)
    assert pinned.acquire(oldest).size == 8000
    next_batch, seconds = fresh_batches(5), []

    def save_to_the_other_first():
        batch, other_batch = next_batch()[0][0], next_batch()[0][0]
        start = time.perf_counter()
        save(index, other_batch)
        seconds.append(time.perf_counter() - start)
        return (batch,), {}

    statuses = benchmark.pedantic(lambda batch: save(pinned, batch), setup=save_to_the_other_first, **ROUNDS)
    assert not statuses.any()
    require_full(index)
    require_full(pinned)
    assert pinned.lookup(oldest)[1] == 8000
    row(
        "reserve and commit of 512, evicting, 8 000 oldest pinned",
        **RATE,
        against="none pinned, in turn",
        ratio=statistics.median(seconds) / benchmark.stats.stats.median if benchmark.stats else None,
        target=">= 0.9x",
    )


def require_full(index):
    now = index.counters()
    assert now["num_ready"] == NUM_SLOTS
    assert now["evictions"] == now["reserved"] - NUM_SLOTS > 0


def lookups_per_second(index, batches, num_threads):
    """Every thread looks up all batches, beginning with its own."""
    barrier, found = threading.Barrier(num_threads + 1), [0] * num_threads

    def look_up(number):
        barrier.wait()
        for i in range(len(batches)):
            found[number] += index.lookup(batches[(i + 3 * number) % len(batches)])[1]

    threads = [threading.Thread(target=look_up, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    assert sum(found) == num_threads * sum(map(len, batches))
    return sum(found) / seconds


def test_memory_of_a_slot(benchmark, row):
    made = benchmark.pedantic(BlockIndex, args=(NUM_SLOTS,), rounds=1)
    row("memory of a slot beyond its payload", value=made.memory_bytes / NUM_SLOTS, unit="B", target="<= 80 B")
    assert made.memory_bytes >= 64 * NUM_SLOTS


def test_lookups_by_many_threads_beside_a_writer(benchmark, row, index, keys):
    """Eight threads (or as many as there are cores) against one, a writer running all the while.

    The batches are large, 16 384 keys, so that the threads meet in the index and not at the interpreter's lock; what
    they look for is pinned, so that the writer cannot evict it.
    """
    num_threads, repeats = min(8, os.cpu_count()), 5
    wanted = np.random.default_rng(6).permutation(keys)[: 32 * 16384]
    index.acquire(wanted)
    batches, stop, fresh = np.split(wanted, 32), threading.Event(), fresh_batches(7)

    def write():
        while not stop.is_set():
            save(index, fresh()[0][0])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        single, many = [], []

        def compare():
            single.append(lookups_per_second(index, batches, 1))
            many.append(lookups_per_second(index, batches, num_threads))

        benchmark.pedantic(compare, rounds=repeats, warmup_rounds=1)
    finally:
        stop.set()
        writer.join()
    one, all_of_them = statistics.median(single), statistics.median(many)
    row(
        f"lookups by {num_threads} threads beside a writer",
        value=all_of_them,
        unit="keys/s",
        against="1 thread",
        ratio=all_of_them / one,
        target=">= 5x" if os.cpu_count() >= 16 else None,
    )
