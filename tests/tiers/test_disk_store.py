"""What the disk store does when the system fails it: every call, at every count, in every way."""

import errno
import gc
import os
import subprocess
import sys
import time

import pytest
from tier_rig import (
    PAYLOAD_BYTES,
    POOL_SLOTS,
    SECONDS,
    SPACE,
    TAG,
    DiskRig,
    block,
    keys_of,
    make_pool,
    open_now,
    open_segments,
    require_no_more,
    statuses_of,
)

from kvortex import ConfigError, EngineClosed, PinnedPool, TierError, log
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.disk._disk_store import DiskStore
from kvortex.tiers.disk._io_calls import IoCalls

OK = BlockStatus.OK
WAYS = ["EIO", "EINVAL", "ENOSPC", "short", "nothing", "lie"]


@pytest.fixture(params=["threads", "aio"])
def io(request):
    """Each way to do I/O in turn."""
    return request.param


@pytest.fixture
def faulty_rig(tmp_path, faulty, io):
    made = DiskRig(tmp_path, calls=IoCalls(faulty.address), io=io)
    yield made
    faulty.mend()
    made.close()


def counted(faulty, work):
    """How many system calls `work` makes."""
    faulty.count()
    work()
    return faulty.seen


@pytest.mark.parametrize("how", WAYS)
def test_a_put_and_a_get_survive_any_call_that_fails_for_ever(faulty_rig, faulty, how):
    """From the nth call on nothing works; when it does again, so does the store, but for what ENOSPC made read-only."""
    rig, number = faulty_rig, 0
    rig.put([0, 1], [100, 101])

    def work():
        rig.put([2, 3], [number, number + 1000])
        return rig.get([0, 1, 2, 3], [100, 101, number, number + 1000])

    for nth in range(1, counted(faulty, work) + 2):
        number = nth
        faulty.plan("any", how, nth)
        answers = work()
        faulty.mend()
        for key_id, answer in zip([100, 101, number, number + 1000], answers, strict=True):
            assert isinstance(answer, BlockStatus) or answer == block(key_id), (nth, key_id)
        assert rig.get([0, 1], [100, 101]) == [block(100), block(101)], nth
    is_read_only = rig.store.stats()["read_only"] is not None
    assert is_read_only == (how == "ENOSPC")
    assert rig.put([5], [5]) == [BlockStatus.READ_ONLY if is_read_only else OK]


@pytest.mark.parametrize("how", WAYS)
def test_one_call_that_fails_once_costs_one_block_at_the_most(faulty_rig, faulty, how):
    rig = faulty_rig
    for nth in range(1, 9):
        faulty.plan("any", how, nth, count=1)
        rig.put([2, 3], [nth, nth + 1000])
        got = rig.get([2, 3], [nth, nth + 1000])
        faulty.mend()
        for key_id, answer in zip([nth, nth + 1000], got, strict=True):
            assert isinstance(answer, BlockStatus) or answer == block(key_id)
        if how != "ENOSPC":
            assert sum(isinstance(answer, BlockStatus) for answer in got) <= 1, nth
            assert rig.put([2], [nth]) == [OK]


@pytest.mark.parametrize("call", ["read", "write"])
def test_short_answers_are_gone_on_with(faulty_rig, faulty, call):
    faulty.plan(call, "short", count=2)
    assert faulty_rig.put([2], [1]) == [OK]
    assert faulty_rig.get([2], [1]) == [block(1)]


def test_an_interrupted_call_is_made_again(faulty_rig, faulty):
    faulty.plan("any", "EINTR", count=3)
    assert faulty_rig.put([2], [1]) == [OK]
    assert faulty_rig.get([2], [1]) == [block(1)]


@pytest.mark.parametrize("error", ["EINVAL", "EOPNOTSUPP"])
def test_direct_io_that_is_refused_goes_on_buffered_and_is_shown(faulty_rig, faulty, io, error):
    assert faulty_rig.store.stats()["io"] == "direct"
    faulty.plan("write", error, count=2 if io == "aio" else 1)  # by AIO, and by the thread that then tries
    assert faulty_rig.put([2], [1]) == [OK]
    assert faulty_rig.get([2], [1]) == [block(1)]
    stats = faulty_rig.store.stats()
    assert stats["io"] == "buffered" and "direct I/O was refused" in stats["io_reason"]


