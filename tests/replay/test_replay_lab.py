"""The sweep: LRU is what a replay finds, and Belady's bound is what the best of all policies finds."""

import functools
import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lru_model import simulate

import kvortex
from kvortex.cli import main
from kvortex.replay import ReplayOptions, Request, lab, read_trace, replay, report, sample_path, sweep
from kvortex.replay.lab import belady_hits, next_use


def request(*ids, tokens=None):
    return Request(0, 512 * len(ids) if tokens is None else tokens, 1, np.array(ids, dtype=np.int64))


def best_possible(requests, pool_blocks):
    """Blocks of leading runs that the luckiest of all policies finds, by trying everything it could keep.

    A block is named by the ids up to it. After a request the pool may hold anything that it held or that the request
    brought.
    """
    prompts = [tuple(tuple(ids[: n + 1]) for n in range(len(ids))) for ids in requests]

    @functools.cache
    def best(position, pool):
        if position == len(prompts):
            return 0
        blocks = prompts[position]
        leading = len(list(itertools.takewhile(lambda block: block in pool, blocks)))
        later = {block for prompt in prompts[position + 1 :] for block in prompt}
        candidates = sorted((pool | set(blocks)) & later)
        kept = itertools.combinations(candidates, min(pool_blocks, len(candidates)))
        return leading + max(best(position + 1, frozenset(keep)) for keep in kept)

    return best(0, frozenset())


prompts = st.lists(st.lists(st.integers(1, 2), max_size=4), max_size=7)


@settings(deadline=None, max_examples=300)
@given(prompts, st.integers(1, 4))
def test_belady_is_the_best_possible(prompts, pool_blocks):
    result = sweep([request(*ids) for ids in prompts], [pool_blocks])
    assert result.points[0].belady_blocks == best_possible(prompts, pool_blocks)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(1, 3), max_size=6), max_size=30), st.lists(st.integers(1, 9), min_size=1))
def test_belady_keeps_whole_prefixes_and_no_pool_finds_more(prompts, sizes):
    requests = [request(*ids) for ids in prompts]
    words = np.array([hash(tuple(ids[: n + 1])) for ids in prompts for n in range(len(ids))], np.int64).view(np.uint64)
    next_uses, distinct = next_use(words)
    assert distinct == len(set(words.tolist()))
    for size in sizes:
        hits, start = belady_hits(next_uses, size), 0
        for ids in prompts:
            run = hits[start : start + len(ids)]
            assert (np.sort(run)[::-1] == run).all(), "hits behind a miss"
            start += len(ids)
    result = sweep(requests, sizes)
    for point in result.points:
        assert point.lru_blocks <= point.belady_blocks <= result.unbounded_blocks
        assert point.lru_tokens <= point.belady_tokens <= result.unbounded_tokens
    assert [point.pool_blocks for point in result.points] == sorted(set(sizes))


def test_a_larger_pool_never_finds_less_of_sessions_that_grow():
    """Twenty agents in turn, each prompt the former one and some blocks: many prompts are longer than many pools."""
    draw = random.Random(8)
    sessions, requests = [[] for _ in range(20)], []
    while len(requests) < 300:
        session = draw.choice(sessions)
        for _ in range(draw.randrange(1, 4)):  # turns in a row
            grown = len(session) + draw.randrange(20, 250)
            session += range(1000 * len(requests), 1000 * len(requests) + min(grown, 2100) - len(session))
            requests.append(request(*session))
    result = sweep(requests, range(200, 3001, 200))
    hits = [100 * point.lru_blocks / result.blocks_touched for point in result.points]
    assert max(smaller - larger for smaller, larger in itertools.pairwise(hits)) <= 0.1
    assert hits[4] > 0.4 * hits[-1] > 5  # 1 000 blocks hold many a prompt


@pytest.mark.parametrize("pool_blocks", [1, 2, 5, 12])
def test_a_prompt_longer_than_the_pool_finds_its_head_again(pool_blocks):
    requests = [request(*range(29))] * 5
    assert sweep(requests, [pool_blocks]).points[0].lru_blocks == 4 * pool_blocks
    options = ReplayOptions(block_bytes=4096, num_pieces=2, pool_blocks=pool_blocks, device="host")
    assert replay(requests, options).blocks_loaded == 4 * pool_blocks


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(1, 2), max_size=5), max_size=12), st.integers(5, 12))
def test_lru_is_what_a_model_of_it_finds(prompts, pool_blocks):
    """In pools that hold a whole prompt: the model says nothing of a save that evicts what it saved itself."""
    named = [(512 * len(ids), [hash(tuple(ids[: n + 1])) for n in range(len(ids))]) for ids in prompts]
    point = sweep([request(*ids) for ids in prompts], [pool_blocks]).points[0]
    expected = simulate(named, pool_blocks)
    assert (point.lru_blocks, point.lru_tokens) == (expected.loaded, expected.tokens_loaded)


