"""Segments: what the quota buys, whom a folder belongs to, and what becomes of files that are not as they were."""

import os
import socket
import stat
import subprocess
import sys

import numpy as np
import pytest
from tier_rig import (
    NUM_SLOTS,
    SLOT_BYTES,
    SPACE,
    STRIDE_BYTES,
    DiskRig,
    block,
    open_now,
    open_segments,
    quota_of,
    require_no_more,
)  # fmt: skip

from kvortex import ConfigError, TierError
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.disk._io_calls import IoCalls
from kvortex.tiers.disk.segments import SEGMENT_BYTES, slots_of

OK, MISSING = BlockStatus.OK, BlockStatus.MISSING


def disk_usage(folder):
    """Bytes on the disk, as `du` counts them."""
    places = [folder, *(os.path.join(root, name) for root, dirs, files in os.walk(folder) for name in dirs + files)]
    return sum(os.lstat(place).st_blocks * 512 for place in places)


def reopened(path, work=lambda rig: None, **settings):
    """What `work` answers with the same folder in a new store."""
    rig = DiskRig(path, **settings)
    try:
        return work(rig)
    finally:
        rig.close()


def test_what_was_put_is_there_for_the_next_store(tmp_path):
    reopened(tmp_path, lambda rig: rig.put(range(NUM_SLOTS), range(NUM_SLOTS)))
    assert reopened(tmp_path, lambda rig: rig.get(range(NUM_SLOTS), range(NUM_SLOTS))) == list(
        map(block, range(NUM_SLOTS))
    )


@pytest.mark.parametrize("num_slots", [1, 15, 16, 17, 32, 40])
def test_the_disk_is_never_used_beyond_the_quota(tmp_path, num_slots):
    def overfill(rig):
        for round_ in range(3):
            assert rig.put(range(num_slots), range(num_slots), generation=round_) == [OK] * num_slots
            rig.store.flush(10_000)
            assert disk_usage(tmp_path) <= quota_of(num_slots)

    assert slots_of(quota_of(num_slots) - (64 << 10), SLOT_BYTES, quota_of(16) - (64 << 10)) == (16, num_slots)
    reopened(tmp_path, overfill, num_slots=num_slots)


def test_a_quota_buys_whole_segments_and_what_fits_into_the_rest():
    stride = (1 << 20) + 4096
    per_segment, num_slots = slots_of(10 * SEGMENT_BYTES + (100 << 20), stride)
    assert per_segment == 1019 and num_slots == 10 * 1019 + 99
    assert slots_of(SEGMENT_BYTES, 2 << 30) == (1, 0)  # a slot larger than a segment has one for itself
    assert slots_of(5 << 30, 2 << 30) == (1, 2)
    assert slots_of(-1, stride)[1] == slots_of(0, stride)[1] == 0


@pytest.mark.parametrize("first, second", [(20, 40), (40, 20), (40, 16), (16, 17), (33, 32)])
def test_another_quota_keeps_the_blocks_that_both_have(tmp_path, first, second):
    kept = min(first, second)
    reopened(tmp_path, lambda rig: rig.put(range(first), range(first)), num_slots=first)

    def look(rig):
        assert disk_usage(tmp_path) <= quota_of(second)
        assert rig.get(range(second), range(second)) == [block(i) if i < kept else MISSING for i in range(second)]

    reopened(tmp_path, look, num_slots=second)


