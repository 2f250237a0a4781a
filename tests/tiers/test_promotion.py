"""Promotions: who pins what and for how long, who joins whom, and what ends a run."""

import asyncio
import gc
import os
import signal
import time

import numpy as np
import pytest
from engine_rig import EngineRig
from tier_rig import SECONDS, block, keys_of

from kvortex import ConfigError, DriverError, EngineClosed, KVLayout, Prefetch, Stream
from kvortex.index import NO_SLOT


@pytest.fixture
def rig(tmp_path):
    rig = EngineRig(tmp_path / "disk")
    yield rig
    rig.close()


def held_get(rig, ids, **settings):
    """A prefetch whose reads hang."""
    rig.store.hold("get")
    before = rig.gets()
    prefetch = rig.prefetch(ids, **settings)
    rig.wait_for(lambda: rig.gets() > before)
    return prefetch


def test_blocks_come_back_as_they_were(rig):
    rig.put_away(range(8))
    assert rig.engine.check_blocks(keys_of(range(9)))[:1] == (0,)
    hits = rig.engine.check_blocks(keys_of(range(9)))
    assert hits.leading_anywhere == 8 and hits.where.tolist() == 8 * [2] + [0] and not hits.mask.any()
    with rig.fetch(range(8)) as prefetch:
        assert isinstance(prefetch, Prefetch) and prefetch.num_blocks == 8 and prefetch.done()
        assert rig.engine.check_blocks(keys_of(range(8))).leading == 8
        assert rig.load(range(8), prefetched=prefetch) == 8
    rig.wait_for(rig.is_at_rest)


def test_a_lookup_says_which_level_has_each_block(rig):
    rig.put_away(range(6))
    with rig.fetch([1]), rig.fetch([4]):
        hits = rig.engine.check_blocks(keys_of([1, 0, 4, 2, 99, 3]))
        assert hits.where.tolist() == [1, 2, 1, 2, 0, 2] and hits.mask.tolist() == [True, False, True] + 3 * [False]
        assert (hits.leading, hits.leading_anywhere) == (1, 4)
        assert rig.engine.check_blocks(keys_of([])).leading_anywhere == 0
        rig.engine.tiering._breaker._until_s = float("inf")
        hits = rig.engine.check_blocks(keys_of([1, 0, 4]))
        assert (hits.where.tolist(), hits.leading_anywhere) == ([1, 0, 1], 1), "what a suspended tier has cannot be had"


def test_one_call_brings_and_loads(rig):
    rig.put_away(range(6))
    assert rig.load(range(6)) == 0
    assert rig.load(range(8), promote_timeout_ms=SECONDS) == 6
    rig.wait_for(rig.is_at_rest)


def test_without_a_tier_one_call_loads_what_ram_has(tmp_path):
    from kvortex import KVortexConfig, KVortexEngine

    with KVortexEngine.create(KVortexConfig(cpu_pool_size_bytes=1 << 20, block_bytes=4096, device="host")) as engine:
        memory = np.ones(4096, np.uint8)
        engine.save_blocks(keys_of([1]), data_ptrs=[memory]).wait(SECONDS)
        target = np.zeros(4096, np.uint8)
        job = engine.load_blocks(keys_of([1]), data_ptrs=[target], promote_timeout_ms=100)
        job.wait(SECONDS)
        assert job.num_blocks == 1 and target.all() and engine.flush() == 0
        with pytest.raises(ConfigError, match=r"no lower tier .* tiers="):
            engine.prefetch(keys_of([1]))


def test_what_ram_has_of_a_prefix_is_pinned_before_the_rest_comes(rig):
    rig.put_away(range(6))
    assert rig.load(range(3), promote_timeout_ms=SECONDS) == 3
    prefetch = held_get(rig, range(6))
    rig.save(range(100, 116))  # as many as the pool has
    assert rig.in_ram(range(3)) == [0, 1, 2]
    rig.store.let_go()
    prefetch.wait(SECONDS)
    assert prefetch.num_blocks == 6 and rig.load(range(6), prefetched=prefetch) == 6