def test_a_full_disk_makes_the_store_read_only(faulty_rig, faulty):
    rig = faulty_rig
    rig.put([1], [1])
    faulty.plan("write", "ENOSPC", count=1)
    assert rig.put([2], [2]) == [BlockStatus.NO_SPACE]
    assert rig.put([3], [3]) == [BlockStatus.READ_ONLY]
    assert rig.get([1, 2], [1, 2]) == [block(1), BlockStatus.MISSING]
    assert statuses_of(rig.store.erase([1], timeout_ms=SECONDS)) == [OK]
    assert rig.store.stats()["read_only"] == os.strerror(errno.ENOSPC)


def test_a_disk_that_does_not_sync_is_told(faulty_rig, faulty):
    faulty.plan("sync", "EIO", count=1)
    with pytest.raises(TierError, match="could not be made durable: IO_ERROR .Input/output error."):
        faulty_rig.store.flush(SECONDS)
    assert faulty_rig.store.flush(SECONDS) == 0


def test_a_batch_that_the_collector_finds_is_freed_like_any_other(faulty_rig, monkeypatch):
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    cycle = [faulty_rig.put([0], [100], wait=False)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert not complaints


def test_a_flush_whose_time_is_over_during_the_sync_says_that_something_is_left(faulty_rig, faulty):
    assert faulty_rig.put([0], [100]) == [OK]
    faulty.plan("sync", "hang", count=1)
    assert faulty_rig.store.flush(50) == 1
    faulty.mend()
    assert faulty_rig.store.flush(SECONDS) == 0


# ---- a disk that hangs -----------------------------------------------------------------------------------------------


def test_a_wait_ends_by_its_deadline_and_the_memory_stays_the_stores(faulty_rig, faulty):
    rig = faulty_rig
    rig.put([1], [1])
    faulty.plan("read", "hang")
    batch = rig.store.get([1], [POOL_SLOTS - 1], keys_of([1]), PAYLOAD_BYTES, tag=TAG, timeout_ms=200)
    faulty.wait_hanging()
    assert statuses_of(batch) == [BlockStatus.LATE]
    assert not batch.done()
    faulty.mend()
    while not batch.done():
        time.sleep(0.001)
    assert statuses_of(batch) == [BlockStatus.LATE]
    assert rig.get([1], [1]) == [block(1)]


def test_a_short_wait_tells_what_is_pending(faulty_rig, faulty):
    faulty.plan("write", "hang")
    batch = faulty_rig.put([1], [1], wait=False)
    faulty.wait_hanging()
    assert batch.wait(timeout_ms=10).tolist() == [BlockStatus.PENDING]
    faulty.mend()
    assert statuses_of(batch) == [OK]


def test_a_late_put_does_not_mix_with_the_next_one_in_its_slot(faulty_rig, faulty):
    rig = faulty_rig
    faulty.plan("write", "hang", count=1)
    late = rig.put([1], [1], timeout_ms=100, wait=False)
    faulty.wait_hanging()
    assert statuses_of(late) == [BlockStatus.LATE]
    rig.pool.view(5)[:] = block(2)
    after = rig.store.put([1], [5], keys_of([2]), PAYLOAD_BYTES, tag=TAG, timeout_ms=SECONDS)
    assert rig.put([2], [3]) == [OK]  # others go on meanwhile
    assert after.statuses.tolist() == [BlockStatus.PENDING]
    faulty.mend()
    assert statuses_of(after) == [OK] and late.done()
    assert rig.get([1], [2]) == [block(2)]


def test_what_waits_behind_a_hung_disk_is_late_and_makes_room(tmp_path, faulty, io):
    rig = DiskRig(tmp_path, io=io, calls=IoCalls(faulty.address), num_threads=1, queue_blocks=3)
    faulty.plan("write", "hang")
    hung = rig.put([0], [0], wait=False)
    faulty.wait_hanging()
    waiting = rig.put([1, 2, 3, 4], [1, 2, 3, 4], timeout_ms=100, wait=False)
    assert waiting.statuses.tolist()[3] == BlockStatus.DROPPED
    assert statuses_of(waiting) == [BlockStatus.LATE] * 3 + [BlockStatus.DROPPED]
    assert waiting.done()
    assert rig.store.stats()["waiting"] == 0
    after = rig.put([5, 6, 7], [5, 6, 7], wait=False)
    assert after.statuses.tolist() == [BlockStatus.PENDING] * 3
    assert rig.store.flush(50) == 4
    faulty.mend()
    assert statuses_of(after) == [OK] * 3 and statuses_of(hung) == [OK]
    rig.close()


def test_a_batch_that_nobody_asks_about_makes_room_too(tmp_path, faulty, io):
    rig = DiskRig(tmp_path, io=io, calls=IoCalls(faulty.address), num_threads=1, queue_blocks=2)
    faulty.plan("write", "hang")
    rig.put([0], [0], wait=False)
    faulty.wait_hanging()
    rig.put([1, 2], [1, 2], timeout_ms=50, wait=False)
    time.sleep(0.06)
    assert rig.put([3, 4], [3, 4], wait=False).statuses.tolist() == [BlockStatus.PENDING] * 2
    faulty.mend()
    rig.close()


def test_closing_waits_for_running_io_and_drops_what_waits(tmp_path, faulty, io):
    rig = DiskRig(tmp_path, io=io, calls=IoCalls(faulty.address), num_threads=1)
    faulty.plan("write", "hang")
    batch = rig.put([0, 1], [0, 1], wait=False)
    faulty.wait_hanging()
    rig.store.close(timeout_ms=50)
    assert batch.statuses.tolist() == [BlockStatus.PENDING, BlockStatus.DROPPED]
    assert not batch.done()
    rig.pool.close()  # the mapping stays, since the write still reads from it
    with pytest.raises(TierError, match=f"is in use by process {os.getpid()} on"):
        open_segments([tmp_path])
    faulty.mend()
    while not batch.done():
        time.sleep(0.001)
    assert batch.statuses.tolist()[0] == OK


def test_closing_without_time_leaves_nothing_behind_where_nothing_runs(tmp_path, io):
    for _ in range(5):
        rig = DiskRig(tmp_path, io=io)
        rig.put([1], [1])
        rig.store.close(timeout_ms=0)
        rig.pool.close()


# ---- lifetimes -------------------------------------------------------------------------------------------------------


def test_a_dropped_store_gives_everything_back(tmp_path, io):
    pool = make_pool()
    before = open_now()
    rig = DiskRig(tmp_path, io=io, pool=pool)
    batch = rig.put(range(8), range(8), wait=False)
    rig.store = rig.segments = rig = None
    assert statuses_of(batch) == [OK] * 8
    batch = None
    require_no_more(before)
    pool.close()
    DiskRig(tmp_path, io=io).close()


def test_a_pool_closed_under_the_store_stays_mapped(tmp_path, io):
    rig = DiskRig(tmp_path, io=io)
    rig.put([1], [1])
    rig.pool.close()
    batch = rig.store.get([1], [9], keys_of([1]), PAYLOAD_BYTES, tag=TAG, timeout_ms=SECONDS)
    assert statuses_of(batch) == [OK]
    rig.close()


def test_a_forked_child_is_refused(tmp_path, io):
    code = (
        "import os, sys; from pathlib import Path; from tier_rig import DiskRig\n"
        "rig = DiskRig(Path(sys.argv[1]), io=sys.argv[2]); batch = rig.put([1], [1], wait=False); batch.wait()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    for verb in (lambda: rig.get([1], [1]), lambda: batch.wait(), rig.store.stats):\n"
        "        try: verb()\n"
        "        except Exception as error: print(error, flush=True)\n"
        "    del batch; rig.store.close(); rig = None; os._exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert isinstance(rig.get([1], [1])[0], bytes)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path, io], capture_output=True, text=True,
                          timeout=60, cwd=os.path.dirname(__file__))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("belongs to the parent process") == 3


def test_ctrl_c_ends_a_wait(tmp_path, faulty, io):
    rig = DiskRig(tmp_path, io=io, calls=IoCalls(faulty.address))
    faulty.plan("write", "hang")
    batch = rig.put([1], [1], wait=False)
    faulty.wait_hanging()
    timer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(.3); os.kill({os.getpid()}, 2)"])
    with pytest.raises(KeyboardInterrupt):
        batch.wait()
    timer.wait()
    faulty.mend()
    assert statuses_of(batch) == [OK]
    rig.close()


# ---- Linux AIO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["EAGAIN", "ENOSYS", "EPERM"])
def test_aio_that_is_refused_leaves_the_i_o_to_threads_and_says_so_once(tmp_path, faulty, caplog, monkeypatch, error):
    monkeypatch.setattr(log, "_told", set())
    faulty.plan("aio_setup", error)
    for _ in range(2):
        rig = DiskRig(tmp_path, calls=IoCalls(faulty.address), io="aio")
        assert rig.put([1, 2], [1, 2]) == [OK, OK] and rig.get([2], [2]) == [block(2)]
        stats, reason = rig.store.stats(), os.strerror(getattr(errno, error))
        assert (stats["io_engine"], stats["io_engine_reason"]) == ("threads", f"AIO was refused: {reason}")
        rig.close()
    assert [record.reason for record in caplog.records if record.event == "disk_aio_refused"] == [reason]


@pytest.mark.parametrize("how", ["EAGAIN", "EINVAL", "ENOSYS", "nothing"])
def test_a_submission_that_is_refused_is_done_at_once(tmp_path, faulty, how):
    rig = DiskRig(tmp_path, calls=IoCalls(faulty.address), io="aio")
    faulty.plan("aio_submit", how)
    assert rig.put(range(8), range(8)) == [OK] * 8
    assert rig.get(range(8), range(8)) == [block(i) for i in range(8)]
    rig.close()


@pytest.mark.parametrize("how", ["EINTR", "EINVAL", "nothing"])
def test_a_wait_for_events_that_fails_is_made_again(tmp_path, faulty, how):
    rig = DiskRig(tmp_path, calls=IoCalls(faulty.address), io="aio")
    faulty.plan("aio_wait", how, count=5)
    assert rig.put([1, 2], [1, 2]) == [OK, OK]
    assert rig.get([1, 2], [1, 2]) == [block(1), block(2)]
    rig.close()


def test_no_more_blocks_are_begun_than_were_asked_for(tmp_path, faulty):
    rig = DiskRig(tmp_path, calls=IoCalls(faulty.address), io="aio", num_threads=3)
    faulty.plan("write", "hang")
    batch = rig.put(range(10), range(10), wait=False)
    faulty.wait_hanging(3)
    assert (rig.store.stats()["running"], rig.store.stats()["waiting"]) == (3, 7)
    faulty.mend()
    assert statuses_of(batch) == [OK] * 10
    rig.close()


def test_an_event_that_comes_late_ends_its_block_and_no_other(tmp_path, faulty):
    rig = DiskRig(tmp_path, calls=IoCalls(faulty.address), io="aio")
    faulty.plan("write", "hang", count=1)
    hung = rig.put([1], [1], timeout_ms=50, wait=False)
    faulty.wait_hanging()
    for i in range(2, 20):
        assert rig.put([i], [i]) == [OK] and rig.get([i], [i]) == [block(i)]
    assert statuses_of(hung) == [BlockStatus.LATE] and not hung.done()
    faulty.mend()
    while not hung.done():
        time.sleep(0.001)
    assert rig.get([1], [1]) == [block(1)]
    rig.close()


def test_a_closed_store_gives_its_aio_back(tmp_path):
    def aio_maps():
        with open("/proc/self/maps") as maps:
            return sum("[aio]" in line for line in maps)

    before = aio_maps()
    rig = DiskRig(tmp_path, io="aio")
    rig.put([1], [1])
    assert aio_maps() == before + 1
    rig.store.close()
    assert aio_maps() == before and rig.store.stats()["io_engine"] == "aio"
    rig.close()


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_threads": 0}, "num_threads must be 1 to 64, got 0"),
        ({"num_threads": 65}, "num_threads must be 1 to 64, got 65"),
        ({"queue_blocks": 0}, r"queue_blocks must be 1 to 2\^31 - 1, got 0"),
        ({"io": "uring"}, "io must be 'threads' or 'aio', got 'uring'"),
        ({"namespace": b"short"}, "namespace must have 32 bytes, got 5"),
    ],
)
def test_a_setting_outside_its_limits_is_refused(tmp_path, settings, message):
    segments = open_segments([tmp_path])
    with make_pool() as pool, pytest.raises(ValueError, match=message):
        DiskStore(pool, segments, **{"namespace": SPACE, **settings})
    segments.close()


def test_pools_that_do_not_fit_are_refused(tmp_path):
    segments = open_segments([tmp_path])
    for header_bytes, payload_bytes, message in (
        (0, PAYLOAD_BYTES, "header_bytes=4096, got 0"),
        (4096, 30_000, "a stride of 36864 bytes, that of the pool, got 24576"),
    ):
        pool = PinnedPool(1 << 20, payload_bytes, "host", header_bytes=header_bytes)
        with pool, pytest.raises(ConfigError, match=message):
            DiskStore(pool, segments, namespace=SPACE)
    segments.close()


def test_a_store_that_was_never_made_says_so():
    with pytest.raises(EngineClosed, match="this store was never made"):
        DiskStore.__new__(DiskStore).stats()
