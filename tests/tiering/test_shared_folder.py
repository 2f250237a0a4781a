"""Engines that share a folder: what one saved another finds, and what bounds the folder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tier_rig import STRIDE_BYTES
from tiered_rig import EngineRig, keys_of, wait_until

from kvortex import ObjectTier
from kvortex.cli import main
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.remote.sweep import sweep

HERE = Path(__file__).parent
WAIT = {"promote_timeout_ms": 30_000}
LOOKUP_MS = 30_000  # a deadline that no healthy machine comes near


@pytest.fixture
def open_engine(tmp_path):
    """Return a function that opens an engine over one folder."""
    opened = []

    def make(weights=None, **settings):
        tier = ObjectTier(f"file://{tmp_path}/shared", **{"lookup_timeout_ms": LOOKUP_MS, **settings})
        opened.append(EngineRig(tmp_path, tier=tier, weights=weights))
        return opened[-1]

    yield make
    for rig in opened:
        rig.close()


@pytest.fixture
def files(tmp_path):
    """Return a function that lists the files of the folder."""
    return lambda: [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]


def test_what_one_engine_saved_another_finds_when_it_asks(open_engine):
    a, b = open_engine(), open_engine()
    a.save(range(12))
    assert a.engine.flush() == 0
    assert b.load(range(12)) == 0, "b has not been told to ask"
    assert b.load(range(12), **WAIT) == 12
    assert b.engine.check_blocks(keys_of(range(12))).leading_anywhere == 12


def test_a_chain_is_asked_for_by_its_ends(open_engine):
    a, b = open_engine(), open_engine()
    a.save(range(9))
    assert a.engine.flush() == 0
    asked, size_of = [], b.store.client._size
    b.store.client._size = lambda name: asked.append(name) or size_of(name)
    assert b.load(range(12), **WAIT) == 9
    assert len(asked) <= 5, "the first one, and those that halve the rest"
    assert b.load(range(20, 32), **WAIT) == 0
    assert len(asked) <= 6, "an absent chain takes one question"


def test_a_chain_that_is_longer_than_the_view_is_found_from_its_head_on(open_engine):
    a, b = open_engine(), open_engine(view_blocks=4)
    a.save(range(12))
    assert a.engine.flush() == 0
    assert b.load(range(12), **WAIT) == 4
    b.save(range(12, 24))
    assert b.engine.flush() == 0, "all is there, though the view has forgotten most"
    b.require_quiet()


def test_a_prefix_that_nobody_knows_waits_no_longer_than_it_may(open_engine):
    rig = open_engine(lookup_timeout_ms=20)
    rig.store.client._size = lambda name: time.sleep(1) or 0
    assert rig.load(range(4), promote_timeout_ms=60_000) == 0
    assert rig.engine.get_stats().tiers[0].misses["UNANSWERED"] == 1


def test_a_reader_who_leaves_while_the_server_is_asked_gets_nothing(open_engine):
    rig = open_engine()
    rig.store.client._size = lambda name: time.sleep(0.2) or 0
    with rig.engine.prefetch(keys_of(range(4)), timeout_ms=60_000):
        pass
    rig.require_quiet()


def test_the_client_is_not_closed_while_it_is_asked(open_engine):
    """A client's library may crash where it is."""
    rig = open_engine(lookup_timeout_ms=1)
    client, is_asked, may_answer, told = rig.store.client, threading.Event(), threading.Event(), []
    close, size_of = client.close, client._size
    client.close = lambda: told.append("closed") or close()
    client._size = lambda name: is_asked.set() or may_answer.wait(30) and told.append("answered") or size_of(name)
    assert rig.load(range(4), promote_timeout_ms=10) == 0
    assert is_asked.wait(30)
    threading.Timer(0.2, may_answer.set).start()
    rig.close()
    assert told == ["answered", "closed"]


def test_an_answer_that_comes_after_a_clear_is_not_believed(open_engine):
    a, b = open_engine(weights="step 1"), open_engine(weights="step 1", lookup_timeout_ms=1)
    a.save(range(4))
    assert a.engine.flush() == 0
    size_of, is_asked, may_answer = b.store.client._size, threading.Event(), threading.Event()
    b.store.client._size = lambda name: is_asked.set() or may_answer.wait(30) and size_of(name)
    assert b.load(range(4), promote_timeout_ms=10) == 0
    assert is_asked.wait(30)
    b.engine.clear(weights="step 2")
    b.weights = "step 2"
    may_answer.set()
    wait_until(lambda: b.tier.adoption.num_adopted == 4)
    assert b.engine.check_blocks(keys_of(range(4))).leading_anywhere == 0