def test_segments_lie_in_all_folders_in_turn(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    reopened(paths, lambda rig: rig.put(range(NUM_SLOTS), range(NUM_SLOTS)))
    names = [sorted(name.name for name in path.rglob("*.segment")) for path in paths]
    assert names == [["000000.segment", "000002.segment"], ["000001.segment"]]
    assert reopened(paths, lambda rig: rig.get(range(NUM_SLOTS), range(NUM_SLOTS))) == [
        block(i) for i in range(NUM_SLOTS)
    ]


# ---- files that are not as they were ---------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path):
    """A folder with a block in each slot, and the paths of its three segments."""
    reopened(tmp_path, lambda rig: rig.put(range(NUM_SLOTS), range(NUM_SLOTS)))
    return tmp_path, sorted(tmp_path.rglob("*.segment"))


def served(path):
    """The slots whose blocks a new store serves; wrong ones fail the test."""
    answers = reopened(path, lambda rig: rig.get(range(NUM_SLOTS), range(NUM_SLOTS)))
    assert all(answer == block(i) for i, answer in enumerate(answers) if isinstance(answer, bytes))
    return [i for i, answer in enumerate(answers) if isinstance(answer, bytes)]


def test_a_deleted_segment_costs_its_blocks(filled):
    filled[1][1].unlink()
    assert served(filled[0]) == [*range(16), *range(32, 40)]


@pytest.mark.parametrize("slots", [0, 5, 15])
def test_a_truncated_segment_keeps_what_it_holds(filled, slots):
    os.truncate(filled[1][1], 4096 + slots * STRIDE_BYTES + 8000)
    assert served(filled[0]) == [*range(16 + slots), *range(32, 40)]


def test_a_segment_cut_in_use_answers_short(tmp_path):
    rig = DiskRig(tmp_path)
    rig.put([3, 4], [3, 4])
    os.truncate(rig.place(4)[0], rig.place(4)[1] + 4096)
    assert rig.get([3, 4], [3, 4]) == [block(3), BlockStatus.SHORT]
    assert rig.put([4], [4]) == [OK] and rig.get([4], [4]) == [block(4)]
    rig.close()


@pytest.mark.parametrize("size", [0, 1, 4095])
def test_a_segment_without_its_page_is_made_anew(filled, size):
    os.truncate(filled[1][1], size)
    assert served(filled[0]) == [*range(16), *range(32, 40)]


def test_a_segment_page_with_a_flipped_bit_drops_the_segment(filled, seed):
    for bit in [*range(0, 8 * 64, 7), *np.random.default_rng(seed).integers(0, 8 * 4096, 10)]:
        data = bytearray(filled[1][2].read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        filled[1][2].write_bytes(data)
        segments = open_segments([filled[0]])
        assert segments.facts()["dropped_segments"] == 1 and segments.new_slots == [(32, 8)], bit
        segments.close()


def test_exchanged_segments_are_made_anew(filled):
    first, second, _ = filled[1]
    first.rename(filled[0] / "x")
    second.rename(first)
    (filled[0] / "x").rename(second)
    assert served(filled[0]) == [*range(32, 40)]


def test_another_stride_drops_the_segments(filled):
    segments = open_segments([filled[0]], stride_bytes=STRIDE_BYTES + 4096)
    assert segments.facts()["dropped_segments"] == 3
    segments.close()
    assert served(filled[0]) == []


def test_folders_of_other_models_ranks_and_replicas_are_left_alone(filled):
    for other in ({"namespace": bytes(32)}, {"rank": 1}, {"replica": 1}):
        open_segments([filled[0]], **other).close()
    assert served(filled[0]) == [*range(40)]


# ---- whose folder it is ----------------------------------------------------------------------------------------------


def test_nobody_else_may_read_what_prompts_left_behind(tmp_path):
    previous = os.umask(0)
    try:
        segments = open_segments([tmp_path / "made"])
    finally:
        os.umask(previous)
    folder = tmp_path / "made" / SPACE[:4].hex() / "dp0-rank0"
    assert segments.folders == (str(folder),)
    for place in (tmp_path / "made", folder.parent, folder, *folder.iterdir()):
        assert stat.S_IMODE(place.stat().st_mode) == (0o700 if place.is_dir() else 0o600), place
    segments.close()
    folder.chmod(0o755)
    open_segments([tmp_path / "made"]).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    open_segments([tmp_path]).close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 7)
    with pytest.raises(TierError, match=rf"belongs to user {os.getuid()}, and this process is user {os.getuid() + 7}"):
        open_segments([tmp_path])


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / SPACE[:4].hex()).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TierError, match="is no folder"):
        open_segments([tmp_path])


def test_a_path_that_is_no_folder_is_refused_with_the_next_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match="the disk tier cannot use .*file: File exists .*name another one"):
        open_segments([tmp_path / "file"])


def test_a_second_process_is_told_who_has_the_folder(tmp_path):
    code = (
        "import sys; from tier_rig import open_segments\n"
        "segments = open_segments([sys.argv[1]]); print('open', flush=True); sys.stdin.read()"
    )
    folder = os.path.dirname(__file__)
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=-1, stdout=-1, text=True, cwd=folder) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(TierError, match=f"is in use by process {other.pid} on {socket.gethostname()}; end that"):
            open_segments([tmp_path])
        open_segments([tmp_path], rank=1).close()
        other.kill()
        other.wait()
        open_segments([tmp_path]).close()


