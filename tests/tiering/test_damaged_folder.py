"""Whatever happens to a folder between two engines, the next one says what is wrong, or misses; no block is wrong."""

import contextlib
import gc
import itertools
import os
import random
import shutil
import socket
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tier_rig import (
    PAYLOAD_BYTES,
    SECONDS,
    SEGMENT_BYTES,
    STRIDE_BYTES,
    keys_of,
    open_now,
    quota_of,
    require_no_more,
)  # fmt: skip
from tiered_rig import NAMESPACE, POOL_SLOTS, TIER_SLOTS, EngineRig

from kvortex import DiskTier, KVortexConfig, KVortexEngine, TierError

SOAK = os.environ.get("KVORTEX_SOAK") == "1"
IDS = range(40)  # the last segment is half full
FIELDS = {"magic": 0, "version": 8, "codec": 12, "rank": 16, "group": 20, "stored_bytes": 24, "block_bytes": 28,
          "space": 32, "tag": 64, "key": 96, "name": 128, "xxh3": 160, "weighted": 168, "zeros": 2000,
          "header_xxh3": 4088, "payload": 4096, "end of the payload": 4095 + PAYLOAD_BYTES}  # fmt: skip
with_and_without_manifest = pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "scan"])


def fill(folder, key_ids=IDS, **settings):
    """Let an engine fill a folder; the closed rig, which knows where the records are."""
    rig = EngineRig(folder, **settings)
    with rig.adopted():
        for first in range(0, len(key_ids), POOL_SLOTS):
            rig.save(key_ids[first : first + POOL_SLOTS])
            assert rig.engine.flush(SECONDS) == 0
        rig.slots = {i: int(rig.tier.catalogue.slots_of(keys_of([i]))[0]) for i in key_ids}
    return rig


@pytest.fixture
def filled(tmp_path):
    return fill(tmp_path)


def manifests(folder):
    return list(Path(folder).rglob("manifest.sqlite"))


def segments(folder):
    return sorted(Path(folder).rglob("*.segment"))


def found(folder, key_ids=IDS, **settings):
    """What a new engine finds. It goes on: what it did not find can be saved, and is there."""
    with EngineRig(folder, **settings) as rig:
        there = rig.adopted().found(key_ids)
        rig.require_quiet()
        rig.forget_ram()
        assert rig.found(key_ids) == there, "what was wrong once is not tried again"
        missing = [i for i in key_ids if i not in there][:POOL_SLOTS]
        rig.save(missing)
        assert rig.engine.flush(SECONDS) == 0
        rig.forget_ram()
        assert rig.found(missing) == missing
        rig.require_quiet()
    return there


def all_but(*lost):
    return [i for i in IDS if i not in lost]


def test_without_a_disaster_all_is_found(filled, tmp_path):
    assert len(manifests(tmp_path)) == 1
    assert found(tmp_path) == [*IDS]


# ---- records ---------------------------------------------------------------------------------------------------------


@with_and_without_manifest
def test_a_bit_that_flips_anywhere_in_a_record_loses_that_block(filled, tmp_path, manifest):
    lost = []
    for key_id, offset in enumerate(FIELDS.values()):
        record = bytearray(filled.read_record(filled.slots[key_id]))
        record[offset] ^= 1 << key_id % 8
        filled.write_record(filled.slots[key_id], record)
        lost.append(key_id)
    if not manifest:
        manifests(tmp_path)[0].unlink()
    assert found(tmp_path) == all_but(*lost)


@with_and_without_manifest
def test_records_that_changed_places_are_never_taken_for_each_other(filled, tmp_path, manifest):
    first, second = (filled.read_record(filled.slots[i]) for i in (3, 20))
    filled.write_record(filled.slots[3], second)
    filled.write_record(filled.slots[20], first)
    if not manifest:
        manifests(tmp_path)[0].unlink()
    assert found(tmp_path) == (all_but(3, 20) if manifest else [*IDS])


@with_and_without_manifest
def test_a_payload_under_the_header_of_another_block_is_a_miss(filled, tmp_path, manifest):
    first, second = (filled.read_record(filled.slots[i]) for i in (3, 20))
    filled.write_record(filled.slots[3], first[:4096] + second[4096:])
    if not manifest:
        manifests(tmp_path)[0].unlink()
    assert found(tmp_path) == all_but(3)


