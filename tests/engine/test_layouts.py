"""An engine with several layouts: whose keys are whose, which memory may be where, and how layouts come and go."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from kvcache import DeviceCache, content, keys_of, leaves_its_engine_behind, make_engine

import kvortex
from kvortex import KVLayout

KEYS = [1, 2, 3]
SIZES = {"num_layers": 4, "num_blocks": 32, "block_size": 16, "num_heads": 1, "head_dim": 8, "itemsize": 2}


class Cache(DeviceCache):
    """A cache whose layout has a name."""

    def __init__(self, device, shape="one_allocation", name="", **settings):
        super().__init__(device, shape, **settings)
        if name:
            self.layout = KVLayout(self.layout.runs, self.num_blocks, name=name)


class Bench:
    """An engine over a first cache, and more caches."""

    def __init__(self, device, stream, num_slots=16, **settings):
        self.device, self.stream = device, stream
        self.caches = [Cache(device)]
        self.engine = make_engine(self.caches[0], num_slots, **settings)

    def add(self, *arguments, **settings):
        cache = Cache(self.device, *arguments, **settings)
        self.caches.append(cache)
        self.engine.add_layout(cache.layout)
        return cache

    def save(self, cache, key_ids, blocks=None, layout=None, generation=0, **settings):
        blocks = list(range(len(key_ids))) if blocks is None else blocks
        for key_id, block in zip(key_ids, blocks, strict=True):
            cache.write(block, content(key_id, generation, cache.block_bytes))
        layout = cache.layout if layout is None else layout
        return self.engine.save_blocks(keys_of(key_ids), blocks, stream=self.stream, layout=layout, **settings)

    def load(self, cache, key_ids, blocks, layout=None, **settings):
        layout = cache.layout if layout is None else layout
        return self.engine.load_blocks(keys_of(key_ids), blocks, stream=self.stream, layout=layout, **settings)

    def leading(self, key_ids, layout=None):
        return self.engine.check_blocks(keys_of(key_ids), layout=layout).leading

    def close(self):
        self.engine.shutdown()
        for cache in self.caches:
            cache.close()


@pytest.fixture
def make_bench(device, stream):
    made = []

    def make(**settings):
        made.append(Bench(device, stream, **settings))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench):
    return make_bench()


def holds(cache, block, key_id, generation=0):
    return cache.read(block) == content(key_id, generation, cache.block_bytes)


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deferred", [False, True])
def test_what_was_saved_from_one_layout_is_loaded_into_another_of_its_fingerprint(bench, deferred):
    other = bench.add(num_blocks=11)
    assert other.layout.fingerprint == bench.caches[0].layout.fingerprint
    for source, target in (bench.caches, bench.caches[::-1]):
        bench.engine.clear()
        bench.save(source, KEYS, deferred=deferred).wait(20_000)
        job = bench.load(target, KEYS, [8, 9, 10], deferred=deferred)
        job.wait(20_000)
        assert job.num_blocks == 3 and all(holds(target, 8 + at, key) for at, key in enumerate(KEYS))


def test_layouts_of_one_fingerprint_may_lie_in_memory_as_they_like(make_bench, device, stream):
    """Shapes of `kvcache` that have the same pieces, here described by their runs alone."""
    bench = make_bench(num_slots=8)
    first = bench.add("uneven", num_blocks=9)
    plain = Cache(device)
    places = [(plain.buffers[buffer].address + start, stride, size) for buffer, start, stride, size in plain.places]
    plain.layout = KVLayout(places, plain.num_blocks)
    bench.caches.append(plain)
    bench.engine.add_layout(plain.layout)
    assert first.layout.fingerprint == plain.layout.fingerprint != bench.caches[0].layout.fingerprint
    bench.save(first, KEYS).wait(20_000)
    job = bench.load(plain, KEYS, [20, 21, 22])
    job.wait(20_000)
    assert job.num_blocks == 3 and all(holds(plain, 20 + at, key) for at, key in enumerate(KEYS))


def test_to_layouts_of_other_fingerprints_a_key_names_another_block(bench):
    draft, loner = bench.add("mla", name="draft"), bench.add(name="loner")
    caches = [bench.caches[0], draft, loner]
    assert loner.block_bytes == bench.caches[0].block_bytes
    for generation, cache in enumerate(caches):
        assert bench.leading(KEYS, cache.layout) == 0
        job = bench.load(cache, KEYS, [3, 4, 5])
        job.wait(20_000)
        assert job.num_blocks == 0
        job = bench.save(cache, KEYS, generation=generation)
        job.wait(20_000)
        assert job.num_blocks == 3
    for generation, cache in enumerate(caches):
        job = bench.load(cache, KEYS, [8, 9, 10])
        job.wait(20_000)
        assert job.num_blocks == 3 and all(holds(cache, 8 + at, key, generation) for at, key in enumerate(KEYS))


def test_discard_touch_and_check_mean_the_blocks_of_their_layout(bench):
    other = bench.add(name="other")
    for cache in (bench.caches[0], other):
        bench.save(cache, KEYS).wait(20_000)
    assert bench.engine.touch_blocks(keys_of(KEYS), layout=other.layout) == 3
    assert bench.engine.discard_blocks(keys_of(KEYS[:2]), layout=other.layout) == 2
    assert bench.engine.check_blocks(keys_of(KEYS), layout=other.layout).where.tolist() == [0, 0, 1]
    assert bench.leading(KEYS) == bench.leading(KEYS, bench.caches[0].layout) == 3
    assert bench.engine.discard_blocks(keys_of(KEYS)) == 3
    assert bench.engine.touch_blocks(keys_of(KEYS), layout=other.layout) == 1


def test_what_a_save_continues_is_looked_for_among_the_blocks_of_its_layout(make_bench):
    """Of eight slots the six coldest are the head of the prompt: its tail takes the two others, not its own head's."""
    bench = make_bench(num_slots=8)
    other = bench.add(name="other")
    head, tail = [1, 2, 3, 4, 5, 6], [7, 8, 9]
    bench.save(other, head).wait(20_000)
    bench.save(bench.caches[0], [20, 21]).wait(20_000)
    job = bench.save(other, tail, [10, 11, 12], after=keys_of(head))
    job.wait(20_000)
    assert job.num_blocks == 2
    assert bench.leading([*head, *tail], other.layout) == 8 and bench.leading([20]) == bench.leading([21]) == 0


