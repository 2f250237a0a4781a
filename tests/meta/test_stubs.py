"""The .pyi files say what the compiled modules are: same names, same parameters, same defaults or none.

A compiled module needs a stub when its package, or kvortex itself, exports something of it; the stub names at least
that. Constructors are read from the .pyx, since a `__cinit__` leaves no signature behind.
"""

import ast
import enum
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "kvortex").rglob("_*.pyx"))
PROTOCOLS = {f"__{word}__" for word in ("enter", "exit", "await", "len", "iter", "getitem", "contains")}
PROTOCOLS |= {f"__{word}__" for word in ("cuda_stream", "cuda_array_interface", "array_interface", "dlpack")}
PROTOCOLS |= {"__dlpack_device__"}


def module_name(source):
    return ".".join(source.relative_to(ROOT).with_suffix("").parts)


def exported(name):
    """Return what the packages around module `name` export of it."""
    found, package = set(), name
    while "." in package:
        package = package.rpartition(".")[0]
        home = importlib.import_module(package)
        for public in getattr(home, "__all__", [n for n in vars(home) if not n.startswith("_")]):
            if getattr(getattr(home, public), "__module__", None) == name:
                found.add(public)
    return found


def parameters_of_stub(function):
    """Return (kind, name, has a default) of each parameter of a stub's `def`, self left out."""
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    plain = len(positional) - len(spec.defaults)
    listed = [("", arg.arg, index >= plain) for index, arg in enumerate(positional)]
    listed += [("*", spec.vararg.arg, False)] if spec.vararg else []
    pairs = zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    listed += [("key", arg.arg, default is not None) for arg, default in pairs]
    listed += [("**", spec.kwarg.arg, False)] if spec.kwarg else []
    return [entry for entry in listed if entry[1] not in {"self", "cls"}]


def parameters_of_object(function):
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    kinds[inspect.Parameter.KEYWORD_ONLY] = "key"
    function = getattr(function, "__func__", function)  # classmethod, staticmethod
    return [
        (kinds.get(p.kind, ""), p.name, p.default is not p.empty)
        for p in inspect.signature(function).parameters.values()
        if p.name not in {"self", "cls"}
    ]


def parameters_of_constructor(source_text, class_name):
    """Read the parameters of a class from the text of a .pyx; None where it has no constructor.

    Both methods get the same arguments, and `__init__`, where there is one, is the one that names them.
    """
    body = re.search(rf"^(?:cdef )?class {class_name}\b.*?(?=^\S|\Z)", source_text, re.M | re.S)
    heads = dict(re.findall(r"^ +def (__c?init__)\(((?:[^()]|\([^()]*\))*)\)", body[0], re.M)) if body else {}
    head = heads.get("__init__", heads.get("__cinit__"))
    if head is None:
        return None
    listed, kind = [], ""
    for text in re.split(r",(?![^(\[]*[)\]])", re.sub(r"#.*", "", head)):
        declared, _, default = text.partition("=")
        name = re.sub(r"\[[^]]*\]| not None| or None", "", declared).partition(":")[0].split()
        if name in (["self"], []):
            continue
        if name == ["*"]:
            kind = "key"
            continue
        stars = re.match(r"\**", name[-1])[0]
        listed.append((stars or kind, name[-1].lstrip("*"), bool(default)))
        kind = "key" if stars == "*" else kind
    return listed


def public_members(cls):
    if issubclass(cls, enum.Enum):
        return set(cls.__members__)
    return {name for name in vars(cls) if not name.startswith("_") or name in PROTOCOLS}


