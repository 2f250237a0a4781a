"""What a user meets first: the import, the version, README and the changelog."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kvortex

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


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
    assert int(count) < 82, f"import kvortex loads {count} modules besides numpy's"


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


def test_every_python_example_of_the_readme_runs_as_printed():
    examples = [text for language, text in FENCE.findall(README.read_text()) if language == "python"]
    assert examples, "README.md shows no example: it needs a ```python block that runs as printed"
    for example in examples:
        done = run_python(example)
        assert done.returncode == 0, f"{example}\n{done.stderr}"


def map_of_the_tree():
    """Return the paths that README's map names.

    The map is the fenced block under the heading with the word "tree". A line is names, two or more spaces, a remark;
    a folder ends in a slash, and what is indented below it lies in it.
    """
    section = re.search(r"^#+ [^\n]*\btree\b.*?(?=^#+ |\Z)", README.read_text(), re.M | re.S | re.I)
    assert section, "README.md has no map: a heading with the word 'tree' and a fenced block under it"
    block = FENCE.search(section[0])
    assert block, "README.md has no fenced block under the heading of its map"
    paths, folders = [], []  # folders: (indentation, path) of the folders that we are in
    for line in filter(str.strip, block[2].splitlines()):
        indentation = len(line) - len(line.lstrip())
        folders = [(depth, path) for depth, path in folders if depth < indentation]
        parent = folders[-1][1] if folders else Path()
        names = re.split(r"\s{2,}", line.strip())[0].replace(",", " ").split()
        paths += [parent / name for name in names]
        if names[-1].endswith("/"):
            folders.append((indentation, parent / names[-1]))
    return paths


def test_the_readme_maps_the_tree_as_it_is():
    named = map_of_the_tree()
    missing = [str(path) for path in named if not list(ROOT.glob(str(path)))]
    assert not missing, f"README's map names what is not there: {missing}"
    folders = {Path(name) for name in ("include", "kvortex", "tests", "bench", ".ci")}
    folders |= {path.parent.relative_to(ROOT) for path in (ROOT / "kvortex").glob("*/__init__.py")}
    around = {parent for path in named for parent in (path, *path.parents)}
    unnamed = sorted(str(folder) for folder in folders - around)
    assert not unnamed, f"README's map leaves out: {unnamed}"
