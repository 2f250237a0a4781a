"""Eight Python threads on one index; what must hold while they run and after they stopped."""

import threading

import numpy as np
import pytest

THREADS = 8
OPERATIONS = 2500
NUM_SLOTS = 64
NUM_KEYS = 160


@pytest.fixture
def run_threads():
    def run(target, count=THREADS):
        failures = []

        def guarded(number):
            try:
                target(number)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    return run


def test_eight_threads_never_share_a_slot_and_leave_the_counters_whole(make_index, make_keys, run_threads):
    """Whoever writes a slot stamps it; whoever pins one must find the stamp of its key, before and after a pause."""
    index, keys = make_index(NUM_SLOTS), make_keys(*range(NUM_KEYS))
    stamps = np.full(NUM_SLOTS, -1)

    def work(number):
        rng = np.random.default_rng([7, number])
        for _ in range(OPERATIONS):
            chosen = rng.integers(0, NUM_KEYS, rng.integers(1, 12))
            choice = rng.integers(0, 100)
            if choice < 45:
                slots, statuses = index.reserve(keys[chosen], 100)
                new = statuses == 0
                stamps[slots[new]] = -1
                if rng.integers(0, 8) == 0:
                    index.abort(slots[new])
                else:
                    stamps[slots[new]] = chosen[new]
                    index.commit(slots[new])
            elif choice < 85:
                slots = index.acquire(keys[chosen], 100)
                assert (stamps[slots] == chosen[: len(slots)]).all()
                index.lookup(keys)
                assert (stamps[slots] == chosen[: len(slots)]).all()
                index.release(slots)
            elif choice < 92:
                index.touch(keys[chosen])
            elif choice < 97:
                index.discard(keys[chosen])
            elif choice < 99:
                index.evict(3)
            else:
                index.clear()

    run_threads(work)
    now = index.counters()
    assert (now["num_writing"], now["num_pinned"]) == (0, 0)
    assert now["num_free"] + now["num_ready"] == NUM_SLOTS
    mask, _ = index.lookup(keys)
    assert mask.sum() == now["num_ready"]
    ready = np.flatnonzero(mask)
    slots = [index.acquire(keys[i : i + 1])[0] for i in ready]
    assert len(set(slots)) == len(slots)
    assert stamps[slots].tolist() == ready.tolist()
    assert index.evict(NUM_SLOTS) == 0
    index.release(slots)
    assert index.evict(NUM_SLOTS) == len(slots)
    assert index.num_free == NUM_SLOTS


def test_pins_of_eight_threads_add_up(make_index, make_keys, run_threads):
    index, keys = make_index(512), make_keys(*range(512))
    index.commit(index.reserve(keys, 100)[0])

    def work(number):
        for _ in range(1000):
            slots = index.acquire(keys)
            assert len(slots) == 512
            index.release(slots)
            index.touch(keys)

    run_threads(work)
    assert index.num_pinned == 0
    assert index.evict(1000) == 512
    assert index.counters()["hits"] == THREADS * 1000 * 512


def test_a_reader_never_misses_a_resident_key_nor_finds_an_uncommitted_one(make_index, make_keys, run_threads):
    index = make_index(32)
    resident, never = make_keys(*range(8)), make_keys(*range(1000, 1024))
    slots, _ = index.reserve(resident, 100)
    index.commit(slots, pin=True)
    stopped = threading.Event()

    def work(number):
        if number > 0:
            while not stopped.is_set():
                assert index.lookup(resident)[1] == 8
                assert not index.lookup(never)[0].any()
            return
        try:
            for i in range(OPERATIONS):
                index.abort(index.reserve(never, 100)[0])
                slots, _ = index.reserve(make_keys(*range(2000 + i, 2012 + i)), 100)
                index.commit(slots[slots < 32])
                index.evict(12)
        finally:
            stopped.set()

    run_threads(work, 4)
