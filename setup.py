"""Builds one extension module per kvortex/**/_*.pyx; everything else about the package is in pyproject.toml.

Settings come from the environment: KVORTEX_WERROR=1 (warnings are errors; CI sets it), KVORTEX_CFLAGS and
KVORTEX_LDFLAGS (debug, sanitizer and coverage builds), KVORTEX_ANNOTATE=1 (yellow HTML) and KVORTEX_ONLY=NAME (only
modules whose dotted name contains NAME).
"""

import os
import re
import shutil
import sysconfig
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, find_namespace_packages, setup

ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)

# C sources a module is built from besides its own .pyx.
EXTRA_SOURCES = {
    "kvortex.driver._host": sorted(map(str, Path("kvortex/driver").glob("host_*.c"))),
}

# Bounds and None are checked, because other people's tuples and arrays are read nearly everywhere. Where a loop is too
# hot for that, its module (in the first line) or function says so. Nor does Cython compile None checks where a function
# without the GIL changes a field of its object in place ("Operation not allowed without gil").
directives = {
    "language_level": 3,
    "boundscheck": True,
    "wraparound": True,
    "initializedcheck": True,
    "nonecheck": True,
    "cdivision": True,
    "embedsignature": True,
    "show_performance_hints": False,
}

annotate = os.environ.get("KVORTEX_ANNOTATE") == "1"
only = os.environ.get("KVORTEX_ONLY", "")

# -g0: debug information would carry the build machine's paths into the wheel; KVORTEX_CFLAGS comes later and wins.
compile_args = ["-std=gnu11", "-O2", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
compile_args += ["-pthread", *os.environ.get("KVORTEX_CFLAGS", "").split()]
link_args = ["-pthread", *os.environ.get("KVORTEX_LDFLAGS", "").split()]
# Some Pythons put their own library folder into every module's RUNPATH; ours need none, and it names the machine.
if "CC" not in os.environ:
    os.environ.setdefault("LDSHARED", re.sub(r"-Wl,-rpath,\S+", "", sysconfig.get_config_var("LDSHARED")))


def stamp(name, *settings):
    """Return a file that changes when the settings do, and whether it just has."""
    file, text = Path("build", name), repr(settings)
    changed = not file.exists() or file.read_text() != text
    if changed:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return str(file), changed


def extensions():
    # Every module cimports kvortex/_c.pxd, which names every header, so every module really includes all of them.
    depends = [str(header) for folder in ("include", "kvortex") for header in sorted(Path(folder).rglob("*.h"))]
    flags, _ = stamp("flags", compile_args, link_args)  # a build with other flags compiles everything again
    werror = ["-Werror"] if os.environ.get("KVORTEX_WERROR") == "1" else []
    for source in sorted(Path("kvortex").rglob("_*.pyx")):
        name = ".".join(source.with_suffix("").parts)
        if only in name:
            yield Extension(
                name,
                [str(source), *EXTRA_SOURCES.get(name, [])],
                include_dirs=["include"],
                depends=[*depends, flags],
                extra_compile_args=compile_args + werror,
                extra_link_args=link_args,
            )


if stamp("directives", directives)[1]:  # of these Cython keeps no account
    shutil.rmtree("build/cython", ignore_errors=True)

setup(
    # The headers are installed inside the package, for modules that cimport it (kvortex.get_include()).
    packages=[*find_namespace_packages(include=["kvortex*"]), "kvortex.include.kvortex"],
    package_dir={"kvortex.include.kvortex": "include/kvortex"},
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        list(extensions()),
        build_dir="build/annotate" if annotate else "build/cython",
        annotate=annotate,
        compiler_directives=directives,
    ),
)
