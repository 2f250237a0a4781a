"""`kvortex inspect` and `kvortex verify`: what lies in a disk tier's folders, and whether it is whole."""

import fcntl
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading

import pytest
from tier_rig import (
    NUM_SLOTS,
    PAYLOAD_BYTES,
    SEGMENT_BYTES,
    SPACE,
    STRIDE_BYTES,
    TAG,
    make_pool,
    quota_of,
    save,
)

from kvortex.cli import main
from kvortex.tiers.disk import DiskTier, check
from kvortex.tiers.disk.segments import segment_page

FIELDS = {  # of a header page: where each begins
    "magic": 0, "version": 8, "codec": 12, "rank": 16, "group": 20, "stored_bytes": 24, "block_bytes": 28,
    "namespace": 32, "tag": 64, "key": 96, "name": 128, "payload_xxh3": 160, "payload_weighted": 168, "zeros": 300,
    "header_xxh3": 4088,
}  # fmt: skip
SEGMENT_FIELDS = {"magic": 0, "version": 8, "codec": 12, "rank": 16, "number": 20, "stride": 24, "namespace": 32,
                  "zeros": 99, "sum": 4090}  # fmt: skip


def open_tier(path, pool, **settings):
    settings = {"disk_bytes": quota_of(NUM_SLOTS), "segment_bytes": SEGMENT_BYTES, **settings}
    tier = DiskTier(path, **settings).open(pool, namespace=SPACE, tag=TAG)
    tier.adoption.wait()
    return tier


@pytest.fixture(scope="module")
def pool():
    with make_pool() as made:
        yield made


@pytest.fixture
def filled(tmp_path, pool):
    """A tier's path with 20 blocks of 40, and the folder in it."""
    with open_tier(tmp_path, pool) as tier:
        save(tier, pool, list(range(20)))
    return tmp_path, tmp_path / SPACE[:4].hex() / "dp0-rank0"


@pytest.fixture
def run(capsys):
    """Run a command with --json: its exit status, and the facts of the only folder."""

    def call(command, path):
        status = main([command, str(path), "--json"])
        (facts,) = json.loads(capsys.readouterr().out)["folders"]
        return status, facts

    return call


def flip(path, at, bit=0):
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)