def test_what_landed_stays_until_its_reader_has_it(rig):
    rig.put_away(range(6))
    prefetch = rig.fetch(range(6))
    rig.save(range(100, 116))
    assert rig.load(range(6), prefetched=prefetch) == 6
    rig.wait_for(rig.is_at_rest)
    rig.save(range(200, 216))
    assert rig.in_ram(range(6)) == []


def test_a_run_has_half_of_the_pool_at_the_most(rig):
    rig.put_away(range(12))
    first = rig.fetch(range(12))
    assert first.num_blocks == 8 and rig.stats().misses == {"FULL": 4}
    assert rig.fetch(range(8, 12)).num_blocks == 0, "nobody waits for another's pins"
    assert list(rig.save(range(100, 108)).statuses) == [0] * 8, "nor does a save"
    first.close()
    assert rig.fetch(range(8, 12)).num_blocks == 4


def test_pins_go_when_the_time_is_over_and_that_is_counted(rig):
    rig.put_away(range(4))
    prefetch = rig.fetch(range(4), hold_ms=1)
    rig.wait_for(rig.is_at_rest)
    assert rig.stats().blocks_expired_unread == 4 and prefetch.num_blocks == 4
    prefetch.close()
    rig.wait_for(rig.is_at_rest)


def test_pins_go_with_the_object_that_holds_them(rig):
    rig.put_away(range(4))
    prefetch = rig.fetch(range(4))
    assert not rig.is_at_rest()
    del prefetch
    gc.collect()
    rig.wait_for(rig.is_at_rest)
    assert rig.stats().blocks_expired_unread == 0


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_who_leaves_before_the_blocks_come_holds_none(rig, how):
    rig.put_away(range(4))
    prefetch = held_get(rig, range(4))
    if how == "closed":
        prefetch.close()
        prefetch.wait(SECONDS)
        assert prefetch.done() and prefetch.num_blocks == 0
    del prefetch
    gc.collect()
    rig.store.let_go()
    rig.wait_for(rig.is_at_rest)
    assert rig.in_ram(range(4)) == [0, 1, 2, 3], "they came all the same"


def test_a_block_that_two_wait_for_is_read_once_and_pinned_for_each(rig):
    rig.put_away(range(4))
    first = held_get(rig, range(3))
    second = rig.prefetch(range(4))
    rig.store.let_go()
    first.wait(SECONDS), second.wait(SECONDS)
    assert (first.num_blocks, second.num_blocks) == (3, 4) and rig.gets() == 4
    assert [rig.pins_of(i) for i in range(4)] == [2, 2, 2, 1]
    first.close()
    assert rig.load(range(4), prefetched=second) == 4
    rig.wait_for(rig.is_at_rest)


def test_a_joiner_stays_when_the_one_who_began_leaves(rig):
    rig.put_away(range(4))
    first = held_get(rig, range(4))
    second = rig.prefetch(range(4))
    first.close()
    rig.store.let_go()
    second.wait(SECONDS)
    assert second.num_blocks == 4 and [rig.pins_of(i) for i in range(4)] == [1] * 4
    assert rig.load(range(4), prefetched=second) == 4


def test_a_joiner_that_leaves_takes_its_pin_along(rig):
    rig.put_away(range(4))
    first = held_get(rig, range(4))
    rig.prefetch(range(4)).close()
    rig.store.let_go()
    first.wait(SECONDS)
    assert first.num_blocks == 4 and [rig.pins_of(i) for i in range(4)] == [1] * 4


class Meanwhile:
    """The index, as one sees it whose second look comes after something has happened."""

    def __init__(self, index, happens):
        self._index, self._happens = index, happens

    def __getattr__(self, name):
        return getattr(self._index, name)

    def reserve(self, *args, **settings):
        answer = self._index.reserve(*args, **settings)
        self._happens()
        return answer


@pytest.mark.parametrize("ends", ["ready", "writing"])
def test_a_block_that_a_save_is_writing_is_looked_at_once_more(rig, ends):
    rig.put_away(range(3))
    (slot,), _ = rig.index.reserve(keys_of([1]), 20_000)
    rig.promoter.index = Meanwhile(rig.index, lambda: ends == "ready" and rig.index.commit([slot]))
    prefetch = rig.fetch(range(3))
    assert prefetch.num_blocks == (3 if ends == "ready" else 1)
    if ends == "writing":
        assert rig.stats().misses == {"BEING_SAVED": 2}
        rig.index.abort([slot])
    prefetch.close()
    rig.wait_for(rig.is_at_rest)


