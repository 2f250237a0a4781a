"""`python -m bench.gpu` runs on the host device and writes what it promises: a table, JSON, a picture of the sweep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "bench.gpu", "--device", "host", "--mib", "16", "--pool-gib", "1"]
    done = subprocess.run(
        [*command, "--json", folder / "gpu.json", "--plots", folder], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_table_json_and_picture_are_written(result):
    folder, text = result
    numbers = json.loads((folder / "gpu.json").read_text())
    assert "| cache | pieces | save / load GB/s |" in text
    assert len(numbers["rows"]) > 10 and all(row["save_gbps"] > 0 for row in numbers["rows"])
    assert any(row["gather_ctas"] for row in numbers["rows"])
    assert (folder / "rate.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "slowdown.png").exists(), "there are no kernels to be slowed down here"


def test_an_earlier_result_is_printed_again(result):
    folder, text = result
    command = [sys.executable, "-m", "bench.gpu", "--from-json", folder / "gpu.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() in text
