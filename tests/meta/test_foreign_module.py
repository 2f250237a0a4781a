"""Other people's compiled modules: what they cimport is installed, and the example of include/README.md works.

The package is laid out as a wheel has it, with the compiled modules of this tree; `.ci/wheel` does the same with the
wheel itself, in an environment without the sources.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvortex

ROOT = Path(__file__).resolve().parents[2]
CAPI = ROOT / "kvortex" / "capi.pxd"


def run(*command, cwd, **variables):
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder to put on the path instead of the source tree."""
    target = tmp_path_factory.mktemp("installed")
    run("setup.py", "-q", "build_py", "--build-lib", target, cwd=ROOT)
    for module in (ROOT / "kvortex").rglob("*.so"):
        shutil.copy(module, target / module.relative_to(ROOT))
    return target


def test_headers_and_declarations_are_installed(installed):
    wanted = {path.relative_to(ROOT) for path in (ROOT / "kvortex").rglob("*.pxd")}
    wanted |= {Path("kvortex") / path.relative_to(ROOT) for path in (ROOT / "include").rglob("*.h")}
    assert wanted and not [path for path in wanted if not (installed / path).is_file()]


def test_declarations_include_only_headers_that_are_installed():
    for path in (ROOT / "kvortex").rglob("*.pxd"):
        for header in re.findall(r"cdef extern from \"([^<\"]+)\"", path.read_text()):
            assert (ROOT / "include" / header).is_file(), f"{path.name} names {header}, which users do not have"


def test_get_include_names_the_headers_of_the_kvortex_in_use(installed, tmp_path):
    assert Path(kvortex.get_include(), "kvortex", "table.h").is_file()
    out = run("-c", "import kvortex; print(kvortex.get_include())", cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(out.strip()) == installed / "kvortex" / "include"


def test_the_example_of_the_page_builds_and_runs_without_the_sources(installed, tmp_path):
    script = Path(__file__).with_name("foreign_module.py")
    out = run(script, ROOT / "include/README.md", cwd=tmp_path, PYTHONPATH=str(installed))
    assert f"a module built against {installed / 'kvortex'}" in out


def test_every_name_of_capi_can_be_cimported(installed, tmp_path):
    names = re.findall(r"^    (\w+),$|cimport (\w+(?:, \w+)*)$", CAPI.read_text(), re.M)
    names = sorted({name for pair in names for group in pair for name in group.split(", ") if name})
    assert len(names) > 15
    (tmp_path / "user.pyx").write_text(f"from kvortex.capi cimport {', '.join(names)}\n")
    run("-m", "cython", "-3", "user.pyx", cwd=tmp_path, PYTHONPATH=str(installed))
    source = (tmp_path / "user.c").read_text()
    for header in set(re.findall(r'#include "(kvortex/[^"]+)"', source)):
        assert (installed / "kvortex" / "include" / header).is_file(), header