def test_a_key_named_twice_is_pinned_twice(rig):
    rig.put_away(range(3))
    prefetch = rig.fetch([0, 1, 0, 2])
    assert prefetch.num_blocks == 4 and rig.pins_of(0) == 2 and rig.gets() == 3
    prefetch.close()
    rig.wait_for(rig.is_at_rest)


def test_what_is_cleared_while_it_comes_is_not_shown(rig):
    rig.put_away(range(4))
    prefetch = held_get(rig, range(4))
    rig.engine.clear()
    rig.store.let_go()
    prefetch.wait(SECONDS)
    assert prefetch.num_blocks == 0 and rig.in_ram(range(4)) == [] and rig.on_disk(range(4)) == []
    rig.wait_for(rig.is_at_rest)
    assert rig.index.num_free == 16
    rig.save(range(4), generation=1)
    assert rig.engine.flush(SECONDS) == 0
    rig.index.evict(16)
    assert rig.load(range(4), generation=1, promote_timeout_ms=SECONDS) == 4


def test_a_run_ends_at_a_block_that_is_discarded_while_it_comes(rig):
    rig.put_away(range(6))
    prefetch = held_get(rig, range(6))
    rig.engine.discard_blocks(keys_of([3]))
    rig.store.let_go()
    prefetch.wait(SECONDS)
    assert prefetch.num_blocks == 3 and rig.stats().misses == {"DISCARDED": 1}
    assert rig.load(range(6), prefetched=prefetch) == 3
    rig.wait_for(rig.is_at_rest)
    assert rig.in_ram(range(6)) == [0, 1, 2, 4, 5] and rig.on_disk(range(6)) == [0, 1, 2, 4, 5]


def test_what_is_late_is_a_miss_and_its_slot_stays_the_disks(rig):
    rig.put_away(range(4))
    prefetch = held_get(rig, range(4), timeout_ms=20)
    prefetch.wait(SECONDS)
    assert prefetch.num_blocks == 0
    rig.wait_for(lambda: (rig.index.slots_of(keys_of(range(4))) == NO_SLOT).all())
    assert rig.index.num_writing == 4, "the disk may still write there"
    assert list(rig.save(range(4), generation=1).statuses) == [0] * 4
    assert rig.index.num_writing == 4 and rig.tier.catalogue.num_pinned == 4
    rig.store.let_go()
    rig.wait_for(rig.is_at_rest)
    assert rig.load(range(4), generation=1) == 4


def test_a_damaged_block_ends_the_run_and_is_forgotten(rig):
    rig.put_away(range(6), batch=1)
    slot = int(rig.tier.catalogue.slots_of(keys_of([2]))[0])
    segments = rig.store.segments
    path = f"{segments.folders[0]}/{slot // segments.slots_per_segment:06}.segment"
    with open(path, "r+b") as file:
        offset = 4096 + slot % segments.slots_per_segment * segments.stride_bytes + 4096 + 777
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    prefetch = rig.fetch(range(6))
    assert prefetch.num_blocks == 2 and rig.stats().misses == {"PAYLOAD_DAMAGED": 1}
    assert rig.load(range(6), prefetched=prefetch) == 2
    assert rig.on_disk(range(6)) == [0, 1, 3, 4, 5] == rig.in_ram(range(6)), "what came well is there"
    rig.wait_for(rig.is_at_rest)


def test_what_came_back_is_not_written_again(rig):
    rig.put_away(range(4))
    rig.fetch(range(4)).close()
    rig.save([9])
    assert rig.engine.flush(SECONDS) == 0
    assert rig.stats().blocks_written == 5 and rig.engine.get_stats().pool_blocks_clean == 5


def test_it_can_be_awaited_and_given_up(rig):
    rig.put_away(range(4))

    async def wait():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(first_of(prefetch), 0.01)
        assert not prefetch.done(), "only the waiting was given up"
        rig.store.let_go()
        return await prefetch

    async def first_of(prefetch):
        return await prefetch

    prefetch = held_get(rig, range(4))
    assert asyncio.run(wait()) is prefetch and prefetch.num_blocks == 4


