"""Bad input gets an error with value, limit and next step, and nothing is changed by it."""

import numpy as np
import pytest
from kvcache import DeviceCache, keys_of, make_engine

import kvortex
from kvortex import ConfigError, KVortexConfig, KVortexEngine

ADDRESS = 1 << 20


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (np.zeros((2, 31), np.uint8), ValueError),
        (np.zeros((2, 33), np.uint8), ValueError),
        (np.zeros(64, np.uint8), ValueError),
        (np.zeros((2, 32), np.int8), TypeError),
        (np.zeros((2, 32), np.float64), TypeError),
        (np.zeros((4, 32), np.uint8)[::2], ValueError),
        ([b"x" * 32], TypeError),
        (None, TypeError),
    ],
)
def test_keys_of_wrong_shape_or_type(bench, keys, error):
    for call in (
        lambda: bench.engine.save_blocks(keys, [0, 1], stream=0),
        lambda: bench.engine.load_blocks(keys, [0, 1], stream=0),
        lambda: bench.engine.check_blocks(keys),
        lambda: bench.engine.touch_blocks(keys),
        lambda: bench.engine.discard_blocks(keys),
    ):
        with pytest.raises(error, match="keys"):
            call()
    assert bench.engine.get_stats().pool_blocks_used == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"block_ids": [0]}, "2 keys but 1 blocks"),
        ({"block_ids": [0, 32]}, r"block_ids\[1\] is 32, outside the layout's 0 to 31"),
        ({"block_ids": [-1, 0]}, r"block_ids\[0\] is -1"),
        ({"block_ids": [[0, 1]]}, "one-dimensional"),
        ({"block_ids": [0.5, 1.5]}, "integers"),
        ({}, "either block_ids or data_ptrs"),
        ({"block_ids": [0, 1], "data_ptrs": [ADDRESS, ADDRESS]}, "either block_ids or data_ptrs"),
        ({"block_ids": [0, 1], "sizes": 4}, "sizes go with data_ptrs"),
        ({"data_ptrs": [ADDRESS, ADDRESS]}, "need sizes"),
        ({"data_ptrs": [0, ADDRESS], "sizes": 4}, r"data_ptrs\[0\] is 0x0"),
        ({"data_ptrs": [ADDRESS, ADDRESS + 3], "sizes": 4}, r"data_ptrs\[1\] is 0x100003.*multiples of 4"),
        ({"data_ptrs": [-4096, ADDRESS], "sizes": 4}, r"data_ptrs\[0\]"),
        ({"data_ptrs": [ADDRESS, 2 * ADDRESS], "sizes": 0}, r"sizes\[0\] is 0"),
        ({"data_ptrs": [ADDRESS, 2 * ADDRESS], "sizes": [4, 4097]}, r"sizes\[1\] is 4097; it must be 1 to 2048"),
        ({"data_ptrs": [ADDRESS, 2 * ADDRESS], "sizes": [4, 4, 4]}, "an int or 2 integers"),
        ({"data_ptrs": np.array(["a", "b"]), "sizes": 4}, "integers"),
    ],
)
def test_unfit_blocks(bench, arguments, match):
    for verb in (bench.engine.save_blocks, bench.engine.load_blocks):
        with pytest.raises(ValueError, match=match):
            verb(keys_of([1, 2]), stream=0, **arguments)
    assert bench.engine.get_stats().pool_blocks_used == 0


def test_device_memory_needs_a_stream(bench):
    buffer = bench.cache.buffers[0].address
    for verb in (bench.engine.save_blocks, bench.engine.load_blocks):
        with pytest.raises(ValueError, match="stream"):
            verb(keys_of([1]), [0])
        with pytest.raises(ValueError, match="stream"):
            verb(keys_of([1]), data_ptrs=[buffer], sizes=64)


@pytest.mark.host
def test_memory_of_the_cpu_needs_none():
    source = np.random.default_rng(5).integers(0, 256, (4, 1024), dtype=np.uint8)
    target = np.zeros_like(source)
    config = KVortexConfig(cpu_pool_size_bytes=1 << 20, device="host", block_bytes=1024)
    with KVortexEngine.create(config) as engine:
        pointers = source.ctypes.data + np.arange(4) * 1024
        engine.save_blocks(keys_of(range(4)), data_ptrs=pointers, sizes=1024).wait(20_000)
        pointers = target.ctypes.data + np.arange(4) * 1024
        engine.load_blocks(keys_of(range(4)), data_ptrs=pointers, sizes=1024).wait(20_000)
    assert (source == target).all()


