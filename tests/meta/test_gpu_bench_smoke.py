"""`python -m bench.gpu` runs on the host device and writes what it promises: a table, JSON, a picture of the sweep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import compute, plots, table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "bench.gpu", "--device", "host", "--json", folder / "gpu.json", "--plots", folder]
    few = ["--mib", "16", "--pool-gib", "0.125", "--repeats", "1"]
    done = subprocess.run([*command, *few], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_table_json_and_picture_are_written(result):
    folder, text = result
    numbers = json.loads((folder / "gpu.json").read_text())
    assert "| cache | pieces of a block | save / load GB/s |" in text
    assert "one cuMemcpy2DAsync a block" in text and "huge pages, memory used before" in text
    assert len(numbers["rows"]) > 10 and all(row["save_gbps"] > 0 for row in numbers["rows"])
    assert any(row["gather_ctas"] for row in numbers["rows"])
    assert (folder / "rate.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "slowdown.png").exists(), "there are no kernels to be slowed down here"


def test_an_earlier_result_is_printed_again(result):
    folder, text = result
    command = [sys.executable, "-m", "bench.gpu", "--from-json", folder / "gpu.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() in text


def test_the_ways_of_submitting_are_compared():
    command = [sys.executable, "-m", "bench.gpu.deferred", "--device", "host", "--blocks", "8", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| deferred |" in done.stdout and "8 blocks of 32 x 64 KiB" in done.stdout


def test_codecs_are_compared_with_the_exact_path():
    command = [sys.executable, "-m", "bench.gpu.packed", "--device", "host", "--blocks", "2", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| q8 | 12 |" in done.stdout and "| 0.00, 0.00 | 256 |" in done.stdout


class DriftingKernels:
    """A kernel that slows down from run to run, by more than any transfer costs it."""

    def __init__(self):
        self.num_runs = 0

    def run(self, move_part=None, pause_s=0.0):
        self.num_runs += 1
        seconds = 0.1 + 0.005 * self.num_runs
        return seconds * (move_part() if move_part else 1.0), 40e9


def test_a_drift_of_the_clock_is_no_slowdown():
    found = compute.beside(DriftingKernels(), lambda: 1.03, lambda: 1.02, 1 << 20, 0.0)
    assert found["slowdown_percent"] == pytest.approx(3.0)
    assert found["contiguous_slowdown_percent"] == pytest.approx(2.0)
    assert found["difference_points"] == pytest.approx(1.0)


def test_what_transfers_cost_kernels_is_printed_and_drawn(capsys, tmp_path):
    points = []
    for kernel in ("gemm", "memory"):
        for way in ("strided", "gather, 4 CTAs"):
            for direction in ("save", "load"):
                found = compute.beside(DriftingKernels(), lambda: 1.05, lambda: 1.02, 1 << 20, 0.0)
                points.append({"kernel": kernel, "direction": direction, "way": way, **found})
    table.show_compute(points)
    text = capsys.readouterr().out
    assert text.count("| 3.0! (3.0 to 3.0) / 3.0! (3.0 to 3.0) |") == 4
    plots.slowdown({"device": "none", "compute": points}, tmp_path / "slowdown.png")
    assert (tmp_path / "slowdown.png").read_bytes().startswith(b"\x89PNG")
