"""Other people's code inside a call: a stream's or a memory's protocol, a finaliser. It may close whatever it likes."""

import gc
import threading

import numpy as np
import pytest
from kvcache import DeviceCache, keys_of

import kvortex

pytestmark = pytest.mark.host

LONG_MS = 3_600_000  # whoever waits for himself here waits for the test's time limit


class StreamThat:
    """A stream whose protocol first does something else."""

    def __init__(self, stream, act, how):
        self.stream, self.act, self.how = stream, act, how
        if how == "__cuda_stream__":
            self.__cuda_stream__ = self.ask_protocol

    def ask_protocol(self):
        self.act()
        return 0, self.stream.handle

    @property
    def cuda_stream(self):
        if self.how != "cuda_stream":
            raise AttributeError
        self.act()
        return self.stream.handle


class MemoryThat:
    """Memory that first does something else when it is asked where it is."""

    def __init__(self, memory, act):
        self.memory, self.act = memory, act

    @property
    def __array_interface__(self):
        self.act()
        return self.memory.__array_interface__


class Trouble(Exception):
    pass


def trouble():
    raise Trouble


HOWS = ["__cuda_stream__", "cuda_stream"]


@pytest.fixture
def patient(make_bench, host):
    """An engine that waits for an hour before it gives up on a call."""
    gc.collect()
    before = host.live_objects()["registrations"]
    bench = make_bench(4, shutdown_timeout_ms=LONG_MS)
    bench.saved([1])
    bench.leaks = lambda: host.live_objects()["registrations"] > before
    return bench


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("verb", ["save_blocks", "load_blocks"])
def test_a_stream_that_shuts_down_or_raises(patient, verb, how):
    engine, memory = patient.engine, [np.zeros(256, np.uint8)]
    call = getattr(engine, verb)
    for arguments in ({"block_ids": [0]}, {"data_ptrs": memory, "sizes": [64]}):
        with pytest.raises(Trouble):
            call(keys_of([2]), stream=StreamThat(patient.stream, trouble, how), **arguments)
    patient.load([1], [8]).wait(20_000)
    with pytest.raises(kvortex.EngineClosed):
        call(keys_of([2]), stream=StreamThat(patient.stream, engine.shutdown, how), **arguments)
    assert not patient.leaks()


@pytest.mark.parametrize("with_stream", [True, False])
@pytest.mark.parametrize("verb", ["save_blocks", "load_blocks"])
def test_memory_that_shuts_down_or_raises(patient, verb, with_stream):
    call, memory = getattr(patient.engine, verb), np.zeros(256, np.uint8)
    stream = patient.stream if with_stream else None
    with pytest.raises(Trouble):
        call(keys_of([2]), data_ptrs=[MemoryThat(memory, trouble)], sizes=[64], stream=stream)
    with pytest.raises(kvortex.EngineClosed):
        shut_down = MemoryThat(memory, patient.engine.shutdown)
        call(keys_of([2]), data_ptrs=[shut_down], sizes=[64], stream=stream)
    assert not patient.leaks()


def test_a_finaliser_that_shuts_down_wherever_the_collector_runs(make_bench, host):
    """The collector is made to run at each allocation, and the n-th of them, for every n, finds the finaliser."""

    class Cycle:
        def __init__(self, act):
            self.me, self.act = self, act

        def __del__(self):
            self.act()

    gc.collect()
    before = host.live_objects()["registrations"]
    for verb in ("save_blocks", "load_blocks", "check_blocks", "touch_blocks", "get_stats"):
        for n in range(12):
            bench = make_bench(2, shutdown_timeout_ms=LONG_MS, max_jobs=2, num_transfer_streams=2)
            bench.saved([1])
            arguments = () if verb == "get_stats" else (keys_of([1]),)
            keywords = {"block_ids": [0], "stream": bench.stream} if verb in ("save_blocks", "load_blocks") else {}
            call = getattr(bench.engine, verb)
            gc.collect()
            gc.disable()
            Cycle(bench.engine.shutdown)
            made = [[] for _ in range(gc.get_count()[0])]
            gc.set_threshold(gc.get_count()[0] + n)
            gc.enable()
            try:
                call(*arguments, **keywords)
            except kvortex.EngineClosed:
                pass
            finally:
                gc.set_threshold(700)
                del made
            bench.engine.shutdown()
            bench.cache.close()
        assert host.live_objects()["registrations"] <= before


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("closed", ["queue", "pool", "device"])
def test_a_stream_that_closes_what_a_queue_submits_with(device, stream, closed, how):
    cache = DeviceCache(device)
    own = kvortex.Device.open("host")
    pool, queue = kvortex.PinnedPool(1 << 20, cache.block_bytes, own), kvortex.TransferQueue(own, "D2H")
    closing = {"queue": queue, "pool": pool, "device": own}[closed]
    with pytest.raises(kvortex.EngineClosed):
        queue.submit(cache.layout, [0], pool, [0], stream=StreamThat(stream, closing.close, how))
    assert queue.jobs_in_flight == 0
    for part in (queue, pool, own):
        part.close()


def test_a_stream_that_ends_what_it_is_given_to(device, stream):
    own = kvortex.Device.open("host")
    event, other = kvortex.Event.create(own), kvortex.Device.open("host")
    with pytest.raises(kvortex.EngineClosed):
        event.record(StreamThat(stream, event.close, "cuda_stream"))
    with pytest.raises(kvortex.EngineClosed):
        kvortex.Stream.borrow(other, StreamThat(stream, other.close, "cuda_stream"))
    data = np.zeros(64, np.uint8)
    for call in (
        lambda buffer: buffer.fill(1, stream=StreamThat(stream, buffer.close, "cuda_stream")),
        lambda buffer: buffer.copy_from(data, stream=StreamThat(stream, buffer.close, "cuda_stream")),
        lambda buffer: buffer.copy_to(MemoryThat(data, buffer.close)),
        lambda buffer: buffer.copy_to(MemoryThat(data, own.close)),
    ):
        with pytest.raises(kvortex.EngineClosed):
            call(kvortex.DeviceBuffer(64, own))
    with kvortex.DevicePool(1 << 20, device) as pool:
        pooled = pool.alloc(64, stream)
        with pytest.raises(kvortex.EngineClosed):
            pooled.free(StreamThat(stream, pooled.close, "cuda_stream"))
        with pytest.raises(kvortex.EngineClosed):
            pool.alloc(64, StreamThat(stream, pool.close, "cuda_stream"))


def test_wait_on_a_stream_that_shuts_down(patient):
    job = patient.load([1], [8])
    with pytest.raises(kvortex.EngineClosed):
        job.wait_on(StreamThat(patient.stream, patient.engine.shutdown, "cuda_stream"))
    assert job.done() and job.num_blocks == 1


def test_a_call_that_was_still_asking_when_another_thread_shut_down(make_bench):
    bench = make_bench(4)
    asked, go_on, ended = threading.Event(), threading.Event(), []

    def act():
        asked.set()
        go_on.wait(20)

    def save():
        try:
            bench.engine.save_blocks(keys_of([2]), [0], stream=StreamThat(bench.stream, act, "cuda_stream"))
        except kvortex.EngineClosed as error:
            ended.append(error)

    saver = threading.Thread(target=save)
    saver.start()
    assert asked.wait(20)
    bench.engine.shutdown()
    go_on.set()
    saver.join(20)
    assert len(ended) == 1