@with_and_without_manifest
def test_a_record_of_other_weights_is_a_miss(filled, tmp_path, manifest):
    other = fill(tmp_path / "other", weights="step 1")
    for i in (3, 20):
        filled.write_record(filled.slots[i], other.read_record(other.slots[i]))
    if not manifest:
        manifests(tmp_path)[0].unlink()
    assert found(tmp_path) == all_but(3, 20)


# ---- files -----------------------------------------------------------------------------------------------------------


def in_segment(rig, number):
    return [i for i in IDS if rig.slots[i] // 16 == number]


@with_and_without_manifest
@pytest.mark.parametrize("what", ["deleted", "emptied", "cut in the page", "cut in a record", "cut in a payload",
                                  "another's", "garbage"])  # fmt: skip
def test_a_segment_that_is_not_what_it_was_loses_its_blocks_alone(filled, tmp_path, what, manifest):
    path = segments(tmp_path)[1]
    lost = in_segment(filled, 1)
    if what == "deleted":
        path.unlink()
    elif what == "another's":
        shutil.copy(segments(tmp_path)[0], path)
    elif what == "garbage":
        path.write_bytes(np.random.default_rng(1).bytes(path.stat().st_size))
    else:
        cut = {"emptied": 0, "cut in the page": 100, "cut in a record": 4096 + 3 * STRIDE_BYTES + 50,
               "cut in a payload": 4096 + 3 * STRIDE_BYTES + 9000}[what]  # fmt: skip
        os.truncate(path, cut)
        lost = [i for i in lost if cut <= 4096 or filled.slots[i] % 16 >= 3]
    if not manifest:
        manifests(tmp_path)[0].unlink()
    assert found(tmp_path) == all_but(*lost)


def test_a_folder_copied_back_from_an_earlier_state_has_old_blocks_that_are_right(tmp_path):
    """Of the same weights, that is: what came after it is missing, and of other weights nothing is served."""
    now, before = tmp_path / "now", tmp_path / "before"
    fill(now, IDS[:20])
    shutil.copytree(now, before)
    with EngineRig(now) as rig:
        rig.adopted().engine.discard_blocks(keys_of(IDS[:5]))
        rig.engine.flush(SECONDS)
        rig.save(IDS[20:])
        rig.engine.clear(weights="step 1")
        rig.weights = "step 1"
        rig.save(IDS[:20])
        rig.engine.flush(SECONDS)
    shutil.rmtree(now)
    shutil.copytree(before, now)
    assert found(now, weights="step 1") == []
    shutil.rmtree(now)
    shutil.copytree(before, now)
    assert found(now) == [*IDS[:20]]


@with_and_without_manifest
def test_segments_of_several_states_together_serve_no_wrong_block(tmp_path, seed, manifest):
    """Parts of the folder from before the weights changed, parts from after; its manifest is any of them, or none."""
    states = []
    for weights in (None, "step 1", None):
        fill(tmp_path / "now", IDS[::-1] if states else IDS, weights=weights)
        states.append(shutil.copytree(tmp_path / "now", tmp_path / f"state {len(states)}"))
    choices = list(itertools.product(states, repeat=4))
    for choice in choices if SOAK else random.Random(seed).sample(choices, 6):
        mixed = Path(shutil.copytree(choice[3], tmp_path / "mixed"))
        for number, state in enumerate(choice[:3]):
            shutil.copy(segments(state)[number], segments(mixed)[number])
        if not manifest:
            manifests(mixed)[0].unlink()
        with EngineRig(mixed, weights="step 1") as rig:
            rig.adopted().found(IDS)
        with EngineRig(mixed) as rig:
            rig.adopted().found(IDS)
            rig.require_quiet()
        shutil.rmtree(mixed)


# ---- the manifest ----------------------------------------------------------------------------------------------------


def change_manifest(path, statement, rows=((),)):
    database = sqlite3.connect(path)
    database.executemany(statement, rows)
    database.commit()
    database.close()


@pytest.mark.parametrize("statement", [
    "DELETE FROM blocks WHERE position < 7",
    "DELETE FROM about",
    "DROP TABLE about",
    "UPDATE about SET version = 99",
    "UPDATE about SET tag = x'00'",
    "UPDATE about SET tag = 'text'",
    "UPDATE about SET num_blocks = -1",
    "UPDATE blocks SET slot = -1 WHERE position = 3",
    "UPDATE blocks SET slot = 48 WHERE position = 3",
    "UPDATE blocks SET slot = 1 << 40 WHERE position = 3",
    "UPDATE blocks SET slot = 'x' WHERE position = 3",
    "UPDATE blocks SET slot = NULL WHERE position = 3",
    "UPDATE blocks SET slot = (SELECT slot FROM blocks WHERE position = 4) WHERE position = 3",
    "UPDATE blocks SET key = x'00' WHERE position = 3",
    "UPDATE blocks SET key = NULL WHERE position = 3",
    "UPDATE blocks SET length = 0 WHERE position = 3",
    "UPDATE blocks SET length = 1 << 33 WHERE position = 3",
    "UPDATE blocks SET length = 2.5 WHERE position = 3",
])  # fmt: skip
def test_a_manifest_that_cannot_be_true_is_not_believed(filled, tmp_path, statement):
    change_manifest(manifests(tmp_path)[0], statement)
    assert found(tmp_path) == [*IDS]


@pytest.mark.parametrize("statement", [
    "UPDATE blocks SET length = length - 1 WHERE position < 9",
    "UPDATE blocks SET key = (SELECT key FROM blocks WHERE position = 30) WHERE position = 3",
    "UPDATE blocks SET key = zeroblob(32) WHERE position = 3",
    "UPDATE blocks SET slot = 100 + slot; UPDATE blocks SET slot = 139 - slot + 100",
])  # fmt: skip
def test_what_a_manifest_says_wrong_is_a_miss(filled, tmp_path, statement):
    database = sqlite3.connect(manifests(tmp_path)[0])
    database.executescript(statement)
    database.close()
    assert len(found(tmp_path)) <= len(IDS)


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, b"SQLite format 3\0" + bytes(5000), None])
def test_a_manifest_that_is_none_costs_only_time(filled, tmp_path, content):
    path = manifests(tmp_path)[0]
    if content is None:
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(content)
    assert found(tmp_path) == [*IDS]
    assert len(manifests(tmp_path)) == 1