def test_a_server_that_takes_nothing_serves_all_the_same(open_engine):
    rig = open_engine()
    rig.save(range(4))
    assert rig.engine.flush() == 0

    def fail(name, record):
        raise OSError("planted: no room")

    rig.store.client.put = fail
    rig.save(range(4, 12))
    assert rig.engine.flush(3000) > 0
    wait_until(lambda: rig.engine.get_stats().tiers[0].suspensions)
    rig.forget_ram()
    assert rig.load(range(4), **WAIT) == 4


def test_a_put_that_finds_the_queue_full_takes_nothing_from_the_server(open_engine, files):
    """The place in the view was another block's, which is there all the same."""
    rig = open_engine(view_blocks=1)
    rig.save([0])
    assert rig.engine.flush() == 0
    rig.store._queue_blocks = 0
    rig.save([1])
    rig.engine.flush(2000)
    assert rig.store.stats()["put"]["DROPPED"]
    rig.store.flush(30_000)
    assert len(files()) == 1


def test_a_clear_takes_nothing_from_others_that_is_being_written(open_engine):
    a, b = open_engine(weights="step 1"), open_engine(weights="step 1")
    a.save(range(4))
    assert a.engine.flush() == 0
    put, is_writing, may_write = b.store.client.put, threading.Event(), threading.Event()
    b.store.client.put = lambda *value: is_writing.set() or may_write.wait(30) and put(*value)
    b.save(range(4))
    assert is_writing.wait(30)
    b.engine.clear(weights="step 2")
    may_write.set()
    b.require_quiet()
    b.store.flush(30_000)
    a.forget_ram()
    assert a.load(range(4), **WAIT) == 4


def test_what_was_discarded_is_not_served_though_the_server_did_not_remove_it(open_engine, files):
    rig = open_engine(negative_ttl_s=0)
    rig.save(range(4))
    assert rig.engine.flush() == 0
    delete = rig.store.client.delete

    def fail(name):
        raise OSError("planted")

    rig.store.client.delete = fail
    rig.engine.discard_blocks(keys_of(range(2)))
    assert rig.engine.flush(30_000) == 2
    rig.forget_ram()
    assert rig.found(range(4)) == [2, 3]
    rig.store.client.delete = delete
    assert rig.engine.flush(30_000) == 0
    assert len(files()) == 2
    rig.save(range(2))
    assert rig.engine.flush(30_000) == 0
    rig.forget_ram()
    assert rig.load(range(4), **WAIT) == 4


def test_two_processes_share_a_folder(tmp_path, open_engine):
    """Another process saves, and saves what is there already."""
    program = f"""
from tiered_rig import EngineRig
from kvortex import ObjectTier
with EngineRig({str(tmp_path)!r}, tier=ObjectTier("file://{tmp_path}/shared")) as rig:
    rig.save(range(12))
    assert rig.engine.flush() == 0
"""
    path = os.pathsep.join([str(HERE), str(HERE.parent / "tiers"), str(HERE.parent), os.environ["PYTHONPATH"]])
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": path})
    assert open_engine().load(range(12), **WAIT) == 12


