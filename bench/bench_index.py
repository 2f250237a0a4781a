"""Index: batches of 256 keys against a quarter of a million blocks. Divide 256 by the times shown."""

import numpy as np
import pytest

from kvortex.index import BlockIndex

NUM_SLOTS = 1 << 18
BATCH = 256
LENGTH = 4096


@pytest.fixture(scope="module")
def keys():
    return np.random.default_rng(1).integers(0, 256, (NUM_SLOTS, 32), dtype=np.uint8)


@pytest.fixture
def index(keys):
    full = BlockIndex(NUM_SLOTS)
    full.add_slots(0, NUM_SLOTS)
    full.commit(full.reserve(keys, LENGTH)[0])
    return full


@pytest.fixture
def batches(keys):
    """Batches in random order, endlessly, so that entries are not in the processor's cache already."""
    order = np.random.default_rng(2).permutation(NUM_SLOTS).reshape(-1, BATCH)
    shuffled = [keys[rows] for rows in order]

    def next_batch():
        shuffled.append(shuffled.pop(0))
        return (shuffled[-1],), {}

    return next_batch


def test_lookup(benchmark, index, batches):
    _, leading = benchmark.pedantic(index.lookup, setup=batches, rounds=2000, warmup_rounds=10)
    assert leading == BATCH


def test_lookup_of_missing_keys(benchmark, index):
    missing = np.random.default_rng(3).integers(0, 256, (BATCH, 32), dtype=np.uint8)
    mask, leading = benchmark.pedantic(index.lookup, args=(missing,), rounds=2000, warmup_rounds=10)
    assert leading == 0
    assert not mask.any()


def test_touch(benchmark, index, batches):
    assert benchmark.pedantic(index.touch, setup=batches, rounds=2000, warmup_rounds=10) == BATCH


def test_acquire_and_release(benchmark, index, batches):
    def pin_and_unpin(batch):
        slots = index.acquire(batch, LENGTH)
        index.release(slots)
        return slots

    assert benchmark.pedantic(pin_and_unpin, setup=batches, rounds=2000, warmup_rounds=10).size == BATCH
    assert index.num_pinned == 0


def test_reserve_and_commit_with_eviction(benchmark, index):
    rng = np.random.default_rng(4)

    def fresh_batch():
        return (rng.integers(0, 256, (BATCH, 32), dtype=np.uint8),), {}

    def save(batch):
        return index.commit(index.reserve(batch, LENGTH)[0])

    statuses = benchmark.pedantic(save, setup=fresh_batch, rounds=2000, warmup_rounds=10)
    assert not statuses.any()
    now = index.counters()
    assert now["num_ready"] == NUM_SLOTS
    assert now["evictions"] == now["reserved"] - NUM_SLOTS > 0
