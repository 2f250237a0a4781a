"""Deferred jobs: a thread of the engine submits their copies, in the order of their turns."""

import gc
import os
import threading
import time
import weakref

import numpy as np
import pytest
from kvcache import DeviceCache, content, is_mapped, keys_of, leaves_its_engine_behind, make_engine

import kvortex
from kvortex import ReserveStatus

OUT_OF_MEMORY = 2
ILLEGAL_ADDRESS = 700
COPY = "memcpy_2d_async"  # what moves the blocks of this cache

pytestmark = pytest.mark.host


@pytest.fixture
def bench(make_bench, host):
    """Two streams, so that two saves share one; every test lets go whatever stands still."""
    yield make_bench(8, num_transfer_streams=2, deferred=True)
    host.stop_calls()


def stands(host, field=COPY):
    """Wait until some thread stands before a call of `field`; return its native id."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for native_id, at in host.stopped().items():
            if at == field:
                return native_id
        time.sleep(0)
    raise AssertionError(f"nobody came to {field}")


def outlive(native_id):
    """Wait for the end of a thread that was given up: what it copies must live until then."""
    while os.path.exists(f"/proc/self/task/{native_id}"):
        time.sleep(0)


def in_thread(call):
    answers = []

    def run():
        try:
            answers.append(call())
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, answers


def test_a_call_returns_before_its_copies_are_submitted(bench, host):
    host.stop_calls(COPY)
    job = bench.save([1, 2])
    stands(host)
    assert not job.submitted and not job.done()
    assert list(job.statuses) == [ReserveStatus.NEW] * 2 and job.num_blocks == 2
    assert bench.leading([1, 2]) == 0, "a block is visible before it is copied"
    host.stop_calls()
    job.wait(20_000)
    assert job.submitted and bench.leading([1, 2]) == 2
    bench.load([1, 2], [8, 9]).wait(20_000)
    assert bench.holds(8, 1) and bench.holds(9, 2)


def test_copies_come_after_the_callers_stream_as_it_stood_at_the_call(bench, host):
    host.set_delay_us(2000, 2000)
    bench.cache.scribble(0, 0x11, bench.stream)
    host.stop_calls("stream_wait_event")
    job = bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream)
    stands(host, "stream_wait_event")
    host.stop_calls()
    job.wait_on(bench.stream)
    bench.cache.scribble(0, 0x22, bench.stream)
    job.wait(20_000)
    bench.load([1], [8]).wait(20_000)
    assert set(bench.cache.read(8)) == {0x11}


def test_wait_on_waits_until_the_copies_are_submitted(bench, host):
    bench.saved([1, 2])  # so that the record's event was recorded before
    bench.cache.write(0, content(3, 0, bench.cache.block_bytes))
    host.stop_calls(COPY)
    job = bench.engine.save_blocks(keys_of([3]), [0], stream=bench.stream)
    stands(host)
    thread, answers = in_thread(lambda: job.wait_on(bench.stream))
    thread.join(0.05)
    assert thread.is_alive(), "wait_on did not wait for copies that were still to be submitted"
    host.hold()
    host.stop_calls()
    thread.join(20)
    assert answers == [None] and job.submitted and not job.done()
    bench.cache.scribble(0, 0x22, bench.stream)
    host.release()
    job.wait(20_000)
    bench.load([3], [8]).wait(20_000)
    assert bench.holds(8, 3)


def test_jobs_on_one_block_keep_the_order_of_their_calls(bench, host):
    """A load, then a save of the same block, then a load over it: issued late and by one thread."""
    bench.saved([1, 2])
    host.stop_calls(COPY)
    host.set_delay_us(500, 500)
    jobs = [bench.load([1], [8])]
    stands(host)
    jobs.append(bench.engine.save_blocks(keys_of([10]), [8], stream=bench.stream))
    jobs.append(bench.load([2], [8]))
    host.stop_calls()
    for job in jobs:
        job.wait(20_000)
    assert bench.holds(8, 2)
    bench.load([10], [9]).wait(20_000)
    assert bench.holds(9, 1)


def test_a_call_that_is_not_deferred_does_not_overtake(bench, host):
    bench.saved([1])
    host.stop_calls(COPY)
    first = bench.load([1], [8])
    submitter = stands(host)
    thread, answers = in_thread(
        lambda: bench.engine.save_blocks(keys_of([10]), [8], stream=bench.stream, deferred=False)
    )
    thread.join(0.05)
    assert thread.is_alive() and list(host.stopped()) == [submitter]
    host.stop_calls()
    thread.join(20)
    first.wait(20_000)
    answers[0].wait(20_000)
    bench.load([10], [9]).wait(20_000)
    assert bench.holds(9, 1)


def test_a_short_load_does_not_wait_until_a_long_save_is_submitted(make_bench, host):
    bench = make_bench(40, "uneven", num_transfer_streams=2, deferred=True)
    bench.saved([100])
    host.stop_calls("memcpy_batch_async")
    save = bench.save(range(30), range(30))
    stands(host, "memcpy_batch_async")
    load = bench.load([100], [31])
    time.sleep(0.002)  # a slice and more
    call = stands(host, "memcpy_batch_async")
    while not load.submitted:
        host.step(call)
        time.sleep(0.002)
        call = stands(host, "memcpy_batch_async")  # by then it is known whether the load is submitted
    assert not save.submitted
    host.stop_calls()
    save.wait(20_000)
    load.wait(20_000)
    assert bench.holds(31, 100)


def test_a_job_is_not_issued_before_the_long_one_that_it_met(make_bench, host):
    bench = make_bench(40, "uneven", num_transfer_streams=2, deferred=True)
    bench.saved(range(30))
    bench.cache.fill(0x44)
    host.stop_calls("memcpy_batch_async")
    load = bench.load(range(30), range(30))
    stands(host, "memcpy_batch_async")
    save = bench.engine.save_blocks(keys_of([100]), [29], stream=bench.stream)
    while not load.submitted:
        assert not save.submitted
        time.sleep(0.002)  # a slice and more, so that the other queue is looked at in between
        host.step(stands(host, "memcpy_batch_async"))
        while not load.submitted and not host.stopped():
            time.sleep(0)
    host.stop_calls()
    save.wait(20_000)
    bench.load([100], [31]).wait(20_000)
    assert bench.holds(31, 29)


def test_auto_defers_what_takes_long(make_bench, host):
    bench = make_bench(40, "uneven", num_transfer_streams=2, deferred="auto")
    with pytest.raises(ValueError, match="deferred must be False, True or 'auto', got 'yes'"):
        bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream, deferred="yes")
    short = bench.save([1])
    assert short.submitted
    short.wait(20_000)
    host.stop_calls("memcpy_batch_async")
    long = bench.engine.save_blocks(keys_of(range(2, 34)), range(32), stream=bench.stream)
    stands(host, "memcpy_batch_async")
    assert not long.submitted
    host.stop_calls()
    long.wait(20_000)
    assert long.num_blocks == 32


def test_auto_does_not_wait_behind_what_is_being_submitted(make_bench, host):
    bench = make_bench(40, "uneven", num_transfer_streams=2, deferred="auto")
    host.stop_calls("memcpy_batch_async")
    long = bench.engine.save_blocks(keys_of(range(32)), range(32), stream=bench.stream)
    stands(host, "memcpy_batch_async")
    short = bench.engine.save_blocks(keys_of([100]), [0], stream=bench.stream)
    assert not short.submitted
    host.stop_calls()
    for job in (long, short):
        job.wait(20_000)
    assert short.num_blocks == 1


# ---- withdrawal -----------------------------------------------------------------------------------------------------


def test_what_was_not_begun_can_be_withdrawn(bench, host):
    bench.saved([1])
    host.stop_calls(COPY)
    first, second = bench.save([2], [2]), bench.save([3], [3])
    queue = bench.engine.queues[0]
    stands(host)
    assert not queue.withdraw(first) and queue.withdraw(second) and queue.withdraw(second)
    assert second.num_blocks == 0
    behind = bench.engine.save_blocks(keys_of([4]), [3], stream=bench.stream)
    host.stop_calls()
    for job in (first, second, behind):
        job.wait(20_000)
    assert queue.withdraw(second), "what was withdrawn stays so, though the job is over"
    assert [bench.leading([key]) for key in (2, 3, 4)] == [1, 0, 1]
    stats = bench.engine.get_stats()
    assert (stats.blocks_saved, stats.pool_blocks_used, stats.jobs_failed) == (3, 3, 0)
    with pytest.raises(ValueError, match="another queue"):
        bench.engine.queues[1].withdraw(behind)
    assert not queue.withdraw(behind)


def test_a_withdrawn_load_touches_no_target_and_unpins(bench, host):
    bench.saved([1])
    before = bench.cache.read(8)
    host.stop_calls("stream_wait_event")
    first = bench.load([1], [9])
    stands(host, "stream_wait_event")
    load = bench.load([1], [8])
    assert bench.engine.queues[1].withdraw(load)
    host.stop_calls()
    first.wait(20_000)
    load.wait(20_000)
    assert bench.cache.read(8) == before
    bench.engine.discard_blocks(keys_of([1]))
    assert bench.engine.get_stats().pool_blocks_used == 0


def test_a_job_behind_a_withdrawn_one_waits_for_what_that_met(bench, host):
    bench.saved(range(5))
    host.set_delay_us(3000, 3000)
    host.stop_calls("stream_wait_event")
    load = bench.load(range(5), range(12, 17))
    stands(host, "stream_wait_event")
    save = bench.engine.save_blocks(keys_of([100]), [16], stream=bench.stream)
    assert bench.engine.queues[0].withdraw(save)
    again = bench.engine.save_blocks(keys_of([101]), [16], stream=bench.stream)
    host.stop_calls()
    for job in (load, save, again):
        job.wait(20_000)
    bench.load([101], [20]).wait(20_000)
    assert bench.holds(20, 4), "the block was saved before it was loaded"


# ---- failures -------------------------------------------------------------------------------------------------------


def test_every_call_of_the_submitter_may_fail_once(bench, host):
    for n in range(1, 400):
        bench.engine.clear()
        bench.cache.fill(0x44)
        bench.cache.write(0, content(1, 0, bench.cache.block_bytes))
        bench.cache.write(1, content(2, 0, bench.cache.block_bytes))
        host.fail_call(n, OUT_OF_MEMORY)
        loaded = None
        try:
            save = bench.engine.save_blocks(keys_of([1, 2]), [0, 1], stream=bench.stream)
            save.wait_on(bench.stream)
            save.wait(20_000)
            load = bench.load([1, 2], [8, 9])
            load.wait_on(bench.stream)
            load.wait(20_000)
            loaded = load.num_blocks
        except kvortex.DriverError as error:
            assert error.code == OUT_OF_MEMORY and error.call.startswith("cu")
        struck = not host.fail_pending()
        host.fail_call(0, 0)
        if loaded == 2:
            assert bench.holds(8, 1) and bench.holds(9, 2)
        assert not bench.engine.failed
        bench.engine.clear()
        bench.save([1, 2]).wait(20_000)
        bench.load([1, 2], [8, 9]).wait(20_000)
        assert bench.holds(8, 1) and bench.holds(9, 2)
        stats = bench.engine.get_stats()
        assert (stats.pool_blocks_used, stats.jobs_in_flight) == (2, 0), f"call {n} leaked"
        if not struck:
            return
    raise AssertionError("the calls had no end")


def test_a_job_that_fails_on_the_way_fails_alone(bench, host):
    host.stop_calls(COPY)
    first = bench.save([1], [1])
    stands(host)
    second, third = bench.save([2], [2]), bench.save([3], [3])
    host.fail_call(3, OUT_OF_MEMORY, field=COPY)  # K and V of the first, K of the second
    host.stop_calls()
    first.wait(20_000)
    for ask in (second.wait, lambda: second.wait_on(bench.stream), lambda: second.num_blocks):
        with pytest.raises(kvortex.DriverError, match="cuMemcpy2DAsync"):
            ask()
    third.wait(20_000)
    assert [bench.leading([key]) for key in (1, 2, 3)] == [1, 0, 1]
    assert bench.engine.get_stats().jobs_failed == 1


def test_wait_on_a_job_that_failed_but_is_not_over_raises(bench, host):
    """Its event says when its copies are over, not that they are all."""
    bench.cache.write(0, content(1, 0, bench.cache.block_bytes))
    host.hold()
    host.fail_call(1, OUT_OF_MEMORY, field=COPY)
    job = bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream)
    while not job.submitted:
        time.sleep(0)
    thread, answers = in_thread(lambda: job.wait_on(bench.stream))
    host.release()
    thread.join(20)
    assert isinstance(answers[0], kvortex.DriverError)


@leaves_its_engine_behind
def test_a_shutdown_that_loses_patience_wakes_whoever_waits_for_a_submission(make_bench, host):
    bench = make_bench(8, num_transfer_streams=2, deferred=True, shutdown_timeout_ms=100)
    host.stop_calls(COPY)
    job = bench.save([1])
    submitter = stands(host)
    waits = [in_thread(lambda: job.wait_on(bench.stream)), in_thread(job.wait)]
    overtaken = in_thread(lambda: bench.engine.save_blocks(keys_of([2]), [2], stream=bench.stream, deferred=False))
    time.sleep(0.01)
    ended, _ = in_thread(bench.engine.shutdown)
    for thread, answers in (*waits, overtaken):
        thread.join(20)
        assert not thread.is_alive() and isinstance(answers[0], kvortex.KVortexError), answers
    host.stop_calls()
    ended.join(20)
    assert not ended.is_alive()
    outlive(submitter)


@leaves_its_engine_behind
@pytest.mark.parametrize("call", [COPY, "event_query"])
def test_what_a_thread_uses_that_does_not_come_back_from_the_driver_is_kept(device, stream, host, call):
    """The submitter, or the completion thread: it goes on after engine, cache and job are gone."""
    cache = DeviceCache(device)
    memory = np.zeros((16, 512), np.uint8)
    layout = kvortex.KVLayout.from_tensors([memory])
    engine = make_engine(cache, 8, deferred=True, shutdown_timeout_ms=50)
    engine.add_layout(layout)
    host.stop_calls(call)
    if call != COPY:
        host.hold()
    engine.save_blocks(keys_of([1, 2]), [0, 1], stream=stream)
    engine.save_blocks(keys_of([1, 2]), [0, 1], stream=stream, layout=layout)
    thread, (queue, *_) = stands(host, call), engine.queues
    address, alive = engine.pool.address(0), weakref.ref(memory)
    engine.shutdown()
    del engine, layout, memory
    gc.collect()
    assert alive() is not None and is_mapped(address)
    host.release()
    time.sleep(0.02)  # the copies end, so that a call that asks for them hears so
    host.stop_calls()
    outlive(thread)
    assert queue.jobs_in_flight == 1, "a record was given away although nobody knows whether its copies are over"
    cache.close()


def test_wait_on_a_failed_job_that_is_just_being_retired_raises(bench, host):
    """Its slots are not given back while another call has the index, and until then nobody knows how it ended."""
    host.hold()
    host.fail_call(1, OUT_OF_MEMORY, field=COPY)
    job = bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream)
    while not job.submitted:
        time.sleep(0)
    unknown = np.zeros((8_000_000, 32), np.uint8)
    thread, _ = in_thread(lambda: bench.engine.discard_blocks(unknown))
    time.sleep(0.01)
    host.release()
    time.sleep(0.01)
    with pytest.raises(kvortex.DriverError):
        job.wait_on(bench.stream)
    thread.join(20)


def test_a_failure_wakes_whoever_waits_for_a_submission_that_is_long_in_coming(bench, host):
    """The queue is found dead while its thread is still inside the driver."""
    host.hold()
    first, second = (bench.engine.save_blocks(keys_of([key]), [0], stream=bench.stream) for key in (1, 2))
    while not second.submitted:
        time.sleep(0)
    host.stop_calls(COPY)
    third = bench.engine.save_blocks(keys_of([3]), [3], stream=bench.stream)
    stands(host)
    thread, answers = in_thread(lambda: third.wait_on(bench.stream))
    thread.join(0.02)
    assert thread.is_alive()
    host.kill(0, ILLEGAL_ADDRESS)
    with pytest.raises(kvortex.DriverError):
        first.wait(20_000)
    thread.join(20)
    assert not thread.is_alive() and isinstance(answers[0], kvortex.DriverError)
    host.release()
    host.stop_calls()
    for job in (second, third):
        with pytest.raises(kvortex.DriverError):
            job.wait(20_000)
    assert bench.engine.failed


def test_jobs_dropped_before_they_are_submitted_are_done_all_the_same(bench, host):
    host.stop_calls(COPY)
    jobs = [bench.save([key], [key]) for key in range(5)]
    stands(host)
    del jobs
    host.stop_calls()
    while bench.engine.get_stats().jobs_in_flight:
        time.sleep(0)
    assert bench.leading(range(5)) == 5


def test_an_engine_shut_down_with_deferred_jobs_ends_them_first(make_bench, host):
    bench = make_bench(8, num_transfer_streams=2, deferred=True)
    host.set_delay_us(1000, 1000)
    jobs = [bench.save([key], [key]) for key in range(8)]
    bench.engine.shutdown()
    assert all(job.done() and job.num_blocks == 1 for job in jobs)


# ---- without an engine ----------------------------------------------------------------------------------------------


def test_a_queue_without_a_submitter_refuses_deferred_jobs(bench, device):
    cache = bench.cache
    with kvortex.PinnedPool(8 * 8192, cache.block_bytes, device) as pool, kvortex.TransferQueue(device, "D2H") as queue:
        with pytest.raises(ValueError, match="Submitter"):
            queue.submit(cache.layout, [0], pool, [0], stream=bench.stream, deferred=True)
        with kvortex.transfer.Submitter(device, queue.signals, [queue]) as submitter:
            with pytest.raises(ValueError, match="already"):
                kvortex.transfer.Submitter(device, queue.signals, [queue])
            cache.write(3, content(3, 0, cache.block_bytes))
            job = queue.submit(cache.layout, [3], pool, [5], stream=bench.stream, deferred=True)
            job.wait(20_000)
            assert bytes(pool.view(5)) == content(3, 0, cache.block_bytes)
        submitter.close()
        with pytest.raises(ValueError, match="Submitter"):
            queue.submit(cache.layout, [0], pool, [0], stream=bench.stream, deferred=True)


def test_unfit_submitters_are_refused(device):
    signals = kvortex.transfer.JobSignals()
    with kvortex.TransferQueue(device, "D2H") as queue:
        with pytest.raises(ValueError, match="other signals or another device"):
            kvortex.transfer.Submitter(device, signals, [queue])
        with pytest.raises(ValueError, match="at most 256"):
            kvortex.transfer.Submitter(device, queue.signals, [queue] * 257)
        with pytest.raises(TypeError):
            kvortex.transfer.Submitter(device, queue.signals, [object()])


def test_closing_a_submitter_submits_what_it_has_taken(bench, device, host):
    cache = bench.cache
    with kvortex.PinnedPool(8 * 8192, cache.block_bytes, device) as pool, kvortex.TransferQueue(device, "D2H") as queue:
        with kvortex.transfer.Submitter(device, queue.signals, [queue]):
            jobs = [
                queue.submit(cache.layout, [block], pool, [block], stream=bench.stream, deferred=True)
                for block in range(8)
            ]
        assert all(job.submitted for job in jobs)
        for job in jobs:
            job.wait(20_000)
        assert all(bytes(pool.view(block)) == cache.read(block) for block in np.arange(8))


def test_a_queue_that_no_submitter_has_refuses_deferred_jobs(bench, device):
    with kvortex.PinnedPool(8 * 8192, bench.cache.block_bytes, device) as pool:
        first = kvortex.TransferQueue(device, "D2H")
        second = kvortex.TransferQueue(device, "D2H", signals=first.signals)
        with (
            first,
            second,
            kvortex.transfer.Submitter(device, first.signals, [first]),
            pytest.raises(ValueError, match="Submitter"),
        ):
            second.submit(bench.cache.layout, [0], pool, [0], stream=bench.stream, deferred=True)


def test_a_submitter_that_was_closed_for_ever_has_ended(device):
    with kvortex.TransferQueue(device, "D2H") as queue:
        for _ in range(2):
            kvortex.transfer.Submitter(device, queue.signals, [queue]).close(None)
        with kvortex.transfer.Submitter(device, queue.signals, [queue]) as submitter:
            submitter.close(None)


def test_a_job_that_a_closing_submitter_does_not_take_is_submitted_by_its_caller_alone(bench, device, host):
    cache = bench.cache
    cache.write(1, content(1, 0, cache.block_bytes))
    with kvortex.PinnedPool(8 * 8192, cache.block_bytes, device) as pool, kvortex.TransferQueue(device, "D2H") as queue:
        submitter = kvortex.transfer.Submitter(device, queue.signals, [queue])

        def submit(block):
            return queue.submit(cache.layout, [block], pool, [block], stream=bench.stream, deferred=True)

        host.stop_calls(COPY)
        first = submit(0)
        issuing = stands(host)
        host.stop_calls(COPY, "event_record")
        caller, jobs = in_thread(lambda: submit(1))
        calling = stands(host, "event_record")
        closer, _ = in_thread(lambda: submitter.close(2000))
        time.sleep(0.01)  # from here on it takes no more
        host.step(calling)
        while queue.num_waiting == 0:
            time.sleep(0)
        while not first.submitted:
            if issuing in host.stopped():
                host.step(issuing)
        assert stands(host) == calling
        closer.join(20)
        assert not closer.is_alive() and list(host.stopped()) == [calling]
        host.stop_calls()
        caller.join(20)
        jobs[0].wait(20_000)
        assert bytes(pool.view(1)) == content(1, 0, cache.block_bytes)