def test_a_wait_of_its_own_ends_in_time(rig):
    rig.put_away(range(4))
    prefetch = held_get(rig, range(4))
    with pytest.raises(TimeoutError, match="not done after 1 ms"):
        prefetch.wait(1)


def test_shutdown_ends_every_wait(tmp_path):
    rig = EngineRig(tmp_path / "disk", engine_shutdown_timeout_ms=200)
    rig.put_away(range(4))
    prefetch = held_get(rig, range(4))
    rig.engine.shutdown()
    prefetch.wait(SECONDS)
    assert prefetch.num_blocks == 0
    prefetch.close()
    with pytest.raises(EngineClosed):
        rig.prefetch(range(4))
    rig.store.let_go()


@pytest.mark.parametrize("times", [{"timeout_ms": -1}, {"hold_ms": 1.5}, {"timeout_ms": True}])
def test_a_time_that_is_none_is_refused(rig, times):
    with pytest.raises(ValueError, match="must be a whole number of milliseconds"):
        rig.prefetch([1], **times)


def test_two_ways_to_promote_exclude_each_other(rig):
    with rig.fetch([1]) as prefetch, pytest.raises(ValueError, match="exclude each other"):
        rig.load([1], prefetched=prefetch, promote_timeout_ms=1)


def test_a_long_run_comes_in_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("kvortex.tiers.promoter.WINDOW_BYTES", 60_000)
    rig = EngineRig(tmp_path / "disk", pool_blocks=64)
    rig.put_away(range(30), batch=5)
    assert rig.fetch(range(30)).num_blocks == 30
    assert max(len(keys) for verb, keys in rig.store.calls if verb == "get") == 2
    rig.close()


def in_windows_of_two(tmp_path, monkeypatch, **settings):
    monkeypatch.setattr("kvortex.tiers.promoter.WINDOW_BYTES", 60_000)
    rig = EngineRig(tmp_path / "disk", pool_blocks=64, **settings)
    rig.put_away(range(20), batch=5)
    return rig


@pytest.mark.parametrize("deferred", [False, True])
def test_a_long_run_is_loaded_piece_by_piece_as_it_comes(tmp_path, monkeypatch, host, deferred):
    rig = in_windows_of_two(tmp_path, monkeypatch)
    before = rig.engine.get_stats()
    assert rig.load(range(25), promote_timeout_ms=SECONDS, deferred=deferred) == 20
    assert rig.engine.get_stats().blocks_loaded - before.blocks_loaded == 20
    rig.wait_for(rig.is_at_rest)
    assert rig.load(range(25), promote_timeout_ms=SECONDS) == 20, "in one piece"
    rig.close()


def test_the_last_piece_speaks_for_all(tmp_path, monkeypatch, host):
    rig = in_windows_of_two(tmp_path, monkeypatch)
    memory = [np.zeros(20_000, np.uint8) for _ in range(20)]
    monkeypatch.setattr(Prefetch, "wait_for_more", lambda self, first: (self.wait(), (first + 2, first + 2 >= 20))[1])
    host.hold()
    job = rig.engine.load_blocks(keys_of(range(20)), data_ptrs=memory, promote_timeout_ms=SECONDS)
    assert job.num_blocks == 20 and not job.done() and rig.engine.get_stats().jobs_in_flight >= 2
    with pytest.raises(TimeoutError):
        job.wait(10)
    host.release()
    job.wait(SECONDS)
    assert job.done() and rig.engine.get_stats().jobs_in_flight == 0
    assert all(target.tobytes() == block(i) for i, target in enumerate(memory))
    rig.close()


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_piece_that_fails_fails_the_call(tmp_path, monkeypatch, host, nth):
    rig = in_windows_of_two(tmp_path, monkeypatch)
    monkeypatch.setattr(Prefetch, "wait_for_more", lambda self, first: (self.wait(), (first + 2, first + 2 >= 20))[1])
    host.fail_call(nth, 1, field="event_record")
    memory = [np.zeros(20_000, np.uint8) for _ in range(20)]
    with pytest.raises(DriverError):
        rig.engine.load_blocks(keys_of(range(20)), data_ptrs=memory, promote_timeout_ms=SECONDS).wait(SECONDS)
    assert rig.engine.get_stats().jobs_in_flight == 0, "nothing is written into the targets any more"
    rig.wait_for(rig.is_at_rest)
    assert rig.load(range(20), promote_timeout_ms=SECONDS) == 20
    rig.close()


