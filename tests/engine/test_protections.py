"""Schedules in which the absence of one protection shows on every run: what is slow is made slow, step by step.

tests/engine/test_invariants.py draws schedules; here each one is arranged. tests/mutants takes the protections
out one by one and names these tests.
"""

import threading
import time

import numpy as np
import pytest
from kvcache import DeviceCache, content, is_mapped, keys_of, make_engine

import kvortex

OUT_OF_MEMORY = 2
INVALID_VALUE = 1
ILLEGAL_ADDRESS = 700
STEP_US = 3000  # of every stream operation: a job of one block takes 2 of them, one of eight takes 16

pytestmark = pytest.mark.host


def call_in_thread(call):
    """Start `call` in a thread; what it returned or raised is appended to the list that is returned with the thread."""
    answers = []

    def run():
        try:
            answers.append(call())
        except kvortex.KVortexError as error:
            answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, answers


def step_to(host, field, n):
    """Wait until the one thread that stops stands before its n-th call of `field`, which is stopped."""
    for at in range(n):
        while not (found := host.stopped()):
            time.sleep(0)
        (native_id,) = found
        assert found[native_id] == field
        if at < n - 1:
            host.step(native_id)  # from now on it counts as standing only at its next call


# 5: batch copies read their source in stream order


def test_batch_copies_wait_for_the_callers_stream(make_bench, host):
    bench = make_bench(8, "uneven")
    assert not bench.engine.get_stats().strided
    host.set_delay_us(STEP_US, STEP_US)
    for block in (0, 1):
        bench.cache.scribble(block, 0x11, bench.stream)
    bench.engine.save_blocks(keys_of([1, 2]), [0, 1], stream=bench.stream).wait(20_000)
    bench.load([1, 2], [8, 9]).wait(20_000)
    assert set(bench.cache.read(8)) == set(bench.cache.read(9)) == {0x11}


# 7: the engine orders its own jobs


def test_short_load_does_not_overtake_the_long_save_that_reads_its_target(bench, host):
    bench.saved([100])
    for block in range(7):
        bench.cache.write(block, content(block, 0, bench.cache.block_bytes))
    host.set_delay_us(STEP_US, STEP_US)
    host.hold()  # both start when both are submitted
    save = bench.engine.save_blocks(keys_of(range(7)), range(7), stream=bench.stream)
    load = bench.load([100], [6])
    host.release()
    save.wait(20_000)
    load.wait(20_000)
    assert bench.holds(6, 100)
    bench.load([6], [9]).wait(20_000)
    assert bench.holds(9, 6), "the block was overwritten before it was saved"


def test_short_save_does_not_overtake_the_long_load_that_writes_its_source(bench, host):
    bench.saved(range(7))
    host.set_delay_us(STEP_US, STEP_US)
    host.hold()
    load = bench.load(range(7), range(10, 17))
    save = bench.engine.save_blocks(keys_of([100]), [16], stream=bench.stream)
    host.release()
    load.wait(20_000)
    save.wait(20_000)
    bench.load([100], [20]).wait(20_000)
    assert bench.holds(20, 6), "the block was saved before it was loaded"


@pytest.mark.parametrize("n, field", [(1, "event_record"), (1, "stream_wait_event"), (2, "stream_wait_event")])
def test_job_behind_a_failed_one_waits_for_what_the_failed_one_met(make_bench, host, n, field):
    bench = make_bench(8, num_transfer_streams=2)
    bench.saved(range(7))
    host.set_delay_us(STEP_US, STEP_US)
    load = bench.load(range(7), range(10, 17))
    host.fail_call(n, OUT_OF_MEMORY, field=field)
    with pytest.raises(kvortex.DriverError):
        bench.engine.save_blocks(keys_of([100]), [16], stream=bench.stream)
    bench.engine.save_blocks(keys_of([100]), [16], stream=bench.stream).wait(20_000)
    load.wait(20_000)
    bench.load([100], [20]).wait(20_000)
    assert bench.holds(20, 6), "the block was saved before it was loaded"


# 8: an event is not recorded anew while somebody waits on it


def test_record_of_a_finished_job_is_not_reused_while_another_call_holds_its_event(make_bench, device, host):
    """The save stands still before it waits on the load's event, long after the load's end."""
    bench = make_bench(8, max_jobs=1, num_transfer_streams=2)
    bench.saved([1])
    host.hold()
    load = bench.load([1], [5])
    host.stop_calls("stream_wait_event")
    thread, answers = call_in_thread(lambda: bench.engine.save_blocks(keys_of([2]), [5], stream=bench.stream))
    step_to(host, "stream_wait_event", 2)  # the first is the wait for the caller's stream
    host.release()
    load.wait(20_000)
    another = bench.load([1], [6])
    host.stop_calls()
    thread.join()
    answers[0].wait(20_000)
    assert another.num_blocks == 0, "the only record was given away while its event was held"


