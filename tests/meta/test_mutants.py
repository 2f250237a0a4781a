"""Every mutant still fits the tree: its patch applies and the tests it names exist. `make test-mutants` runs them."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted((ROOT / "tests" / "mutants").glob("*.patch"))


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("mutant_runner", ROOT / "tests" / "mutants" / "run.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_applies(runner, patch, tmp_path):
    hunks = runner.read_mutant(patch).hunks
    for path in {hunk[0] for hunk in hunks}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    runner.apply(hunks, tmp_path)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_named_tests_exist(runner, patch):
    for test in runner.read_mutant(patch).tests:
        file, name = re.fullmatch(r"([^:]+)::(\w+)(?:\[.*\])?", test).groups()
        assert f"\ndef {name}(" in (ROOT / file).read_text(), test


def test_at_least_twelve_protections_have_a_mutant():
    assert len(PATCHES) >= 12
