"""Imports go only downward: every `import` and `cimport` line of the package, held against the table of layers.

Nor do the project's files go round in a circle, C included. `python tests/meta/test_layers.py` prints their graph.
"""

import re
import subprocess
import sys
import tempfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BASE = {"_c", "arguments", "errors", "log", "config", "slots", "stats", "version"}
TOP = {"__init__", "__main__", "cli", "info", "metrics", "replay", "integrations"}
MAY_IMPORT = {  # part of kvortex: the other parts it may name
    "_c": set(),
    "arguments": set(),
    "errors": BASE,
    "log": BASE,
    "config": BASE | {"keys"},
    "slots": BASE,
    "stats": BASE | {"keys"},
    "version": set(),
    "keys": BASE,
    "driver": BASE,
    "index": BASE | {"keys"},
    "codec": BASE | {"keys"},
    "memory": BASE | {"driver"},
    "transfer": BASE | {"keys", "driver", "codec", "memory"},
    "tiers": BASE | {"keys", "index", "memory", "codec"},
    "engine": BASE | {"keys", "driver", "index", "codec", "memory", "transfer", "tiers"},
    "capi": BASE | {"keys", "driver", "index", "memory", "transfer"},
}
ALONE = {  # foreign package: the parts that may name it
    "cuda": {"driver"},
    "torch": {"integrations"},
    "vllm": {"integrations"},
    "transformers": {"integrations"},
    "matplotlib": {"replay"},
    "prometheus_client": {"metrics"},
    "pytest": set(),
}
IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<source>[\w.]+)[ \t]+c?import[ \t]+(?P<names>\([^)]*\)|[^\n]*)"
    r"|c?import[ \t]+(?P<modules>[\w., \t]+))"
    r"|import_module\([\"'](?P<late>[\w.]+)",
    re.M,
)


def imports(path, root):
    """Yield the dotted name of everything that a .py, .pyx or .pxd file imports."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text())
    text = re.sub(r"#.*", "", text)
    package = ["kvortex", *path.relative_to(root / "kvortex").parent.parts]
    for match in IMPORT.finditer(text):
        if match["late"]:
            yield match["late"]
        elif match["modules"]:
            yield from (part.split()[0] for part in match["modules"].split(",") if part.strip())
        else:
            source = match["source"]
            if source.startswith("."):
                dots = len(source) - len(source.lstrip("."))
                source = ".".join([*package[: len(package) - dots + 1], *filter(None, [source.lstrip(".")])])
            for name in match["names"].strip("()").split(","):
                if name.strip():
                    yield f"{source}.{name.split()[0]}"


def part_of(name):
    """Return the part that the first name below kvortex belongs to: `engine` and its compiled `_engine` are one."""
    return name if name == "_c" or name.startswith("__") else name.lstrip("_")


def is_dunder(name):
    """Tell whether `name` is `__version__` or the like, which is nobody's own."""
    return re.fullmatch(r"__\w+__", name) is not None


def violations(root):
    """Return a line for every import under `root`/kvortex that goes up, sideways or abroad."""
    found = []
    package = root / "kvortex"
    for path in sorted(path for path in package.rglob("*") if path.suffix in {".py", ".pyx", ".pxd"}):
        part = part_of(path.relative_to(package).parts[0].split(".")[0])
        where = path.relative_to(root)
        if part not in MAY_IMPORT and part not in TOP:
            found.append(f"{where}: part {part!r} has no place in the table of layers")
            continue
        for name in imports(path, root):
            first, *rest = name.split(".")
            if first != "kvortex":
                if part not in ALONE.get(first, {part}):
                    found.append(f"{where}: only {sorted(ALONE[first])} may name {first}, not {part}")
                continue
            other = part_of(rest[0]) if rest else part
            if other == part or is_dunder(other):
                continue
            if part not in TOP and other not in MAY_IMPORT[part]:
                found.append(f"{where}: {part} must not know {other} ({name})")
            elif part in TOP and any(word.startswith("_") and not is_dunder(word) for word in rest):
                found.append(f"{where}: {name} is private to {other}")
    for header in sorted((root / "include/kvortex").glob("*.h")):
        for name in re.findall(r"#\s*include\s*[<\"]([^>\"]+)", header.read_text()):
            if name == "Python.h" or name.startswith("cuda"):
                found.append(f"{header.relative_to(root)}: a header of the C core must not include {name}")
    return found


