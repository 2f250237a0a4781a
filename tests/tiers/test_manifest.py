"""A manifest makes a restart fast and keeps the order of eviction; a wrong one serves no wrong block."""

import functools
import os
import sqlite3

import numpy as np
import pytest
from test_segments import disk_usage
from tier_rig import ALL, NUM_SLOTS, OTHER_TAG, PAYLOAD_BYTES, SECONDS, SPACE, keys_of, load, quota_of, save

from kvortex.tiers.base import BlockStatus
from kvortex.tiers.disk.manifest import NAME, take_manifest, write_manifest


@pytest.fixture
def open_tier(open_tier):
    """With the manifest that is there."""
    return functools.partial(open_tier, manifest=True)


@pytest.fixture
def manifest(tmp_path, open_tier, pool):
    """The manifest of a tier with a block in each slot."""
    with open_tier() as tier:
        save(tier, pool, ALL)
    return tmp_path / SPACE[:4].hex() / "dp0-rank0" / NAME


def test_a_restart_with_a_manifest_reads_no_header(manifest, open_tier, pool):
    with open_tier(wait=False) as tier:
        assert len(load(tier, pool, ALL)) == NUM_SLOTS
        assert tier.store.stats()["scan"] == {}


def test_blocks_go_in_the_order_in_which_they_would_have_gone(open_tier, pool, seed):
    order = np.random.default_rng(seed).permutation(NUM_SLOTS)
    with open_tier() as tier:
        save(tier, pool, ALL)
        for key_id in order:
            tier.catalogue.touch(keys_of([key_id]))
    with open_tier() as tier:
        _, _, victims = tier.catalogue.reserve(keys_of(range(100, 110)), PAYLOAD_BYTES, victims=True)
        assert np.array_equal(victims.keys, keys_of(order[:10]))


def test_it_is_taken_away_so_that_none_outlives_what_it_tells_of(manifest, open_tier):
    assert manifest.exists() and manifest.stat().st_mode & 0o777 == 0o600
    tier = open_tier()
    assert not manifest.exists()
    tier.store.close()  # as a crash: nobody writes another one
    with open_tier() as tier:
        assert tier.adoption.num_adopted == tier.adoption.num_scanned == NUM_SLOTS


def test_one_of_other_weights_is_not_believed(manifest, open_tier, pool):
    with open_tier(tag=OTHER_TAG) as tier:
        assert tier.adoption.num_adopted == 0
        assert load(tier, pool, ALL) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no database" * 1000),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: sqlite(path, "DROP TABLE blocks"),
        lambda path: sqlite(path, "DELETE FROM about"),
        lambda path: sqlite(path, "UPDATE about SET version = 2"),
        lambda path: sqlite(path, "DELETE FROM blocks WHERE slot = 5"),
        lambda path: sqlite(path, "UPDATE blocks SET slot = 40 WHERE slot = 5"),
        lambda path: sqlite(path, "UPDATE blocks SET slot = -1 WHERE slot = 5"),
        lambda path: sqlite(path, "UPDATE blocks SET slot = 6 WHERE slot = 5"),
        lambda path: sqlite(path, "UPDATE blocks SET slot = 'x' WHERE slot = 5"),
        lambda path: sqlite(path, "UPDATE blocks SET key = x'00' WHERE slot = 5"),
        lambda path: sqlite(path, "UPDATE blocks SET key = NULL WHERE slot = 5"),
        lambda path: sqlite(path, "UPDATE blocks SET length = 0 WHERE slot = 5"),
        lambda path: sqlite(path, f"UPDATE blocks SET length = {PAYLOAD_BYTES + 1} WHERE slot = 5"),
        lambda path: sqlite(path, "UPDATE blocks SET length = 1 << 62 WHERE slot = 5"),
    ],
)
def test_a_manifest_that_cannot_be_true_costs_a_scan(manifest, open_tier, pool, damage):
    damage(manifest)
    with open_tier() as tier:
        assert tier.adoption.num_scanned == NUM_SLOTS
        assert len(load(tier, pool, ALL)) == NUM_SLOTS


def sqlite(path, statement):
    database = sqlite3.connect(path)
    database.execute(statement)
    database.commit()
    database.close()


def test_flipped_bits_of_a_manifest_serve_no_wrong_block(manifest, open_tier, pool, seed):
    rng, whole = np.random.default_rng(seed), manifest.read_bytes()
    for _ in range(20):
        data = bytearray(whole)
        for bit in rng.integers(0, 8 * len(data), 20):
            data[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(data)
        with open_tier() as tier:
            load(tier, pool, ALL)  # compares what it gets


def test_a_manifest_older_than_the_data_serves_no_wrong_block(manifest, open_tier, pool):
    old = manifest.read_bytes()
    with open_tier() as tier:
        tier.discard(keys_of(range(10)))
        save(tier, pool, range(100, 130))
    manifest.write_bytes(old)
    with open_tier() as tier:
        found = load(tier, pool, [*ALL, *range(100, 130)])
        keys = keys_of(sorted(set(ALL) - set(found)))
        assert set(found) <= set(ALL) and len(keys)
        slots = tier.catalogue.acquire(keys[:1])
        batch = tier.store.get(slots, [0], keys[:1], PAYLOAD_BYTES, tag=tier.tag, timeout_ms=SECONDS)
        assert batch.wait()[0] in (BlockStatus.KEY_DIFFERS, BlockStatus.MISSING)


def test_a_dropped_segment_is_not_in_what_a_manifest_brings(manifest, open_tier, pool):
    (manifest.parent / "000001.segment").unlink()
    with open_tier(wait=False) as tier:
        assert sorted(load(tier, pool, ALL).values()) == [*range(16), *range(32, 40)]
        assert tier.catalogue.num_free == 16


def test_a_manifest_that_cannot_be_written_is_told_and_left_out(tmp_path):
    write_manifest(tmp_path / "nowhere", SPACE, np.zeros(1, np.uint32), keys_of([1]), np.ones(1, np.uint32))
    (tmp_path / NAME).mkdir()
    write_manifest(tmp_path, SPACE, np.zeros(1, np.uint32), keys_of([1]), np.ones(1, np.uint32))
    assert len(take_manifest(tmp_path, SPACE, 1, 1)[0]) == 0


def test_the_quota_pays_for_the_manifest(tmp_path, manifest):
    assert disk_usage(tmp_path) <= quota_of(NUM_SLOTS)
    for n in (1000, 20_000):
        folder = tmp_path / str(n)
        folder.mkdir()
        slots = np.arange(n, dtype=np.uint32)
        write_manifest(folder, SPACE, slots, np.random.default_rng(0).integers(0, 256, (n, 32), np.uint8), slots + 1)
        assert os.stat(folder / NAME).st_blocks * 512 <= 128 * n
        read = take_manifest(folder, SPACE, n, 1 << 20)
        assert read[0].tolist() == slots.tolist() and read[2].tolist() == (slots + 1).tolist()
