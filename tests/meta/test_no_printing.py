"""The library prints nothing: only the command line and what replay shows may write to the console.

The one exception is the last word of a broken invariant, before the process ends.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_PRINT = {"kvortex/cli.py", "kvortex/replay/report.py", "include/kvortex/status.h"}
# What is no Python: Cython's statements and C's functions, comments left out.
TEXT_PRINTS = re.compile(r"\b(?:v?f?printf|f?puts|putchar|perror|print|sys\s*\.\s*std(?:out|err)|std(?:out|err))\b")


def python_prints(text):
    """Return the lines of a Python module that write to the console."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and node.id == "print":
            found.add(node.lineno)
        if isinstance(node, ast.Attribute) and node.attr in {"stdout", "stderr"}:
            found.add(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "sys":
            found |= {node.lineno for name in node.names if name.name in {"stdout", "stderr"}}
    return sorted(found)


def text_prints(text, comment):
    """Return the lines of a C or Cython file that write to the console."""
    text = re.sub(comment, lambda match: "\n" * match[0].count("\n"), text)
    return [number for number, line in enumerate(text.splitlines(), 1) if TEXT_PRINTS.search(line)]


def prints(path):
    text = path.read_text()
    if path.suffix == ".py":
        return python_prints(text)
    if path.suffix in {".pyx", ".pxd"}:
        return text_prints(text, r'"""(?:.|\n)*?"""|#.*')
    return text_prints(text, r"/\*(?:.|\n)*?\*/|//.*")


def test_nothing_else_prints():
    sources = [path for folder in ("kvortex", "include") for path in (ROOT / folder).rglob("*")]
    sources = [path for path in sources if path.suffix in {".py", ".pyx", ".pxd", ".c", ".h"}]
    sources = [path for path in sources if not path.match("_*.c")]  # Cython's
    assert len(sources) > 50
    found = {str(path.relative_to(ROOT)): lines for path in sources if (lines := prints(path))}
    assert {path: lines for path, lines in found.items() if path not in MAY_PRINT} == {}
    assert set(found) == MAY_PRINT, "one that is named here does not print"


@pytest.mark.parametrize(
    "name, text",
    [
        ("x.py", "print('x')"),
        ("x.py", "import sys\nsys.stderr.write('x')"),
        ("x.py", "from sys import stdout"),
        ("x.py", "map(print, range(3))"),
        ("_x.pyx", "cdef int f():\n    print('x')"),
        ("_x.pyx", "    printf('%d', 1)"),
        ("x.c", 'fprintf(stderr, "x");'),
        ("x.h", 'puts("x");'),
    ],
)
def test_a_planted_print_is_found(tmp_path, name, text):
    (tmp_path / name).write_text(text + "\n")
    assert prints(tmp_path / name) == [len(text.splitlines())]


@pytest.mark.parametrize(
    "name, text",
    [
        ("x.py", '"""Do not print."""'),
        ("x.py", "fingerprint(x)  # print(x)"),
        ("_x.pyx", '"""print"""\nfingerprint = 1  # print'),
        ("x.c", '/* printf */ snprintf(name, 3, "x");'),
    ],
)
def test_what_prints_nothing_is_let_through(tmp_path, name, text):
    (tmp_path / name).write_text(text + "\n")
    assert prints(tmp_path / name) == []