def test_keys_of_the_callers_memory_are_read_once_and_left_alone(bench):
    other, keys = bench.add(name="other"), keys_of(KEYS)
    before = keys.copy()
    bench.engine.save_blocks(keys, [0, 1, 2], stream=bench.stream, layout=other.layout, after=keys_of([9]))
    bench.engine.load_blocks(keys, [0, 1, 2], stream=bench.stream, layout=other.layout)
    bench.engine.check_blocks(keys, layout=other.layout)
    assert np.array_equal(keys, before)


def test_a_call_that_names_no_layout_means_the_first_one(bench):
    first, other = bench.caches[0], bench.add(name="other")
    assert bench.engine.layouts == (first.layout, other.layout) and bench.engine.layout is first.layout
    bench.save(first, KEYS).wait(20_000)
    job = bench.engine.load_blocks(keys_of(KEYS), [8, 9, 10], stream=bench.stream)
    job.wait(20_000)
    assert job.num_blocks == 3 and holds(first, 9, 2)
    bench.engine.remove_layout(first.layout)
    assert bench.engine.layout is other.layout and bench.leading(KEYS) == 0
    bench.engine.save_blocks(keys_of(KEYS), [0, 1, 2], stream=bench.stream).wait(20_000)
    assert bench.leading(KEYS, other.layout) == 3
    moved = bench.add()  # of the fingerprint that the first layout had
    bench.load(moved, KEYS, [8, 9, 10]).wait(20_000)
    assert holds(moved, 9, 2)


def test_an_engine_of_raw_memory_may_be_given_layouts(device, stream):
    cache = Cache(device)
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, block_bytes=cache.block_bytes, device=device.name)
    with kvortex.KVortexEngine.create(config) as engine, kvortex.DeviceBuffer(64, device) as memory:

        def save_raw(key_id):
            return engine.save_blocks(keys_of([key_id]), data_ptrs=[memory.address], sizes=64, stream=stream)

        with pytest.raises(ValueError, match="no layout"):
            engine.save_blocks(keys_of([1]), [0], stream=stream)
        save_raw(1).wait(20_000)
        for _ in range(2):
            engine.add_layout(cache.layout)
            assert engine.layout is cache.layout
            cache.write(3, content(2, 0, cache.block_bytes))
            engine.save_blocks(keys_of([2]), [3], stream=stream).wait(20_000)
            engine.load_blocks(keys_of([2]), [5], stream=stream).wait(20_000)
            assert holds(cache, 5, 2)
            engine.remove_layout(cache.layout)
            assert engine.layout is None and engine.layouts == ()
        assert save_raw(3).num_blocks == 1
    cache.close()