@pytest.fixture
def free_bytes(monkeypatch):
    """A function that says how much of the disk is free: so much, and what `expelled` names beyond it."""
    real, state = os.statvfs, {"free": 1 << 50, "parts": []}

    def statvfs(path):
        facts = real(path)
        gone = sum(nbytes for part, nbytes in state["parts"] if not os.path.exists(part))
        return os.statvfs_result((4096, 4096, *facts[2:4], (state["free"] + gone) // 4096, *facts[5:]))

    def say(free, parts=()):
        state.update(free=free, parts=[(part, disk_usage(part)) for part in parts])

    monkeypatch.setattr(os, "statvfs", statvfs)
    return say


def test_folders_of_other_models_make_room_least_recently_opened_first(tmp_path, free_bytes):
    parts = []
    for age, space in enumerate([b"a" * 32, b"b" * 32, b"c" * 32, b"d" * 32]):
        other = open_segments([tmp_path], namespace=space)
        parts += other.folders
        if space[0] != ord("b"):
            other.close()
        os.utime(os.path.join(parts[-1], "lock"), (1000 - age, 1000 - age))  # d was opened first
    (tmp_path / "notes").mkdir()
    (tmp_path / "61616161" / "notes").mkdir()
    free_bytes(0, parts)
    reopened(tmp_path, lambda rig: rig.put([1], [1]), num_slots=50)
    assert [os.path.exists(part) for part in parts] == [
        True,
        True,
        False,
        False,
    ]  # b is in use, c and d had room enough
    assert (tmp_path / "notes").exists() and (tmp_path / "61616161" / "notes").exists()
    free_bytes(0)  # our own are there now: nothing is missing
    assert reopened(tmp_path, lambda rig: rig.store.stats()["expelled_folders"], num_slots=50) == ()
    assert reopened(tmp_path, lambda rig: rig.get([1], [1]), num_slots=50) == [block(1)]
    assert os.path.exists(parts[0])


def test_where_there_is_room_nobody_is_expelled(tmp_path):
    open_segments([tmp_path], namespace=b"a" * 32).close()
    assert reopened(tmp_path, lambda rig: rig.store.stats()["expelled_folders"]) == ()


# ---- file systems that refuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["EOPNOTSUPP", "ENOSYS", "EINVAL"])
def test_where_no_room_can_be_reserved_segments_are_sparse_and_it_is_said(tmp_path, faulty, error):
    faulty.plan("allocate", error)

    def look(rig):
        assert rig.store.stats()["sparse_segments"] == 3
        assert os.stat(rig.place(39)[0]).st_size == 4096 + 8 * STRIDE_BYTES
        assert rig.put([39], [1]) == [OK] and rig.get([39], [1]) == [block(1)]

    reopened(tmp_path, look, calls=IoCalls(faulty.address))
    assert disk_usage(tmp_path) < quota_of(16)


def test_a_disk_without_room_for_the_quota_is_refused_at_the_start(tmp_path, faulty):
    faulty.plan("allocate", "ENOSPC")
    with pytest.raises(TierError, match="No space left on device; .* are free; set disk_bytes lower"):
        open_segments([tmp_path], calls=IoCalls(faulty.address))
    faulty.mend()
    reopened(tmp_path)


@pytest.mark.parametrize("call", ["direct_align", "set_direct"])
def test_a_file_system_without_direct_io_is_used_buffered_and_it_is_said(tmp_path, faulty, call):
    faulty.plan(call, "EINVAL" if call == "set_direct" else "nothing")

    def look(rig):
        assert rig.store.stats()["io"] == "buffered" and "direct I/O" in rig.store.stats()["io_reason"]
        assert rig.put([39], [1]) == [OK] and rig.get([39], [1]) == [block(1)]

    reopened(tmp_path, look, calls=IoCalls(faulty.address))


def test_a_kernel_that_does_not_tell_its_alignment_is_asked_by_trying(tmp_path, faulty):
    faulty.plan("direct_align", "ENOSYS")
    reopened(tmp_path, lambda rig: rig.put([1], [1]), calls=IoCalls(faulty.address))
    assert reopened(tmp_path, lambda rig: rig.store.stats()["io"], calls=IoCalls(faulty.address)) == "direct"


@pytest.mark.parametrize("how", ["EIO", "EINVAL", "ENOSPC", "short", "nothing", "lie"])
def test_opening_survives_any_call_that_fails(tmp_path, faulty, how):
    """A clear message or a tier that works; never a descriptor or a lock left behind, never a wrong block."""
    calls = IoCalls(faulty.address)
    reopened(tmp_path, lambda rig: rig.put(range(NUM_SLOTS), range(NUM_SLOTS)))
    faulty.count()
    open_segments([tmp_path], calls=calls).close()
    before = open_now()
    for nth in range(1, faulty.seen + 1):
        faulty.plan("any", how, nth, count=1)
        try:
            open_segments([tmp_path], calls=calls).close()
        except TierError as error:
            assert "cannot be used: " in str(error) and (
                "; name another path" in str(error) or "are free" in str(error)
            )
        require_no_more(before, nth)
    faulty.mend()
    served(tmp_path)


def test_a_quota_without_room_for_a_block_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a disk tier of .* over 1 folders holds no block of 24576 bytes"):
        open_segments([tmp_path], num_slots=0)
    with pytest.raises(ConfigError, match="over 0 folders"):
        open_segments([])
