"""`await job`: many at once, cancelled, in several loops, and with the loop gone early."""

import asyncio
import gc
import os
import threading

import pytest
from kvcache import DeviceCache

import kvortex


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

    async def wait_for(job):
        await job

    assert asyncio.run(cancel()).num_blocks == 1
    assert bench.holds(8, 1)


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

    async def wait_for(job):
        await job

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