@pytest.mark.parametrize("what", ["folder", "dangling link", "link to a file"])
def test_what_lies_at_the_place_of_the_manifest_is_not_followed(filled, tmp_path, what):
    path = manifests(tmp_path)[0]
    path.unlink()
    elsewhere = tmp_path / "elsewhere"
    if what == "folder":
        path.mkdir()
    else:
        path.symlink_to(elsewhere)
    if what == "link to a file":
        elsewhere.write_text("mine")
    assert found(tmp_path) == [*IDS]
    assert elsewhere.exists() == (what == "link to a file")
    assert not elsewhere.exists() or elsewhere.read_text() == "mine"


def test_a_manifest_older_than_the_data_loses_nothing_that_is_right(filled, tmp_path):
    """Each block lies elsewhere by now, for most of its slots; headers are the truth."""
    old = manifests(tmp_path)[0].read_bytes()
    with EngineRig(tmp_path) as rig:
        rig.adopted().engine.discard_blocks(keys_of(IDS))
        rig.engine.flush(SECONDS)
        for first in (32, 16, 0):
            rig.save(IDS[first : first + 16][::-1])
            rig.engine.flush(SECONDS)
    manifests(tmp_path)[0].write_bytes(old)
    found(tmp_path)


# ---- under a running engine ------------------------------------------------------------------------------------------


def test_a_folder_that_is_deleted_under_an_engine_serves_until_its_end(tmp_path):
    with EngineRig(tmp_path / "folder") as rig:
        rig.save(IDS[:20])
        assert rig.engine.flush(SECONDS) == 0
        shutil.rmtree(tmp_path / "folder")
        rig.forget_ram()
        assert rig.found(IDS[:20]) == [*IDS[:20]]
        rig.save(IDS[20:])
        assert rig.engine.flush(SECONDS) == 0
        fill(tmp_path / "folder")  # another engine's, which has nothing in common with this one
    assert found(tmp_path / "folder") == [*IDS]


