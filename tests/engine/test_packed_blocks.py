"""An engine with a codec: what comes back is what the slow reference makes of a block, and nothing else is served."""

import gc
import threading

import numpy as np
import pytest
from kvcache import DeviceCache, keys_of, leaves_its_engine_behind, make_engine, there_and_back

import kvortex
from kvortex import ConfigError, KVLayout, KVortexConfig, KVortexEngine
from kvortex.codec import CODECS, Plane

LOSSY = [codec for codec in CODECS if codec != "exact"]
TOKENS, HEADS, DIM, LAYERS, NUM_BLOCKS = 16, 2, 64, 3, 12
MIB = 1 << 20


def numbers(seed, *shape):
    """Bits of bfloat16 numbers of any magnitude below 2."""
    return np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16) & 0xBFFF


@pytest.fixture
def make(device):
    """Arrays that describe themselves, an engine over them, and what their blocks hold."""
    engines = []

    def build(shape, block_dim, roles, codec="q8", num_slots=16, num_layers=LAYERS, **settings):
        arrays = [numbers(layer, *shape) for layer in range(num_layers)]
        layout = KVLayout.from_tensors(arrays, block_dim, roles=roles)
        config = KVortexConfig(device=device.name, codec=codec, cpu_pool_size_bytes=num_slots * MIB, **settings)
        engine = KVortexEngine.create(config, layout=layout)
        engines.append(engine)
        return arrays, layout, engine

    yield build
    for engine in engines:
        engine.shutdown()


def block_of(arrays, block_dim, block):
    return b"".join(np.take(array, block, block_dim).tobytes() for array in arrays)


def save_and_load(arrays, engine, save=(1, 2, 3), load=(7, 8, 9)):
    """Save blocks, load them elsewhere; returns how many came."""
    keys = keys_of(save)
    engine.save_blocks(keys, np.array(save)).wait(20_000)
    job = engine.load_blocks(keys, np.array(load))
    job.wait(20_000)
    return job.num_blocks


