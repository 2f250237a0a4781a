"""A disk whose I/O does not return until a gate opens: RAM goes on, every wait ends, and nothing wrong comes of it."""

import time

import pytest
from kvcache import leaves_its_engine_behind
from tier_rig import SECONDS, keys_of
from tiered_rig import EngineRig

from kvortex.index import ReserveStatus

ON_DISK, NEW = range(20), range(100, 200)
LONG_S = 30  # in which anything ends that ends by a timeout of less than a second


@pytest.fixture(params=["breaker as it is", "breaker held closed", "aio"])
def rig(request, tmp_path, faulty_disk):
    """An engine of whose blocks only the disk has some; whatever hangs goes on at the end."""
    with EngineRig(tmp_path, disk={"io": "aio" if request.param == "aio" else "threads"}) as made:
        if request.param == "breaker held closed":
            made.engine.tiering._breaker.allows = lambda now_s: True
        made.save(ON_DISK)
        assert made.engine.flush(SECONDS) == 0
        made.forget_ram()
        yield made
        faulty_disk.mend()
        if not made.is_closed:
            made.require_quiet()


def use_ram(rig, first=0):
    """Save more than RAM holds, look it up, load it; nothing of that has to do with the disk."""
    for i in NEW[first:]:
        statuses = rig.begin_save([i])
        statuses.wait(SECONDS)
        assert ReserveStatus.FULL not in statuses.statuses, "room was refused for the disk's sake"
        assert rig.engine.check_blocks(keys_of([i])).leading == 1
        assert rig.load([i]) == 1


@pytest.mark.parametrize("call", ["any", "read", "write"])
def test_ram_goes_on_while_the_disk_hangs(rig, faulty_disk, call):
    faulty_disk.plan(call, "hang")
    prefetch = rig.engine.prefetch(keys_of(ON_DISK), timeout_ms=200)
    rig.save(NEW[:8])
    faulty_disk.wait_hanging()
    use_ram(rig)
    prefetch.wait(1000 * LONG_S)
    prefetch.close()
    use_ram(rig)
    faulty_disk.mend()
    rig.require_quiet()
    use_ram(rig)
    for i in ON_DISK:
        rig.load([i])
    rig.found(ON_DISK)


def test_every_wait_for_a_disk_that_hangs_ends_by_its_timeout(rig, faulty_disk):
    rig.save(NEW[:2])
    assert rig.engine.flush(SECONDS) == 0
    faulty_disk.plan("any", "hang")
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        rig.engine.prefetch(keys_of(ON_DISK[18:]), timeout_ms=SECONDS).wait(100)
    prefetch = rig.engine.prefetch(keys_of([NEW[0], *ON_DISK]), timeout_ms=100)
    prefetch.wait()
    assert prefetch.num_blocks == 1, "RAM has it"
    assert rig.load([NEW[0], *ON_DISK[:5]], promote_timeout_ms=100) == 1
    assert rig.load([*ON_DISK[5:9]], promote_timeout_ms=100) == 0
    rig.save(NEW[2:4])
    assert rig.engine.flush(100) > 0
    rig.engine.discard_blocks(keys_of(ON_DISK[:3]))
    rig.engine.get_stats()
    assert time.monotonic() - start < LONG_S


def test_a_sync_that_hangs_ends_the_flush_by_its_timeout(rig, faulty_disk):
    rig.save(NEW[:2])
    faulty_disk.plan("sync", "hang")
    assert rig.engine.flush(200) > 0
    faulty_disk.mend()
    assert rig.engine.flush(SECONDS) == 0


def test_a_read_that_returns_too_late_changes_no_block(rig, faulty_disk):
    """Its reader has left, its keys were saved anew under other weights, and RAM was used up several times."""
    faulty_disk.plan("read", "hang")
    rig.engine.prefetch(keys_of(ON_DISK), timeout_ms=50).wait()
    faulty_disk.wait_hanging()
    rig.engine.clear(weights="step 1")
    rig.weights = "step 1"
    for _ in range(3):
        rig.save(ON_DISK)
        use_ram(rig, 50)
    saved = ON_DISK[:6]  # half of RAM is lent to the disk, an eighth to the cleaner
    rig.save(saved)
    faulty_disk.mend()
    rig.require_quiet()
    assert rig.load(saved) == len(saved)
    rig.found(ON_DISK)


def test_a_read_that_returns_too_late_leaves_the_key_to_a_save(rig, faulty_disk):
    faulty_disk.plan("read", "hang")
    rig.engine.prefetch(keys_of(ON_DISK[:6]), timeout_ms=50).wait()
    assert rig.save(ON_DISK[:6]) == 6
    assert rig.load(ON_DISK[:6]) == 6
    faulty_disk.mend()
    rig.require_quiet()
    assert rig.load(ON_DISK[:6]) == 6


def test_a_write_that_returns_after_the_weights_changed_is_served_to_nobody(rig, faulty_disk, tmp_path):
    faulty_disk.plan("write", "hang")
    rig.save(NEW[:3])
    faulty_disk.wait_hanging()
    rig.engine.clear(weights="step 1")
    rig.weights = "step 1"
    rig.save(NEW[:3])
    faulty_disk.mend()
    rig.engine.tiering._breaker._until_s = 0.0
    assert rig.engine.flush(SECONDS) == 0
    rig.forget_ram()
    assert rig.found(NEW[:3]) == [*NEW[:3]]
    rig.close()
    for weights in (None, "step 1", "step 2"):
        with EngineRig(tmp_path, weights=weights) as later:
            there = later.adopted().found(NEW[:3])
            assert weights is None or there == ([*NEW[:3]] if weights == "step 1" else [])


@leaves_its_engine_behind
@pytest.mark.parametrize("call", ["read", "write", "any"])
def test_a_shutdown_while_the_disk_hangs_ends_in_time(tmp_path, faulty_disk, call):
    rig = EngineRig(tmp_path, shutdown_timeout_ms=600)
    rig.save(ON_DISK)
    assert rig.engine.flush(SECONDS) == 0
    rig.forget_ram()
    faulty_disk.plan(call, "hang")
    prefetch = rig.engine.prefetch(keys_of(ON_DISK), timeout_ms=SECONDS)
    rig.save(NEW[:8])
    faulty_disk.wait_hanging()
    start = time.monotonic()
    rig.engine.shutdown()
    assert time.monotonic() - start < LONG_S
    assert prefetch.done()
    prefetch.close()
    faulty_disk.mend()
    assert not list(tmp_path.rglob("manifest.sqlite"))


@leaves_its_engine_behind
def test_a_shutdown_while_the_scan_hangs_ends_in_time(tmp_path, faulty_disk):
    with EngineRig(tmp_path) as rig:
        rig.save(ON_DISK)
    next(tmp_path.rglob("manifest.sqlite")).unlink()
    faulty_disk.plan("read", "hang", nth=4)
    rig = EngineRig(tmp_path, shutdown_timeout_ms=600)
    faulty_disk.wait_hanging()
    rig.save(NEW[:8])
    start = time.monotonic()
    rig.engine.shutdown()
    assert time.monotonic() - start < LONG_S
    faulty_disk.mend()
