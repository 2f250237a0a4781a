"""What a constructor that fails gives back: everything, at once, with the error that it met."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvortex
from kvortex.memory import PoolSlot

HERE = Path(__file__).parent

pytestmark = pytest.mark.host


def run(*arguments, **environ):
    """Run a function of creation.py in a process of its own, where resources can be counted."""
    command = [sys.executable, HERE / "creation.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, **environ})
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("KVORTEX_SANITIZE" in os.environ, reason="the sanitizer wants to be preloaded alone")
def test_a_creation_that_is_refused_memory_or_a_thread_gives_everything_back(tmp_path):
    library = tmp_path / "refuse.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", HERE / "refuse.c", "-o", library, "-ldl"], check=True)
    run("refused", library, LD_PRELOAD=str(library))


def test_a_creation_that_is_interrupted_gives_everything_back():
    run("interrupted")


def test_a_subclass_that_fails_gives_everything_back():
    run("subclasses")


PARTS = {
    "device": lambda: kvortex.Device.__new__(kvortex.Device),
    "pool": lambda: kvortex.PinnedPool.__new__(kvortex.PinnedPool),
    "index": lambda: kvortex.BlockIndex(1),
    "carrier": lambda: kvortex.transfer.Carrier.__new__(kvortex.transfer.Carrier),
}


@pytest.mark.parametrize("part", [*PARTS, "another device", "another pool"])
def test_an_engine_of_unfit_parts_is_refused(device, part):
    with (
        kvortex.PinnedPool(4 * 4096, 4096, device) as pool,
        kvortex.Device.open(device.name) as other,
        kvortex.PinnedPool(4 * 4096, 4096, other) as other_pool,
        contextlib.closing(kvortex.transfer.Carrier(device, other_pool if part == "another pool" else pool)) as carrier,
    ):
        parts = {"device": device, "pool": pool, "index": kvortex.BlockIndex(4), "carrier": carrier}
        if part in PARTS:
            parts[part] = PARTS[part]()
        elif part == "another device":
            parts["device"] = other
        with pytest.raises((ValueError, TypeError, kvortex.EngineClosed)):
            kvortex.KVortexEngine(**parts)


@pytest.mark.parametrize("savers, loaders", [(0, 1), (1, 0), (17, 16)])
def test_a_carrier_of_too_few_or_too_many_queues_is_refused(device, savers, loaders):
    with kvortex.PinnedPool(4096, 4096, device) as pool, pytest.raises(ValueError, match=f"{savers} that save"):
        kvortex.transfer.Carrier(device, pool, num_savers=savers, num_loaders=loaders)


CLASSES = [kvortex.Device, kvortex.DeviceBuffer, kvortex.DevicePool, kvortex.Event, kvortex.PinnedPool, PoolSlot]
CLASSES += [
    kvortex.Stream,
    kvortex.TransferQueue,
    kvortex.transfer.Carrier,
    kvortex.KVortexEngine,
    kvortex.memory.PooledBuffer,
]
CLASSES += [kvortex.memory.DeviceArena]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_object_without_its_constructor_raises_and_does_not_crash(cls):
    """As in a subclass that forgets `super().__init__`."""
    made = type("Forgetful", (cls,), {"__init__": lambda self: None})() if is_open(cls) else cls.__new__(cls)
    assert repr(made)
    for name in sorted(set(dir(cls)) - set(dir(object))):
        if name.startswith("_") and name not in ("__len__", "__dlpack__", "__enter__", "__dlpack_device__"):
            continue
        for arguments in [(), *((value,) * count for value in (0, None) for count in (1, 2, 3))]:
            try:
                member = getattr(made, name)
                if callable(member):
                    member(*arguments)
            except (kvortex.KVortexError, TypeError, ValueError) as error:
                assert "NoneType' object has no attribute" not in str(error)
            except AttributeError as error:
                assert name == "__cuda_array_interface__", error
    with pytest.raises((kvortex.EngineClosed, TypeError)):
        memoryview(made)


def is_open(cls):
    """Whether a class may be derived from."""
    try:
        type("Derived", (cls,), {})
    except TypeError:
        return False
    return True


def test_no_constructor_runs_twice(device):
    for cls, arguments in (
        (kvortex.PinnedPool, (1 << 16, 4096, device)),
        (kvortex.TransferQueue, (device, "D2H")),
        (kvortex.DeviceBuffer, (64, device)),
        (kvortex.DevicePool, (1 << 20, device)),
    ):
        with cls(*arguments) as made, pytest.raises((RuntimeError, TypeError), match="once|twice"):
            made.__init__(*arguments)
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 16, block_bytes=4096, device="host")
    with kvortex.KVortexEngine.create(config) as engine, pytest.raises(RuntimeError, match="once"):
        engine.__init__(engine.device, engine.pool, engine.index, kvortex.transfer.Carrier(engine.device, engine.pool))
