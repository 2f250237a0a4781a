"""`python -m bench.remote` runs, compares what it reads, and leaves nothing behind."""

import json
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