def state_of(path):
    """Every file below, with its content and when it was changed."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return [(file, hashlib.sha256(file.read_bytes()).digest(), file.stat().st_mtime_ns) for file in files]


# ---- what is whole ---------------------------------------------------------------------------------------------------


def test_inspect_tells_what_a_folder_holds(filled, run):
    status, facts = run("inspect", filled[0])
    assert status == 0
    told = {name: facts[name] for name in ("folder", "namespace", "rank", "replica", "in_use_by", "slots", "records")}
    assert told == {"folder": str(filled[1]), "namespace": SPACE.hex(), "rank": 0, "replica": 0, "in_use_by": None,
                    "slots": NUM_SLOTS, "records": 20}  # fmt: skip
    assert [(row["slots"], row["stride_bytes"], row["version"]) for row in facts["segments"]] == [
        (16, STRIDE_BYTES, 1), (16, STRIDE_BYTES, 1), (8, STRIDE_BYTES, 1)
    ]  # fmt: skip
    assert facts["record_bytes"] == 20 * PAYLOAD_BYTES
    assert facts["manifest_bytes"] == (filled[1] / "manifest.sqlite").stat().st_size
    assert facts["bytes"] == sum(file.stat().st_size for file in filled[1].iterdir())
    assert facts["last_opened"].startswith("20") and not facts["garbage"] and not facts["damaged"]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_tier_a_model_s_folder_and_a_part_may_be_named(filled, run, command, depth):
    status, facts = run(command, [filled[0], filled[1].parent, filled[1]][depth])
    assert (status, facts["records"], facts["findings"]) == (0, 20, [])


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_that_was_copied_elsewhere_is_read_too(filled, run, command, tmp_path):
    copy = filled[1].rename(tmp_path / "copy")
    assert run(command, copy)[1]["records"] == 20


def test_text_is_for_people_and_progress_goes_to_stderr(filled, capsys, monkeypatch):
    assert main(["inspect", str(filled[0])]) == 0
    text = capsys.readouterr().out
    records = "records     20, 390.62 KiB (400000 bytes) for blocks of 390.62 KiB (400000 bytes) (1.00x)"
    for words in (str(filled[1]), SPACE.hex(), "40 slots of 24 KiB", "in use      no", "codec       exact", records):
        assert words in text
    monkeypatch.setattr("kvortex.replay.report.time.monotonic", itertools.count(0, 100).__next__)  # always time to show
    assert main(["verify", str(filled[0])]) == 0
    printed = capsys.readouterr()
    assert "100% 20 records" in printed.err and "100%" not in printed.out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_help_has_examples_and_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "exit status: 0" in text and "--json" in text


def test_it_works_as_a_user_runs_it(filled):
    done = subprocess.run([sys.executable, "-m", "kvortex", "verify", filled[0]], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "records     20" in done.stdout


# ---- what is not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_bit_of_a_header_is_found_by_both(filled, run, field):
    flip(filled[1] / "000000.segment", 4096 + 5 * STRIDE_BYTES + FIELDS[field])
    for command, exit_status in (("inspect", 0), ("verify", 1)):
        status, facts = run(command, filled[0])
        assert (status, facts["records"], facts["damaged"]) == (exit_status, 19, 1)
        assert facts["findings"] == [{"file": "000000.segment", "slot": 5, "status": "HEADER_DAMAGED", "why": ""}]


@pytest.mark.parametrize("at", [0, 1, 9_999, PAYLOAD_BYTES - 1])
def test_a_flipped_bit_of_a_payload_is_found(filled, run, capsys, at):
    flip(filled[1] / "000001.segment", 4096 + 2 * STRIDE_BYTES + 4096 + at, bit=7)
    assert run("inspect", filled[0])[:1] == (0,)
    status, facts = run("verify", filled[0])
    assert (status, facts["records"], facts["damaged"]) == (1, 19, 1)
    assert [(row["slot"], row["status"]) for row in facts["findings"]] == [(2, "PAYLOAD_DAMAGED")]
    assert main(["verify", str(filled[0])]) == 1
    assert "000001.segment slot 2: PAYLOAD_DAMAGED" in capsys.readouterr().out


def test_a_bit_behind_the_payload_is_nobody_s(filled, run):
    flip(filled[1] / "000000.segment", 4096 + STRIDE_BYTES - 1)
    assert run("verify", filled[0])[0] == 0


@pytest.mark.parametrize("field", SEGMENT_FIELDS)
def test_a_flipped_bit_of_a_segment_s_page_is_found(filled, run, field):
    flip(filled[1] / "000000.segment", SEGMENT_FIELDS[field])
    status, facts = run("verify", filled[0])
    assert (status, facts["records"], facts["damaged"]) == (1, 4, 1)
    assert facts["findings"][0]["file"] == "000000.segment" and facts["findings"][0]["slot"] is None


@pytest.mark.parametrize("nbytes, records", [(100, 4), (4096 + 3 * STRIDE_BYTES + 100, 7), (4096 + 8000, 4)])
def test_a_truncated_segment_is_found_and_the_rest_of_it_counted(filled, run, nbytes, records):
    os.truncate(filled[1] / "000000.segment", nbytes)
    status, facts = run("verify", filled[0])
    assert (status, facts["records"], facts["damaged"]) == (1, records, 1)
    assert facts["findings"][0]["status"] == "SHORT"


@pytest.mark.parametrize("stride", [0, 4096, 6000, 1 << 40, (1 << 64) - 4096])
def test_a_page_may_tell_any_stride(filled, run, stride):
    """Under a sum that is right: nothing of it is used as a size that the file does not have."""
    with open(filled[1] / "000000.segment", "r+b") as file:
        os.pwrite(file.fileno(), segment_page(SPACE, 0, 0, stride), 0)
    status, facts = run("verify", filled[0])
    assert (status, facts["records"], facts["damaged"], facts["unreadable"]) == (1, 4, 1, 0)


def test_a_stride_beyond_any_block_is_no_size_though_a_sparse_file_has_it(filled, run):
    with open(filled[1] / "000000.segment", "r+b") as file:
        os.pwrite(file.fileno(), segment_page(SPACE, 0, 0, 1 << 40), 0)
        file.truncate(1 << 41)
    status, facts = run("verify", filled[0])
    assert (status, facts["damaged"], facts["unreadable"]) == (1, 1, 0)
    assert facts["findings"][0]["status"] == "HEADER_DAMAGED"


def test_a_record_of_another_slot_s_model_is_found(filled, run, tmp_path, pool):
    """As after a folder was put together from two."""
    other = tmp_path / "other"
    with DiskTier(other, disk_bytes=quota_of(NUM_SLOTS), segment_bytes=SEGMENT_BYTES).open(
        pool, namespace=TAG, tag=TAG
    ) as tier:
        tier.adoption.wait()
        save(tier, pool, [0])
    (theirs,) = (file.read_bytes() for file in other.rglob("000000.segment"))
    with open(filled[1] / "000000.segment", "r+b") as file:
        os.pwrite(file.fileno(), theirs[4096 : 4096 + STRIDE_BYTES], 4096)
    for command, exit_status in (("inspect", 0), ("verify", 1)):
        status, facts = run(command, filled[1])
        assert (status, facts["damaged"], facts["findings"][0]["status"]) == (exit_status, 1, "NAMESPACE_DIFFERS")


def test_many_findings_are_counted_and_not_all_listed(filled, run, monkeypatch, capsys):
    monkeypatch.setattr(check, "MOST_FINDINGS", 3)
    for slot in range(10):
        flip(filled[1] / "000000.segment", 4096 + slot * STRIDE_BYTES)
    _, facts = run("verify", filled[0])
    assert facts["damaged"] == 10 and len(facts["findings"]) == 3
    main(["verify", str(filled[0])])
    assert "and 7 more" in capsys.readouterr().out


# ---- what is no part of a tier ---------------------------------------------------------------------------------------


def test_foreign_files_and_unknown_formats_are_garbage(filled, run):
    part = filled[1]
    (part / "notes.txt").write_bytes(b"x" * 100)
    (part / "000007.segment").write_bytes(os.urandom(50_000))
    (part / "000008.segment").write_bytes(bytes(8192))
    (part / "000009.segment").write_bytes((part / "000000.segment").read_bytes())  # under another's name
    (part / "folder").mkdir()
    (part / "000010.segment").symlink_to("/etc/passwd")
    os.mkfifo(part / "000011.segment")
    page = bytearray((part / "000002.segment").read_bytes()[:4096])
    page[8:12], page[2000] = b"\2\0\0\0", 5
    (part / "000002.segment").write_bytes(page)
    status, facts = run("verify", filled[0])
    assert (status, facts["records"], facts["damaged"]) == (0, 20, 0)
    garbage = {file["name"]: file["why"] for file in facts["garbage"]}
    assert sorted(garbage) == ["000002.segment", *(f"{i:06}.segment" for i in range(7, 12)), "folder", "notes.txt"]
    assert garbage["000002.segment"] == "format 2" and garbage["000009.segment"].startswith("segment 0 of rank 0")


def test_a_record_of_another_format_is_counted_and_not_called_damaged(filled, run):
    with open(filled[1] / "000000.segment", "r+b") as file:
        os.pwrite(file.fileno(), b"VORTXKR1\2\0\0\0" + os.urandom(4000), 4096)
    status, facts = run("verify", filled[0])
    assert (status, facts["records"], facts["unknown_records"], facts["damaged"]) == (0, 19, 1, 0)


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("name, words", [("nothing", "No such file"), ("empty", "holds no folder of a disk tier"),
                                         ("file", "Not a directory")])  # fmt: skip
def test_a_path_that_is_no_tier_exits_2(tmp_path, capsys, command, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    assert main([command, str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.startswith(f"kvortex {command}: error: ") and not printed.out


def test_a_disk_that_does_not_give_a_segment_exits_2(filled, run, monkeypatch):
    def broken(file, buffers, offset, real=os.preadv):
        if offset == 4096 + STRIDE_BYTES:
            raise OSError(5, "Input/output error")
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    for command in ("inspect", "verify"):
        status, facts = run(command, filled[0])
        assert (status, facts["unreadable"], facts["damaged"]) == (2, 3, 0)


# ---- what others do meanwhile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_nothing_is_changed(filled, run, command):
    flip(filled[1] / "000000.segment", 5000)
    before = state_of(filled[0])
    run(command, filled[0])
    assert state_of(filled[0]) == before


def test_a_folder_in_use_is_looked_at_and_says_by_whom(filled, run, pool, capsys):
    with open_tier(filled[0], pool) as tier:
        for command in ("inspect", "verify"):
            status, facts = run(command, filled[0])
            assert (status, facts["records"]) == (0, 20)
            assert facts["in_use_by"] == f"process {os.getpid()} on {os.uname().nodename}"
        main(["inspect", str(filled[0])])
        assert f"in use      by process {os.getpid()}" in capsys.readouterr().out
        save(tier, pool, [30])  # and it still writes


def test_a_record_in_a_folder_in_use_is_undecided_and_damaged_afterwards(filled, run, pool, capsys):
    with open_tier(filled[0], pool):
        flip(filled[1] / "000000.segment", 4096 + 5000)
        status, facts = run("verify", filled[0])
        assert (status, facts["records"], facts["undecided"], facts["damaged"]) == (0, 19, 1, 0)
        assert facts["findings"][0]["status"] == "IN_USE"
        main(["verify", str(filled[0])])
        assert "but the folder is in use" in capsys.readouterr().out
    assert run("verify", filled[0])[0] == 1


def test_records_that_are_written_meanwhile_are_never_called_damaged(filled, run, pool):
    over = threading.Event()

    def write(tier):
        number = 100
        while not over.is_set():
            save(tier, pool, list(range(number, number + 20)))
            number += 20

    with open_tier(filled[0], pool) as tier:
        writer = threading.Thread(target=write, args=[tier])
        writer.start()
        try:
            for _ in range(10):
                status, facts = run("verify", filled[0])
                assert (status, facts["damaged"]) == (0, 0)
        finally:
            over.set()
            writer.join()


def test_a_process_that_begins_to_use_the_folder_makes_what_is_read_undecided(filled, run, monkeypatch):
    """Between the look at a record and the question whether somebody has the folder."""
    flip(filled[1] / "000000.segment", 4096 + 5000)
    states = iter([(None, 1), (None, 1), *[(None, 2), (None, 3)] * check.LOOKS])
    monkeypatch.setattr(check, "lock_state", lambda part: next(states))
    status, facts = run("verify", filled[0])
    assert (status, facts["undecided"], facts["damaged"]) == (0, 1, 0)


def test_who_opens_a_tier_is_not_refused_because_of_a_look(filled, pool):
    lock = os.open(filled[1] / "lock", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    threading.Timer(0.005, os.close, [lock]).start()
    open_tier(filled[0], pool).close()


def test_memory_is_bounded_by_a_slot(tmp_path):
    """A tier of 200 MiB is verified by a process that may take 64 MiB beyond what it has."""
    script = f"""
import sys, resource
from kvortex import PinnedPool
from kvortex.cli import main
from kvortex.tiers.disk import DiskTier
import numpy as np
with PinnedPool(4 << 20, 1 << 20, "host", header_bytes=4096) as pool:
    with DiskTier({str(tmp_path)!r}, 210 << 20).open(pool, namespace=bytes(32)) as tier:
        tier.adoption.wait()
        for slot in range(195):
            keys = np.full((1, 32), slot, np.uint8)
            tier.store.put([slot], [0], keys, 1 << 20, tag=bytes(32), timeout_ms=60_000).wait()
pages = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (pages + (64 << 20),) * 2)
sys.exit(main(["verify", {str(tmp_path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "records     195" in done.stdout