# 9: never share a buffer with the future


def test_failed_submission_returns_when_the_copies_it_had_submitted_are_over(make_bench, host):
    bench = make_bench(8)
    bench.save(range(4)).wait(20_000)
    bench.engine.clear()
    host.hold()
    host.fail_call(5, OUT_OF_MEMORY, field="memcpy_2d_async")
    thread, answers = call_in_thread(lambda: bench.engine.save_blocks(keys_of(range(4)), range(4), stream=bench.stream))
    thread.join(0.5)
    assert thread.is_alive(), "the call is over although its first copies are still to come"
    assert bench.engine.get_stats().pool_blocks_used == 4
    host.release()
    thread.join()
    assert answers[0].code == OUT_OF_MEMORY
    assert bench.engine.get_stats().pool_blocks_used == 0


# graph capture, dead contexts


def test_no_verb_spoils_the_capture_of_another_stream(bench, device, host):
    with kvortex.Stream.create(device) as capturing:
        assert host.begin_capture(capturing.handle) == 0
        host.set_delay_us(20_000, 20_000)  # so that the jobs are not over before they are waited for
        thread, answers = call_in_thread(lambda: use_every_verb(bench))
        thread.join()
        assert host.end_capture(capturing.handle) == (0, 0)
    assert answers == [None]


def use_every_verb(bench):
    job = bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream)
    job.wait_on(bench.stream)
    job.wait(20_000)
    bench.engine.load_blocks(keys_of([1]), [9], stream=bench.stream).wait(20_000)
    bench.engine.check_blocks(keys_of([1]))
    bench.engine.touch_blocks(keys_of([1]))
    bench.engine.discard_blocks(keys_of([1]))
    bench.engine.clear()
    bench.engine.get_stats()


def test_retiring_a_job_does_not_spoil_the_capture_of_another_stream(bench, device, host):
    with kvortex.Stream.create(device) as capturing:
        host.hold()
        bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream)
        assert host.begin_capture(capturing.handle) == 0
        host.release()
        while bench.engine.get_stats().jobs_in_flight:
            time.sleep(0)
        assert host.end_capture(capturing.handle) == (0, 0)
    assert bench.leading([1]) == 1


def test_pool_of_a_dead_context_stays_mapped_after_shutdown(bench, host):
    bench.saved([1])
    address = bench.engine.pool.address(0)
    host.hold()
    bench.load([1], [8])
    host.kill(0, ILLEGAL_ADDRESS)
    host.release()
    while not bench.engine.failed:
        time.sleep(0)
    bench.engine.shutdown()
    assert is_mapped(address), "a copy that is still running would write into somebody else's memory"


# what the driver refuses is not asked of it


def test_no_copy_spans_two_registrations_of_the_pool(device, stream):
    """Blocks without gaps on both sides, which the planner merges wherever it may."""
    cache = DeviceCache(device, "cross_layer", piece_bytes=512)
    assert cache.block_bytes == 4096
    engine = make_engine(cache, 9, pool_first_chunk_bytes=3 * 4096, pool_chunk_bytes=2 * 4096)
    engine.wait_ready(60_000)
    for block in range(9):
        cache.write(block, content(block, 0, 4096))
    thread, answers = call_in_thread(lambda: engine.save_blocks(keys_of(range(9)), np.arange(9), stream=stream))
    thread.join()
    assert isinstance(answers[0], kvortex.Job), f"the driver refused: {answers[0]}"
    answers[0].wait(20_000)
    engine.load_blocks(keys_of(range(9)), np.arange(20, 29), stream=stream).wait(20_000)
    assert all(cache.read(20 + block) == content(block, 0, 4096) for block in range(9))
    engine.shutdown()
    cache.close()


def test_refused_strided_copy_is_not_tried_again(device, stream, host):
    """The probe is refused as across separate allocations, so that no transfer makes a strided copy."""
    cache = DeviceCache(device)
    host.fail_call(1, INVALID_VALUE, field="memcpy_2d_async")
    engine = make_engine(cache, 4)
    assert not host.fail_pending()
    assert not engine.get_stats().strided
    host.count_calls()
    engine.save_blocks(keys_of([1]), [0], stream=stream).wait(20_000)
    engine.load_blocks(keys_of([1]), [8], stream=stream).wait(20_000)
    assert host.num_calls("memcpy_2d_async") == 0
    assert host.num_calls("memcpy_batch_async") == 2
    assert cache.read(8) == cache.read(0)
    engine.shutdown()
    cache.close()
