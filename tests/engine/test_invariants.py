"""The promises of the engine, each with the test that fails without it. Late streams make a forgotten wait show.

Tests marked `host` close the host driver's gate, which holds every stream back; the same promises are kept on a GPU by
tests/engine/test_gpu_order.py with long kernels in front.
"""

import time

import numpy as np
import pytest
from kvcache import SHAPES, ConfigWithTiers, content, keys_of

import kvortex
from kvortex import KVortexConfig, ReserveStatus

NEW, PRESENT, PENDING, FULL = (int(status) for status in ReserveStatus)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_comes_back_byte_by_byte(make_bench, shape):
    bench = make_bench(16, shape)
    bench.saved(range(10))
    bench.cache.fill(0)
    job = bench.load(range(10), range(20, 30))
    job.wait(20_000)
    assert job.num_blocks == 10
    assert all(bench.holds(20 + key_id, key_id) for key_id in range(10))


@pytest.mark.parametrize("make_config, header_bytes", [(KVortexConfig, 0), (ConfigWithTiers, 4096)])
def test_header_page_leaves_the_payload_alone(make_bench, make_config, header_bytes):
    bench = make_bench(4, make_config=make_config)
    bench.saved([1, 2])
    bench.load([1, 2], [5, 6]).wait(20_000)
    assert bench.holds(5, 1) and bench.holds(6, 2)
    assert bench.engine.pool.stride_bytes == 4096 + header_bytes


# 1: two-phase writes


@pytest.mark.host
def test_unwritten_memory_is_never_served(make_bench, host):
    bench = make_bench()
    for block, key_id in enumerate([1, 2]):
        bench.cache.write(block, content(key_id, 0, bench.cache.block_bytes))
    host.hold()
    job = bench.engine.save_blocks(keys_of([1, 2]), [0, 1], stream=bench.stream)
    assert list(job.statuses) == [NEW, NEW] and not job.done()
    assert bench.leading([1, 2]) == 0
    assert bench.load([1, 2], [8, 9]).num_blocks == 0
    host.release()
    job.wait(20_000)
    assert bench.leading([1, 2]) == 2


@pytest.mark.host
@pytest.mark.parametrize("field", ["memcpy_2d_async", "event_record", "stream_wait_event"])
def test_failed_save_leaves_nothing_behind(bench, host, field):
    host.fail_call(1, 2, field=field)
    with pytest.raises(kvortex.DriverError) as raised:
        bench.save([1, 2])
    assert raised.value.name == "CUDA_ERROR_OUT_OF_MEMORY"
    assert bench.leading([1]) == 0
    assert bench.engine.get_stats().pool_blocks_used == 0
    bench.saved([1, 2])
    bench.load([1, 2], [5, 6]).wait(20_000)
    assert bench.holds(5, 1) and bench.holds(6, 2)


# 2: an entry knows its length


def test_load_of_another_size_ends_the_run_and_is_counted(make_bench):
    bench = make_bench()
    cache, engine = bench.cache, bench.engine
    buffer = cache.buffers[0].address
    engine.save_blocks(keys_of([1, 2]), data_ptrs=[buffer, buffer + 1024], sizes=[512, 256], stream=0).wait(20_000)
    job = engine.load_blocks(keys_of([1, 2]), data_ptrs=[buffer + 2048, buffer + 4096], sizes=512, stream=0)
    job.wait(20_000)
    assert job.num_blocks == 1
    assert engine.get_stats().length_mismatches == 1


# 3: pinned means pinned


@pytest.mark.host
def test_slot_being_loaded_is_not_reused(make_bench, host):
    bench = make_bench(2)
    bench.saved([1, 2])
    bench.cache.fill(0)
    bench.cache.write(0, content(3, 0, bench.cache.block_bytes))
    host.hold()
    load = bench.load([1, 2], [8, 9])
    save = bench.engine.save_blocks(keys_of([3]), [0], stream=bench.stream)
    assert list(save.statuses) == [FULL]
    host.release()
    load.wait(20_000)
    assert bench.holds(8, 1) and bench.holds(9, 2)
    bench.saved([3])
    assert bench.engine.get_stats().blocks_evicted == 1


