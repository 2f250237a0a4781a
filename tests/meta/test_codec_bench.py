"""The arithmetic and the table of `python -m bench.codec`; its models are left to `make bench-codec`."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.codec import table

ROOT = Path(__file__).resolve().parents[2]
FAIR = np.log([[0.5, 0.5]])
LOADED = np.log([[0.25, 0.75]])


def score(reference, log_p, target):
    return table.score(reference, np.exp(reference), log_p, [target])[:, 0]


def test_what_came_back_as_it_was_costs_nothing():
    assert score(LOADED, LOADED, 0).tolist() == [0.0, 0.0, 1.0]


def test_a_token_tells_how_far_its_prediction_moved():
    fallen, kl, same = score(LOADED, FAIR, 1)
    assert fallen == pytest.approx(math.log(1.5))
    assert kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5)), "KL(exact || restored), not the reverse"
    assert same == 0


def test_changes_are_paired_token_by_token():
    steady = np.array([np.full(100, math.log(1.02)), np.full(100, 3e-3), np.ones(100)])
    found = table.summary(steady)
    assert found["ppl_change_percent"] == pytest.approx(2) and found["ppl_error_percent"] == pytest.approx(0, abs=1e-9)
    assert found["kl"] == pytest.approx(3e-3) and found["top1_percent"] == 100 and found["num_tokens"] == 100
    noisy = np.array([[0.1, -0.1], [0.0, 0.0], [1.0, 0.0]])
    assert table.summary(noisy)["ppl_error_percent"] == pytest.approx(10) and table.summary(noisy)["top1_percent"] == 50


def tokens(fallen, kl, count=4):
    return np.array([np.full(count, fallen), np.full(count, kl), np.ones(count)])


def row(name="q8", bits=8.0, kl=1e-3):
    scores = {kind: [tokens(0.0, kl), tokens(0.0, kl)] for kind in table.TEXTS}
    scores["look-up"] = [tokens(math.log(1.5), 1.0)]
    return table.row_of(name, bits, scores, [[1.0, 75.0, 4.0, 80.0], [2.0, 225.0, 0.0, 20.0]])


def test_look_ups_are_counted_apart_from_texts():
    found = row()
    assert found["texts"]["num_tokens"] == 24 and found["texts"]["kl"] == pytest.approx(1e-3)
    assert found["look-up"]["num_tokens"] == 4 and found["look-up"]["ppl_change_percent"] == pytest.approx(50)
    assert found["prose"]["num_tokens"] == 8


def test_errors_are_of_all_documents_together_k_and_v_apart():
    found = row(bits=5.0)
    assert (found["k_error_percent"], found["v_error_percent"]) == (pytest.approx(10), pytest.approx(20))
    assert found["ratio"] == pytest.approx(3.2)


@pytest.fixture
def earlier(tmp_path):
    about = {"model": "Tiny", "num_layers": 2, "num_heads": 1, "head_dim": 64, "prefix_tokens": 64}
    rows = [row("exact", 16.0, 0.0), row("q8", 8.25, 0.1e-3), row("k8v5", 6.75, 0.7e-3), row("fp8 e4m3", 8.0, 2e-3)]
    model = {**about, "perplexity": {"prose": 12.3}, "rows": rows}
    result = {"machine": "a laptop", "date": "today", "command": "x", "versions": "torch 1", "models": [model]}
    (tmp_path / "codec.json").write_text(json.dumps(result))
    return tmp_path / "codec.json"


def bench(*arguments):
    command = [sys.executable, "-m", "bench.codec", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_an_earlier_result_is_printed_and_drawn(earlier):
    done = bench("--from-json", earlier, "--plot", earlier.with_suffix(".png"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("| q8 ")]
    assert line.startswith("| q8 | 8.25 | 1.94 | 10.00 / 20.00 | +0.00 +-0.00 | 0.100 | 100.0 | +50.00 +-0.00 |")
    assert {line.count("|") for line in lines if line.startswith("|")} == {11}
    assert earlier.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_target_that_was_missed_is_marked(earlier):
    text = bench("--from-json", earlier).stdout
    assert "| 0.700! |" in text and "| 0.100 |" in text and text.count("!") == 1


def test_help_shows_how_to_begin_where_no_torch_is():
    done = bench("--help")
    assert done.returncode == 0 and "make bench-codec" in done.stdout and "--quick" in done.stdout


def test_without_torch_the_command_that_brings_it_is_named():
    code = "import sys; sys.modules['torch'] = None; from bench.codec.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--quick"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "make bench-codec" in done.stderr and "Traceback" not in done.stderr
