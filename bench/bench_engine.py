"""Engine: from the Python call to the end of `wait`, for 64 blocks of 1 MiB and for one; and lookups of 1 to 512 keys.

Random bytes, block ids and slots shuffled.
"""

import numpy as np
import pytest
from kvcache import DeviceCache, keys_of, make_engine

BATCH = 64
ROUNDS = {"rounds": 50, "warmup_rounds": 5}
SOURCES, TARGETS = np.random.default_rng(5).permutation(2 * BATCH).reshape(2, BATCH)


@pytest.fixture
def cache(device):
    made = DeviceCache(device, "one_allocation", num_blocks=2 * BATCH, num_layers=16, piece_bytes=32 << 10)
    rng = np.random.default_rng(6)
    for block in SOURCES:
        made.write(block, rng.bytes(made.block_bytes))
    yield made
    made.close()


@pytest.fixture
def engine(cache):
    with make_engine(cache, 2 * BATCH) as made:
        yield made


def save(engine, num_blocks, stream):
    job = engine.save_blocks(keys_of(range(num_blocks)), SOURCES[:num_blocks], stream=stream)
    job.wait(60_000)
    return job.num_blocks


def load(engine, num_blocks, stream):
    """Load to other blocks than those that were saved."""
    job = engine.load_blocks(keys_of(range(num_blocks)), TARGETS[:num_blocks], stream=stream)
    job.wait(60_000)
    return job.num_blocks


def same(cache, num_blocks):
    pairs = zip(SOURCES[:num_blocks], TARGETS[:num_blocks], strict=True)
    return all(cache.read(source) == cache.read(target) for source, target in pairs)


def describe(row, what, num_blocks):
    """A rate for the batch, and the time from call to done for one."""
    rate = {"operations": num_blocks << 20, "unit": "bytes"} if num_blocks > 1 else {}
    row(f"{what}, {num_blocks} block{'s' * (num_blocks > 1)} of 1 MiB, call to done", **rate)


@pytest.mark.parametrize("num_blocks", [BATCH, 1])
def test_save_to_done(benchmark, row, cache, engine, stream, num_blocks):
    describe(row, "save", num_blocks)
    rng = np.random.default_rng(7)

    def forget():
        engine.discard_blocks(rng.permutation(keys_of(range(num_blocks))))  # which shuffles the free slots
        return (engine, num_blocks, stream), {}

    assert benchmark.pedantic(save, setup=forget, **ROUNDS) == num_blocks
    assert load(engine, num_blocks, stream) == num_blocks
    assert same(cache, num_blocks)


@pytest.mark.parametrize("num_blocks", [BATCH, 1])
def test_load_to_done(benchmark, row, cache, engine, stream, num_blocks):
    describe(row, "load", num_blocks)
    assert save(engine, num_blocks, stream) == num_blocks
    assert benchmark.pedantic(load, args=(engine, num_blocks, stream), **ROUNDS) == num_blocks
    assert same(cache, num_blocks)


@pytest.mark.parametrize("num_keys", [1, 8, 64, 512])
def test_check_blocks(benchmark, row, device, stream, num_keys):
    row(f"check_blocks of {num_keys} key{'s' * (num_keys > 1)}", target="<= 60 us" if num_keys == 512 else None)
    cache = DeviceCache(device, "cross_layer", num_blocks=512)
    with make_engine(cache, 512) as engine:
        engine.save_blocks(keys_of(range(512)), np.arange(512), stream=stream).wait(60_000)
        keys = keys_of(np.random.default_rng(8).permutation(512)[:num_keys])
        hits = benchmark.pedantic(engine.check_blocks, args=(keys,), rounds=500, iterations=10, warmup_rounds=10)
        assert hits.leading == num_keys and hits.mask.all()
        assert not engine.check_blocks(keys_of([512])).mask.any()
    cache.close()
