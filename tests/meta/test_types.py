"""Types reach the user: type checkers pass what pages show, and of `typed_use.py` refuse the wrong lines only."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from kvortex import DiskTier, KVortexConfig
from kvortex.config import OtherSettings, Settings

ROOT = Path(__file__).resolve().parents[2]
USE = ROOT / "tests" / "meta" / "typed_use.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a user's, with `USE` and every example of a page. What is named torch there may be of any type."""
    folder = tmp_path_factory.mktemp("types")
    (folder / USE.name).write_text(USE.read_text())
    (folder / "torch.pyi").write_text("from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n")
    pages = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    for page in pages.stdout.split():
        for number, example in enumerate(re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)):
            (folder / f"{page.lower().replace('/', '_')[:-3]}_{number}.py").write_text(example)
    assert (folder / "readme_0.py").exists()
    return folder


def mypy(folder):
    """Yield (file, line, why) of each error."""
    options = ["--strict", "--follow-imports=silent", "--output=json", f"--cache-dir={ROOT}/build/mypy"]
    done = run("mypy", *options, *sorted(path.name for path in folder.glob("*.py")), cwd=folder)
    for error in map(json.loads, done.stdout.splitlines()):
        if error["severity"] == "error":
            yield error["file"], error["line"], error["message"]


def pyright(folder):
    """Yield (file, line, why) of each error."""
    (folder / "pyrightconfig.json").write_text(json.dumps({"include": ["*.py"], "extraPaths": [str(ROOT)]}))
    done = run("pyright", "--outputjson", "--pythonpath", sys.executable, cwd=folder)
    for error in json.loads(done.stdout)["generalDiagnostics"]:
        if error["severity"] == "error":
            yield Path(error["file"]).name, error["range"]["start"]["line"] + 1, error["message"]


def run(tool, *arguments, cwd):
    environ = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments], capture_output=True, text=True, timeout=110, cwd=cwd, env=environ
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done


@pytest.mark.parametrize("errors_of", [mypy, pyright])
def test_what_is_wrong_is_found_and_nothing_else(folder, errors_of):
    wrong = {(USE.name, at) for at, line in enumerate(USE.read_text().splitlines(), 1) if line.endswith("# wrong")}
    found = {(file, line): why for file, line, why in errors_of(folder)}
    assert {place: why for place, why in found.items() if place not in wrong} == {}
    assert wrong - found.keys() == set()


def test_type_checkers_are_told_of_every_setting():
    settings = {field.name for field in fields(KVortexConfig)}
    assert Settings.__annotations__.keys() == {*OtherSettings.__annotations__, "cpu_pool_size_bytes"} == settings
    for name, kind in Settings.__annotations__.items():
        assert name.endswith("_bytes") == (name in KVortexConfig._LIMITS and "str" in str(kind)), name
    told = next(
        node
        for node in ast.walk(ast.parse((ROOT / "kvortex" / "tiers" / "disk" / "tier.py").read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" and "disk_bytes" in ast.unparse(node.args)
    )
    assert [argument.arg for argument in told.args.args[1:]] == [field.name for field in fields(DiskTier)]
