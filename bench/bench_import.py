"""Import: a process that imports kvortex and ends, beside one that does the same with numpy, which most of it is."""

import subprocess
import sys

import pytest

ROUNDS = {"rounds": 15, "warmup_rounds": 2}  # the first ones read the files from disk
IMPORTS = {"group": "import"}


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout


def test_import(benchmark, row):
    row("a process that imports kvortex", **IMPORTS, target="<= 300 ms")
    benchmark.pedantic(run, args=("import kvortex",), **ROUNDS)
    loaded = run("import kvortex, sys; print(*(name for name in ('cuda', 'torch') if name in sys.modules))")
    assert loaded.strip() == b""


@pytest.mark.peer
def test_numpy_for_comparison(benchmark, row):
    row("a process that imports numpy", side="numpy alone", **IMPORTS)
    benchmark.pedantic(run, args=("import numpy",), **ROUNDS)
