"""A tier that finds what an earlier process left, while it already serves."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tier_rig import (
    ALL,
    NUM_SLOTS,
    OTHER_TAG,
    PAYLOAD_BYTES,
    SECONDS,
    SEGMENT_BYTES,
    SPACE,
    TAG,
    DiskRig,
    MemoryRig,
    block,
    keys_of,
    load,
    quota_of,
    save,
    statuses_of,
)

from kvortex import ConfigError
from kvortex.tiers.base import BUSY, HIT, MISS, BlockStatus
from kvortex.tiers.disk._io_calls import IoCalls
from kvortex.tiers.disk.tier import DiskTier, OpenDiskTier

SOAK = os.environ.get("KVORTEX_SOAK") == "1"


@pytest.mark.parametrize("io", ["threads", "aio"])
def test_what_was_saved_is_found_after_a_restart(open_tier, pool, io):
    with open_tier(io=io) as tier:
        assert tier.store.stats()["io_engine"] == io
        save(tier, pool, ALL)
        where = load(tier, pool, ALL)
        assert len(where) == NUM_SLOTS
    with open_tier(io=io) as tier:
        assert load(tier, pool, ALL) == where
        assert (tier.adoption.num_scanned, tier.adoption.num_adopted) == (NUM_SLOTS, NUM_SLOTS)
        assert tier.look_up(keys_of([*ALL, 99])).tolist() == [HIT] * NUM_SLOTS + [MISS]


def test_a_block_that_is_being_written_is_busy(open_tier):
    with open_tier() as tier:
        slots, _ = tier.catalogue.reserve(keys_of([1]), PAYLOAD_BYTES)
        assert tier.look_up(keys_of([1, 2])).tolist() == [BUSY, MISS]
        tier.catalogue.abort(slots)
        assert tier.look_up(keys_of([1])).tolist() == [MISS]


def test_a_new_tier_is_free_at_once_without_a_scan(open_tier, pool):
    with open_tier(wait=False) as tier:
        assert tier.catalogue.num_free == NUM_SLOTS
        assert tier.store.stats()["scan"] == {}


def test_blocks_of_other_weights_are_free_room(open_tier, pool):
    with open_tier() as tier:
        save(tier, pool, ALL)
    with open_tier(tag=OTHER_TAG) as tier:
        assert load(tier, pool, ALL) == {} and tier.catalogue.num_free == NUM_SLOTS
    with open_tier() as tier:  # erased by nobody: the folder may go back to these weights
        assert len(load(tier, pool, ALL)) == NUM_SLOTS


def test_a_discarded_and_flushed_block_does_not_come_back(open_tier, pool):
    with open_tier() as tier:
        save(tier, pool, ALL)
        assert tier.discard(keys_of([3, 99])) == 1
        assert tier.store.flush(SECONDS) == 0
    with open_tier() as tier:
        assert sorted(load(tier, pool, ALL)) == [i for i in ALL if i != 3]


def test_a_copy_that_a_failed_put_left_behind_does_not_come_back(open_tier, pool, monkeypatch):
    """Key 0 is evicted, the put into its slot fails, key 0 goes elsewhere and is discarded: no old copy may be left."""
    with open_tier() as tier:
        save(tier, pool, ALL)
        first = tier.catalogue.slots_of(keys_of([0]))
        slots, _ = tier.catalogue.reserve(keys_of([100]), PAYLOAD_BYTES)  # evicts the coldest
        evicted = [i for i in ALL if tier.look_up(keys_of([i])) == MISS]
        assert len(evicted) == 1 and len(first)
        tier.store.erase(slots, timeout_ms=None)  # as where a put failed
        tier.catalogue.abort(slots)
        save(tier, pool, evicted)
        tier.discard(keys_of(evicted))
        tier.store.flush(SECONDS)
    with open_tier() as tier:
        assert sorted(load(tier, pool, ALL)) == [i for i in ALL if i not in evicted]


@pytest.fixture
def half_scanned(pool):
    """A filled store whose scan stands still until it is told to go on, and what is adopted of it."""

    rig = MemoryRig()
    rig.put(ALL, ALL)
    scan, store = rig.store.scan, rig.store
    gate, arrived = threading.Event(), threading.Event()

    def held(slots, **kwargs):
        batch = scan(slots, **kwargs)
        arrived.set()
        gate.wait()
        return batch

    store.scan = held
    tier = OpenDiskTier(store, TAG)
    arrived.wait()
    yield rig, tier, gate
    gate.set()
    tier.close()
    rig.close()


def finish(tier, gate):
    gate.set()
    assert tier.adoption.wait(SECONDS)
    return [i for i in ALL if tier.look_up(keys_of([i])) == HIT]


def test_until_its_header_is_read_a_block_is_a_miss(half_scanned):
    rig, tier, gate = half_scanned
    assert tier.look_up(keys_of(ALL)).tolist() == [MISS] * NUM_SLOTS
    assert finish(tier, gate) == [*ALL]


def test_what_is_discarded_during_the_scan_is_not_adopted_and_erased(half_scanned):
    rig, tier, gate = half_scanned
    tier.discard(keys_of([3, 4]))
    assert finish(tier, gate) == [i for i in ALL if i not in (3, 4)]
    assert rig.get([3, 4, 5], [3, 4, 5]) == [BlockStatus.MISSING] * 2 + [block(5)]
    assert tier.catalogue.num_free == 2


def test_what_is_cleared_during_the_scan_is_not_adopted(half_scanned):
    rig, tier, gate = half_scanned
    tier.clear(OTHER_TAG)
    assert finish(tier, gate) == [] and tier.catalogue.num_free == NUM_SLOTS


def test_of_two_copies_one_is_adopted_and_the_other_erased(half_scanned):
    rig, tier, gate = half_scanned
    rig.put([8], [7])  # read before: what the scan brought is older than what lies there
    assert finish(tier, gate) == [*ALL]
    batch = tier.store.get([8], [40], keys_of([8]), PAYLOAD_BYTES, tag=TAG, timeout_ms=SECONDS)
    assert statuses_of(batch) == [BlockStatus.KEY_DIFFERS]


def test_duplicates_on_the_disk_count_once(open_tier, pool):
    with open_tier() as tier:
        for slot in (2, 5, 30):
            pool.view(0)[:] = block(1)
            tier.store.put([slot], [0], keys_of([1]), PAYLOAD_BYTES, tag=TAG, timeout_ms=SECONDS).wait()
    with open_tier() as tier:
        assert load(tier, pool, [1]) == {1: 2}
        assert tier.catalogue.num_ready == 1 and tier.catalogue.num_free == NUM_SLOTS - 1
        tier.store.flush(SECONDS)
        scan = tier.store.scan(ALL, tag=TAG, timeout_ms=SECONDS)
        assert np.flatnonzero(scan.wait() == BlockStatus.OK).tolist() == [2]


def test_closing_does_not_wait_for_the_scan(half_scanned):
    rig, tier, gate = half_scanned
    tier.store.close()
    gate.set()
    tier.adoption.stop()
    assert tier.adoption.is_over


def test_closing_a_tier_whose_disk_hangs_takes_no_longer_than_it_may(tmp_path, pool, faulty):
    rig = DiskRig(tmp_path, pool=pool, calls=IoCalls(faulty.address))
    folder = rig.segments.folders[0]
    faulty.plan("read", "hang")
    tier = OpenDiskTier(rig.store, TAG, folder=folder)
    faulty.wait_hanging()
    start = time.monotonic()
    tier.close(timeout_ms=200)
    assert time.monotonic() - start < 4  # the scan alone would wait 5 s
    assert not os.path.exists(os.path.join(folder, "manifest.sqlite"))
    faulty.mend()


@pytest.mark.parametrize("how", ["EIO", "short", "nothing", "lie"])
def test_headers_that_cannot_be_read_are_free_room(tmp_path, pool, faulty, how):
    rig = DiskRig(tmp_path, pool=pool)
    rig.put(ALL, ALL)
    rig.store.close()
    rig = DiskRig(tmp_path, pool=pool, calls=IoCalls(faulty.address))
    for nth in (1, 2, 20):
        faulty.plan("read", how, nth, count=1)
        tier = OpenDiskTier(rig.store, TAG)
        assert tier.adoption.wait(SECONDS)
        assert tier.catalogue.num_ready + tier.catalogue.num_free == NUM_SLOTS
        assert tier.catalogue.num_ready >= NUM_SLOTS - 1
        faulty.mend()
        assert len(load(tier, pool, ALL)) >= NUM_SLOTS - 1
    rig.store.close()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"paths": ["a", "a"]}, "paths must differ, got a, a"),
        ({"paths": "a", "disk_bytes": 0}, r"disk_bytes must be larger than 0 and at most 2\^50, got 0"),
        ({"paths": "a", "disk_bytes": "9999T"}, r"disk_bytes must be larger than 0 and at most 2\^50, got 9999"),
        ({"paths": "a", "io": "uring"}, "io must be 'threads' or 'aio', got 'uring'"),
        ({"paths": "a", "segment_bytes": -1}, r"segment_bytes must be larger than 0 and at most 2\^50, got -1"),
    ],
)
def test_a_tier_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DiskTier(**{"disk_bytes": 1 << 30, **settings})


def test_the_quota_is_that_of_all_ranks_and_replicas(tmp_path, pool):
    settings = DiskTier(tmp_path, disk_bytes=4 * quota_of(20), segment_bytes=SEGMENT_BYTES)
    tiers = [
        settings.open(pool, namespace=SPACE, rank=rank, num_ranks=2, replica=replica, num_replicas=2)
        for rank in range(2)
        for replica in range(2)
    ]
    assert [tier.store.num_slots for tier in tiers] == [20] * 4
    for tier in tiers:
        tier.close()


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

WRITERS = """
import os, sys
from pathlib import Path
import numpy as np
from tier_rig import NUM_SLOTS, SEGMENT_BYTES, SPACE, make_pool, quota_of, save
from kvortex.tiers.disk.tier import DiskTier

