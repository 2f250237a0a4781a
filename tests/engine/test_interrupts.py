"""Ctrl-C ends every long wait, what it leaves is whole, and a second call finishes what the first one began."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from kvcache import DeviceCache, is_mapped, keys_of, make_engine

import kvortex

pytestmark = pytest.mark.host

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_is_leaked(host):
    """What earlier tests left to the collector would be counted as ours."""
    gc.collect()
    before = host.live_objects()
    yield
    gc.collect()
    after = host.live_objects()
    assert {name: after[name] for name in ("registrations", "pools")} == {
        name: before[name] for name in ("registrations", "pools")
    }


def interrupted(call, ready=None):
    """Press Ctrl-C while `call` waits (from 0.1 s on, or as soon as `ready` says so); it must raise KeyboardInterrupt.

    Each of these calls would wait for ever otherwise, or long enough for what the test looks at afterwards.
    """
    is_inside = True

    def press():
        while ready is not None and not ready():
            time.sleep(0)
        if ready is None:
            time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)

    def handler(*_):
        if is_inside:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        is_inside = False
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def held(device, stream, host):
    """A buffer whose copy on `stream` does not end before the host driver is released."""
    with kvortex.DeviceBuffer(64, device) as buffer:
        host.hold()
        buffer.fill(7, stream=stream)
        yield buffer
        host.release()


def test_a_stream_an_event_and_a_copy_that_are_waited_for(device, stream, host, held):
    target = np.zeros(64, np.uint8)
    with kvortex.Event.create(device) as event:
        event.record(stream)
        interrupted(stream.synchronize)
        interrupted(event.synchronize)
        interrupted(lambda: held.copy_to(target))
        assert not stream.query() and not event.query()
        host.release()
        stream.synchronize()
        event.synchronize()
        held.copy_to(target)
    assert (target == 7).all()


def test_a_queue_that_is_closed(device, stream, host):
    cache = DeviceCache(device)
    with kvortex.PinnedPool(MIB, cache.block_bytes, device) as pool:
        queue = kvortex.TransferQueue(device, "D2H")
        host.hold()
        job = queue.submit(cache.layout, [0], pool, [0], stream=stream)
        interrupted(lambda: queue.close(None))
        assert not job.done()
        with pytest.raises(kvortex.EngineClosed):
            queue.submit(cache.layout, [0], pool, [1], stream=stream)
        host.release()
        job.wait(20_000)
        queue.close()
        assert job.num_blocks == 1


def test_an_engine_that_is_shut_down(device, stream, host):
    cache = DeviceCache(device)
    engine = make_engine(cache, 4, shutdown_timeout_ms=3_600_000)
    host.hold()
    job = engine.save_blocks(keys_of([1]), [0], stream=stream)
    interrupted(engine.shutdown)
    with pytest.raises(kvortex.EngineClosed):
        engine.check_blocks(keys_of([1]))
    assert not job.done()
    host.release()
    job.wait(20_000)  # the engine's thread still retires
    engine.shutdown()
    assert job.num_blocks == 1


def test_a_device_pool_that_is_closed(device, stream, host):
    pool, pinned = kvortex.DevicePool(MIB, device), kvortex.PinnedPool(MIB, 4096, device)
    buffer = pool.alloc(64, stream)
    host.hold()
    buffer.copy_from(np.asarray(pinned.slot(0))[:64], stream=stream)
    buffer.free(stream)
    interrupted(pool.close)
    with pytest.raises(kvortex.EngineClosed):
        pool.alloc(64, stream)
    host.release()
    pool.close()
    pinned.close()


def test_a_pool_that_is_waited_for(device):
    pool = kvortex.PinnedPool(4096 * MIB, MIB, device, huge_pages=False)
    interrupted(lambda: pool.wait_ready(3_600_000), ready=lambda: pool.slots_ready > 128)
    assert pool.slots_ready < pool.num_slots
    pool.close()


def test_a_pool_that_is_closed(device, host):
    """Thousands of chunks, so that giving them back takes a while."""
    pool = kvortex.PinnedPool(64 * MIB, 4096, device, first_chunk_bytes=4096, chunk_bytes=4096)
    pool.wait_ready(60_000)
    view, address = pool.view(5), pool.address(5)
    view[:1] = b"\x05"
    registered = host.live_objects()["registrations"]
    interrupted(pool.close, ready=lambda: host.live_objects()["registrations"] < registered)
    assert view[0] == 5
    with pytest.raises(kvortex.EngineClosed):
        pool.view(5)
    view.release()
    assert is_mapped(address), "the rest is still registered"
    pool.close()
    assert not is_mapped(address)


def test_a_handler_may_shut_down_what_is_being_shut_down(device, stream, host):
    cache = DeviceCache(device)  # held until its copies are over
    engine = make_engine(cache, 4, shutdown_timeout_ms=20_000)
    host.hold()
    job = engine.save_blocks(keys_of([1]), [0], stream=stream)

    def handler(*_):
        host.release()
        engine.shutdown()

    before = signal.signal(signal.SIGUSR1, handler)
    threading.Timer(0.1, signal.raise_signal, [signal.SIGUSR1]).start()
    try:
        engine.shutdown()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert job.done() and job.num_blocks == 1


INTERRUPTED_AT_THE_END = """
import os, signal, threading
import numpy as np, kvortex
from kvortex.driver import _host
memory = np.zeros(4096, np.uint8)
settings = {"cpu_pool_size_bytes": 1 << 20, "block_bytes": 4096, "device": "host", "shutdown_timeout_ms": 3600000}
with kvortex.KVortexEngine.create(kvortex.KVortexConfig(**settings)) as engine:
    stream = kvortex.Stream.create(engine.device)
    _host.hold()
    job = engine.save_blocks(kvortex.block_keys(np.arange(16), 16), data_ptrs=[memory], stream=stream)
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    threading.Timer(0.8, _host.release).start()
    print("leaving", flush=True)
"""


def test_the_interpreter_ends_after_a_shutdown_was_interrupted():
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED_AT_THE_END], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "leaving\n"
    assert ended.returncode == -signal.SIGINT and ended.stderr.rstrip().endswith("KeyboardInterrupt")


def test_a_replay_that_pins_its_pool(tmp_path):
    """A pool that takes long to pin; only a part of it is touched before the interrupt."""
    command = [sys.executable, "-m", "kvortex", "replay", "--device", "host", "--pool-bytes", "6GiB"]
    replay = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    while not any(f"-{replay.pid}-" in name for name in os.listdir("/dev/shm")):  # what it has yet to touch
        assert replay.poll() is None
        time.sleep(0.001)
    before = resident_bytes(replay.pid)
    while resident_bytes(replay.pid) < before + 100 * MIB:
        assert replay.poll() is None
    replay.send_signal(signal.SIGINT)
    assert replay.wait(60) == 130
    assert b"interrupted" in replay.stderr.read()


def resident_bytes(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096