def test_a_target_named_twice_is_refused_before_anything_is_read(tmp_path):
    rig = EngineRig(tmp_path / "disk")
    memory = np.zeros((8, 5000), np.float32)
    rig.engine.add_layout(KVLayout.from_tensors([memory]))
    with pytest.raises(ValueError, match="names a target twice"):
        rig.engine.load_blocks(keys_of([1, 2]), [3, 3], promote_timeout_ms=SECONDS)
    with pytest.raises(ValueError, match="promote_timeout_ms|timeout_ms must be"):
        rig.engine.load_blocks(keys_of([1, 2]), [3, 4], promote_timeout_ms=-1)
    rig.close()


def test_a_run_that_would_come_later_than_it_is_computed_is_left(tmp_path):
    rig = EngineRig(tmp_path / "disk", engine_prefill_tokens_per_s=1 << 40, engine_block_tokens=1)
    rig.put_away(range(8))
    rig.fetch(range(4)).close()  # nothing is known of the disk before
    assert rig.fetch(range(8)).num_blocks == 4
    assert rig.stats().misses == {"SLOWER_THAN_COMPUTING": 4}
    rig.close()


def test_a_forked_child_leaves_all_of_it_to_its_parent(tmp_path):
    """Even where a thread of the parent held the locks."""
    rig = EngineRig(tmp_path / "disk")
    rig.put_away(range(4))
    prefetch = rig.fetch(range(4))
    with rig.engine.tiering._waking:
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(60)
                prefetch.close()
                rig.engine.tiering.wake()
                rig.engine.tiering.close(1000)
                with pytest.raises(EngineClosed):
                    rig.prefetch(range(4))
                del prefetch
                gc.collect()
                os._exit(7)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert rig.load(range(4), prefetched=prefetch) == 4
    rig.close()


def test_what_the_tier_forgets_before_ram_has_a_slot_is_not_shown(rig):
    rig.put_away(range(4))
    before, happened = rig.index, []

    class Index:
        def __getattr__(self, name):
            return getattr(before, name)

        def reserve(self, *args, **settings):
            if not happened:
                happened.append(rig.tier.catalogue.discard(keys_of([2])))  # and erases it when it has been read
            return before.reserve(*args, **settings)

    rig.promoter.index = Index()
    prefetch = rig.fetch(range(4))
    assert prefetch.num_blocks == 2 and happened == [1] and rig.in_ram(range(4)) == [0, 1, 3]


def test_windows_that_are_over_together_were_read_together(tmp_path, monkeypatch):
    rig = in_windows_of_two(tmp_path, monkeypatch)
    measured = []
    rig.promoter.break_even.measured = lambda nbytes, seconds, now_s: measured.append((nbytes, seconds))
    rig.store.hold("get")
    prefetch = rig.prefetch(range(8))
    rig.wait_for(lambda: len(rig.store.calls) and rig.promoter.num_ahead == 8)
    time.sleep(0.05)
    rig.store.let_go()
    prefetch.wait()
    assert sum(nbytes for nbytes, _ in measured) == 8 * rig.engine.pool.stride_bytes
    assert measured[0][1] >= 0.05 and all(nbytes / seconds < 1e12 for nbytes, seconds in measured)


def test_clear_in_the_middle_of_a_load_ends_it(tmp_path, monkeypatch):
    """Blocks of old and of new weights never come together."""
    rig = in_windows_of_two(tmp_path, monkeypatch)
    calls = []

    def and_clear(self, num_blocks):
        self.wait()
        calls.append(num_blocks)
        if len(calls) == 2:
            rig.engine.clear()
            rig.save(range(20), generation=1)
        return 2 * len(calls), len(calls) == 10

    monkeypatch.setattr(Prefetch, "wait_for_more", and_clear)
    memory = [np.zeros(20_000, np.uint8) for _ in range(20)]
    job = rig.engine.load_blocks(keys_of(range(20)), data_ptrs=memory, promote_timeout_ms=SECONDS)
    job.wait(SECONDS)
    assert [target.tobytes() for target in memory] == [block(0), block(1)] + 18 * [bytes(20_000)]
    assert job.num_blocks == 2
    rig.close()