@pytest.mark.host
def test_slot_being_saved_is_not_reused(make_bench, host):
    bench = make_bench(2)
    for block in range(3):
        bench.cache.write(block, content(block, 0, bench.cache.block_bytes))
    host.hold()
    first = bench.engine.save_blocks(keys_of([0, 1]), [0, 1], stream=bench.stream)
    second = bench.engine.save_blocks(keys_of([2]), [2], stream=bench.stream)
    again = bench.engine.save_blocks(keys_of([0]), [0], stream=bench.stream)
    assert list(first.statuses) == [NEW, NEW]
    assert list(second.statuses) == [FULL]
    assert list(again.statuses) == [PENDING]
    host.release()
    first.wait(20_000)
    bench.load([0, 1], [8, 9]).wait(20_000)
    assert bench.holds(8, 0) and bench.holds(9, 1)


# 4: forgetting is immediate


@pytest.mark.host
@pytest.mark.parametrize("forget", ["discard", "clear"])
def test_forgotten_save_in_flight_never_appears(make_bench, host, forget):
    bench = make_bench(2)
    bench.cache.write(0, content(1, 0, bench.cache.block_bytes))
    host.hold()
    job = bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream)
    if forget == "discard":
        assert bench.engine.discard_blocks(keys_of([1])) == 1
    else:
        bench.engine.clear()
    host.release()
    job.wait(20_000)
    assert bench.leading([1]) == 0
    bench.saved([1], generation=1)
    bench.load([1], [9]).wait(20_000)
    assert bench.holds(9, 1, generation=1)
    assert bench.engine.get_stats().pool_blocks_used == 1


@pytest.mark.host
def test_load_in_flight_keeps_the_content_it_found_when_the_key_is_saved_anew(make_bench, host):
    bench = make_bench(2)
    bench.saved([1])
    bench.cache.write(0, content(1, 1, bench.cache.block_bytes))
    host.hold()
    load = bench.load([1], [8])
    bench.engine.clear()
    save = bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream)
    assert list(save.statuses) == [NEW]
    host.release()
    load.wait(20_000)
    save.wait(20_000)
    assert bench.holds(8, 1, generation=0)
    bench.load([1], [9]).wait(20_000)
    assert bench.holds(9, 1, generation=1)


# 5 and 6: ordered on both sides


@pytest.mark.host
@pytest.mark.parametrize("round_", range(8))
@pytest.mark.parametrize("shape", ["one_allocation", "gathered"])
def test_save_copies_what_the_callers_stream_wrote_before_and_not_after(make_bench, host, shape, round_):
    bench = make_bench(8, shape)
    host.set_delay_us(0, 1500, seed=round_)
    bench.cache.scribble(3, 0x11, bench.stream)
    job = bench.engine.save_blocks(keys_of([7]), [3], stream=bench.stream)
    job.wait_on(bench.stream)
    bench.cache.scribble(3, 0x22, bench.stream)
    job.wait(20_000)
    bench.load([7], [9]).wait(20_000)
    assert set(bench.cache.read(9)) == {0x11}


@pytest.mark.host
@pytest.mark.parametrize("round_", range(8))
@pytest.mark.parametrize("shape", ["one_allocation", "gathered"])
def test_load_lands_after_earlier_work_and_before_later_work_of_the_callers_stream(make_bench, host, shape, round_):
    bench = make_bench(8, shape)
    bench.saved([7])
    host.set_delay_us(0, 1500, seed=round_)
    bench.cache.scribble(9, 0x33, bench.stream)
    job = bench.load([7], [9])
    job.wait_on(bench.stream)
    data = bench.cache.read(9, bench.stream)
    assert data == content(7, 0, bench.cache.block_bytes)
    job.wait(20_000)
    assert bench.holds(9, 7)


# 7: the engine orders its own jobs


@pytest.mark.host
@pytest.mark.parametrize("round_", range(8))
def test_load_into_a_block_waits_for_the_save_that_reads_it(bench, host, round_):
    bench.saved([1])
    bench.cache.write(5, content(2, 0, bench.cache.block_bytes))
    host.set_delay_us(0, 2000, seed=round_)
    save = bench.engine.save_blocks(keys_of([2]), [5], stream=bench.stream)
    load = bench.load([1], [5])
    save.wait(20_000)
    load.wait(20_000)
    assert bench.holds(5, 1)
    bench.load([2], [6]).wait(20_000)
    assert bench.holds(6, 2)


@pytest.mark.host
@pytest.mark.parametrize("round_", range(8))
def test_save_of_a_block_waits_for_the_load_that_writes_it(bench, host, round_):
    bench.saved([1])
    host.set_delay_us(0, 2000, seed=round_)
    load = bench.load([1], [5])
    save = bench.engine.save_blocks(keys_of([2]), [5], stream=bench.stream)
    load.wait(20_000)
    save.wait(20_000)
    bench.load([2], [6]).wait(20_000)
    assert bench.holds(6, 1)  # what the load had put into block 5