def graph(root):
    """Return a dict: for each module and each C unit (X.c with X.h) of the project, those that it names.

    A module is its .py, .pyx and .pxd together. It names what it imports and the headers that it declares; a C unit
    names the headers that it includes and the units whose functions and variables it uses.
    """
    files = [path for path in (root / "kvortex").rglob("*") if path.suffix in {".py", ".pyx", ".pxd"}]
    units = [path for path in root.rglob("*.[ch]") if path.relative_to(root).parts[0] in {"include", "kvortex"}]
    units = [path for path in units if not path.name.startswith("_")]  # those are Cython's
    found = {node_of(path, root): set() for path in files + units}
    for path in files:
        for name in imports(path, root):
            while name not in found and "." in name:
                name = name.rpartition(".")[0]  # what is imported from a module may be no module itself
            found[node_of(path, root)].add(name)
    for path in files + units:
        for name in re.findall(r'^\s*(?:#\s*include|cdef extern from) "([^"]+)"', path.read_text(), re.M):
            for header in (path.parent / name, root / "include" / name):
                if header.is_file():
                    found[node_of(path, root)].add(node_of(header.resolve(), root.resolve()))
    for user, owner in uses([path for path in units if path.suffix == ".c"], root):
        found[user].add(owner)
    return {node: (others & set(found)) - {node} for node, others in found.items()}


def node_of(path, root):
    """Return the name of the module, or of the C unit, that the file belongs to."""
    parts = path.relative_to(root).with_suffix("").parts
    return "/".join(parts) if path.suffix in {".c", ".h"} else ".".join(parts).removesuffix(".__init__")


def uses(sources, root):
    """Yield (user, owner) for each symbol that one C file uses and another defines, as the compiler sees them."""
    used, owners = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            compiled = Path(folder) / "unit.o"
            subprocess.run(["gcc", "-std=gnu11", "-I", root / "include", "-c", source, "-o", compiled], check=True)
            listing = subprocess.run(["nm", "-P", compiled], check=True, capture_output=True, text=True).stdout
            for symbol, kind, *_ in map(str.split, listing.splitlines()):
                if kind == "U":
                    used.append((node_of(source, root), symbol))
                elif kind.isupper():
                    owners[symbol] = node_of(source, root)
    for user, symbol in used:
        if symbol in owners:
            yield user, owners[symbol]


def circles(nodes):
    """Return circles of the graph as "a -> b -> a", one after another until what is left of it has none."""
    nodes = {node: set(others) for node, others in nodes.items()}
    found = []
    while True:
        try:
            TopologicalSorter(nodes).prepare()
            return found
        except CycleError as error:
            circle = error.args[1][::-1]
            nodes[circle[0]].remove(circle[1])
            found.append(" -> ".join(circle))


def test_no_file_comes_back_to_itself():
    assert circles(graph(ROOT)) == []


@pytest.mark.parametrize(
    "files, circle",
    [
        ({"kvortex/a.py": "import kvortex.b", "kvortex/b.py": "from kvortex import a"}, "kvortex.a kvortex.b"),
        ({"kvortex/a.py": "def f():\n    from .b import f", "kvortex/b.py": "from . import a"}, "kvortex.a kvortex.b"),
        (
            {
                "kvortex/_a.pxd": "from kvortex._b cimport B",
                "kvortex/_b.pyx": "from kvortex._a import A",
                "kvortex/_b.pxd": "",
            },
            "kvortex._a kvortex._b",
        ),
        (
            {"include/kvortex/a.h": '#include "b.h"', "include/kvortex/b.h": '#  include "kvortex/a.h"'},
            "include/kvortex/a include/kvortex/b",
        ),
        (
            {
                "kvortex/x/a.c": "void b(void);\nvoid a(void) { b(); }",
                "kvortex/x/b.c": "void a(void);\nvoid b(void) { a(); }",
            },
            "kvortex/x/a kvortex/x/b",
        ),
        (
            {
                "kvortex/x/a.h": "#define CALL(x) x##_b()\nvoid f_b(void);",
                "kvortex/x/a.c": '#include "a.h"\nvoid a(void) { CALL(f); }',
                "kvortex/x/b.c": '#include "a.h"\nvoid f_b(void) {}',
            },
            "kvortex/x/a kvortex/x/b",
        ),
        (
            {
                "kvortex/x/a.c": "extern int b;\nint a(void) { return b; }",
                "kvortex/x/b.c": "extern int a;\nint b, *c = &a;",
            },
            "kvortex/x/a kvortex/x/b",
        ),
    ],
)
def test_a_planted_circle_is_named(tmp_path, files, circle):
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    (found,) = circles(graph(tmp_path))
    assert sorted(set(found.split(" -> "))) == circle.split()


