"""`gpu_pool_size_bytes`: the engine's pool of device memory, the gather's staging in it, and its numbers."""

import gc

import kvcache
import numpy as np
import pytest
from kvcache import DeviceCache

import kvortex
from kvortex import EngineClosed, PoolExhausted

MIB = 1 << 20
STAGING_BYTES = 16 * MIB  # of a stream, and a table of 32 bytes a piece


@pytest.fixture
def cache(device):
    made = DeviceCache(device, "gathered", num_blocks=16, num_layers=3)  # too few for strided copies, however they lie
    yield made
    made.close()


def test_without_the_setting_there_is_none(cache):
    with kvcache.make_engine(cache, 16) as engine:
        stats = engine.get_stats()
        assert engine.device_pool is None and engine.queues[0].gather.pool is None
        assert stats.device_pool_bytes == stats.device_pool_bytes_used == stats.device_pool_bytes_reserved == 0


def test_staging_of_the_gather_is_taken_from_the_pool(device, cache, stream):
    with kvcache.make_engine(cache, 16, gpu_pool_size_bytes=100 * MIB) as engine:
        pool, num_streams = engine.device_pool, len(engine.queues)
        assert all(queue.gather.pool is pool for queue in engine.queues)
        stats = engine.get_stats()
        assert stats.device_pool_bytes == 100 * MIB
        assert stats.device_pool_bytes_used == num_streams * STAGING_BYTES
        assert stats.device_pool_bytes_reserved >= stats.device_pool_bytes_used
        keys, ids = kvcache.keys_of(range(16)), np.arange(16)
        for block in ids:
            cache.write(block, kvcache.content(block, 0, cache.block_bytes))
        engine.save_blocks(keys, ids, stream=stream).wait(20_000)
        cache.fill(0)
        job = engine.load_blocks(keys, ids[::-1].copy(), stream=stream)
        job.wait(20_000)
        assert job.num_blocks == 16
        for block in ids:
            assert cache.read(15 - block) == kvcache.content(block, 0, cache.block_bytes)
        buffer = pool.alloc(MIB, stream)  # and the runtime takes the rest
        assert engine.get_stats().device_pool_bytes_used == stats.device_pool_bytes_used + MIB
    assert pool.closed and cache.layout is not None
    buffer.fill(7)
    target = bytearray(MIB)
    buffer.copy_to(target)
    assert set(target) == {7}
    buffer.free(stream)
    assert pool.device.closed
    with pytest.raises(EngineClosed):
        pool.alloc(1, stream)


@pytest.mark.host
def test_engine_gives_all_of_its_device_memory_back(cache, host):
    before = host.live_objects()
    kvcache.make_engine(cache, 16, gpu_pool_size_bytes=100 * MIB).shutdown()
    gc.collect()
    assert host.live_objects() == before


@pytest.mark.host
def test_pool_that_is_too_small_for_the_gather_is_refused_and_nothing_is_left(cache, host):
    before = host.live_objects()
    with pytest.raises(PoolExhausted, match=r"16777216 bytes were asked .* raise its limit_bytes \(gpu_pool_size_byt"):
        kvcache.make_engine(cache, 16, gpu_pool_size_bytes=40 * MIB)
    gc.collect()
    assert host.live_objects() == before


@pytest.mark.host
def test_dead_device_ends_with_its_pool(cache, host):
    engine = kvcache.make_engine(cache, 16, gpu_pool_size_bytes=100 * MIB)
    buffer = engine.device_pool.alloc(64, 0)
    host.kill(0, 700)
    stats = engine.get_stats()
    assert (stats.device_pool_bytes, stats.device_pool_bytes_used) == (100 * MIB, 0)
    engine.shutdown()
    buffer.close()
    assert engine.device_pool.closed


def test_metrics_show_the_pool(cache):
    with kvcache.make_engine(cache, 16, gpu_pool_size_bytes=100 * MIB) as engine:
        page = kvortex.prometheus_text(engine.get_stats())
    assert f"\nkvortex_device_pool_bytes {100 * MIB}\n" in page
    assert "\nkvortex_device_pool_used_bytes " in page and "\nkvortex_device_pool_reserved_bytes " in page
