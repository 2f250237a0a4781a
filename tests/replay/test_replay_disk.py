"""Replays through an engine with a disk tier: where hits come from, and that nothing wrong comes."""

import functools
import os

import pytest
from lru_model import simulate

import kvortex
from kvortex.cli import main
from kvortex.replay import ReplayOptions, read_trace, replay, report, sample_path

DEVICE = os.environ.get("KVORTEX_TEST_DEVICE", "host")
NUM_REQUESTS = 250
FIRST_CREDIT = 1000  # blocks


@functools.cache
def sample():
    return read_trace(sample_path(), NUM_REQUESTS)


@functools.cache
def hits_of(num_blocks):
    """What an LRU cache of so many blocks has, by a model that shares nothing with the engine."""
    return simulate([(request.input_length, request.hash_ids.tolist()) for request in sample()], num_blocks).loaded


@pytest.fixture
def run(tmp_path):
    def run(**options):
        options = {"pool_blocks": 200, "disk_blocks": 900, "write_bytes_per_s": 0} | options
        return replay(sample(), ReplayOptions(block_bytes=4096, device=DEVICE, disk=tmp_path, **options))

    yield run
    assert os.listdir(tmp_path) == [], "a replay leaves nothing behind"


def test_ram_and_disk_hit_together_what_the_disk_alone_would(run):
    result = run(flush=True)
    assert result.wrong_blocks == 0
    assert result.stats.blocks_evicted > 0 < result.stats.tiers[0].blocks_evicted
    assert result.blocks_loaded == pytest.approx(hits_of(900), rel=0.01)
    assert result.blocks_loaded - result.blocks_from_tier == pytest.approx(hits_of(200), rel=0.01)
    assert result.blocks_from_tier == result.stats.tiers[0].blocks_promoted > 0
    assert result.stats.blocks_dropped == 0 and not any(result.stats.tiers[0].misses.values())


def test_a_cleaner_that_always_runs_does_not_change_what_ram_has(run):
    result = run()
    assert result.wrong_blocks == 0 < result.stats.tiers[0].blocks_written
    assert result.blocks_loaded - result.blocks_from_tier == pytest.approx(hits_of(200), rel=0.02)


def test_overlapping_requests_bring_no_wrong_block_from_the_disk(run):
    result = run(inflight=4, flush=True)
    assert (result.wrong_blocks, result.requests) == (0, NUM_REQUESTS)
    assert result.blocks_from_tier > 0


@pytest.mark.parametrize("share", [0, 0.25])
def test_of_what_is_saved_a_share_is_written(run, share):
    result = run(write_bytes_per_s=None, write_share=share)
    tier = result.stats.tiers[0]
    assert result.wrong_blocks == 0
    assert tier.blocks_admitted + tier.blocks_not_admitted == result.blocks_saved
    assert tier.blocks_written <= share * result.blocks_saved + FIRST_CREDIT
    assert tier.blocks_admitted >= share * result.blocks_saved
    assert tier.blocks_written_beyond == 0


def test_a_corrupted_slot_is_seen_with_a_disk_too(run):
    result = run(flush=True, corrupt_slots=3)
    assert result.corrupted_slots == 3 <= result.wrong_blocks


def test_table_and_json_say_where_hits_came_from(run):
    options = ReplayOptions(disk="/", disk_blocks=900)
    fields = report.summary(run(), options, "sample")
    assert all(type(value) in (int, float, str, bool, dict) for value in fields.values()), fields
    assert fields["ram_hit_block_ratio"] + fields["disk_hit_block_ratio"] == pytest.approx(
        fields["prefix_hit_block_ratio"]
    )
    table = report.table(fields)
    for row in ("hits in RAM", "hits on disk", "disk  ", "written", "dropped dirty", "promoted"):
        assert f"\n  {row}" in table
    fields["disk_misses"] = {"LATE": 3, "BEING_SAVED": 1200}
    assert "not brought: 1,200 being saved, 3 late" in report.table(fields)


def test_a_disk_of_so_many_blocks_has_so_many(run):
    for disk_blocks in (1, 900, 3000):
        assert run(disk_blocks=disk_blocks).stats.tiers[0].blocks_capacity == disk_blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flush": True}, "need a disk"),
        ({"disk_blocks": 5}, "need a disk"),
        ({"write_bytes_per_s": 0}, "need a disk"),
        ({"write_share": 0.0}, "need a disk"),
        ({"disk": "/"}, "give disk_blocks or disk_bytes"),
        ({"disk": "/", "disk_blocks": 5, "disk_bytes": 5}, "give disk_blocks or disk_bytes"),
        ({"disk": "/", "disk_blocks": 0}, "disk_blocks must be 1 or more"),
        ({"disk": "/", "disk_blocks": 5, "write_bytes_per_s": 5, "write_share": 0.5}, "not both"),
    ],
)
def test_bad_options_of_a_disk_are_refused(changes, message):
    with pytest.raises(kvortex.ConfigError, match=message):
        ReplayOptions(**changes)


def test_the_command_line_takes_a_disk(tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    args = ["replay", "--device", DEVICE, "--limit", "50", "--block-bytes", "4096", "--pool-blocks", "128"]
    disk = ["--disk", str(tmp_path / "disk"), "--disk-bytes", "8MiB"]
    assert main([*args, *disk, "--flush", "--write-bytes-per-s", "0"]) == 0
    assert main([*args, *disk, "--write-share", "0.25"]) == 0
    assert "hits on disk" in capsys.readouterr().out
    assert main([*args, "--flush"]) == 2
    assert "need a disk" in capsys.readouterr().err
    for bad in (["--disk", "/no/such/folder"], ["--write-share", "2"], ["--write-bytes-per-s", "x"]):
        with pytest.raises(SystemExit):
            main([*args, *bad])
