"""Replays through a real engine, on the device under test."""

import dataclasses
import functools
import json
import os
import random

import numpy as np
import pytest
from lru_model import simulate

import kvortex
from kvortex.replay import ReplayOptions, Request, read_trace, replay, report, sample_path
from kvortex.replay.cache import ModelCache

BLOCK_BYTES = 4096
DEVICE = os.environ.get("KVORTEX_TEST_DEVICE", "host")


@functools.cache
def sample():
    return read_trace(sample_path())


def run(requests, **options):
    return replay(requests, ReplayOptions(**{"block_bytes": BLOCK_BYTES, "device": DEVICE} | options))


def request(*ids):
    return Request(0, 512 * len(ids), 1, np.array(ids, dtype=np.int64))


@pytest.mark.parametrize("pool_blocks", [200, 1024, 4096])
def test_sample_agrees_with_an_independent_lru(pool_blocks):
    expected = simulate([(r.input_length, r.hash_ids.tolist()) for r in sample()], pool_blocks)
    result = run(sample(), pool_blocks=pool_blocks)
    assert result.wrong_blocks == 0
    assert result.pool_blocks == pool_blocks
    assert (result.requests, result.blocks_touched, result.tokens) == (len(sample()), expected.touched, expected.tokens)
    assert result.blocks_loaded / result.blocks_touched == pytest.approx(expected.loaded / expected.touched, abs=1e-3)
    assert result.tokens_loaded / result.tokens == pytest.approx(expected.tokens_loaded / expected.tokens, abs=1e-3)
    # One request at a time leaves nothing to chance: the counts agree to the block.
    assert (result.blocks_loaded, result.blocks_saved, result.blocks_evicted) == (
        expected.loaded,
        expected.saved,
        expected.evicted,
    )


def test_demo_settings_evict_more_than_half_of_the_saves():
    expected = simulate([(r.input_length, r.hash_ids.tolist()) for r in sample()], 1024)
    assert expected.evicted > expected.saved / 2
    assert 0.3 < expected.loaded / expected.touched < 0.7


def test_counts_agree_with_the_engines_own():
    result = run(sample()[:300], pool_blocks=256)
    stats = result.stats
    assert (stats.blocks_saved, stats.blocks_loaded) == (result.blocks_saved, result.blocks_loaded)
    assert (stats.bytes_saved, stats.bytes_loaded) == (
        result.blocks_saved * BLOCK_BYTES,
        result.blocks_loaded * BLOCK_BYTES,
    )


def test_latencies_spread_as_the_requests_do():
    stats = run(sample()[:500], pool_blocks=256).stats
    for name in ("lookup", "save", "load"):
        p50, p99 = (getattr(stats, f"{name}_latency_us_{percentile}") for percentile in ("p50", "p99"))
        assert 0.1 < p50 < p99 < 1e6, name  # requests of 1 to 78 blocks: no two percentiles are alike


@pytest.mark.parametrize("inflight", [2, 8])
def test_overlapping_requests_load_no_wrong_block(inflight):
    result = run(sample(), pool_blocks=512, inflight=inflight)
    assert result.wrong_blocks == 0
    assert result.requests == len(sample())
    assert result.blocks_loaded > 0.3 * result.blocks_touched


def test_overlapping_requests_for_the_same_prefixes_load_no_wrong_block():
    rng = random.Random(11)
    prefixes = [list(range(100 * n, 100 * n + 12)) for n in range(6)]
    requests = [request(*prefixes[rng.randrange(6)][: rng.randrange(1, 13)]) for _ in range(600)]
    for pool_blocks in (2, 9, 30):  # smaller than a request, smaller than the work in flight, roomy
        result = run(requests, pool_blocks=pool_blocks, inflight=5)
        assert result.wrong_blocks == 0, f"pool of {pool_blocks} blocks"
        assert result.requests == 600