def differences(module, stub_text, source_text, wanted):
    """Return a line for everything in which a stub and its module differ."""
    found = []
    named = {}
    for node in ast.parse(stub_text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            named[node.name] = node
    found += [f"{name} is exported but missing in the stub" for name in sorted(wanted - set(named))]
    for name, node in named.items():
        if not hasattr(module, name):
            found.append(f"{name} is in the stub but not in the module")
        elif isinstance(node, ast.ClassDef):
            found += class_differences(name, node, getattr(module, name), source_text)
        elif parameters_of_stub(node) != parameters_of_object(getattr(module, name)):
            found.append(mismatch(name, parameters_of_stub(node), parameters_of_object(getattr(module, name))))
    return found


def class_differences(name, node, cls, source_text):
    members = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            members[item.name] = item
        elif isinstance(item, ast.AnnAssign):
            members[item.target.id] = item
        elif isinstance(item, ast.Assign):
            members[item.targets[0].id] = item
    found = [f"{name}.{missing} is missing in the stub" for missing in sorted(public_members(cls) - set(members))]
    for member, item in members.items():
        if member == "__init__":
            real = parameters_of_constructor(source_text, name)
            if real is not None and real != parameters_of_stub(item):
                found.append(mismatch(f"{name}.__init__", parameters_of_stub(item), real))
        elif member == "__buffer__" and sys.version_info < (3, 12):
            continue  # compiled classes have had the protocol for long, its name in Python only since then
        elif not hasattr(cls, member):
            found.append(f"{name}.{member} is in the stub but not in the class")
        elif isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            value = inspect.getattr_static(cls, member)
            decorators = {getattr(d, "id", getattr(d, "attr", "")) for d in item.decorator_list}
            if "property" in decorators or "setter" in decorators or member in PROTOCOLS:
                continue
            if not callable(value) and not hasattr(value, "__func__"):
                found.append(f"{name}.{member} is a method in the stub but an attribute of the class")
            elif parameters_of_stub(item) != parameters_of_object(value):
                found.append(mismatch(f"{name}.{member}", parameters_of_stub(item), parameters_of_object(value)))
    constructor = parameters_of_constructor(source_text, name)
    if "__init__" not in members and constructor:
        found.append(f"{name}.__init__ is missing in the stub; it takes {[entry[1] for entry in constructor]}")
    return found


def mismatch(name, in_stub, in_module):
    return f"{name}: the stub has the parameters {in_stub}, the module {in_module}"


def test_there_are_compiled_modules():
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=module_name)
def test_stub_agrees_with_the_compiled_module(source):
    name = module_name(source)
    module = importlib.import_module(name)
    assert module.__file__.endswith(".so"), f"{name} is not compiled: {module.__file__}"
    wanted = exported(name)
    stub = source.with_suffix(".pyi")
    if not stub.exists():
        assert not wanted, f"{name} has no stub, but users import {sorted(wanted)} from it"
        return
    assert differences(module, stub.read_text(), source.read_text(), wanted) == []


class Sample:
    """Stands for a compiled class in the tests of the comparison itself."""

    size = property(lambda self: 1)

    def __init__(self, first, *, second=None): ...

    def method(self, keys, pin=False): ...

    @classmethod
    def make(cls, *parts): ...


SOURCE = """
cdef class Other:
    def __cinit__(self): pass

cdef class Sample:
    cdef int x

    def __cinit__(self, *args, **kwargs):
        pass

    def __init__(self, const unsigned char[:, ::1] first not None, *, object second=None):
        pass
"""
STUB = """
class Sample:
    size: int
    def __init__(self, first: object, *, second: int | None = ...) -> None: ...
    def method(self, keys: object, pin: bool = False) -> None: ...
    @classmethod
    def make(cls, *parts: int) -> "Sample": ...
"""


def sample_differences(stub):
    class module:
        pass

    module.Sample = Sample
    return differences(module, stub, SOURCE, {"Sample"})


def test_a_true_stub_is_let_through():
    assert sample_differences(STUB) == []


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("pin: bool = False", "pin: bool", "Sample.method: the stub has"),
        ("keys: object", "key: object", "Sample.method: the stub has"),
        ("*, second", "second", "Sample.__init__: the stub has"),
        ("*parts", "parts", "Sample.make: the stub has"),
        ("    size: int\n", "", "Sample.size is missing"),
        ("size: int", "size: int\n    width: int", "Sample.width is in the stub but not in the class"),
        ("class Sample", "class Simple", "Sample is exported but missing"),
        ("size: int", "def size(self) -> int: ...", "Sample.size is a method in the stub"),
    ],
)
def test_a_stub_that_drifted_is_found(old, new, complaint):
    found = sample_differences(STUB.replace(old, new, 1))
    assert any(complaint in line for line in found), found
