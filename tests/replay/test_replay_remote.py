"""Replays through engines over a folder that they share; Redis and S3: tests/services/test_replay.py."""

import functools
import json
import os

import pytest
from lru_model import simulate

import kvortex
from kvortex.cli import main
from kvortex.replay import ReplayOptions, read_trace, replay, sample_path

DEVICE = os.environ.get("KVORTEX_TEST_DEVICE", "host")
NUM_REQUESTS = 60
LOOKUP_MS = 30_000  # a deadline that no healthy machine comes near
ALL = 1 << 30  # blocks: a cache that never evicts
ARGS = ["replay", "--device", DEVICE, "--limit", "30", "--block-bytes", "4096", "--pool-blocks", "200"]


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
        remote = kvortex.ObjectTier(f"file://{tmp_path}", negative_ttl_s=0, lookup_timeout_ms=LOOKUP_MS)
        options = {"pool_blocks": 200, "flush": True} | options
        return replay(sample(), ReplayOptions(block_bytes=4096, device=DEVICE, remote=remote, **options))

    yield run
    assert os.listdir(tmp_path) == [], "a replay leaves nothing behind"


@pytest.mark.parametrize("engines", [1, 2, 3])
def test_engines_in_turn_find_what_one_would_that_never_evicts(run, engines):
    result = run(engines=engines)
    assert (result.wrong_blocks, result.requests) == (0, NUM_REQUESTS)
    assert result.blocks_loaded == pytest.approx(hits_of(ALL), rel=0.01)
    assert result.blocks_from_tier == sum(tier.blocks_promoted for tier in result.tiers)
    assert len(result.tiers) == engines and all(tier.blocks_promoted > 0 for tier in result.tiers)
    assert result.blocks_dropped == 0


def test_overlapping_requests_of_two_engines_bring_no_wrong_block(run):
    result = run(engines=2, inflight=4)
    assert (result.wrong_blocks, result.requests) == (0, NUM_REQUESTS)
    assert result.blocks_from_tier > 0


def test_a_corrupted_slot_is_seen_over_a_remote_too(run):
    result = run(engines=2, corrupt_slots=3)
    assert result.corrupted_slots == 3 <= result.wrong_blocks


def test_the_write_budget_is_the_tiers():
    redis = kvortex.RedisTier("redis://host", ttl_s=9)
    tier = ReplayOptions(remote=redis, write_bytes_per_s=7).tier(None)
    assert (tier.write_bytes_per_s, tier.ttl_s) == (7, 9)
    paced = ReplayOptions(remote=redis, write_share=0.5, block_bytes=4096).tier(None)
    assert paced.write_bytes_per_s == 100 * 8192, "blocks are its clock"


def test_table_and_json_say_what_ram_and_the_remote_had(tmp_path, capsys):
    remote = ["--remote", f"file://{tmp_path}", "--remote-option", f"lookup_timeout_ms={LOOKUP_MS}"]
    args = [*ARGS, *remote, "--flush", "--engines", "2"]
    assert main([*args, "--json", "-"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["ram_hit_block_ratio"] + fields["remote_hit_block_ratio"] == pytest.approx(
        fields["prefix_hit_block_ratio"]
    )
    assert fields["engines"] == 2 and fields["remote_blocks_written"] > 0 == fields["wrong_blocks"]
    assert main(args) == 0
    table = capsys.readouterr().out
    for text in ("hits in RAM", "hits in remote", "in each of 2 engines", "evicted before the remote had them"):
        assert text in table
    assert main([*args, "--inject", "corrupt=1"]) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--remote", "file:///no/such/folder"], "/no/such/folder"),
        (["--remote", "ftp://host"], "must begin with"),
        (["--remote", "redis://user:hush@host"], "password_env"),
        (["--remote", "redis://host", "--remote-option", "password=hush"], "did you mean 'password_env'"),
        (["--remote", "redis://host", "--remote-option", "ttl_s=soon"], "ttl_s"),
        (["--remote", "redis://127.0.0.1:1"], "does not take a value"),
        (["--remote", "redis://host", "--disk", "/tmp", "--disk-blocks", "9"], "not both"),
        (["--remote", "redis://host", "--disk-blocks", "9"], "need a disk"),
        (["--remote-option", "ttl_s=9"], "needs --remote"),
        (["--engines", "2"], "need a remote"),
        (["--remote", "redis://host", "--engines", "65"], "engines must be 1 to 64"),
    ],
)
def test_what_cannot_be_replayed_over_is_one_line_and_status_2(capsys, args, message):
    assert main([*ARGS, *args]) == 2
    err = capsys.readouterr().err
    assert message in err and "hush" not in err.replace("password=hush", "") and "Traceback" not in err


def test_a_sweep_takes_no_remote(capsys):
    assert main(["replay", "--sweep", "100", "--remote", "redis://host"]) == 2
    assert "leave" in capsys.readouterr().err


def test_a_remote_option_without_a_value_is_refused(capsys):
    with pytest.raises(SystemExit):
        main([*ARGS, "--remote", "redis://host", "--remote-option", "ttl_s"])
    assert "NAME=VALUE" in capsys.readouterr().err