@pytest.mark.parametrize("nbytes", [0, 4096 + 5 * STRIDE_BYTES + 5000])
def test_segments_that_are_cut_under_an_engine_lose_their_blocks_alone(tmp_path, nbytes):
    with EngineRig(tmp_path) as rig:
        for first in (0, 16, 32):
            rig.save(IDS[first : first + 16])
            assert rig.engine.flush(SECONDS) == 0
        rig.forget_ram()
        slots = {i: int(rig.tier.catalogue.slots_of(keys_of([i]))[0]) for i in IDS}
        os.truncate(segments(tmp_path)[0], nbytes)
        assert rig.found(IDS) == [i for i in IDS if slots[i] >= 16 or slots[i] < nbytes // STRIDE_BYTES]
        rig.require_quiet()
        rig.forget_ram()
        lost = [i for i in IDS if i not in rig.known(IDS)]
        rig.save(lost)
        assert rig.engine.flush(SECONDS) == 0
        rig.forget_ram()
        assert rig.found(IDS) == [*IDS]
    found(tmp_path)


# ---- quota, owner, two engines ---------------------------------------------------------------------------------------


@with_and_without_manifest
@pytest.mark.parametrize("tier_slots", [2 * TIER_SLOTS, TIER_SLOTS // 2, 17, 16])
def test_another_quota_keeps_the_blocks_that_both_have(filled, tmp_path, tier_slots, manifest):
    if not manifest:
        manifests(tmp_path)[0].unlink()
    with EngineRig(tmp_path, tier_slots=tier_slots) as rig:
        assert rig.adopted().found(IDS) == [i for i in IDS if filled.slots[i] < tier_slots]
        rig.require_quiet()
    found(tmp_path)


def test_other_segments_serve_no_wrong_block(filled, tmp_path):
    """The same files mean other slots where segments have another size; the manifest is of the old ones."""
    with EngineRig(tmp_path, disk={"segment_bytes": 2 * SEGMENT_BYTES}) as rig:
        rig.adopted().found(IDS)
        rig.require_quiet()
    found(tmp_path)


@pytest.mark.parametrize("difference", [{"namespace": "another model"}, {"block_bytes": PAYLOAD_BYTES - 4}])
def test_an_engine_of_another_model_finds_nothing(filled, tmp_path, difference):
    settings = {"cpu_pool_size_bytes": 4 * STRIDE_BYTES, "block_bytes": PAYLOAD_BYTES, "device": "host",
                "namespace": NAMESPACE, **difference}  # fmt: skip
    disk = DiskTier(tmp_path, quota_of(TIER_SLOTS), segment_bytes=SEGMENT_BYTES)
    with KVortexEngine.create(KVortexConfig(tiers=(disk,), **settings)) as engine:
        assert engine.tiering.tier.adoption.wait(SECONDS)
        assert (engine.check_blocks(keys_of(IDS)).where == 0).all()
    assert found(tmp_path) == [*IDS]


def test_two_engines_in_one_folder_are_one_too_many(filled, tmp_path):
    with EngineRig(tmp_path) as rig:
        with pytest.raises(TierError, match=rf"in use by process {os.getpid()} on {socket.gethostname()}; end that"):
            EngineRig(tmp_path)
        assert rig.adopted().found(IDS) == [*IDS]
    assert found(tmp_path) == [*IDS]


@contextlib.contextmanager
def nothing_left_behind():
    before = open_now()
    yield
    gc.collect()
    require_no_more(before)


def test_a_folder_of_somebody_else_is_refused(filled, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 7)
    with nothing_left_behind(), pytest.raises(TierError, match=rf"belongs to user {os.getuid()}, and this process"):
        EngineRig(tmp_path)
    monkeypatch.undo()
    assert found(tmp_path) == [*IDS]


@pytest.fixture
def own_folder():
    """A folder of a user who may not do everything, as which the test runs."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["lock", "000001.segment"])
def test_a_file_that_may_not_be_written_is_named(own_folder, name):
    fill(own_folder)
    (file,) = own_folder.rglob(name)
    file.chmod(0o400)
    with nothing_left_behind(), pytest.raises(TierError, match=f"Permission denied.*|{name}.*Permission denied"):
        EngineRig(own_folder)
    file.chmod(0o600)
    assert len(found(own_folder)) == len(IDS)


def test_a_folder_that_may_not_be_written_is_named(own_folder):
    own_folder.chmod(0o500)
    with nothing_left_behind(), pytest.raises(TierError, match=f"Permission denied .{own_folder}.*may write"):
        EngineRig(own_folder)


def test_a_manifest_that_may_not_be_read_costs_only_time(own_folder):
    fill(own_folder)
    manifests(own_folder)[0].chmod(0)
    assert found(own_folder) == [*IDS]
