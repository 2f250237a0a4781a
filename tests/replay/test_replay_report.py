"""Table, progress and picture from a result; no engine needed."""

import io
import struct
from types import SimpleNamespace

import numpy as np
import pytest

import kvortex
from kvortex.replay import ReplayOptions, ReplayResult, plot, report

LATENCIES = {
    f"{name}_latency_us_{percentile}": 1.5 for name in ("lookup", "save", "load") for percentile in ("p50", "p99")
}


def result(num_requests=200):
    """A steady replay: 10 blocks a request, 4 of them loaded in 1 ms, 6 saved in 2 ms."""
    samples = [(0.01 * n, 10 * n, 4 * n, 6 * n, 0.001 * n, 0.002 * n) for n in range(1, num_requests + 1)]
    n = num_requests
    return ReplayResult(
        "host:0", 1_000_000, pool_blocks=64, requests=n, blocks_touched=10 * n, blocks_loaded=4 * n,
        blocks_saved=6 * n, blocks_evicted=6 * n - 64, tokens=5000 * n, tokens_loaded=2048 * n,
        save_busy_s=0.002 * n, load_busy_s=0.001 * n, seconds=0.01 * n, stats=SimpleNamespace(**LATENCIES),
        samples=samples,
    )  # fmt: skip


def fields(**changes):
    return report.summary(result(), ReplayOptions(**changes), "some.jsonl")


def test_summary_has_ratios_and_rates():
    got = fields()
    assert got["prefix_hit_block_ratio"] == pytest.approx(0.4)
    assert got["prefix_hit_token_ratio"] == pytest.approx(0.4096)
    assert got["save_gbps"] == pytest.approx(6e6 / 0.002 / 1e9)
    assert got["load_gbps"] == pytest.approx(4e6 / 0.001 / 1e9)
    assert got["requests"] == 200 and got["blocks_evicted"] == 1136 and got["policy"] == "lru"


def test_summary_of_a_replay_without_hits_divides_by_nothing():
    empty = ReplayResult("host:0", 4096, stats=SimpleNamespace(**LATENCIES))
    got = report.summary(empty, ReplayOptions(), "x")
    assert got["prefix_hit_block_ratio"] == got["load_gbps"] == got["save_gbps"] == 0


def test_table_says_whether_bytes_were_compared():
    assert "wrong blocks      0\n" in report.table(fields()) + "\n"
    assert "not checked" in report.table(fields(verify=False))
    assert "40.00% of blocks, 40.96% of tokens" in report.table(fields())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_ends_full_and_with_a_line_end():
    out = Terminal()
    with report.Bar(out) as bar:
        report.Progress(200, bar)(result())
    assert out.getvalue().startswith("\r[#") and out.getvalue().endswith("\n")
    assert "100% 200/200 requests" in out.getvalue() and "." not in out.getvalue().split("]")[0]


def test_progress_is_silent_for_ten_seconds_when_nobody_watches(monkeypatch):
    now = 100.0
    monkeypatch.setattr(report.time, "monotonic", lambda: now)
    out = io.StringIO()
    progress = report.Progress(400, report.Bar(out))
    progress(result())
    assert out.getvalue() == ""
    now = 111.0
    progress(result())
    assert out.getvalue().splitlines() == [" 50% 200/400 requests  100/s  2 s left  hits 40.0%  wrong 0"]


def test_bins_of_a_steady_replay_are_level():
    edges_s, hit_ratio, load_gbps, save_gbps, total = plot.bins(result().samples, 1_000_000, num_bins=20)
    assert edges_s[[0, -1]].tolist() == [0, 2.0] and len(edges_s) == 21
    assert hit_ratio == pytest.approx(np.full(20, 0.4)) and total == pytest.approx(np.full(20, 0.4))
    assert load_gbps == pytest.approx(np.full(20, 4.0)) and save_gbps == pytest.approx(np.full(20, 3.0))


def test_bins_lose_nothing():
    seconds = np.sort(np.random.default_rng(5).random(500))
    samples = [(t, 3 * i, i, 2 * i, 0.001 * i, 0.002 * i) for i, t in enumerate(seconds, 1)]
    for num_bins in (1, 7, 80):
        *_, total = plot.bins(samples, 1, num_bins)
        assert total[-1] == pytest.approx(1 / 3)


def test_picture_is_a_png_of_readable_size(tmp_path):
    for number, replayed in enumerate((result(), result(1))):
        plot.write_picture(tmp_path / f"{number}.png", replayed, report.summary(replayed, ReplayOptions(), "t.jsonl"))
        head = (tmp_path / f"{number}.png").read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", head[16:24])
        assert width >= 1000 and height >= 600


def test_picture_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "kvortex\[plot\]"'):
        plot.write_picture(tmp_path / "x.png", result(), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_bytes": 0}, "block_bytes must be 1 to 4294967295"),
        ({"block_bytes": 1000}, "multiple of 128 .*got 1000; the nearest are 896 and 1024"),
        ({"num_pieces": 3}, "must be even"),
        ({"inflight": 0}, "inflight must be 1 to 256"),
        ({"pool_blocks": 0}, "pool_blocks must be 1 or more"),
        ({"pool_blocks": 1, "pool_bytes": 4096}, "not both"),
        ({"corrupt_slots": 1, "verify": False}, "verification on"),
    ],
)
def test_bad_options_are_refused_with_the_limit(changes, message):
    with pytest.raises(kvortex.ConfigError, match=message):
        ReplayOptions(**changes)


def test_pool_blocks_are_counted_in_whole_pages():
    assert ReplayOptions(block_bytes=4096, pool_blocks=10).cpu_pool_size_bytes == 40960
    assert ReplayOptions(block_bytes=4224, num_pieces=2, pool_blocks=10).cpu_pool_size_bytes == 81920
    assert ReplayOptions(pool_bytes=12345).cpu_pool_size_bytes == 12345
    assert ReplayOptions().cpu_pool_size_bytes == 256 << 20


def test_default_pieces_are_64_kib_and_at_least_8():
    assert [ReplayOptions(block_bytes=n << 10).num_pieces for n in (64, 256, 512, 1024, 2048)] == [8, 8, 8, 16, 32]
