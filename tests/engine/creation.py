"""What `test_creation.py` runs in a process of its own: nothing may be left of an engine that could not be created."""

import contextlib
import ctypes
import gc
import linecache
import os
import sys
import time

import numpy as np

import kvortex
from kvortex.driver import _host

POOL_BYTES = 64 << 20
CACHE = np.zeros((64, 4096), np.uint8)
RETURN = "            return engine\n"  # behind the last call, where no signal handler runs
LAYOUT = kvortex.KVLayout.from_tensors([CACHE])


def create(cls=kvortex.KVortexEngine, **settings):
    """An engine that takes all there is to take: two chunks, a device pool, a gather."""
    settings = {"pool_first_chunk_bytes": POOL_BYTES // 2, "pool_chunk_bytes": POOL_BYTES // 2, **settings}
    config = kvortex.KVortexConfig(
        cpu_pool_size_bytes=POOL_BYTES,
        gpu_pool_size_bytes=64 << 20,
        gather_ctas=4,
        max_jobs=3,
        device="host",
        **settings,
    )
    return cls.create(config, layout=LAYOUT)


def left():
    """What a process may lose: pages of pools, threads, descriptors, claims, and what the driver knows of."""
    with open("/proc/self/smaps") as file:
        flags = [line.split()[1:] for line in file if line.startswith("VmFlags:")]
    return {
        "pages": sum("dc" in names for names in flags),  # mappings that a fork leaves out: ours alone do
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "claims": [name for name in os.listdir("/dev/shm") if f"-{os.getpid()}-" in name],
        "driver": _host.live_objects(),
    }


def assert_nothing_is_left(before, why):
    for _ in range(400):  # the kernel needs a moment to bury a thread that was joined
        after = left()
        grown = {name for name in before if after[name] != before[name]}
        if not grown:
            return
        time.sleep(0.005)
    raise AssertionError(f"{why}: left {[(name, before[name], after[name]) for name in grown]}")


def refused(library):
    """Each request for memory, a mapping, a mutex or a thread is refused once."""
    refuse_in = ctypes.c_long.in_dll(ctypes.CDLL(library), "refuse_in")
    met = set()
    texts = ("completion thread", "registering the pool", "no address space", "touching the pool", "job records")
    for _ in range(10):  # the pool's own threads ask meanwhile, so one round may miss the one request of a kind
        refuse_each(refuse_in, met)
        if all(any(text in message for message in met) for text in texts):
            return
    raise AssertionError(met)


def refuse_each(refuse_in, met):
    for n in range(1, 1000):
        held = None
        refuse_in.value = n
        try:
            engine = create()
        except (MemoryError, kvortex.DriverError) as error:
            held = error  # as a caller may for long: nothing may depend on its end
            met.add(str(error))
        else:
            with contextlib.suppress(MemoryError):
                engine.wait_ready(20_000)
        struck, refuse_in.value = refuse_in.value <= 0, 0  # below 0 where two threads asked at once
        if held is None:
            engine.shutdown()
            del engine
        assert_nothing_is_left(BEFORE, f"request {n}, {held!r}")
        if not struck:
            break
    assert struck is False and n > 30, n


class Interrupt:
    """Raise at the n-th line that runs in KVortex, or the n-th instruction of `create` itself (but its return)."""

    def __init__(self, n):
        self.n = n

    def __call__(self, frame, event, argument):
        if "/kvortex/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = frame.f_code.co_filename.endswith("/engine.py")
        frame.f_trace_lines = not frame.f_trace_opcodes
        return self.step

    def step(self, frame, event, argument):
        if event in ("line", "opcode") and linecache.getline(frame.f_code.co_filename, frame.f_lineno) != RETURN:
            self.n -= 1
            if self.n == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.step


def interrupted():
    """Ctrl-C comes between two steps, each in turn; under a sanitizer, where a step takes long, each fourth."""
    for n in range(1, 5000, 4 if os.environ.get("KVORTEX_SANITIZE") else 1):
        held = engine = None
        interrupt = Interrupt(n)
        sys.settrace(interrupt)
        try:
            engine = create(pool_first_chunk_bytes=4096 * 16)
        except KeyboardInterrupt as error:
            held = error
        finally:
            sys.settrace(None)
        if engine is not None:
            engine.shutdown()
            break
        assert held is not None
        # The exception's frames hold a file that was just opened, and no more than that.
        assert_nothing_is_left({name: BEFORE[name] for name in BEFORE if name != "files"}, f"step {n}")
        held = None
        assert_nothing_is_left(BEFORE, f"step {n}")
    assert 200 < n < 4999, n


def subclasses():
    """A subclass that raises before or after what it overrides, or leaves it out, and may raise at its end again."""

    class Before(kvortex.KVortexEngine):
        def __init__(self, *parts):
            raise OSError("mine")

    class After(kvortex.KVortexEngine):
        def __init__(self, *parts):
            super().__init__(*parts)
            raise OSError("mine")

    class Never(kvortex.KVortexEngine):
        def __init__(self, *parts):
            pass

    class Unready(After):
        def _close(self, timeout_ms):
            raise AttributeError("what the constructor would have made")

    mine = [(cls, OSError, "mine") for cls in (Before, After, Unready)]
    for cls, kind, text in (*mine, (Never, TypeError, "super().__init__")):
        try:
            create(cls)
        except kind as error:
            assert text in str(error)
            held = error
        else:
            raise AssertionError(f"{cls} was created")
        assert_nothing_is_left(BEFORE, cls)
        del held


if __name__ == "__main__":
    for _ in range(2):
        create().shutdown()
    gc.collect()
    gc.disable()  # what only a collection gives back was not given back
    BEFORE = left()
    globals()[sys.argv[1]](*sys.argv[2:])
    create().shutdown()
    assert_nothing_is_left(BEFORE, "the next one")
