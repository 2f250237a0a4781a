"""Engine: from the Python call to the end of `wait`, for 64 blocks of 1 MiB and for one; and a lookup of 512 keys."""

import numpy as np
import pytest
from kvcache import DeviceCache, keys_of, make_engine

BATCH = 64
ROUNDS = {"rounds": 20, "warmup_rounds": 2}


@pytest.fixture
def cache(device):
    made = DeviceCache(device, "one_allocation", num_blocks=2 * BATCH, num_layers=16, piece_bytes=32 << 10)
    rng = np.random.default_rng(6)
    for block in range(BATCH):
        made.write(block, rng.bytes(made.block_bytes))
    yield made
    made.close()


@pytest.fixture
def engine(cache):
    with make_engine(cache, 2 * BATCH) as made:
        yield made


def save(engine, num_blocks, stream):
    job = engine.save_blocks(keys_of(range(num_blocks)), np.arange(num_blocks), stream=stream)
    job.wait(60_000)
    return job.num_blocks


def load(engine, num_blocks, stream):
    """Load behind the blocks that were saved."""
    job = engine.load_blocks(keys_of(range(num_blocks)), BATCH + np.arange(num_blocks), stream=stream)
    job.wait(60_000)
    return job.num_blocks


def same(cache, num_blocks):
    return all(cache.read(BATCH + block) == cache.read(block) for block in range(num_blocks))


@pytest.mark.parametrize("num_blocks", [BATCH, 1])
def test_save_to_done(benchmark, cache, engine, stream, num_blocks):
    def forget():
        engine.discard_blocks(keys_of(range(num_blocks)))
        return (engine, num_blocks, stream), {}

    assert benchmark.pedantic(save, setup=forget, **ROUNDS) == num_blocks
    assert load(engine, num_blocks, stream) == num_blocks
    assert same(cache, num_blocks)


@pytest.mark.parametrize("num_blocks", [BATCH, 1])
def test_load_to_done(benchmark, cache, engine, stream, num_blocks):
    assert save(engine, num_blocks, stream) == num_blocks
    assert benchmark.pedantic(load, args=(engine, num_blocks, stream), **ROUNDS) == num_blocks
    assert same(cache, num_blocks)


@pytest.mark.parametrize("num_keys", [1, 8, 64, 512])
def test_check_blocks(benchmark, device, stream, num_keys):
    cache = DeviceCache(device, "cross_layer", num_blocks=512)
    with make_engine(cache, 512) as engine:
        assert save(engine, 512, stream) == 512
        hits = benchmark.pedantic(engine.check_blocks, args=(keys_of(range(num_keys)),), rounds=2000, warmup_rounds=10)
        assert hits.leading == num_keys and hits.mask.all()
    cache.close()
