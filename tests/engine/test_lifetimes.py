"""Things dropped in the wrong order: handles, engines, pools, interpreters and forks with work in flight."""

import gc
import os
import subprocess
import sys
import textwrap
import time
import weakref

import numpy as np
import pytest
from kvcache import DeviceCache, content, keys_of, make_engine

import kvortex


def test_dropped_job_still_commits(bench):
    job = bench.save([1])
    del job
    gc.collect()
    bench.engine.save_blocks(keys_of([2]), [1], stream=bench.stream).wait(20_000)  # FIFO of one of the queues
    bench.save([3]).wait(20_000)
    while bench.engine.get_stats().jobs_in_flight:
        pass
    assert bench.leading([1]) == 1


@pytest.mark.host
def test_engine_dropped_with_a_job_in_flight_lives_until_the_job_is_over(device, stream, host):
    cache = DeviceCache(device)
    engine = make_engine(cache, 4)
    cache.write(0, content(1, 0, cache.block_bytes))
    host.set_delay_us(1000, 2000)
    job = engine.save_blocks(keys_of([1]), [0], stream=stream)
    watch = weakref.ref(engine)
    del engine
    gc.collect()
    assert watch() is not None, "the job keeps its engine"
    job.wait(20_000)
    del job
    gc.collect()
    assert watch() is None


@pytest.mark.host
def test_engine_and_job_dropped_together_wait_for_the_copies(device, stream, host):
    cache = DeviceCache(device)
    before = host.live_objects()
    engine = make_engine(cache, 4)
    host.set_delay_us(1000, 2000)
    job = engine.save_blocks(keys_of([1, 2]), [0, 1], stream=stream)
    job = engine = None  # noqa: F841
    gc.collect()
    assert host.live_objects() == before


def test_engine_in_a_cycle_is_collected(device):
    cache = DeviceCache(device)
    engine = make_engine(cache, 4)
    engine.itself = engine
    watch = weakref.ref(engine)
    del engine
    gc.collect()
    assert watch() is None


def test_view_of_a_slot_outlives_the_engine(make_bench):
    bench = make_bench(2)
    bench.saved([1])
    view = bench.engine.pool.view(0)
    before = bytes(view)
    bench.engine.shutdown()
    assert bytes(view) == before
    view.release()


def test_shutdown_is_idempotent_and_everything_after_it_is_refused(bench):
    job = bench.save([1])
    bench.engine.shutdown()
    bench.engine.shutdown()
    assert job.done()
    job.wait(0)
    assert job.num_blocks == 1
    for call in (
        lambda: bench.save([2]),
        lambda: bench.load([1], [8]),
        lambda: bench.engine.check_blocks(keys_of([1])),
        lambda: bench.engine.touch_blocks(keys_of([1])),
        lambda: bench.engine.discard_blocks(keys_of([1])),
        lambda: bench.engine.clear(),
        lambda: bench.engine.wait_ready(),
    ):
        with pytest.raises(kvortex.EngineClosed):
            call()


def run_python(code, device_name, timeout=60):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "KVORTEX_NAME": device_name, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


PROLOGUE = """
import os
import numpy as np, kvortex
from kvcache import DeviceCache, keys_of, make_engine
device = kvortex.Device.open(os.environ["KVORTEX_NAME"])
cache = DeviceCache(device)
engine = make_engine(cache, 8)
stream = kvortex.Stream.create(device)
"""


def test_interpreter_exits_with_work_in_flight(device):
    done = run_python(
        PROLOGUE
        + """
jobs = [engine.save_blocks(keys_of([number]), [number], stream=stream) for number in range(8)]
print("leaving")
""",
        device.name,
    )
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr
    assert done.stderr == ""


def test_forked_child_finds_the_engine_closed_and_the_parent_goes_on(device):
    done = run_python(
        PROLOGUE
        + """
import gc, time
job = engine.save_blocks(keys_of([1]), [0], stream=stream)
job.wait()
time.sleep(0.2)  # long enough for the completion thread to fall asleep in its condition variable
pid = os.fork()
if pid == 0:
    refused = 0
    for call in (lambda: engine.save_blocks(keys_of([2]), [1], stream=stream),
                 lambda: engine.load_blocks(keys_of([1]), [9], stream=stream),
                 lambda: engine.check_blocks(keys_of([1])), lambda: engine.clear(), lambda: engine.get_stats(),
                 lambda: engine.wait_ready(), lambda: engine.pool.view(0), lambda: job.wait(1000), lambda: job.done(),
                 lambda: job.wait_on(stream)):
        try:
            call()
        except kvortex.EngineClosed:
            refused += 1
    engine.shutdown()
    del job, engine
    gc.collect()
    os._exit(refused)
_, status = os.waitpid(pid, 0)
print("refused", os.waitstatus_to_exitcode(status))
job.wait(20_000)
load = engine.load_blocks(keys_of([1]), [9], stream=stream)
load.wait(20_000)
print(load.num_blocks)
engine.shutdown()
""",
        device.name,
    )
    assert done.stdout == "refused 10\n1\n", done.stderr


@pytest.mark.host
def test_child_forked_while_locks_are_held_and_the_gate_is_closed_exits(device):
    done = run_python(
        PROLOGUE
        + """
from kvortex.driver import _host as host
import threading, signal
host.hold()
jobs = [engine.save_blocks(keys_of([number]), [number], stream=stream) for number in range(8)]
waiters = [threading.Thread(target=job.wait) for job in jobs]
for thread in waiters: thread.start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        del jobs, engine, stream, cache
        import gc; gc.collect()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
host.release()
for thread in waiters: thread.join()
engine.shutdown()
print("fine")
""",
        device.name,
    )
    assert done.stdout == "fine\n", done.stderr


def test_many_engines_leave_nothing_open(device, stream):
    cache = DeviceCache(device)

    def one_round():
        with make_engine(cache, 4) as engine:
            engine.save_blocks(keys_of(range(3)), np.arange(3), stream=stream).wait(20_000)

    def open_now():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    one_round()
    before = open_now()
    for _ in range(10):
        one_round()
    deadline = time.monotonic() + 20
    while open_now() > before:  # a joined thread leaves /proc a moment later
        assert time.monotonic() < deadline, f"{before} file descriptors and threads became {open_now()}"