def test_a_target_named_twice_is_refused_and_nothing_is_pinned(make_bench):
    bench = make_bench(2)
    bench.saved([1, 2])
    with pytest.raises(ValueError, match="twice"):
        bench.load([1, 2], [5, 5])
    with pytest.raises(ValueError, match="overlap"):
        address = bench.cache.buffers[0].address
        bench.engine.load_blocks(keys_of([1, 2]), data_ptrs=[address, address + 64], sizes=128, stream=0)
    bench.saved([3, 4])
    assert bench.engine.get_stats().blocks_evicted == 2


# 8: wait_on never lies


@pytest.mark.host
def test_wait_on_a_job_that_is_over_waits_for_nothing(make_bench, host):
    bench = make_bench(8, max_jobs=1, num_transfer_streams=2)
    first = bench.save([1])
    first.wait(20_000)
    host.hold()
    second = bench.engine.save_blocks(keys_of([2]), [0], stream=bench.stream)  # has the record that the first had
    assert list(second.statuses) == [NEW]
    host.count_calls()
    first.wait_on(bench.stream)
    assert host.num_calls("stream_wait_event") == 0
    second.wait_on(bench.stream)
    assert host.num_calls("stream_wait_event") == 1
    host.count_calls(False)
    host.release()
    second.wait(20_000)


def test_job_is_submitted_when_the_call_returns(bench):
    assert bench.save([1]).submitted


# 10: a job says what it did


def test_save_answers_for_each_key(make_bench):
    bench = make_bench(3)
    bench.saved([1])
    job = bench.save([1, 2, 2, 3, 4])
    job.wait(20_000)
    assert list(job.statuses) == [PRESENT, NEW, PENDING, NEW, FULL]  # what the call met is not evicted for the rest
    assert job.num_blocks == 2
    stats = bench.engine.get_stats()
    assert (stats.blocks_saved, stats.blocks_present, stats.blocks_pending, stats.blocks_refused) == (3, 1, 1, 1)
    assert stats.blocks_evicted == 0


def test_load_moves_the_leading_run_and_touches_no_target_beyond_it(bench):
    bench.saved([1, 2, 4])
    bench.cache.fill(0x77)
    job = bench.load([1, 2, 3, 4], [8, 9, 10, 11])
    job.wait(20_000)
    assert job.num_blocks == 2
    assert bench.holds(8, 1) and bench.holds(9, 2)
    assert set(bench.cache.read(10)) == set(bench.cache.read(11)) == {0x77}


# 11: one party retires a job


def test_completion_thread_commits_without_anyone_waiting(bench):
    bench.save([1])
    deadline = time.monotonic() + 20
    while not bench.leading([1]):
        assert time.monotonic() < deadline, "nobody committed the block"
    assert bench.engine.get_stats().blocks_saved == 1


# 14 and 15: full is an answer


@pytest.mark.host
def test_full_queue_answers_with_no_blocks(make_bench, host):
    bench = make_bench(8, max_jobs=1, num_transfer_streams=2)
    bench.saved([1])
    host.hold()
    first = bench.load([1], [5])
    second = bench.load([1], [6])
    assert (first.num_blocks, second.num_blocks) == (1, 0)
    assert second.done()
    save = bench.engine.save_blocks(keys_of([2]), [0], stream=bench.stream)
    refused = bench.engine.save_blocks(keys_of([3]), [1], stream=bench.stream)
    assert list(save.statuses) == [NEW] and list(refused.statuses) == [FULL]
    host.release()
    first.wait(20_000)
    bench.load([1], [7]).wait(20_000)
    assert bench.holds(7, 1)


def test_save_larger_than_the_pool_keeps_the_head(make_bench):
    bench = make_bench(2)
    job = bench.save(range(5))
    job.wait(20_000)
    assert list(job.statuses) == [NEW, NEW, FULL, FULL, FULL]
    assert bench.leading(range(5)) == 2


# recency


def test_victims_come_from_the_tail_of_a_prefix(make_bench):
    bench = make_bench(6)
    bench.saved([0, 1, 2, 3, 4, 5])
    for newcomer, survivors in ((10, 5), (11, 4), (12, 3)):
        bench.saved([newcomer])
        assert bench.leading(range(6)) == survivors


