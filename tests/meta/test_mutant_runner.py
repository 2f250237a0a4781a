"""The mutant runner on a toy tree: what it must call killed, survived and broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).resolve().parents[1] / "mutants" / "run.py"

SETUP = """
import subprocess, sys
command = ["cc", "-shared", "-fPIC", "-Werror", "-Iinclude", "-x", "c", "include/toy.h", "-o", "kvortex/toy.so"]
sys.exit(subprocess.call(command))
"""
HEADER = """
int toy_clamp(int value)
{
    /* Never above ten. */
    if (value > 10)
        value = 10;
    return value;
}

int toy_double(int value)
{
    return value * 2;
}
"""
TESTS = """
import ctypes, time
toy = ctypes.CDLL("kvortex/toy.so")

def test_clamp():
    assert toy.toy_clamp(11) == 10

def test_double():
    assert toy.toy_double(3) == 6

def test_double_by_a_lookup():
    assert {2: "two"}[toy.toy_double(1)] == "two"

def test_crash():
    assert ctypes.string_at(0 if toy.toy_double(1) == 3 else b"x") == b"x"
"""
CLAMP_HUNK = """\
@@ -4,4 +4,4 @@
     /* Never above ten. */
     if (value > 10)
-        value = 10;
+        value = 11;
     return value;
"""
DOUBLE_HUNK = """\
@@ -13,1 +13,1 @@
-    return value * 2;
+    return value * 3;
"""
AMBIGUOUS_HUNK = """\
@@ -1,1 +1,1 @@
-{
+{ value++;
"""
MUTANTS = {  # name: diff, the tests it names
    "noticed": (CLAMP_HUNK, "test_clamp"),
    "noticed-by-all": (CLAMP_HUNK + DOUBLE_HUNK, "test_clamp test_double"),
    "moved": (CLAMP_HUNK.replace("-4,4 +4,4", "-9,4 +9,4"), "test_clamp"),
    "hanging": (DOUBLE_HUNK.replace("return value * 3", "for (volatile int i = 0;; i++)"), "test_double"),
    "unnoticed": (CLAMP_HUNK, "test_double"),
    "noticed-by-one-of-two": (CLAMP_HUNK, "test_clamp test_double"),
    "not-applying": (CLAMP_HUNK.replace("above ten", "above 10"), "test_clamp"),
    "ambiguous": (AMBIGUOUS_HUNK, "test_clamp"),
    "not-building": (CLAMP_HUNK.replace("= 11;", "= ;"), "test_clamp"),
    "other-exception": (DOUBLE_HUNK, "test_double_by_a_lookup"),
    "crashing": (DOUBLE_HUNK, "test_crash"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    for folder in ("include", "kvortex", "tests/mutants"):
        (root / folder).mkdir(parents=True)
    (root / "kvortex/__init__.py").touch()
    (root / "setup.py").write_text(SETUP)
    (root / "include/toy.h").write_text(HEADER)
    (root / "tests/test_toy.py").write_text(TESTS)
    for name, (diff, tests) in MUTANTS.items():
        write_mutant(root, name, diff, tests)
    return root


def write_mutant(root, name, diff, tests):
    ids = " ".join(f"tests/test_toy.py::{test}" for test in tests.split())
    header = f"# removes: a toy protection\n# invariant: 1\n# tests: {ids}\n"
    files = "--- a/include/toy.h\n+++ b/include/toy.h\n"
    (root / f"tests/mutants/{name}.patch").write_text(header + files + diff)


def run(toy, *options):
    command = [sys.executable, str(RUNNER), "--root", str(toy), "--min-limit-s", "15", *options]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the toy needs none, and starts faster
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def all_of_them(toy):
    status, output = run(toy)
    assert status == 1, output
    return output


@pytest.mark.parametrize(
    "name, verdict, why",
    [
        ("noticed", "killed", "AssertionError"),
        ("noticed-by-all", "killed", "test_double: AssertionError"),
        ("moved", "killed", "AssertionError"),
        ("hanging", "killed", "time-out"),
        ("unnoticed", "survived", "test_double: passed all the same"),
        ("noticed-by-one-of-two", "survived", "test_double: passed all the same"),
        ("not-applying", "broken", "does not apply: include/toy.h:4 matches 0 places"),
        ("ambiguous", "broken", "does not apply: include/toy.h:1 matches 2 places"),
        ("not-building", "broken", "does not build"),
        ("other-exception", "broken", "KeyError"),
        ("crashing", "broken", "SIGSEGV"),
    ],
)
def test_each_kind_of_mutant_gets_its_verdict(all_of_them, name, verdict, why):
    line = next(line for line in all_of_them.splitlines() if line.split()[1:2] == [name])
    assert line.split()[0] == verdict and why in line, line


def test_the_last_line_counts_the_verdicts(all_of_them):
    assert all_of_them.splitlines()[-1] == "4 killed, 2 survived, 5 broken"


def test_killing_every_chosen_mutant_is_success(toy):
    assert run(toy, "--only", "noticed")[0] == 0


def test_an_unknown_name_is_refused_with_the_known_ones(toy):
    status, output = run(toy, "--only", "notised")
    assert status == 1 and "no such mutant: notised" in output and "noticed" in output


def test_a_named_test_that_does_not_exist_stops_the_run(toy):
    write_mutant(toy, "unfounded", CLAMP_HUNK, "test_absent")
    status, output = run(toy, "--only", "unfounded")
    assert status == 1 and "test_absent must pass without a mutant" in output, output
