"""Things dropped in the wrong order: handles, engines, pools, interpreters and forks with work in flight."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
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
def test_forked_child_leaves_memory_lent_to_the_parent_alone(device):
    """Nor does it ask whether the job is over: the lock may be held for ever there."""
    done = run_python(
        PROLOGUE
        + """
import time

class Lent:
    num_gone = 0

    def __init__(self):
        self.memory = np.zeros(cache.block_bytes, np.uint8)
        self.__array_interface__ = self.memory.__array_interface__

    def __del__(self):
        Lent.num_gone += 1

job = engine.save_blocks(keys_of([1]), data_ptrs=[Lent()], stream=stream)
while engine.queues[0].jobs_in_flight:
    time.sleep(0.001)
assert Lent.num_gone == 0
pid = os.fork()
if pid == 0:
    try:
        engine.check_blocks(keys_of([1]))
    except kvortex.EngineClosed:
        os._exit(10 + Lent.num_gone)
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status))
""",
        device.name,
    )
    assert done.stdout == "10\n", done.stderr


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


@pytest.mark.host
def test_job_in_a_garbage_cycle_takes_its_outcome_back(bench, host):
    """Otherwise retiring it writes into memory that has long been something else."""

    class Holder:
        pass

    host.hold()
    for number in range(20):
        job = bench.engine.save_blocks(keys_of([number]), [0], stream=bench.stream)
        holder = Holder()  # younger than the job, so that the collector clears the job first
        holder.itself, holder.job = holder, job
        del holder, job
    gc.collect()
    size = kvortex.Job.__basicsize__ + 16  # what the collector adds in front
    pattern = b"\x41"
    reused = [pattern * (size - 33 - smaller) for _ in range(400) for smaller in (0, 1, 8, 16)]
    host.release()
    while bench.engine.get_stats().jobs_in_flight:
        pass
    assert not [data for data in reused if data.strip(pattern)]


@pytest.mark.host
def test_queue_keeps_pool_and_layout_of_dropped_jobs(device, stream, host):
    cache = DeviceCache(device)
    queue = kvortex.TransferQueue(device, "D2H")
    pool = kvortex.PinnedPool(64 * 4096, cache.block_bytes, device)
    layout = weakref.ref(cache.layout)
    host.hold()
    queue.submit(cache.layout, range(8), pool, range(8), stream=stream)
    del pool, cache.layout
    gc.collect()
    assert layout() is not None
    assert host.live_objects()["registrations"] == 1
    host.release()
    queue.close()
    gc.collect()
    assert layout() is None
    assert host.live_objects()["registrations"] == 0


@pytest.mark.host
def test_second_shutdown_returns_when_the_first_has_finished(make_bench, host):
    bench = make_bench(4)
    host.hold()
    job = bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream)
    threads = [threading.Thread(target=bench.engine.shutdown) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert not job.done()
    assert all(thread.is_alive() for thread in threads)
    host.release()
    for thread in threads:
        thread.join(20)
    assert job.done() and job.num_blocks == 1


@pytest.mark.host
@pytest.mark.parametrize("verb", ["save_blocks", "load_blocks"])
def test_shutdown_from_within_a_call_ends_it_at_once_and_leaks_nothing(make_bench, host, verb):
    """As a signal handler does it; here Python code inside the call is the attribute of a stream object."""
    gc.collect()
    before = host.live_objects()["registrations"]
    bench = make_bench(4, shutdown_timeout_ms=600_000)
    bench.saved([1])

    class Stream:
        @property
        def cuda_stream(self):
            bench.engine.shutdown()
            return bench.stream.handle

    with pytest.raises(kvortex.EngineClosed):
        getattr(bench.engine, verb)(keys_of([1]), [0], stream=Stream())
    with pytest.raises(kvortex.EngineClosed):
        bench.engine.check_blocks(keys_of([1]))
    assert host.live_objects()["registrations"] <= before


@pytest.mark.parametrize("driver_allocated", [False, True])
def test_view_outlives_the_pool_however_it_was_allocated(device, driver_allocated):
    pool = kvortex.PinnedPool(4 * 4096, 4096, device, driver_allocated=driver_allocated)
    view = pool.view(1)
    view[:] = b"\x07" * 4096
    pool.close()
    assert set(view) == {7}
    view.release()


def test_pool_of_an_engine_ends_with_the_engine_alone(device, stream):
    cache = DeviceCache(device)
    engine = make_engine(cache, 4)
    with pytest.raises(BufferError, match="shutdown"):
        engine.pool.close()
    engine.save_blocks(keys_of([1]), [0], stream=stream).wait(20_000)
    engine.shutdown()
    engine.pool.close()


def test_objects_that_were_never_created_refuse_every_call():
    for made in (kvortex.Stream.__new__(kvortex.Stream), kvortex.Event.__new__(kvortex.Event)):
        assert "never created" in repr(made)
    assert kvortex.TransferQueue.__new__(kvortex.TransferQueue).gather is None
    for call in (
        lambda: kvortex.TransferQueue.__new__(kvortex.TransferQueue).poll(),
        lambda: kvortex.KVortexEngine.__new__(kvortex.KVortexEngine).get_stats(),
        lambda: kvortex.KVortexEngine.__new__(kvortex.KVortexEngine).clear(),
        lambda: kvortex.PinnedPool.__new__(kvortex.PinnedPool).view(0),
        lambda: kvortex.Stream.__new__(kvortex.Stream).query(),
    ):
        with pytest.raises(kvortex.EngineClosed):
            call()


@pytest.mark.host
def test_closed_queue_fails_no_job_whose_copies_are_over(device, stream):
    cache = DeviceCache(device)
    with kvortex.PinnedPool(64 * 4096, cache.block_bytes, device) as pool, kvortex.Stream.create(device) as other:
        queue = kvortex.TransferQueue(device, "D2H")
        jobs = [queue.submit(cache.layout, [number], pool, [number], stream=stream) for number in range(5)]
        for job in jobs:
            job.wait_on(other)
        other.synchronize()
        queue.close(timeout_ms=0)
        for job in jobs:
            job.wait(0)


@pytest.mark.host
def test_signal_handlers_run_while_a_job_is_waited_for(bench, host):
    host.hold()
    job = bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream)
    threading.Timer(0.1, signal.raise_signal, [signal.SIGUSR1]).start()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            job.wait(20_000)
    finally:
        signal.signal(signal.SIGUSR1, before)
    host.release()
    job.wait(20_000)


@pytest.mark.host
def test_wait_tells_how_a_job_ended_that_a_signal_handler_saw_to_its_end(device, stream, host):
    cache = DeviceCache(device)
    engine = make_engine(cache, 4)
    host.set_delay_us(300_000, 300_000)
    job = engine.save_blocks(keys_of([1]), [0], stream=stream)
    before = signal.signal(signal.SIGUSR1, lambda *_: engine.shutdown())
    threading.Timer(0.1, signal.raise_signal, [signal.SIGUSR1]).start()
    try:
        job.wait(20_000)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert job.num_blocks == 1


@pytest.mark.parametrize("timeout, error", [(0.9, TypeError), ("5", TypeError), (True, TypeError), (-5, ValueError)])
def test_timeouts_are_whole_milliseconds(bench, timeout, error):
    job = bench.save([1])
    for wait in (job.wait, bench.engine.wait_ready):
        with pytest.raises(error, match="timeout_ms must be"):
            wait(timeout)
    job.wait(2**70)


def test_sizes_and_counts_are_whole_numbers(device):
    index = kvortex.BlockIndex(np.int64(4))
    for call in (
        lambda: kvortex.BlockIndex(3.7),
        lambda: index.add_slots(0.5, 3.9),
        lambda: index.evict(1.9),
        lambda: kvortex.TransferQueue(device, "D2H", max_jobs=2.5),
        lambda: kvortex.DeviceBuffer(100.9, device),
        lambda: kvortex.PinnedPool(1.5e6, 4096, device),
        lambda: kvortex.PinnedPool(1 << 20, 4096, device, chunk_bytes=8192.7),
        lambda: kvortex.DevicePool(1.5e6, device),
    ):
        with pytest.raises(TypeError, match="integer|whole number"):
            call()
    for call in (
        lambda: kvortex.PinnedPool(-1, 4096, device),
        lambda: kvortex.PinnedPool(1 << 20, 4096, device, first_chunk_bytes=-1),
        lambda: index.evict(-1),
    ):
        with pytest.raises(ValueError, match="-1"):
            call()
