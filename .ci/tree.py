"""Mirror the sources into a second tree, so that builds with other flags leave the usual one alone.

A second call copies only what changed and keeps time stamps, so the build there stays incremental.
Usage: python .ci/tree.py TARGET
"""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "CHANGELOG.md", "LICENSE"]
FOLDERS = [".ci", "include", "kvortex", "tests", "bench"]
SKIPPED_FOLDERS = {"__pycache__", ".pytest_cache", ".hypothesis", ".benchmarks"}


def is_source(path):
    """Tell whether `path`, relative to the tree, was written by hand."""
    if SKIPPED_FOLDERS & set(path.parts) or path.suffix in {".so", ".html", ".pyc", ".o"}:
        return False
    return not (path.parts[0] == "kvortex" and path.match("_*.c"))  # not ours: Cython's


def sources(root):
    """Return every hand-written file of the tree at `root`, relative to it."""
    found = [Path(name) for name in FILES if (root / name).is_file()]
    for folder in FOLDERS:
        found += [path.relative_to(root) for path in (root / folder).rglob("*") if path.is_file()]
    return [path for path in found if is_source(path)]


def mirror(target, root=ROOT):
    """Make the sources under `target` equal to those under `root`; what was built in `target` stays.

    What Cython made of them in `root` goes with them: other flags of the C compiler change nothing about it.
    """
    wanted = sources(root)
    for path in set(sources(target)) - set(wanted):
        (target / path).unlink()
    for path in wanted:
        source, copy = root / path, target / path
        if not copy.exists() or os.stat(copy).st_mtime_ns != os.stat(source).st_mtime_ns:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    if (root / "build/cython").is_dir() and not (target / "build/cython").exists():
        shutil.copytree(root / "build/cython", target / "build/cython")
        shutil.copy2(root / "build/directives", target / "build/directives")


if __name__ == "__main__":
    mirror(Path(sys.argv[1]))
