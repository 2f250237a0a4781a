"""`python -m bench.remote` runs, compares what it reads, and leaves nothing behind."""

import json
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_row_for_each_verb_depth_and_number_of_joined_blocks_is_shown_and_nothing_is_left(tmp_path):
    report = tmp_path / "rows.json"
    few = ["--mib", "0.1", "--blocks", "4", "--rounds", "1", "--depths", "1,2", "--joined", "1,2"]
    command = [sys.executable, "-m", "bench.remote", f"file://{tmp_path}/shared", *few, "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    wanted = [(depth, joined, verb) for depth in (1, 2) for joined in (1, 2) for verb in ("write", "read")]
    assert [(row["depth"], row["joined"], row["verb"]) for row in rows] == wanted
    assert all(row["store_gbps"] > 0 < row["ratio"] and row["disk_tier_gbps"] > 0 for row in rows)
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]


def test_a_server_that_is_not_there_is_told_and_nobody_waits_for_it():
    with socket.socket() as probe:  # bound, not listening: connections are refused
        probe.bind(("127.0.0.1", 0))
        command = [sys.executable, "-m", "bench.remote", f"redis://127.0.0.1:{probe.getsockname()[1]}", "--mib", "0.1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "does not answer" in done.stderr