def test_an_engine_without_layouts_says_so(bench):
    bench.save(bench.caches[0], KEYS).wait(20_000)
    bench.engine.remove_layout(bench.caches[0].layout)
    assert bench.leading(KEYS) == 3 and bench.engine.queues == ()
    with pytest.raises(ValueError, match="call add_layout"):
        bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream)
    assert bench.engine.get_stats().planner == ()
    bench.engine.add_layout(bench.caches[0].layout)
    job = bench.engine.load_blocks(keys_of(KEYS), [8, 9, 10], stream=bench.stream)
    job.wait(20_000)
    assert job.num_blocks == 3 and holds(bench.caches[0], 10, 3)


# ---- what is refused ------------------------------------------------------------------------------------------------


VERBS = {
    "save": lambda engine, stream, layout: engine.save_blocks(keys_of([1]), [0], stream=stream, layout=layout),
    "load": lambda engine, stream, layout: engine.load_blocks(keys_of([1]), [0], stream=stream, layout=layout),
    "check": lambda engine, stream, layout: engine.check_blocks(keys_of([1]), layout=layout),
    "touch": lambda engine, stream, layout: engine.touch_blocks(keys_of([1]), layout=layout),
    "discard": lambda engine, stream, layout: engine.discard_blocks(keys_of([1]), layout=layout),
    "remove": lambda engine, stream, layout: engine.remove_layout(layout),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_layout_that_the_engine_does_not_have_is_refused(bench, verb):
    foreign, gone = Cache(bench.device), bench.add()
    bench.caches.append(foreign)
    bench.engine.remove_layout(gone.layout)
    for layout in (foreign.layout, gone.layout, foreign.layout.part([0])):
        with pytest.raises(ValueError, match="none of this engine's 1 layouts; call add_layout"):
            VERBS[verb](bench.engine, bench.stream, layout)
    for nonsense in ("layout", 3, foreign):
        with pytest.raises(TypeError, match="layout must be a KVLayout"):
            VERBS[verb](bench.engine, bench.stream, nonsense)
    stats = bench.engine.get_stats()
    assert stats.pool_blocks_used == stats.jobs_in_flight == 0


@pytest.mark.parametrize("name", ["add_layout", "remove_layout"])
def test_layouts_neither_come_nor_go_after_shutdown_or_before_creation(bench, name):
    layout = bench.caches[0].layout
    bench.engine.shutdown()
    for engine in (bench.engine, kvortex.KVortexEngine.__new__(kvortex.KVortexEngine)):
        with pytest.raises(kvortex.EngineClosed):
            getattr(engine, name)(layout)


def shifted(cache, nbytes, num_blocks=4, **settings):
    """A layout over the first layer of a cache, some bytes later."""
    base, stride, piece = cache.layout.runs[0]
    return KVLayout([(base + nbytes, stride, piece)], num_blocks, **settings)


def test_unfit_layouts_are_refused_before_anything_is_changed(bench):
    first = bench.caches[0]
    large = Cache(bench.device, num_layers=8)
    bench.caches.append(large)
    unfit = {
        "added already": first.layout,
        "is a part": first.layout.part([0, 1]),
        f"take {large.block_bytes} bytes, .* hold \\d+; create it with block_bytes={large.block_bytes}": large.layout,
        "share bytes.*remove_layout": shifted(first, 256 * 31),
        "share bytes, ": KVLayout([(first.layout.runs[-1][0] + 31 * 256 + 255, 64, 1)], 1),
        "block 0 of the layout .* and block 2 of KVLayout": shifted(first, 256 * 2, num_blocks=1),
    }
    before = bench.engine.layouts, bench.engine.queues
    for match, layout in unfit.items():
        for _ in range(2):
            with pytest.raises(ValueError, match=match):
                bench.engine.add_layout(layout)
    with pytest.raises(kvortex.ConfigError):
        bench.engine.add_layout(large.layout)
    assert (bench.engine.layouts, bench.engine.queues) == before
    bench.save(first, KEYS).wait(20_000)
    bench.engine.add_layout(Cache(bench.device, num_layers=2).layout)  # smaller blocks fit


def test_layouts_that_only_interleave_may_be_there_together(device, stream):
    with kvortex.DeviceBuffer(64 * 1024, device) as memory:
        halves = [KVLayout([(memory.address + at, 1024, 512)], 64, name=str(at)) for at in (0, 512)]
        config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, device=device.name)
        with kvortex.KVortexEngine.create(config, layout=halves[0]) as engine:
            engine.add_layout(halves[1])
            for number, layout in enumerate(halves):
                memory.fill(number + 1)
                engine.save_blocks(keys_of([1]), [5], stream=stream, layout=layout).wait(20_000)
            memory.fill(9)
            for layout in halves:
                engine.load_blocks(keys_of([1]), [5], stream=stream, layout=layout).wait(20_000)
            data = np.zeros(64 * 1024, np.uint8)
            memory.copy_to(data)
    assert (data[5 * 1024 : 6 * 1024].reshape(2, 512) == [[1], [2]]).all() and (data[: 5 * 1024] == 9).all()