@pytest.mark.host
def test_layout_over_numpy_tensors_needs_no_stream():
    tensors = [np.random.default_rng(layer).integers(0, 256, (2, 8, 16, 4), dtype=np.uint8) for layer in range(3)]
    layout = kvortex.KVLayout.from_tensors(tensors, block_dim=1, block_size=16)
    config = KVortexConfig(cpu_pool_size_bytes=1 << 20, device="host")
    with KVortexEngine.create(config, layout=layout) as engine:
        engine.save_blocks(keys_of([1, 2]), [0, 3]).wait(20_000)
        engine.load_blocks(keys_of([1, 2]), [5, 6]).wait(20_000)
    for tensor in tensors:
        assert (tensor[:, [0, 3]] == tensor[:, [5, 6]]).all()


@pytest.mark.host
def test_stream_of_another_device_is_refused(bench):
    with kvortex.Device.open("host:1") as other, kvortex.Stream.create(other) as stream:
        with pytest.raises(ValueError, match="device"):
            bench.engine.save_blocks(keys_of([1]), [0], stream=stream)
        with pytest.raises(ValueError, match="device"):
            bench.engine.save_blocks(keys_of([1]), [0], stream=stream.handle)
    assert bench.engine.get_stats().pool_blocks_used == 0


@pytest.mark.host
def test_capturing_stream_is_refused_before_anything_is_recorded_on_it(bench, host):
    bench.saved([1])
    job = bench.load([1], [9])
    assert host.begin_capture(bench.stream.handle) == 0
    for call in (
        lambda: bench.engine.save_blocks(keys_of([2]), [0], stream=bench.stream),
        lambda: bench.engine.load_blocks(keys_of([1]), [8], stream=bench.stream),
        lambda: job.wait_on(bench.stream),
    ):
        with pytest.raises(ValueError, match="captur"):
            call()
    assert host.end_capture(bench.stream.handle) == (0, 0), "something of ours was captured"
    job.wait(20_000)
    assert bench.engine.get_stats().pool_blocks_used == 1


@pytest.mark.host
def test_blocks_move_while_another_stream_captures(bench, host, device):
    with kvortex.Stream.create(device) as other:
        assert host.begin_capture(other.handle) == 0
        bench.engine.save_blocks(keys_of([1]), [0], stream=bench.stream).wait(20_000)
        bench.engine.load_blocks(keys_of([1]), [9], stream=bench.stream).wait(20_000)
        assert host.end_capture(other.handle) == (0, 0), "the capture was broken"
    assert bench.cache.read(9) == bench.cache.read(0)