def test_imports_go_only_downward():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "path, line, complaint",
    [
        ("kvortex/index/_x.pyx", "from kvortex.driver._device cimport Device", "index must not know driver"),
        ("kvortex/index/_x.pxd", "cimport kvortex.memory._pinned_pool as pool", "index must not know memory"),
        ("kvortex/index/x.py", "from kvortex import engine", "index must not know engine"),
        ("kvortex/index/x.py", "from ..driver import Device", "index must not know driver"),
        ("kvortex/driver/x.py", "import numpy, kvortex.keys", "driver must not know keys"),
        ("kvortex/memory/x.py", "from kvortex.index import BlockIndex", "memory must not know index"),
        ("kvortex/transfer/x.py", "    from kvortex.index import BlockIndex", "transfer must not know index"),
        ("kvortex/tiers/x.py", "import kvortex.transfer", "tiers must not know transfer"),
        ("kvortex/errors.py", "from kvortex import keys", "errors must not know keys"),
        ("kvortex/memory/x.py", "from cuda.bindings import driver", "only ['driver'] may name cuda"),
        ("kvortex/memory/x.py", 'importlib.import_module("cuda.bindings.driver")', "only ['driver'] may name cuda"),
        ("kvortex/engine/engine.py", "import torch", "only ['integrations'] may name torch"),
        ("kvortex/cli.py", "import vllm.config", "only ['integrations'] may name vllm"),
        ("kvortex/cli.py", "from kvortex.index._block_index import BlockIndex", "is private to index"),
        (
            "kvortex/replay/x.py",
            "from kvortex.transfer import (\n    KVLayout,\n    _layout,\n)",
            "private to transfer",
        ),
        ("kvortex/wild/x.py", "", "'wild' has no place"),
        ("include/kvortex/x.h", "#include <cuda.h>", "must not include cuda.h"),
        ("include/kvortex/x.h", '#  include "Python.h"', "must not include Python.h"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, line, complaint):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    found = violations(tmp_path)
    assert len(found) == 1 and complaint in found[0], found


@pytest.mark.parametrize(
    "path, line",
    [
        ("kvortex/memory/_x.pyx", "from kvortex.driver._device cimport Device, check"),
        ("kvortex/engine/engine.py", "from kvortex.index._block_index cimport BlockIndex"),
        ("kvortex/cli.py", "from kvortex.replay import replay"),
        ("kvortex/cli.py", "from kvortex import __version__"),
        ("kvortex/driver/x.py", "from cuda.bindings import driver"),
        ("kvortex/integrations/vllm/x.py", "import torch"),
        ("kvortex/index/x.py", '"""\nimport torch\n"""'),
        ("kvortex/index/x.py", "# import torch"),
    ],
)
def test_what_the_table_allows_is_let_through(tmp_path, path, line):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert violations(tmp_path) == []


def main():
    nodes = graph(ROOT)
    for node in sorted(nodes):
        print(f"{node}: {' '.join(sorted(nodes[node]))}".rstrip())
    found = circles(nodes)
    print(*(f"circle: {circle}" for circle in found or ["none"]), sep="\n")
    return len(found) > 0


if __name__ == "__main__":
    sys.exit(main())