def test_more_layouts_than_threads_can_serve_are_refused(make_bench):
    bench = make_bench(num_transfer_streams=32, max_jobs=1)
    for _ in range(7):
        bench.add(num_blocks=4)
    extra = Cache(bench.device, num_blocks=4)
    bench.caches.append(extra)
    with pytest.raises(ValueError, match="at most 256 queues, got 256 and 32 more"):
        bench.engine.add_layout(extra.layout)
    bench.engine.remove_layout(bench.caches[3].layout)
    bench.engine.add_layout(extra.layout)
    bench.save(extra, KEYS).wait(20_000)


@pytest.mark.host
@pytest.mark.parametrize("shape", ["one_allocation", "gathered"])
def test_an_adding_in_which_a_driver_call_fails_leaves_nothing_behind(make_bench, host, shape):
    bench = make_bench(max_jobs=2, num_transfer_streams=2, gather_ctas=4)
    bench.save(bench.caches[0], KEYS, deferred=True).wait(20_000)
    cache = Cache(bench.device, shape)
    bench.caches.append(cache)
    before, refused = (host.live_objects(), bench.engine.queues), 0
    for n in range(1, 400):
        host.fail_call(n, 2)
        try:
            bench.engine.add_layout(cache.layout)
        except (kvortex.DriverError, MemoryError):
            refused += 1
            assert cache.layout not in bench.engine.layouts
        else:
            bench.engine.remove_layout(cache.layout)
        struck = not host.fail_pending()
        host.fail_call(0, 0)
        assert (host.live_objects(), bench.engine.queues) == before, f"call {n} left something behind"
        if not struck:
            break
    assert refused > 10 and not struck
    bench.engine.add_layout(cache.layout)
    bench.save(cache, KEYS, deferred=True).wait(20_000)


# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_jobs_on_one_block_of_a_further_layout_wait_for_each_other(make_bench, host):
    bench = make_bench(num_transfer_streams=4)
    cache = bench.add(name="other")
    bench.save(cache, [1]).wait(20_000)
    host.set_delay_us(500, 1500)
    for round_ in range(8):
        bench.load(cache, [1], [4])
        job = bench.engine.save_blocks(keys_of([100 + round_]), [4], stream=bench.stream, layout=cache.layout)
        job.wait_on(bench.stream)
        cache.scribble(4, 0x77, bench.stream)
    host.set_delay_us(0, 0)
    job.wait(20_000)
    bench.stream.synchronize()
    while bench.engine.get_stats().jobs_in_flight:
        time.sleep(0)
    for round_ in range(8):
        job = bench.load(cache, [100 + round_], [6])
        job.wait(20_000)
        assert job.num_blocks == 1 and holds(cache, 6, 1), "a save did not wait for the load before it"
        bench.engine.discard_blocks(keys_of([100 + round_]), layout=cache.layout)


