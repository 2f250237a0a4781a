"""Every benchmark runs once, untimed, so that none of them rots: one file a part, and each file has what passes."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import tiers

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"index", "keys", "codec", "ecsq", "pool", "transfer", "engine", "import", "named", "lru", "lmcache"}


def run_benchmarks(report):
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, f"--junitxml={report}"],
        cwd=ROOT,
        env={**os.environ, "KVORTEX_BENCH_DEVICE": "host"},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_every_part_has_a_benchmark_that_runs(tmp_path):
    done = run_benchmarks(tmp_path / "report.xml")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = Counter(
        case.get("classname").rpartition("bench_")[2]
        for case in ElementTree.parse(tmp_path / "report.xml").iter("testcase")
        if len(case) == 0  # no failure, error or skip in it
    )
    assert set(passed) == PARTS, passed


@pytest.mark.parametrize("name", tiers.MEASURED)
def test_every_measurement_of_a_tier_runs(name, tmp_path, capsys):
    tiers.main(["--small", "--dir", str(tmp_path), name])
    assert "\n  " in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