def test_wait_on_tells_of_a_piece_that_failed_on_the_way(tmp_path, monkeypatch, host):
    rig = in_windows_of_two(tmp_path, monkeypatch)
    monkeypatch.setattr(Prefetch, "wait_for_more", lambda self, first: (self.wait(), (first, first >= 20))[1])
    memory = [np.zeros(20_000, np.uint8) for _ in range(20)]
    host.fail_call(3, 1, field="event_record")
    stream = Stream.create(rig.engine.device)
    with pytest.raises(DriverError):
        job = rig.engine.load_blocks(
            keys_of(range(20)), data_ptrs=memory, promote_timeout_ms=SECONDS, deferred=True, stream=stream
        )
        job.wait_on(stream)
        job.num_blocks  # noqa: B018
    stream.close()
    rig.close()


def test_a_patient_joiner_waits_for_itself(rig):
    rig.put_away(range(4))
    first = held_get(rig, range(4), timeout_ms=30)
    second = rig.prefetch(range(4))
    first.wait(SECONDS)
    assert first.num_blocks == 0 and not second.done()
    rig.store.let_go()
    second.wait(SECONDS)
    assert second.num_blocks == 4


def test_a_load_that_pinned_nothing_leaves_the_prefetch(rig):
    rig.put_away(range(2))
    prefetch = rig.fetch(range(2))
    assert rig.load([77], prefetched=prefetch) == 0 and rig.pins_of(0) == 1
    prefetch.close()
    with pytest.raises(TypeError, match="prefetched must be a Prefetch"):
        rig.load([1], prefetched=4)


def test_a_load_that_is_faster_than_the_prefetch_leaves_nothing_pinned(rig):
    rig.save(range(4))
    for _ in range(200):
        assert rig.load(range(4), prefetched=rig.prefetch(range(4))) == 4
    rig.wait_for(rig.is_at_rest)
    assert not rig.engine.tiering.has_failed


def test_what_was_loaded_makes_room_for_the_next_run_at_once(rig):
    rig.put_away(range(16))
    for _ in range(20):
        for first in (0, 8):
            assert rig.load(range(first, first + 8), promote_timeout_ms=SECONDS) == 8
        for first in (0, 8):
            assert rig.load(range(first, first + 8), prefetched=rig.fetch(range(first, first + 8))) == 8


def test_a_long_run_comes_through_a_short_queue(tmp_path):
    rig = EngineRig(tmp_path / "disk", pool_blocks=64, queue_blocks=4)
    rig.put_away(range(20), batch=2)
    assert rig.fetch(range(20)).num_blocks == 20
    rig.close()


def test_a_disk_that_hangs_is_suspended_though_readers_leave_early(rig, monkeypatch):
    monkeypatch.setattr("kvortex.tiers.promoter.LATE_S", 0.05)
    rig.engine.tiering._breaker._pause_s = 60
    rig.put_away(range(4))
    rig.store.hold("get")
    for i in range(3):
        rig.fetch([i], timeout_ms=5)
    rig.wait_for(lambda: rig.stats().suspensions == 1)
    assert rig.engine.check_blocks(keys_of([3])).leading_anywhere == 0
    rig.store.let_go()


def test_a_signal_handler_may_shut_the_engine_down_while_it_is_asked(tmp_path):
    """It runs between any two steps of a call, with whatever that call holds."""
    rig = EngineRig(tmp_path / "disk", engine_shutdown_timeout_ms=1000)
    rig.put_away(range(4))
    signal.signal(signal.SIGALRM, lambda *_: rig.engine.shutdown())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(EngineClosed):
            while True:
                rig.engine.prefetch(keys_of(range(4)), 1000, 1000).close()
                rig.engine.discard_blocks(keys_of([9]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    rig.store.let_go()