def test_touched_prefix_outlives_newer_blocks(make_bench):
    bench = make_bench(4)
    bench.saved([0, 1])
    bench.saved([2, 3])
    assert bench.engine.touch_blocks(keys_of([0, 1])) == 2
    bench.saved([4, 5])
    assert bench.leading([0, 1]) == 2
    assert bench.leading([2]) == 0


def test_loading_makes_a_prefix_recent(make_bench):
    bench = make_bench(4)
    bench.saved([0, 1])
    bench.saved([2, 3])
    bench.load([0, 1], [8, 9]).wait(20_000)
    bench.saved([4, 5])
    assert bench.leading([0, 1]) == 2


def test_pool_of_two_slots_works(make_bench):
    bench = make_bench(2)
    for key_id in range(20):
        bench.saved([key_id])
        bench.load([key_id], [9]).wait(20_000)
        assert bench.holds(9, key_id)


def test_hits_say_where_each_block_is(bench):
    bench.saved([1, 2, 4])
    hits = bench.engine.check_blocks(keys_of([1, 2, 3, 4]))
    assert (hits.leading, hits.leading_anywhere) == (2, 2)
    assert hits.mask.tolist() == [True, True, False, True] and hits.where.tolist() == [1, 1, 0, 1]


# 16: a chain never eats itself


@pytest.mark.parametrize("num_slots", [1, 2, 5, 12])
def test_a_repeated_prompt_finds_what_the_pool_holds_of_it(make_bench, num_slots):
    bench, prompt = make_bench(num_slots), list(range(29))
    keys = keys_of(prompt)
    for turn in range(5):
        found = bench.engine.check_blocks(keys).leading
        assert found == (min(num_slots, 29) if turn else 0)
        if found:
            loaded = bench.load(prompt[:found], range(found))
            loaded.wait(20_000)
            assert loaded.num_blocks == found and all(bench.holds(block, block) for block in range(found))
        for block in range(found, 29):
            bench.cache.write(block, content(block, 0, bench.cache.block_bytes))
        for first in range(found, 29, 7):  # in several calls, as a prompt is computed in several steps
            rest = slice(first, min(first + 7, 29))
            bench.engine.save_blocks(
                keys[rest], np.arange(29)[rest], stream=bench.stream, after=keys[: rest.start]
            ).wait(20_000)
        bench.engine.touch_blocks(keys)


def test_a_save_takes_keys_alone_as_what_it_continues(bench):
    with pytest.raises(TypeError, match="keys must be an"):
        bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream, after=[1, 2])
    with pytest.raises(ValueError, match=r"keys must have shape"):
        bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream, after=np.zeros((1, 31), np.uint8))
    assert not bench.engine.check_blocks(keys_of([1])).mask.any()


def test_two_layouts_of_sizes_that_differ_per_block(make_bench):
    bench = make_bench(8)
    address = bench.cache.buffers[0].address
    sizes = np.array([4, 100, 256, 1000])
    sources = address + np.array([0, 64, 512, 1024])
    data = np.random.default_rng(3).integers(0, 256, 4096, dtype=np.uint8)
    bench.cache.buffers[0].copy_from(data)
    bench.engine.save_blocks(keys_of(range(4)), data_ptrs=sources, sizes=sizes, stream=bench.stream).wait(20_000)
    bench.cache.buffers[0].fill(0)
    job = bench.engine.load_blocks(keys_of(range(4)), data_ptrs=sources + 8192, sizes=sizes, stream=bench.stream)
    job.wait(20_000)
    back = np.empty(4096, dtype=np.uint8)
    bench.cache.buffers[0].copy_to(back, 8192)
    for start, size in zip(sources - address, sizes, strict=True):
        assert (back[start : start + size] == data[start : start + size]).all()


@pytest.mark.host
def test_saves_and_loads_take_their_queues_in_turn(make_bench, host):
    bench = make_bench(16, num_transfer_streams=4)
    bench.saved([100])
    host.hold()
    for number in range(6):
        bench.engine.save_blocks(keys_of([number]), [number], stream=bench.stream)
        bench.load([100], [10 + number])
    assert [queue.jobs_in_flight for queue in bench.engine.queues] == [3, 3, 3, 3]
    host.release()


@pytest.mark.host
def test_keys_refused_by_full_queues_are_counted(make_bench, host):
    bench = make_bench(8, max_jobs=1, num_transfer_streams=2)
    host.hold()
    for number in range(3):
        bench.engine.save_blocks(keys_of([number]), [0], stream=bench.stream)
    assert bench.engine.get_stats().blocks_refused == 2
    host.release()
