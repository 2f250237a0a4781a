"""`python -m bench.disk` runs and compares what it reads; beside fio where that is installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--mib", "1", "--depths", "2", "--rounds", "1", "--seconds", "0.05"]


def run(*args):
    command = [sys.executable, "-m", "bench.disk", *FEW, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_a_row_for_each_verb_and_size_is_shown_and_nothing_is_left(tmp_path):
    has_fio = shutil.which("fio") is not None
    (tmp_path / "disk").mkdir()
    report = tmp_path / "rows.json"
    done = run("--path", tmp_path / "disk", "--json", report, "--io", "aio", *[] if has_fio else ["--without-fio"])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())
    assert [(row["verb"], row["mib"]) for row in rows] == [("read", 1), ("write", 1), ("read", 2), ("write", 2)]
    assert all(row["kvortex_gbps"] > 0 and (row["ratio"] is not None) == has_fio for row in rows)
    assert "by aio" in done.stdout and done.stdout.count("\n| read |") == 2
    assert not list((tmp_path / "disk").iterdir())


def test_who_has_no_fio_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("--path", tmp_path)
    assert done.returncode == 1 and "apt-get install fio" in done.stderr
