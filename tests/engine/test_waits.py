"""Trouble of the waiting itself is no answer about a job: whatever call fails, memory in use counts as in use."""

import asyncio
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from kvcache import content

import kvortex
from kvortex.driver._device import driver_rows

pytestmark = pytest.mark.host

INVALID_VALUE, OUT_OF_MEMORY = 1, 2
# Those that a wait may call; with the others nothing strikes, which `struck` counts.
ROWS = [row for row, *_ in driver_rows()]


@contextmanager
def failing(host, row, n, code):
    host.fail_call(n, code, field=row)
    yield
    struck[0] += not host.fail_pending()
    host.fail_call(0, 0)


@pytest.fixture(autouse=True, name="struck")
def count_faults():
    struck[0] = 0
    yield struck
    assert struck[0] >= 4, "no call of this wait has failed, so nothing was shown"


struck = [0]


class EngineLoads:
    """Loads of an engine, whose thread retires them."""

    def __init__(self, bench):
        self.bench = bench
        bench.saved([1])

    def start(self):
        return self.bench.load([1], [8])


class QueueLoads:
    """Loads of a bare queue, which nobody retires but those who ask."""

    def __init__(self, bench):
        self.bench = bench
        self.pool = kvortex.PinnedPool(4 * 4096, bench.cache.block_bytes, bench.cache.device)
        self.queue = kvortex.TransferQueue(bench.cache.device, "H2D")
        self.pool.view(3)[:] = content(1, 0, bench.cache.block_bytes)

    def start(self):
        return self.queue.submit(self.bench.cache.layout, [8], self.pool, [3], stream=self.bench.stream)


@pytest.fixture(params=[EngineLoads, QueueLoads])
def loads(request, bench):
    made = request.param(bench)
    yield made
    if isinstance(made, QueueLoads):
        made.queue.close()
        made.pool.close()


def faults():
    return [(row, n, code) for row in ROWS for n in (1, 2) for code in (INVALID_VALUE, OUT_OF_MEMORY)]


def raised(call, *arguments):
    """The exception of a call, so that one which should not be there fails an assertion."""
    try:
        call(*arguments)
    except Exception as error:
        return error
    return None


def ends_well(loads, job, host):
    """The load goes on whatever was said meanwhile, and its bytes arrive."""
    host.release()
    assert raised(job.wait, 20_000) is None
    assert job.done() and job.num_blocks == 1
    assert loads.bench.holds(8, 1)
    loads.bench.cache.scribble(8, 0, loads.bench.stream)
    loads.bench.stream.synchronize()


def test_a_wait_ends_with_the_end_of_its_job_or_with_its_time(loads, host):
    for fault in faults():
        host.hold()
        job = loads.start()
        with failing(host, *fault):
            assert isinstance(raised(job.wait, 1), TimeoutError), fault
        assert not job.done(), fault
        ends_well(loads, job, host)


def test_a_job_that_cannot_be_asked_is_not_done(loads, host):
    for fault in faults():
        host.hold()
        job = loads.start()
        with failing(host, *fault):
            for _ in range(3):
                assert not job.done(), fault
        ends_well(loads, job, host)


def test_an_await_that_cannot_ask_goes_on(loads, host):
    async def wait_for(job):
        return await job

    for fault in faults():
        host.hold()
        job = loads.start()
        with failing(host, *fault), pytest.raises(asyncio.TimeoutError):
            asyncio.run(asyncio.wait_for(wait_for(job), 0.002))
        assert not job.done(), fault
        ends_well(loads, job, host)


def test_what_follows_wait_on_finds_the_bytes_even_where_the_stream_cannot_be_made_to_wait(loads, host):
    bench, target = loads.bench, np.empty(64, np.uint8)
    wanted = np.frombuffer(content(1, 0, bench.cache.block_bytes)[:64], np.uint8)
    for fault in faults():
        host.hold()
        job = loads.start()
        opener = threading.Timer(0.003, host.release)
        opener.start()
        with kvortex.Stream.create(bench.cache.device) as reader, failing(host, *fault):
            try:
                job.wait_on(reader)
            except ValueError as error:  # of the stream, not of the job: nothing was promised
                assert "stream" in str(error)
                job.wait()
            struck[0] += not host.fail_pending()
            host.fail_call(0, 0)
            target[:] = 0
            buffer, start, stride, _ = bench.cache.places[0]
            bench.cache.buffers[buffer].copy_to(target, start + 8 * stride, reader)
            reader.synchronize()
            assert (target == wanted).all(), fault
        opener.join()
        ends_well(loads, job, host)


def test_a_queue_that_is_closed_in_trouble_still_waits_for_its_jobs(bench, host):
    for row, n, code in faults():
        loads = QueueLoads(bench)
        host.hold()
        job = loads.start()
        opener = threading.Timer(0.003, host.release)
        opener.start()
        with failing(host, row, n, code):
            loads.queue.close(20_000)
        opener.join()
        assert job.done() and raised(job.wait) is None, (row, n, code)
        assert bench.holds(8, 1)
        loads.pool.close()


def test_an_engine_whose_thread_cannot_enter_the_context_at_once_serves_all_the_same(make_bench, host):
    for row in ("ctx_set_current", "thread_exchange_stream_capture_mode"):
        for n in range(1, 6):
            host.fail_call(n, OUT_OF_MEMORY, field=row)
            try:
                bench = make_bench(4, max_jobs=4, num_transfer_streams=2)
            except kvortex.KVortexError:  # it struck the constructor
                struck[0] += 1
                continue
            bench.saved([1])
            assert bench.leading([1]) == 1 and not bench.engine.failed
            struck[0] += not host.fail_pending()
            host.fail_call(0, 0)