def test_a_forked_child_has_no_use_of_the_client(open_engine):
    """obstore and its threads do not outlive a fork: a call in the child would never return."""
    rig = open_engine()
    rig.save(range(4))
    assert rig.engine.flush() == 0
    child = os.fork()
    if not child:
        signal.alarm(20)
        batch = rig.store.get([0], [20], keys_of([0]), rig.pool.payload_bytes, tag=rig.tier.tag, timeout_ms=10_000)
        os._exit(not (batch.done() and batch.statuses.tolist() == [BlockStatus.DROPPED]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    rig.forget_ram()
    assert rig.load(range(4), **WAIT) == 4


# ---- what the folder may keep ----------------------------------------------------------------------------------------


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_sweep_removes_what_is_old_and_the_oldest_of_what_is_too_much(open_engine, files):
    rig = open_engine()
    rig.save(range(8))
    assert rig.engine.flush() == 0
    paths = sorted(files())
    for i, path in enumerate(paths):
        age(path, 1000 * (i + 1))
    nbytes = paths[0].stat().st_size
    tier = rig.tier_settings
    would = sweep(tier, older_than_s=6500, dry_run=True)
    assert (would.blocks, would.removed_blocks, len(files())) == (8, 2, 8)
    assert sweep(tier, older_than_s=6500).removed_blocks == 2
    assert sweep(tier, max_bytes=3 * nbytes + 1).removed_bytes == 3 * nbytes
    assert sorted(files()) == paths[:3], "the youngest are left"
    rig.forget_ram()
    assert len(rig.found(range(8))) == 3, "what is gone is a miss, and what is left is right"


def test_a_read_makes_a_block_young_again(open_engine, files):
    rig = open_engine()
    rig.save(range(4))
    assert rig.engine.flush() == 0
    for path in files():
        age(path, 10_000)
    rig.forget_ram()
    assert rig.load([2], **WAIT) == 1
    assert sweep(rig.tier_settings, older_than_s=5000).removed_blocks == 3
    rig.forget_ram()
    assert rig.found(range(4)) == [2]


def test_a_sweep_touches_nothing_that_is_no_block(open_engine, files, tmp_path):
    rig = open_engine()
    rig.save([0])
    assert rig.engine.flush() == 0
    (block,) = files()
    others = [tmp_path / "shared" / "notes.txt", block.with_name("f" * 63), block.with_name(block.name + "#x")]
    staged = [block.with_name(f"{'0' * 64}#1"), block.with_name(f"{'1' * 64}#2")]
    for path in [*others, *staged]:
        path.write_text("")
    for path in [*others, staged[0]]:
        age(path, 1_000_000)
    swept = sweep(rig.tier_settings, older_than_s=10_000)
    assert (swept.removed_blocks, swept.removed_temp_files) == (0, 1)
    assert sorted(files()) == sorted([block, *others, staged[1]]), "who wrote a moment ago may still be writing"


def test_a_writer_that_was_killed_leaves_no_part_of_a_block(tmp_path, open_engine, files):
    program = f"""
import itertools
from tiered_rig import EngineRig
from kvortex import ObjectTier
rig = EngineRig({str(tmp_path)!r}, tier=ObjectTier("file://{tmp_path}/shared"), pool_slots=24)
print("ready", flush=True)
for i in itertools.count():
    rig.save(range(8 * i, 8 * i + 8))
    rig.engine.flush()
"""
    path = os.pathsep.join([str(HERE), str(HERE.parent / "tiers"), str(HERE.parent), os.environ["PYTHONPATH"]])
    for round_ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, stdout=-1
        ) as process:
            process.stdout.readline()
            most = 10 * (round_ + 1)
            wait_until(lambda most=most: len(files()) > most)
            process.kill()
    rig = open_engine()
    blocks = [path for path in files() if "#" not in path.name]
    assert {path.stat().st_size for path in blocks} == {STRIDE_BYTES - 480}, "a header page, and 20 000 bytes"
    assert len(rig.found(range(40))) >= 10
    for path in files():
        age(path, 4000)
    sweep(rig.tier_settings, older_than_s=1 << 40)
    assert not [path for path in files() if "#" in path.name]


def test_the_command_sweeps(open_engine, files, capsys):
    rig = open_engine()
    rig.save(range(4))
    assert rig.engine.flush() == 0
    for path in files():
        age(path, 7200)
    url = rig.tier_settings.url
    assert main(["sweep", url, "--older-than", "1h", "--dry-run"]) == 0
    assert "4 blocks" in capsys.readouterr().out and len(files()) == 4
    assert main(["sweep", url, "--older-than", "1h", "--max-bytes", "1GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed_blocks"] == 4
    assert not files()


@pytest.mark.parametrize(
    "words, message",
    [
        (["file:///tmp"], "max_bytes"),
        (["redis://host", "--older-than", "1h"], "s3, gs, az, file"),
        (["file:///tmp", "--older-than", "1 hour"], "90s"),
        (["s3://bucket/x", "--older-than", "1h", "--endpoint", "http://127.0.0.1:1", "--region", "x"], "swept"),
    ],
)
def test_bad_input_is_told(words, message, capsys, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    try:
        assert main(["sweep", *words]) == 2
    except SystemExit as end:
        assert end.code == 2
    assert message in capsys.readouterr().err


def test_who_asks_while_many_wait_is_answered_first(open_engine):
    rig = open_engine()
    view, is_asked, may_answer, order = rig.tier.adoption, threading.Event(), threading.Event(), []
    rig.store.client.sizes = lambda names, *_: (is_asked.set(), may_answer.wait(30), order.append(names), [0])[-1]
    first = view.ask(keys_of([0]))
    assert is_asked.wait(30)
    questions = [view.ask(keys_of([i])) for i in range(1, 300)]
    assert [question.is_over for question in questions] == [True] * 43 + [False] * 256, "the oldest are dropped"
    may_answer.set()
    wait_until(lambda: first.is_over and all(question.is_over for question in questions))
    names = [view.names.of(keys_of([i]), view.tag) for i in (0, 299, 298)]
    assert order[:3] == names
