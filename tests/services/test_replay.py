"""Replays over real servers; what replays promise over any tier: tests/replay/test_replay_remote.py."""

import dataclasses

import pytest
from servers import BUCKET, Redis

from kvortex import TierError
from kvortex.cli import main
from kvortex.replay import ReplayOptions, read_trace, replay, sample_path

NUM_REQUESTS = 60


def run(tier, **options):
    options = {"pool_blocks": 200, "flush": True, "block_bytes": 4096, "device": "host"} | options
    return replay(read_trace(sample_path(), NUM_REQUESTS), ReplayOptions(remote=tier, **options))


@pytest.mark.parametrize("kind", ["redis", "redis-cluster", "s3"])
def test_two_engines_find_what_one_would(settings_of, kind):
    tier = settings_of(kind, negative_ttl_s=0, lookup_timeout_ms=30_000)
    one, two = run(tier), run(tier, engines=2)
    assert one.wrong_blocks == two.wrong_blocks == 0
    assert two.blocks_loaded == pytest.approx(one.blocks_loaded, abs=0.01 * one.blocks_touched)
    assert one.blocks_from_tier > 0 and all(tier.blocks_promoted > 0 for tier in two.tiers)


def test_nothing_is_left_on_the_server(tmp_path, gateway, settings_of):
    server = Redis(tmp_path).start()
    try:
        arguments = ["replay", "--limit", str(NUM_REQUESTS), "--block-bytes", "4096", "--pool-blocks", "200", "--flush"]
        assert main([*arguments, "--device", "host", "--remote", server.url, "--engines", "2"]) == 0
        assert server.cli("dbsize").strip() == "0"
        assert "cmdstat_set" in server.cli("info", "commandstats")
    finally:
        server.kill()
    tier = settings_of("s3")
    assert run(tier).tiers[0].blocks_written > 0
    listed = gateway.s3().list_objects_v2(Bucket=BUCKET, Prefix=tier.url.partition(f"{BUCKET}/")[2])
    assert listed["KeyCount"] == 0


def test_a_bucket_that_is_missing_is_told_before_the_replay(settings_of):
    with pytest.raises(TierError, match="does not take a value"):
        run(dataclasses.replace(settings_of("s3"), url="s3://no-such-bucket/x"))