SHAPES_AND_ROLES = {
    "k_alone": ((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, "k"),
    "k_before_v": ((2, NUM_BLOCKS, TOKENS, HEADS, DIM), 1, "kv"),
    "k_and_v_in_a_block": ((NUM_BLOCKS, 2, TOKENS, HEADS, DIM), 0, "kv"),
    "interleaved": ((NUM_BLOCKS, TOKENS, HEADS, 2 * DIM), 0, "interleaved"),
    "heads_of_96": ((NUM_BLOCKS, TOKENS, HEADS, 96), 0, "v"),
    "heads_of_256": ((NUM_BLOCKS, TOKENS, HEADS, 256), 0, "k"),
}


@pytest.mark.host
@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("shape, block_dim, roles", SHAPES_AND_ROLES.values(), ids=SHAPES_AND_ROLES)
def test_what_comes_back_is_what_the_reference_makes_of_it(make, shape, block_dim, roles, codec):
    arrays, layout, engine = make(shape, block_dim, roles, codec)
    before = [block_of(arrays, block_dim, block) for block in (1, 2, 3)]
    assert save_and_load(arrays, engine) == 3
    for data, block in zip(before, (7, 8, 9), strict=True):
        assert block_of(arrays, block_dim, block) == there_and_back(data, layout.planes, codec) != data


@pytest.mark.host
@pytest.mark.parametrize("by_role", [True, False])
def test_a_latent_is_packed_and_its_rope_part_stays_exact(device, by_role):
    latent, rope = 512, 64
    arrays = [numbers(layer, NUM_BLOCKS, TOKENS, latent + rope) for layer in range(LAYERS)]
    sizes = {"num_blocks": NUM_BLOCKS, "block_size": TOKENS, "latent_dim": latent + rope, "itemsize": 2}
    if by_role:
        layout = KVLayout.from_tensors(arrays, roles="latent")
    else:
        layout = KVLayout.mla(arrays, **sizes, dtype="bfloat16")
    config = KVortexConfig(device=device.name, codec="q8", cpu_pool_size_bytes=4 * MIB)
    with KVortexEngine.create(config, layout=layout) as engine:
        before = arrays[1][2].copy()
        assert save_and_load(arrays, engine, save=(2,), load=(5,)) == 1
        assert (arrays[1][5][:, latent:] == before[:, latent:]).all()
        assert (arrays[1][5][:, :latent] != before[:, :latent]).any()


@pytest.mark.host
def test_a_latent_that_is_all_rope_stays_exact():
    assert KVLayout.from_tensors([numbers(0, NUM_BLOCKS, TOKENS, 64)], roles="latent").planes == ()


@pytest.mark.host
def test_exact_layers_come_back_byte_by_byte(make):
    arrays, _, engine = make((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, "k", exact_layers=(0, -1))
    before = [array[1].copy() for array in arrays]
    assert save_and_load(arrays, engine, save=(1,), load=(7,)) == 1
    assert [bool((array[7] == was).all()) for array, was in zip(arrays, before, strict=True)] == [True, False, True]


@pytest.mark.host
def test_exact_layers_count_layers_where_k_and_v_are_tensors_of_their_own(make):
    arrays, _, engine = make((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, ["k", "v"] * 2, num_layers=4, exact_layers=(-1,))
    before = [array[1].copy() for array in arrays]
    assert save_and_load(arrays, engine, save=(1,), load=(7,)) == 1
    assert [bool((array[7] == was).all()) for array, was in zip(arrays, before, strict=True)] == [False] * 2 + [
        True
    ] * 2


@pytest.mark.host
@pytest.mark.parametrize("bits", [0x7F80, 0xFFC1, 0x7180])  # Inf, NaN, 2^100
def test_a_block_with_a_number_that_cannot_be_packed_is_not_kept_and_its_neighbours_are(make, caplog, bits):
    arrays, _, engine = make((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, "v")
    arrays[2][2, TOKENS - 1, 1, DIM - 1] = bits
    keys = keys_of((1, 2, 3))
    job = engine.save_blocks(keys, np.array([1, 2, 3]))
    job.wait(20_000)
    assert list(engine.check_blocks(keys).mask) == [True, False, True]
    stats = engine.get_stats()
    assert (stats.blocks_saved, stats.blocks_not_packed, stats.pool_blocks_used) == (2, 1, 2)
    assert len([record for record in caplog.records if "no codec can pack" in record.message]) == 1
    arrays[2][2, TOKENS - 1, 1, DIM - 1] = 0
    engine.save_blocks(keys, np.array([1, 2, 3])).wait(20_000)
    assert engine.check_blocks(keys).leading == 3


@pytest.mark.host
def test_the_codec_gives_a_pool_its_ratio_of_blocks(device):
    """The pool counts slots of packed blocks: 1.95 times as many and more with q8 where a block has 1 MiB."""
    num_layers, dim = 16, 128
    arrays = [np.zeros((2, 16, 8, 2 * dim), np.uint16) for _ in range(num_layers)]  # 64 KiB a block and layer
    layout = KVLayout.from_tensors(arrays, roles="interleaved")
    assert layout.block_bytes == MIB
    slots = {}
    for codec in CODECS:
        config = KVortexConfig(device=device.name, codec=codec, cpu_pool_size_bytes=128 * MIB)
        with KVortexEngine.create(config, layout=layout) as engine:
            slots[codec] = engine.pool.num_slots
    assert slots["exact"] == 128
    ratios = {codec: slots[codec] / 128 for codec in LOSSY}
    assert ratios["q8"] >= 1.95 and ratios["k8v5"] >= 2.35 and ratios["k6v4"] >= 3.0 and ratios["q4"] >= 3.7


@pytest.mark.host
def test_raw_memory_is_refused_where_blocks_are_packed(make):
    arrays, _, engine = make((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, "k")
    with pytest.raises(ValueError, match="packs blocks by the codec 'q8'"):
        engine.save_blocks(keys_of([1]), data_ptrs=[arrays[0]])
    assert engine.get_stats().pool_blocks_used == 0


def test_a_layout_of_which_nothing_can_be_packed_is_refused_by_name(device):
    array = np.zeros((4, TOKENS, DIM), np.uint16)
    config = KVortexConfig(device=device.name, codec="k6v4", cpu_pool_size_bytes=MIB)
    for layout in (
        KVLayout.from_tensors([array]),
        KVLayout.from_tensors([array.view(np.float16)], roles="k"),
        KVLayout.from_tensors([array.view(np.uint8)], roles="k"),
    ):
        with pytest.raises(ConfigError, match="codec 'k6v4' can pack nothing of KVLayout"):
            KVortexEngine.create(config, layout=layout)
    with pytest.raises(ConfigError, match="packs blocks of a layout, and there is none"):
        KVortexEngine.create(config)


def test_unfit_roles_and_planes_are_refused():
    array = np.zeros((4, 3, DIM), np.uint16)
    with pytest.raises(ValueError, match="a role must be one of k, v, kv"):
        KVLayout.from_tensors([array], roles="q")
    with pytest.raises(ValueError, match="got 2 for 1 tensors"):
        KVLayout.from_tensors([array], roles=["k", "v"])
    with pytest.raises(ValueError, match="as many rows of V as of K, got 3 rows"):
        KVLayout.from_tensors([array], roles="kv")
    plane = Plane("k", 0, 4, 2 * DIM, 2 * DIM)
    with pytest.raises(ValueError, match="does not lie in one of the layout's runs"):
        KVLayout([(1 << 20, 256, 256), (1 << 21, 256, 256)], 4, planes=[plane])


@pytest.mark.host
def test_layers_that_share_a_tensor_are_packed_once(device):
    array = numbers(5, NUM_BLOCKS, TOKENS, DIM)
    layout = KVLayout.from_tensors([array, array, array], roles="k")
    config = KVortexConfig(device=device.name, codec="q8", cpu_pool_size_bytes=MIB)
    with KVortexEngine.create(config, layout=layout) as engine:
        before = array[1].tobytes()
        assert save_and_load([array], engine, save=(1,), load=(4,)) == 1
        assert array[4].tobytes() == there_and_back(before, layout.planes)


@pytest.mark.host
def test_a_part_is_packed_by_itself(make):
    arrays, layout, engine = make((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, "k", "q4")
    part = layout.part([1])
    before = arrays[1][3].tobytes()
    engine.save_blocks(keys_of([1]), np.array([3]), layout=part).wait(20_000)
    assert not engine.check_blocks(keys_of([1])).mask[0]  # of the whole layout that is another block
    job = engine.load_blocks(keys_of([1]), np.array([8]), layout=part)
    job.wait(20_000)
    assert job.num_blocks == 1 and arrays[1][8].tobytes() == there_and_back(before, part.planes, "q4")


@pytest.mark.host
def test_layouts_whose_blocks_are_packed_differently_share_none(make):
    """The bytes on the device mean the same; in their slots, as many, they do not."""
    arrays, _, engine = make((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, ["k", "v", "v"], "k6v4", num_slots=8)
    others = [array.copy() for array in arrays]
    other = KVLayout.from_tensors(others, roles=["v", "k", "v"])
    engine.add_layout(other)
    engine.save_blocks(keys_of([1]), np.array([1])).wait(20_000)
    assert engine.check_blocks(keys_of([1])).leading == 1
    assert engine.check_blocks(keys_of([1]), layout=other).leading == 0


@pytest.mark.host
def test_statistics_tell_bytes_of_the_cache_and_bytes_of_slots(make):
    arrays, layout, engine = make((NUM_BLOCKS, TOKENS, HEADS, 128), 0, "k")
    assert save_and_load(arrays, engine) == 3
    stats = engine.get_stats()
    assert stats.bytes_saved == stats.bytes_loaded == 3 * layout.block_bytes
    assert 1.9 < stats.bytes_saved / stats.packed_bytes_saved < 2
    assert stats.packed_bytes_loaded == stats.packed_bytes_saved


@pytest.mark.host
@pytest.mark.parametrize("first, second", [("q8", "exact"), ("exact", "q8"), ("q8", "k8v5")])
def test_another_codec_never_hits_on_a_disk(device, tmp_path, first, second):
    array = numbers(3, NUM_BLOCKS, 2, TOKENS, HEADS, DIM)
    layout = KVLayout.from_tensors([array], roles="kv")
    found = {}
    for codec in (first, second, first):
        config = KVortexConfig(
            device=device.name,
            codec=codec,
            cpu_pool_size_bytes=MIB,
            namespace="model",
            weights="w",
            tiers=(kvortex.DiskTier(str(tmp_path), 64 * MIB),),
        )
        with KVortexEngine.create(config, layout=layout) as engine:
            job = engine.load_blocks(keys_of([1]), np.array([6]), promote_timeout_ms=5000)
            job.wait(20_000)
            found.setdefault(codec, []).append(job.num_blocks)
            engine.save_blocks(keys_of([1]), np.array([1])).wait(20_000)
            assert engine.flush(20_000) == 0
    assert found == {first: [0, 1], second: [0]}


@pytest.mark.host
@pytest.mark.parametrize("round_", range(6))
def test_a_packed_save_copies_what_the_callers_stream_wrote_before_and_not_after(device, stream, host, round_):
    cache = DeviceCache(device, "packed")
    engine = make_engine(cache, 8)
    host.set_delay_us(0, 1500, seed=round_)
    cache.scribble(3, 0x11, stream)
    job = engine.save_blocks(keys_of([7]), [3], stream=stream)
    job.wait_on(stream)
    cache.scribble(3, 0x22, stream)
    job.wait(20_000)
    engine.load_blocks(keys_of([7]), [9], stream=stream).wait(20_000)
    host.set_delay_us(0, 0)
    assert cache.read(9) == there_and_back(b"\x11" * cache.block_bytes, cache.layout.planes)
    engine.shutdown()
    cache.close()


@pytest.mark.host
def test_exact_layers_are_those_of_the_whole_layout_for_its_parts_too(make):
    arrays, layout, engine = make((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, "k", exact_layers=(-1,))
    before = [array[1].copy() for array in arrays]
    for number in range(LAYERS):
        part = layout.part([number])
        engine.save_blocks(keys_of([number]), np.array([1]), layout=part).wait(20_000)
        engine.load_blocks(keys_of([number]), np.array([5]), layout=part).wait(20_000)
    same = [bool((array[5] == was).all()) for array, was in zip(arrays, before, strict=True)]
    assert same == [False, False, True]


@pytest.mark.host
def test_a_lookup_for_a_part_that_is_named_for_the_first_time_asks_no_driver(make, host):
    _, layout, engine = make((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, "k")
    before = host.live_objects()
    host.fail_call(1, 999)
    assert engine.check_blocks(keys_of([1]), layout=layout.part([1])).leading == 0
    host.fail_call(0, 0)
    assert host.live_objects() == before
    engine.shutdown()
    with pytest.raises(kvortex.EngineClosed):
        engine.check_blocks(keys_of([1]), layout=layout.part([2]))


@pytest.mark.host
def test_parts_leave_no_table_behind(make, host):
    arrays, layout, engine = make((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, "k")
    before = host.live_objects()["device_allocations"]
    for number in range(20):
        part = layout.part([number % LAYERS])
        engine.save_blocks(keys_of([number]), np.array([1]), layout=part).wait(20_000)
        del part
    engine.check_blocks(keys_of([1]))  # lets go of what jobs used
    gc.collect()
    assert host.live_objects()["device_allocations"] == before


@pytest.mark.host
def test_two_threads_that_name_a_part_first_share_what_was_made_for_it(make, host):
    """One of two tables would be freed while a kernel reads it."""
    arrays, layout, engine = make((NUM_BLOCKS, TOKENS, HEADS, DIM), 0, "k", num_slots=64)
    for round_ in range(20):
        part, keys = layout.part([round_ % LAYERS]), keys_of([2 * round_, 2 * round_ + 1])
        source = arrays[round_ % LAYERS][1:3].copy()
        host.set_delay_us(0, 300, seed=round_)
        jobs = []

        def save(one, part=part, keys=keys, jobs=jobs):
            jobs.append(engine.save_blocks(keys[one : one + 1], np.array([1 + one]), layout=part))

        threads = [threading.Thread(target=save, args=(one,)) for one in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        host.set_delay_us(0, 0)
        for job in jobs:
            job.wait(20_000)
        job = engine.load_blocks(keys, np.array([5, 6]), layout=part)
        job.wait(20_000)
        assert job.num_blocks == 2
        expected = [there_and_back(block.tobytes(), part.planes) for block in source]
        assert [arrays[round_ % LAYERS][block].tobytes() for block in (5, 6)] == expected


@leaves_its_engine_behind
@pytest.mark.host
@pytest.mark.parametrize("codec", ["q8", "exact"])
def test_shutdown_keeps_its_limit_where_a_copy_does_not_come_back(device, stream, host, codec):
    """Giving the staging of another queue back would wait for it."""
    cache = DeviceCache(device, "packed" if codec == "q8" else "gathered")
    engine = make_engine(cache, 8, shutdown_timeout_ms=200)
    host.hold()
    engine.save_blocks(keys_of([7]), [3], stream=stream)
    thread = threading.Thread(target=engine.shutdown)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    host.release()


@pytest.mark.host
def test_a_layout_of_one_block_may_have_any_stride(device):
    array = numbers(1, 1, TOKENS, DIM)
    plane = Plane("k", 0, TOKENS, 2 * DIM, 2 * DIM)
    layout = KVLayout([(array.ctypes.data, 7, array.nbytes)], 1, planes=[plane])
    config = KVortexConfig(device=device.name, codec="q8", cpu_pool_size_bytes=MIB)
    with KVortexEngine.create(config, layout=layout) as engine:
        before = array.tobytes()
        engine.save_blocks(keys_of([1]), np.array([0])).wait(20_000)
        array[:] = 0
        engine.load_blocks(keys_of([1]), np.array([0])).wait(20_000)
    assert array.tobytes() == there_and_back(before, layout.planes)


def test_pieces_that_no_kernel_can_move_are_refused(device):
    layout = KVLayout([(1 << 20, 24, 24)], 2)
    config = KVortexConfig(device=device.name, codec="q8", cpu_pool_size_bytes=MIB)
    with pytest.raises(ConfigError, match="not made of multiples of 16 bytes"):
        KVortexEngine.create(config, layout=layout)