def test_lru_is_what_a_replay_through_an_engine_finds():
    requests = read_trace(sample_path(), 400)
    result = sweep(requests, [200, 1024])
    for point in result.points:
        replayed = replay(requests, ReplayOptions(block_bytes=4096, device="host", pool_blocks=point.pool_blocks))
        assert (point.lru_blocks, point.lru_tokens) == (replayed.blocks_loaded, replayed.tokens_loaded)
        assert (result.blocks_touched, result.tokens) == (replayed.blocks_touched, replayed.tokens)


def test_requests_larger_than_the_pool_are_found_as_by_an_engine():
    rng = np.random.default_rng(3)
    requests = [request(*rng.integers(1, 3, rng.integers(0, 7)).tolist()) for _ in range(150)]
    for point in sweep(requests, range(1, 7)).points:
        options = ReplayOptions(block_bytes=4096, device="host", pool_blocks=point.pool_blocks)
        assert point.lru_blocks == replay(requests, options).blocks_loaded, point.pool_blocks


def test_a_pool_that_holds_everything_finds_what_was_seen_before():
    result = sweep([request(1, 2), request(1, 2, 3, tokens=1100), request(4), request(1, 2, 3, tokens=1100)], [10**9])
    assert (result.blocks_touched, result.distinct_blocks) == (9, 4)
    assert (result.unbounded_blocks, result.unbounded_tokens) == (5, 1024 + 1100)
    assert (result.points[0].lru_blocks, result.points[0].belady_blocks) == (5, 5)


@pytest.mark.parametrize("requests", [[], [request()]])
def test_a_trace_without_blocks_is_swept(requests):
    fields = report.sweep_summary(sweep(requests, [5]), "empty")
    assert fields["points"][0]["lru_block_ratio"] == fields["unbounded_block_ratio"] == 0
    assert "unbounded" in report.sweep_table(fields)


@pytest.mark.parametrize("sizes", [[], [0], [5, -1]])
def test_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(kvortex.ConfigError, match="1 block or more"):
        sweep([request(1)], sizes)


def test_progress_rises_to_the_end():
    seen = []
    sweep([request(*range(50))] * 20, [10, 20], lambda share, what: seen.append(share))
    assert seen == sorted(seen) and seen[-1] == 1 and 0 < seen[0] <= 1


def test_the_command_line_shows_table_json_and_picture(tmp_path, capsys):
    path, picture = tmp_path / "s.json", tmp_path / "s.png"
    assert main(["replay", "--sweep", "1024,200", "--json", str(path), "--plot", str(picture), "--limit", "400"]) == 0
    fields = json.loads(path.read_text())
    assert [point["pool_blocks"] for point in fields["points"]] == [200, 1024]
    assert 0 < fields["points"][0]["lru_block_ratio"] < fields["points"][0]["belady_block_ratio"] < 1
    shown = capsys.readouterr().out
    for point in fields["points"]:
        assert f"{point['pool_blocks']:,}" in shown
        assert f"{100 * point['lru_block_ratio']:.2f}" in shown and f"{100 * point['belady_token_ratio']:.2f}" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_line_reads_folders(tmp_path, capsys):
    turn = {"t": 0, "in": 128, "hash_ids": [1, 2]}
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps({"block_size": 64, "requests": [turn, turn]}))
    assert main(["replay", str(tmp_path), "--sweep", "4"]) == 0
    assert "8, 4 different ones" in capsys.readouterr().out


def test_indexes_beyond_the_memory_are_refused(monkeypatch):
    asked = []
    monkeypatch.setattr(lab, "lacking_memory", lambda nbytes: asked.append(nbytes) or ("available memory", 1 << 20))
    with pytest.raises(
        kvortex.ConfigError, match="of 2 pools need .* and available memory leaves 1 MiB; ask for fewer"
    ):
        sweep([request(*range(10))], [3, 10**12])
    assert asked == [13 * lab.SLOT_BYTES] and kvortex.BlockIndex(13).memory_bytes < asked[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sweep", "0"], "1 or more"),
        (["--sweep", "10,,20"], "1 or more"),
        (["--sweep", "1k"], "whole number"),
        (["--sweep", "10", "--pool-blocks", "5"], "not allowed with"),
    ],
)
def test_bad_usage_exits_2(args, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["replay", *args])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_sweep_injects_nothing(capsys):
    assert main(["replay", "--sweep", "10", "--inject", "corrupt=1"]) == 2
    assert "--sweep moves no data" in capsys.readouterr().err
