"""`await job`: many at once, cancelled, in several loops, and with the loop gone early."""

import asyncio
import errno
import gc
import os
import threading

import pytest
from kvcache import DeviceCache

import kvortex


async def wait_for(job):
    return await job


def test_many_awaits_in_one_loop(bench):
    bench.saved([1])

    async def load_all():
        return await asyncio.gather(*(bench.load([1], [8 + number % 20]) for number in range(200)))

    jobs = asyncio.run(load_all())
    assert len(jobs) == 200
    assert all(isinstance(job, kvortex.Job) and job.done() for job in jobs)


def test_await_of_a_finished_job_returns_it_at_once(bench):
    job = bench.save([1])
    job.wait(20_000)

    async def wait():
        return await job

    assert asyncio.run(wait()) is job


@pytest.mark.host
def test_cancelling_an_await_stops_only_the_waiting(bench, host):
    bench.saved([1])

    async def cancel():
        host.hold()
        job = bench.load([1], [8])
        waiting = asyncio.ensure_future(wait_for(job))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not job.done()
        host.release()
        await job
        return job

    assert asyncio.run(cancel()).num_blocks == 1
    assert bench.holds(8, 1)


@pytest.mark.host
def test_the_loop_goes_on_while_jobs_are_awaited(bench, host):
    """Loads and whatever else the loop does overlap: nothing of it waits for the copies."""
    bench.saved([1])

    async def overlap():
        host.hold()
        loads = [asyncio.ensure_future(wait_for(bench.load([1], [8 + number]))) for number in range(12)]
        for _ in range(50):
            await asyncio.sleep(0)
        computed = await asyncio.to_thread(sum, range(1000))
        assert not any(load.done() for load in loads)
        host.release()
        return computed, await asyncio.gather(*loads)

    computed, jobs = asyncio.run(overlap())
    assert computed == 499_500 and [job.num_blocks for job in jobs] == [1] * 12
    assert all(bench.holds(8 + number, 1) for number in range(12))


@pytest.mark.host
def test_one_job_serves_many_awaits_whichever_are_cancelled(bench, host):
    bench.saved([1])

    async def share():
        host.hold()
        job = bench.load([1], [8])
        waiting = [asyncio.ensure_future(wait_for(job)) for _ in range(10)]
        await asyncio.sleep(0)
        for task in waiting[::2]:
            task.cancel()
        await asyncio.sleep(0)
        host.release()
        return job, await asyncio.gather(*waiting, return_exceptions=True)

    job, results = asyncio.run(share())
    assert results[1::2] == [job] * 5
    assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])


@pytest.mark.host
def test_a_timeout_leaves_the_job_alone(bench, host):
    bench.saved([1])

    async def time_out():
        host.hold()
        job = bench.load([1], [8])
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(wait_for(job), 0.02)
        assert not job.done()
        host.release()
        return await asyncio.wait_for(wait_for(job), 20)

    assert asyncio.run(time_out()).num_blocks == 1
    assert bench.holds(8, 1)


@pytest.mark.host
def test_shutdown_wakes_those_who_await(make_bench, host):
    bench = make_bench(shutdown_timeout_ms=50)
    bench.saved([1])

    async def shut_down():
        host.hold()
        waiting = asyncio.ensure_future(wait_for(bench.load([1], [8])))
        await asyncio.sleep(0)
        await asyncio.to_thread(bench.engine.shutdown)
        with pytest.raises(kvortex.KVortexError):
            await asyncio.wait_for(waiting, 20)
        host.release()

    asyncio.run(shut_down())


@pytest.mark.host
def test_more_loops_than_an_engine_can_tell_are_served_too(bench, host):
    bench.saved([1])
    host.hold()
    jobs = [bench.load([1], [8 + number % 12]) for number in range(70)]
    started, served = threading.Barrier(71), []

    def run(job):
        async def wait():
            waiting = asyncio.ensure_future(wait_for(job))
            await asyncio.sleep(0)
            await asyncio.to_thread(started.wait)
            served.append(await waiting)

        asyncio.run(wait())

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    started.wait(20)  # every loop has its await under way
    host.release()
    for thread in threads:
        thread.join()
    assert len(served) == 70


@pytest.mark.host
def test_loop_closed_before_the_job_ends(bench, host):
    bench.saved([1])
    host.hold()
    loop = asyncio.new_event_loop()
    job = bench.load([1], [8])

    async def wait_for():
        await job

    waiting = loop.create_task(wait_for())
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    host.release()
    job.wait(20_000)
    assert bench.holds(8, 1)
    assert not waiting.done()


def test_awaits_in_several_loops_at_once(bench):
    bench.saved([1])
    finished = []

    def run(first):
        async def load_all():
            for number in range(50):
                await bench.load([1], [first + number % 2])
            finished.append(first)

        asyncio.run(load_all())

    threads = [threading.Thread(target=run, args=(first,)) for first in (8, 10, 12, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(finished) == [8, 10, 12, 14]


@pytest.mark.host
def test_await_of_a_failed_job_raises(bench, host):
    bench.saved([1])
    host.hold()
    job = bench.load([1], [8])

    async def wait_for():
        waiting = asyncio.ensure_future(waiter())
        await asyncio.sleep(0)
        host.kill(0, 700)
        host.release()
        with pytest.raises(kvortex.DriverError):
            await waiting

    async def waiter():
        await job

    asyncio.run(wait_for())


def test_await_works_on_a_queue_without_an_engine(device, stream):
    cache = DeviceCache(device)
    with kvortex.PinnedPool(1 << 20, cache.block_bytes, device) as pool, kvortex.TransferQueue(device, "D2H") as queue:

        async def save():
            return await queue.submit(cache.layout, [0, 1], pool, [3, 4], stream=stream)

        assert asyncio.run(save()).num_blocks == 2


@pytest.mark.host
def test_loops_dropped_while_jobs_are_awaited_leave_no_file_descriptor(bench, host):
    bench.saved([1])
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(70):  # more than the listeners an engine has room for
        host.hold()
        loop = asyncio.new_event_loop()
        task = loop.create_task(wait_for(bench.load([1], [8])))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        task._log_destroy_pending = False
        del task, loop
        host.release()
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    asyncio.run(wait_for(bench.load([1], [8])))


class NoReaders(asyncio.SelectorEventLoop):
    def add_reader(self, *args):
        raise NotImplementedError


class OddLoop(asyncio.SelectorEventLoop):
    def add_reader(self, *args):
        raise RuntimeError("this loop says so")


def no_descriptor(*args):
    raise OSError(errno.EMFILE, "too many open files")


@pytest.mark.host
@pytest.mark.filterwarnings("error")  # of a listener's end, too
@pytest.mark.parametrize("lacking", ["a descriptor", "a loop that watches one", "an odd loop", "room"])
def test_await_polls_where_it_cannot_be_told(bench, host, monkeypatch, lacking):
    kinds = {"a loop that watches one": NoReaders, "an odd loop": OddLoop}
    loop = kinds.get(lacking, asyncio.SelectorEventLoop)()
    if lacking == "a descriptor":
        monkeypatch.setattr(os, "eventfd", no_descriptor)
    if lacking == "room":
        monkeypatch.setattr(loop, "add_reader", no_descriptor)
    bench.saved([1])
    before = len(os.listdir("/proc/self/fd"))

    async def load():
        host.hold()
        waiting = asyncio.ensure_future(wait_for(bench.load([1], [8])))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        host.release()
        return await waiting

    assert loop.run_until_complete(load()).num_blocks == 1
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    loop.close()
