"""What a user meets first: the import, the version and the changelog. `test_pages.py` looks at the pages."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kvortex

ROOT = Path(__file__).resolve().parents[2]


def run_python(code, timeout_s=60):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)


def test_import_loads_nothing_heavy():
    heavy = {"cuda", "torch", "vllm", "transformers", "matplotlib", "IPython", "pytest", "setuptools", "Cython"}
    heavy |= {"redis", "valkey", "boto3", "botocore", "s3fs", "aiohttp", "prometheus_client", "asyncio"}
    done = run_python(
        "import sys, numpy\n"
        "before = set(sys.modules)\n"
        "import kvortex\n"
        f"print(sorted({heavy} & {{name.partition('.')[0] for name in sys.modules}}))\n"
        "print(any('libcuda' in line for line in open('/proc/self/maps')))\n"
        "print(len([name for name in sys.modules if name not in before]))\n"
    )
    assert done.returncode == 0, done.stderr
    loaded, libcuda, count = done.stdout.splitlines()
    assert (loaded, libcuda) == ("[]", "False")
    assert int(count) < 88, f"import kvortex loads {count} modules besides numpy's"


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "kvortex.version.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", kvortex.__version__)
    try:
        installed = importlib.metadata.version("kvortex")
    except importlib.metadata.PackageNotFoundError:
        return  # used from the source tree, where the literal is the only version there is
    assert installed == kvortex.__version__


def test_the_changelog_speaks_of_this_version():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings and kvortex.__version__ in headings[0], headings[:1]
