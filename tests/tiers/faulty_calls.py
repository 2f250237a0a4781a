"""System calls of the disk tier that fail, and the fixtures that make them."""

import ctypes
import errno
import subprocess
from pathlib import Path

import pytest

from kvortex.tiers.disk import segments
from kvortex.tiers.disk._io_calls import IoCalls

ROOT = Path(__file__).resolve().parents[2]
CALLS = ("open", "allocate", "resize", "direct_align", "set_direct", "read", "write", "sync", "close", "aio_setup",
         "aio_submit", "aio_wait")  # fmt: skip
HOW = {"short": 1000, "nothing": 1001, "lie": 1002, "hang": 1003}


class FaultyCalls:
    """System calls of which some misbehave."""

    def __init__(self, library):
        self.library = library
        self.address = ctypes.addressof(ctypes.c_char.in_dll(library, "faulty_calls"))
        library.faulty_plan.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int]
        library.faulty_seen.restype = ctypes.c_long
        library.faulty_wait_hanging.argtypes = [ctypes.c_long]

    def plan(self, call, how, nth=1, count=1 << 40):
        """Let `call` (or any) misbehave from the nth on: `how` is an errno, its name, or short, nothing, lie, hang."""
        row = -1 if call == "any" else CALLS.index(call)
        code = HOW.get(how) or (how if isinstance(how, int) else getattr(errno, how))
        self.library.faulty_plan(row, nth, count, code)

    def count(self, call="any"):
        """From now on only count calls."""
        self.plan(call, "EIO", nth=1 << 40)

    @property
    def seen(self):
        return self.library.faulty_seen()

    def wait_hanging(self, count=1):
        self.library.faulty_wait_hanging(count)

    def mend(self):
        """Nothing misbehaves any more, and what hangs goes on."""
        self.library.faulty_open_gate()


def build(folder):
    """Compile the library of these calls into a folder, and load it."""
    target = Path(folder) / "faulty_io.so"
    source = ROOT / "tests/c/faulty_io.c"
    flags = ["-shared", "-fPIC", "-std=gnu11", "-O1", "-pthread", "-I", ROOT / "include"]
    subprocess.run(["gcc", *flags, source, "-o", target], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="session")
def faulty_library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("faulty_io"))


@pytest.fixture
def faulty(faulty_library):
    """System calls of which some misbehave; mended after the test."""
    calls = FaultyCalls(faulty_library)
    calls.mend()
    yield calls
    calls.mend()


@pytest.fixture
def faulty_disk(faulty, monkeypatch):
    """The controls of the system calls of every disk tier that this test opens."""
    monkeypatch.setattr(segments, "IoCalls", lambda: IoCalls(faulty.address))
    return faulty