# ---- parts ----------------------------------------------------------------------------------------------------------


def halves_of(cache):
    runs = len(cache.layout.runs)
    return cache.layout.part(range(runs // 2)), cache.layout.part(range(runs // 2, runs))


@pytest.mark.parametrize("shape", ["one_allocation", "separate_allocations", "uneven", "gathered"])
@pytest.mark.parametrize("deferred", [False, True])
def test_parts_are_saved_and_loaded_alone(make_bench, shape, deferred):
    bench = make_bench(gather_ctas=4 if shape == "gathered" else 0)
    cache = bench.add(shape)
    head, tail = halves_of(cache)
    size = head.block_bytes
    bench.save(cache, KEYS).wait(20_000)
    for part in (head, tail):
        job = bench.engine.save_blocks(keys_of(KEYS), [0, 1, 2], stream=bench.stream, layout=part, deferred=deferred)
        job.wait(20_000)
        assert job.num_blocks == 3
    cache.fill(0xEE)
    job = bench.load(cache, KEYS, [8, 9, 10], layout=tail, deferred=deferred)
    job.wait(20_000)
    assert job.num_blocks == 3
    for at, key in enumerate(KEYS):
        assert cache.read(8 + at) == b"\xee" * size + content(key, 0, cache.block_bytes)[size:]
    bench.load(cache, KEYS, [8, 9, 10], layout=head, deferred=deferred).wait(20_000)
    assert all(holds(cache, 8 + at, key) for at, key in enumerate(KEYS))
    stats = bench.engine.get_stats()
    assert stats.bytes_saved == 3 * 2 * cache.block_bytes


def test_parts_have_keys_of_their_own_and_no_block_of_a_part_is_taken_for_another(bench):
    first = bench.caches[0]
    parts = [*halves_of(first), first.layout.part([0])]
    for number, layout in enumerate((first.layout, *parts)):
        assert bench.leading([1], layout) == 0
        bench.save(first, [1], layout=layout, generation=number).wait(20_000)
    for layout in (None, *parts):
        assert bench.leading([1], layout) == 1
    assert bench.leading([1], first.layout.part([1])) == 0


def test_a_part_may_share_keys_with_a_layout_that_holds_the_same(bench):
    first = bench.caches[0]
    alone = bench.add(num_layers=2, num_blocks=8)
    part = first.layout.part([0, 1, 2, 3], fingerprint=alone.layout.fingerprint)
    assert part.block_bytes == alone.block_bytes
    bench.save(alone, [1]).wait(20_000)
    job = bench.load(first, [1], [5], layout=part)
    job.wait(20_000)
    assert job.num_blocks == 1 and first.read(5)[: alone.block_bytes] == content(1, 0, alone.block_bytes)


def test_a_load_that_names_a_block_of_a_part_twice_is_refused(bench):
    head, _ = halves_of(bench.caches[0])
    bench.save(bench.caches[0], [1, 2], layout=head).wait(20_000)
    with pytest.raises(ValueError, match="twice"):
        bench.load(bench.caches[0], [1, 2], [4, 4], layout=head)


@pytest.mark.host
def test_jobs_on_a_part_and_on_the_whole_of_one_block_wait_for_each_other(make_bench, host):
    """A long load of whole blocks is on its way when a part of the last of them is saved, and the other way round."""
    bench = make_bench(num_slots=40, num_transfer_streams=4)
    cache = bench.caches[0]
    head, tail = halves_of(cache)
    size = head.block_bytes
    for key in range(1, 13):
        bench.save(cache, [key]).wait(20_000)
        bench.engine.save_blocks(keys_of([key]), [0], stream=bench.stream, layout=tail).wait(20_000)
    for whole, part in ((cache.layout, tail), (tail, cache.layout)):
        for round_ in range(2):
            cache.fill(0xEE)
            host.set_delay_us(500, 500)
            load = bench.load(cache, range(1, 13), range(10, 22), layout=whole)
            save = bench.engine.save_blocks(keys_of([200 + round_]), [21], stream=bench.stream, layout=part)
            assert save.num_blocks == 1
            save.wait(20_000)
            host.set_delay_us(0, 0)
            load.wait(20_000)
            cache.fill(0x11)
            job = bench.load(cache, [200 + round_], [30], layout=part)
            job.wait(20_000)
            assert cache.read(30)[size:] == content(12, 0, cache.block_bytes)[size:], "the save did not wait"
            bench.engine.discard_blocks(keys_of([200 + round_]), layout=part)


@pytest.mark.host
def test_a_part_lives_until_its_deferred_job_is_over(bench, host):
    first = bench.caches[0]
    bench.save(first, [1]).wait(20_000)
    host.hold()
    bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream, layout=first.layout.part([1, 3]), deferred=True)
    blocks = [first.layout.part([number]) for number in range(8)]  # takes what memory was let go
    del blocks
    host.release()
    deadline = time.monotonic() + 20
    while bench.engine.get_stats().jobs_in_flight and time.monotonic() < deadline:
        time.sleep(0.001)
    part = first.layout.part([1, 3])
    bench.load(first, [1], [7], layout=part).wait(20_000)
    piece = part.block_bytes // 2
    for number in (1, 3):
        span = slice(number * piece, (number + 1) * piece)
        assert first.read(7)[span] == content(1, 0, first.block_bytes)[span]


def test_a_transfer_queue_takes_a_part(device, stream):
    cache = Cache(device)
    head, tail = halves_of(cache)
    cache.write(3, content(1, 0, cache.block_bytes))
    with (
        kvortex.PinnedPool(4 * 8192, 8192, device) as pool,
        kvortex.TransferQueue(device, "D2H") as saves,
        kvortex.TransferQueue(device, "H2D") as loads,
    ):
        saves.submit(tail, [3], pool, [1], stream=stream).wait(20_000)
        assert (
            bytes(memoryview(pool.slot(1))[: tail.block_bytes]) == content(1, 0, cache.block_bytes)[head.block_bytes :]
        )
        loads.submit(tail, [5], pool, [1], stream=stream).wait(20_000)
    assert cache.read(5) == b"\xee" * head.block_bytes + content(1, 0, cache.block_bytes)[head.block_bytes :]
    cache.close()


@pytest.mark.host  # a GPU's copies have other limits
def test_a_part_moves_by_strided_copies_where_its_layout_does(bench):
    from kvortex.transfer._layout import plan_copies

    cache = bench.caches[0]
    parts = [cache.layout.part(range(8)), cache.layout.part(range(0, 8, 2)), cache.layout.part([0, 1])]
    copies = [plan_copies(part, [3], [1], bench.engine.pool) for part in parts]
    assert bench.engine.get_stats().strided
    assert [[copy["rows"] for copy in plan] for plan in copies] == [[4, 4], [4], [1, 1]]


# ---- the end of a layout --------------------------------------------------------------------------------------------


@pytest.mark.host
def test_removing_a_layout_waits_for_its_jobs_and_for_no_others(bench, host):
    other = bench.add(name="other")
    bench.save(other, KEYS).wait(20_000)
    host.hold()
    held = bench.load(bench.caches[0], [], [])  # done from the start
    job = bench.load(other, KEYS, [8, 9, 10])
    done = threading.Event()
    thread = threading.Thread(target=lambda: (bench.engine.remove_layout(other.layout), done.set()))
    thread.start()
    while other.layout in bench.engine.layouts:
        time.sleep(0)
    with pytest.raises(ValueError, match="none of this engine's 1 layouts"):
        bench.load(other, KEYS, [8, 9, 10])
    with pytest.raises(ValueError, match="is being removed"):
        bench.engine.add_layout(other.layout)
    assert not done.wait(0.02) and held.done()
    host.release()
    thread.join(20)
    assert done.is_set() and job.done() and job.num_blocks == 3 and holds(other, 8, 1)
    assert len(bench.engine.queues) == 3


@pytest.mark.host
@pytest.mark.parametrize("deferred", [False, True])
def test_removing_a_layout_gives_up_when_its_time_is_over_and_may_be_asked_again(bench, host, deferred):
    other = bench.add(name="other")
    bench.save(other, KEYS).wait(20_000)
    host.hold()
    job = bench.load(other, KEYS, [8, 9, 10], deferred=deferred)
    with pytest.raises(TimeoutError, match="not done after 5 ms"):
        bench.engine.remove_layout(other.layout, timeout_ms=5)
    assert bench.engine.get_stats().jobs_in_flight == 1 and not job.done()
    with pytest.raises(ValueError, match="none of this engine's"):
        bench.load(other, KEYS, [8, 9, 10])
    host.release()
    bench.engine.remove_layout(other.layout, timeout_ms=20_000)
    assert job.done() and holds(other, 10, 3)
    bench.engine.add_layout(other.layout)
    bench.load(other, KEYS, [11, 12, 13]).wait(20_000)
    assert holds(other, 13, 3)


@pytest.mark.host
@pytest.mark.parametrize(("call", "deferred"), [("event_query", False), ("memcpy_2d_async", True)])
def test_removing_a_layout_gives_up_where_the_driver_does_not_come_back(bench, host, call, deferred):
    """The call is about another layout, but the thread inside it looks at both."""
    first, other = bench.caches[0], bench.add(name="other")
    bench.save(first, KEYS).wait(20_000)
    bench.save(other, KEYS, deferred=True).wait(20_000)
    host.hold()
    host.stop_calls(call)
    job = bench.load(first, KEYS, [8, 9, 10], deferred=deferred)
    while not host.stopped():
        time.sleep(0)
    for _ in range(2):
        with pytest.raises(TimeoutError, match="calls of the driver are not done after 5 ms"):
            bench.engine.remove_layout(other.layout, timeout_ms=5)
    host.stop_calls()
    host.release()
    bench.engine.remove_layout(other.layout, timeout_ms=20_000)
    job.wait(20_000)
    assert len(bench.engine.queues) == 3 and holds(first, 9, 2)
    bench.engine.add_layout(other.layout)
    assert bench.load(other, KEYS, [8, 9, 10], deferred=deferred).num_blocks == 3


@pytest.mark.host
def test_while_a_layout_is_being_removed_calls_that_name_none_mean_another_of_its_kind(bench, host):
    first, moved = bench.caches[0], bench.add()
    bench.save(first, KEYS).wait(20_000)
    host.hold()
    bench.load(first, KEYS, [4, 5, 6])
    thread = threading.Thread(target=bench.engine.remove_layout, args=(first.layout,))
    thread.start()
    while first.layout in bench.engine.layouts:
        time.sleep(0)
    try:
        job = bench.engine.load_blocks(keys_of(KEYS), [7, 8, 9], stream=bench.stream)
        assert thread.is_alive() and job.num_blocks == len(KEYS)
    finally:
        host.release()
        thread.join(20)
    job.wait(20_000)
    assert [moved.read(block) for block in (7, 8, 9)] == [content(key, 0, moved.block_bytes) for key in KEYS]


@pytest.mark.host
def test_ctrl_c_ends_the_wait_for_a_layout_and_another_call_does_the_rest(bench, host):
    other = bench.add(name="other")
    bench.save(other, KEYS).wait(20_000)
    host.hold()
    job = bench.load(other, KEYS, [4, 5, 6])

    def interrupt():
        while other.layout in bench.engine.layouts:
            time.sleep(0)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        bench.engine.remove_layout(other.layout)
    thread.join()
    assert not job.done()
    host.release()
    bench.engine.remove_layout(other.layout)
    assert job.done() and len(bench.engine.queues) == 3


@pytest.mark.host
@leaves_its_engine_behind
def test_shutdown_ends_the_wait_for_a_layout(make_bench, host):
    bench = make_bench(shutdown_timeout_ms=20)
    other = bench.add(name="other")
    bench.save(other, KEYS).wait(20_000)
    host.hold()
    bench.load(other, KEYS, [4, 5, 6])
    errors = []

    def remove():
        try:
            bench.engine.remove_layout(other.layout)
        except kvortex.EngineClosed as error:
            errors.append(error)

    thread = threading.Thread(target=remove)
    thread.start()
    while other.layout in bench.engine.layouts:
        time.sleep(0)
    bench.engine.shutdown()
    thread.join(20)
    host.release()
    assert len(errors) == 1


@pytest.mark.host
def test_shutdown_closes_the_queues_of_all_layouts(device, stream, host):
    before = host.live_objects()
    for _ in range(2):
        bench = Bench(device, stream)
        bench.add(name="other")
        bench.save(bench.caches[1], KEYS, deferred=True)
        bench.close()
        del bench
        assert host.live_objects() == before


def test_layouts_come_and_go_while_others_are_at_work(bench):
    """Threads that save and load over the first layout, one deferred, while one adds, uses and removes others."""
    bench.save(bench.caches[0], KEYS).wait(20_000)
    failures, stop = [], threading.Event()

    def work(block, deferred):
        try:
            with kvortex.Stream.create(bench.device) as stream:
                while not stop.is_set():
                    job = bench.engine.load_blocks(keys_of([2]), [block], stream=stream, deferred=deferred)
                    job.wait(20_000)
                    assert holds(bench.caches[0], block, 2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(20 + number, number == 1)) for number in range(2)]
    for thread in threads:
        thread.start()
    cache = Cache(bench.device, "uneven")
    bench.caches.append(cache)
    for round_ in range(30):
        bench.engine.add_layout(cache.layout)
        bench.save(cache, [50 + round_], [3], deferred=round_ % 2 == 0)
        bench.load(cache, [50 + round_ - 1], [4])
        bench.engine.remove_layout(cache.layout, 20_000)
        assert round_ == 0 or holds(cache, 4, 50 + round_ - 1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures and bench.engine.get_stats().jobs_failed == 0


# ---- the probe ------------------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize("shape", ["one_allocation", "uneven"])
def test_what_a_probe_found_is_not_tried_again_for_a_layout_of_that_shape(bench, host, shape):
    """A probe compares two blocks in pinned memory that it asks for."""
    asked = []
    for num_layers in (6, 6, 6, 5):
        cache = Cache(bench.device, shape, num_layers=num_layers, piece_bytes=128, name="any")
        bench.caches.append(cache)
        host.count_calls()
        bench.engine.add_layout(cache.layout)
        asked.append(host.num_calls("mem_host_alloc"))
        host.count_calls(False)
        bench.save(cache, KEYS).wait(20_000)
        bench.load(cache, KEYS, [5, 6, 7]).wait(20_000)
        assert holds(cache, 7, 3)
        bench.engine.clear()
    assert asked == [1, 0, 0, 1]


def test_moved_tensors_find_their_blocks_again(bench):
    """What a runtime does whose cache moves: the new place is added, the old one goes."""
    stats = bench.engine.get_stats()
    old = bench.caches[0]
    bench.save(old, KEYS).wait(20_000)
    for _ in range(3):
        new = bench.add()
        bench.engine.remove_layout(old.layout)
        bench.engine.load_blocks(keys_of(KEYS), [4, 5, 6], stream=bench.stream).wait(20_000)
        assert all(holds(new, 4 + at, key) for at, key in enumerate(KEYS))
        old = new
    assert bench.engine.get_stats().planner == stats.planner and bench.engine.get_stats().strided


def test_the_example_of_the_manual(device, stream):
    """Two models beside each other, and a cache that moves."""

    def cache(num_blocks):
        return kvortex.DeviceBuffer(2 * 2 * num_blocks * 16 * 1 * 8 * 2, device)

    with cache(32) as main, cache(8) as small, cache(64) as larger:
        sizes = {"num_layers": 2, "block_size": 16, "num_heads": 1, "head_dim": 8, "itemsize": 2}
        target = KVLayout.contiguous(main.address, num_blocks=32, **sizes)
        draft = KVLayout.contiguous(small.address, num_blocks=8, name="draft", **sizes)
        config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, device=device.name)
        keys = kvortex.block_keys(list(range(48)), block_size=16)
        with kvortex.KVortexEngine.create(config, layout=target) as engine:
            engine.add_layout(draft)
            engine.save_blocks(keys, [4, 5, 6], stream=stream).wait()
            assert engine.check_blocks(keys, layout=draft).leading == 0  # the draft's blocks have keys of their own
            engine.save_blocks(keys, [0, 1, 2], stream=stream, layout=draft).wait()

            moved = KVLayout.contiguous(larger.address, num_blocks=64, **sizes)  # the same fingerprint as `target`
            engine.add_layout(moved)
            engine.remove_layout(target)
            assert engine.load_blocks(keys, [60, 61, 62], stream=stream).num_blocks == 3

            first_layer = moved.part(moved.runs[:2])  # of the same blocks
            engine.save_blocks(keys, [60, 61, 62], stream=stream, layout=first_layer).wait()