def write(path, tag, rng):
    pool = make_pool()
    settings = DiskTier(path, disk_bytes=quota_of(NUM_SLOTS), segment_bytes=SEGMENT_BYTES)
    tier = settings.open(pool, namespace=SPACE, tag=tag)
    print(os.getpid(), flush=True)
    while True:
        save(tier, pool, rng.permutation(3 * NUM_SLOTS)[:8])
        print("saved", flush=True)
        if rng.integers(32) == 0:
            tier.clear(rng.bytes(32))  # what is saved now dies with this process

for line in sys.stdin:  # a process for each, without the price of an interpreter; nothing is open yet
    tag, seed = line.split()
    if os.fork() == 0:
        write(Path(sys.argv[1]), bytes.fromhex(tag), np.random.default_rng(int(seed)))
    os.wait()
    print("dead", flush=True)
"""


@pytest.mark.timeout(7200 if SOAK else 120)
def test_a_killed_writer_leaves_no_wrong_block(tmp_path, open_tier, pool, seed):
    """Killed at any moment, under the same weights or others: what is found is right."""
    rng, num_found = np.random.default_rng(seed), 0
    command = [sys.executable, "-W", "ignore", "-c", WRITERS, tmp_path]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=os.path.dirname(__file__)) as writers:
        for round_ in range(1000 if SOAK else 50):
            tag = (TAG, OTHER_TAG)[round_ % 3 == 2]
            print(tag.hex(), rng.integers(1 << 30), file=writers.stdin, flush=True)
            writer = int(writers.stdout.readline())
            if round_ % 2:
                assert writers.stdout.readline() == "saved\n"  # however slow the machine is
            time.sleep(rng.uniform(0, 0.05))
            os.kill(writer, signal.SIGKILL)
            while writers.stdout.readline() == "saved\n":
                pass
            with open_tier(tag=tag) as tier:
                num_found += len(load(tier, pool, range(3 * NUM_SLOTS)))
        writers.stdin.close()
    assert num_found > 0