@pytest.mark.parametrize("corrupt_slots", [1, 5])
def test_corrupted_slots_are_seen_when_they_are_loaded(corrupt_slots):
    result = run(sample()[:400], pool_blocks=512, corrupt_slots=corrupt_slots)
    assert result.corrupted_slots == corrupt_slots
    assert result.wrong_blocks >= corrupt_slots  # a corrupted block may be loaded more than once


def test_the_only_hit_of_a_trace_can_be_corrupted():
    result = run([request(1, 2), request(1), request(3), request(4)], corrupt_slots=1)
    assert (result.corrupted_slots, result.wrong_blocks) == (1, 1)


def test_without_verification_the_same_blocks_move():
    checked, unchecked = (run(sample()[:300], pool_blocks=256, verify=verify) for verify in (True, False))
    for name in ("blocks_loaded", "blocks_saved", "blocks_evicted", "tokens_loaded"):
        assert getattr(checked, name) == getattr(unchecked, name), name


def test_a_request_without_blocks_and_one_larger_than_the_pool_are_served():
    requests = [request(), request(*range(10)), request(), request(*range(10))]
    result = run(requests, pool_blocks=4)
    assert (result.requests, result.blocks_touched, result.wrong_blocks) == (4, 20, 0)
    assert result.blocks_loaded == simulate([(r.input_length, r.hash_ids.tolist()) for r in requests], 4).loaded == 4


def test_a_trace_of_empty_requests_ends():
    assert run([request(), request()]).blocks_touched == 0


def test_samples_rise_to_the_totals():
    result = run(sample()[:200], pool_blocks=256, inflight=3)
    samples = np.array(result.samples)
    assert len(samples) == 200
    assert (np.diff(samples, axis=0) >= 0).all()
    assert samples[-1, 1:4].tolist() == [result.blocks_touched, result.blocks_loaded, result.blocks_saved]
    assert 0 < result.save_busy_s < result.seconds and 0 < result.load_busy_s < result.seconds


def test_progress_sees_every_request():
    seen = []
    replay(
        sample()[:20],
        ReplayOptions(block_bytes=BLOCK_BYTES, device=DEVICE),
        lambda result: seen.append(result.requests),
    )
    assert seen == list(range(1, 21))


def test_summary_of_a_real_replay_is_plain_json():
    options = ReplayOptions(block_bytes=BLOCK_BYTES, device=DEVICE)
    fields = report.summary(replay(sample()[:50], options), options, "sample")
    assert json.loads(report.json_text(fields)) == fields
    assert all(type(value) in (int, float, str, bool) for value in fields.values()), fields


def test_a_cache_larger_than_the_machine_is_refused_with_advice():
    with pytest.raises(kvortex.ConfigError, match="KV cache .* lower --inflight or --block-bytes"):
        run([request(*range(64))], block_bytes=65534 << 16, pool_bytes=1 << 34)


@pytest.mark.host  # tampers with the target through a view of its memory
def test_a_corrupted_target_is_counted_even_if_the_pool_is_right(monkeypatch):
    """The comparison looks at the target: bytes changed after the load, outside the pool, are wrong too."""
    count_wrong = ModelCache.count_wrong

    def tampered(cache, first, words, generations, num_loaded):
        cache._view[3, first, 100] ^= 1
        return count_wrong(cache, first, words, generations, num_loaded)

    monkeypatch.setattr(ModelCache, "count_wrong", tampered)
    result = run(sample()[:100], pool_blocks=512)
    assert result.wrong_blocks > 0


def test_a_key_saved_again_after_its_eviction_has_new_bytes(monkeypatch):
    """Otherwise a slot still holding what was there before the eviction would pass for the new block."""
    write, written = ModelCache.write, []

    def recorded(cache, first, words, generations):
        written.append(generations.tolist())
        return write(cache, first, words, generations)

    monkeypatch.setattr(ModelCache, "write", recorded)
    result = run([request(1), request(2), request(1), request(1)], pool_blocks=1)
    assert written == [[1], [1], [2]]
    assert (result.blocks_loaded, result.wrong_blocks) == (1, 0)


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReplayOptions().inflight = 2