@pytest.mark.parametrize(
    "settings",
    [
        {"cpu_pool_size_bytes": 0},
        {"cpu_pool_size_bytes": -1},
        {"cpu_pool_size_bytes": 1.5e9},
        {"cpu_pool_size_bytes": True},
        {"cpu_pool_size_bytes": 1 << 60},
        {"num_transfer_streams": 0},
        {"num_transfer_streams": 1000},
        {"block_bytes": 0},
        {"block_bytes": 1 << 32},
        {"header_bytes": 0},  # it follows from the tiers
        {"max_jobs": 0},
        {"shutdown_timeout_ms": -1},
        {"pool_chunk_bytes": 0},
        {"device": 0},
        {"enable_numa": "yes"},
        {"deferred": "always"},
    ],
)
def test_absurd_settings_are_refused_when_they_are_made(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        KVortexConfig(**{"cpu_pool_size_bytes": 1 << 20, **settings})


def test_config_is_frozen_and_knows_its_names():
    config = KVortexConfig(cpu_pool_size_bytes=1 << 20)
    with pytest.raises(AttributeError):
        config.max_jobs = 3
    with pytest.raises(ConfigError, match="unknown setting 'pool_size'"):
        KVortexConfig(cpu_pool_size_bytes=1 << 20, pool_size=3)


def test_engine_without_a_block_size_or_with_one_below_the_layouts(device):
    cache = DeviceCache(device)
    config = KVortexConfig(cpu_pool_size_bytes=1 << 20, device=device.name)
    with pytest.raises(ConfigError, match="block_bytes is needed"):
        KVortexEngine.create(config)
    small = KVortexConfig(cpu_pool_size_bytes=1 << 20, device=device.name, block_bytes=64)
    with pytest.raises(ConfigError, match="layout's blocks take 2048"):
        KVortexEngine.create(small, layout=cache.layout)
    with pytest.raises(ConfigError, match="holds no slot"):
        KVortexEngine.create(KVortexConfig(cpu_pool_size_bytes=100, device=device.name), layout=cache.layout)
    with pytest.raises(ConfigError, match="KVortexConfig"):
        KVortexEngine.create({"cpu_pool_size_bytes": 1 << 20})


@pytest.mark.parametrize("name", ["gpu", "host:99", "cuda:99", "host:x", ""])
def test_unknown_devices(name):
    with pytest.raises(ConfigError):
        KVortexEngine.create(KVortexConfig(cpu_pool_size_bytes=1 << 20, device=name, block_bytes=64))


def test_pool_beyond_memory(device):
    with pytest.raises(kvortex.PoolExhausted, match="lower cpu_pool_size_bytes"):
        KVortexEngine.create(KVortexConfig(cpu_pool_size_bytes=1 << 46, device=device.name, block_bytes=1 << 20))


def test_empty_calls_are_legal(bench):
    none = np.zeros((0, 32), np.uint8)
    save, load = bench.engine.save_blocks(none, [], stream=0), bench.engine.load_blocks(none, [], stream=0)
    for job in (save, load):
        job.wait()
        job.wait_on(0)
        assert job.done() and job.num_blocks == 0
    assert len(save.statuses) == 0
    assert bench.engine.check_blocks(none).leading == 0
    assert bench.engine.touch_blocks(none) == bench.engine.discard_blocks(none) == 0


@pytest.mark.host
def test_wait_times_out_and_the_job_goes_on(bench, host):
    bench.saved([1])
    host.hold()
    job = bench.load([1], [9])
    with pytest.raises(TimeoutError, match="20 ms"):
        job.wait(20)
    assert not job.done()
    host.release()
    job.wait(20_000)
    assert bench.holds(9, 1)


@pytest.mark.host
def test_what_was_discarded_while_it_was_saved_counts_neither_as_blocks_nor_as_bytes(make_bench, host):
    bench = make_bench(8)
    host.hold()
    job = bench.engine.save_blocks(keys_of([1, 2, 3]), [1, 2, 3], stream=bench.stream)
    bench.engine.discard_blocks(keys_of([2]))
    host.release()
    job.wait(20_000)
    stats = bench.engine.get_stats()
    assert (job.num_blocks, stats.blocks_saved, stats.bytes_saved) == (3, 2, 2 * bench.cache.block_bytes)


def test_stats_add_up(make_bench):
    bench = make_bench(4)
    bench.saved([1, 2, 3])
    bench.leading([1, 2, 9])
    bench.load([1, 2], [8, 9]).wait(20_000)
    bench.saved([4, 5, 6])
    bench.engine.discard_blocks(keys_of([6]))
    stats = bench.engine.get_stats()
    size = bench.cache.block_bytes
    assert (stats.blocks_checked, stats.blocks_hit, stats.cache_hit_rate) == (3, 2, 2 / 3)
    assert (stats.blocks_saved, stats.bytes_saved) == (6, 6 * size)
    assert (stats.blocks_loaded, stats.bytes_loaded) == (2, 2 * size)
    assert (stats.blocks_evicted, stats.blocks_discarded, stats.pool_blocks_used) == (2, 1, 3)
    assert (stats.jobs_failed, stats.jobs_in_flight, stats.failed) == (0, 0, False)
    assert stats.pool_blocks == 4 and stats.pool_bytes == stats.pool_bytes_ready == 4 * 4096
    assert 0 < stats.save_latency_us_p50 <= stats.save_latency_us_p99
    assert 0 < stats.load_latency_us_p50 <= stats.load_latency_us_p99
    assert stats.lookup_latency_us_p50 <= stats.lookup_latency_us_p99 < stats.save_latency_us_p99 + 1000


def test_engine_serves_while_its_pool_is_still_being_registered(device, stream):
    cache = DeviceCache(device)
    engine = make_engine(cache, 2000, pool_first_chunk_bytes=8 * 4096, pool_chunk_bytes=4096)
    for number in range(50):
        engine.save_blocks(keys_of([number]), [0], stream=stream).wait(20_000)
    engine.wait_ready(60_000)
    assert engine.index.counters()["slots_added"] == engine.pool.num_slots == 2000
    engine.shutdown()


def test_keys_that_say_one_shape_and_hold_another(bench):
    class Lying(np.ndarray):
        @property
        def shape(self):
            return (super().shape[0], 32)

    with pytest.raises(ValueError, match="keys"):
        bench.engine.check_blocks(np.zeros((4, 8), np.uint8).view(Lying))


@pytest.mark.parametrize("timeout_ms", [2**63 - 1, 2**62, 10**15])
def test_absurd_timeouts_wait_for_the_job(bench, timeout_ms):
    job = bench.save([1])
    job.wait(timeout_ms)
    assert job.done()
