"""The pretended model's cache: written, poisoned and checked through a view and through copies, alike."""

import os

import numpy as np
import pytest

import kvortex
from kvortex.replay.cache import ModelCache
from kvortex.replay.oracle import POISON, Oracle

DEVICE = os.environ.get("KVORTEX_TEST_DEVICE", "host")
OUT_OF_MEMORY = 2
NUM_BLOCKS, NUM_PIECES, PIECE_BYTES = 12, 6, 512
WORDS = np.arange(100, 105, dtype=np.uint64)
GENERATIONS = np.array([1, 2, 3, 1, 1], dtype=np.uint32)


@pytest.fixture
def device():
    with kvortex.Device.open(DEVICE) as device:
        yield device


@pytest.fixture(params=[pytest.param(True, marks=pytest.mark.host), False], ids=["view", "copies"])
def cache(request, device):
    oracle = Oracle(PIECE_BYTES)
    cache = ModelCache(device, NUM_BLOCKS, NUM_PIECES, oracle, max_rows=5, direct=request.param)
    yield cache
    cache.close()


def content(cache):
    memory = np.zeros(NUM_PIECES * NUM_BLOCKS * PIECE_BYTES, dtype=np.uint8)
    cache._buffer.copy_to(memory)
    return memory.reshape(NUM_PIECES, NUM_BLOCKS, PIECE_BYTES)


@pytest.mark.host
@pytest.mark.parametrize(
    ("field", "call"), [("mem_create", 1), ("mem_create", 3), ("mem_set_access", 2), ("mem_host_register", 1)]
)
def test_a_cache_that_is_refused_leaves_nothing_even_while_its_error_is_kept(device, host, field, call):
    oracle, before = Oracle(1 << 20), host.live_objects()
    host.fail_call(call, OUT_OF_MEMORY, field=field)
    with pytest.raises(kvortex.KVortexError) as raised:
        ModelCache(device, NUM_BLOCKS, NUM_PIECES, oracle, max_rows=5, direct=False)
    assert raised.tb is not None and host.live_objects() == before


def test_layout_names_the_memory_that_is_written(cache):
    assert (cache.layout.num_blocks, cache.layout.block_bytes) == (NUM_BLOCKS, NUM_PIECES * PIECE_BYTES)


def test_written_blocks_are_right_and_their_neighbours_untouched(cache, device):
    with kvortex.Stream.create(device) as stream:
        cache.poison(0, NUM_BLOCKS, stream)
        stream.synchronize()
    cache.write(3, WORDS, GENERATIONS)
    memory = content(cache)
    assert (memory[:, :3] == POISON).all() and (memory[:, 8:] == POISON).all()
    expected = np.empty((5, PIECE_BYTES), dtype=np.uint8)
    for piece in range(NUM_PIECES):
        Oracle(PIECE_BYTES).write(expected, WORDS, GENERATIONS, piece)
        assert (memory[piece, 3:8] == expected).all()
    assert cache.count_wrong(3, WORDS, GENERATIONS, 5) == 0


def test_a_block_is_wrong_once_however_many_of_its_pieces_are(cache):
    cache.write(3, WORDS, GENERATIONS)
    assert cache.count_wrong(3, WORDS, GENERATIONS + np.array([0, 1, 0, 0, 1], dtype=np.uint32), 5) == 2
    assert cache.count_wrong(3, WORDS[::-1].copy(), GENERATIONS, 5) >= 4
    assert cache.count_wrong(2, WORDS, GENERATIONS, 5) == 5


@pytest.mark.parametrize("piece", [0, NUM_PIECES - 1])
@pytest.mark.parametrize("position", [0, PIECE_BYTES - 1])
def test_one_wrong_byte_in_any_piece_is_one_wrong_block(cache, piece, position):
    cache.write(3, WORDS, GENERATIONS)
    offset = (piece * NUM_BLOCKS + 4) * PIECE_BYTES + position
    byte = np.zeros(1, dtype=np.uint8)
    cache._buffer.copy_to(byte, offset=offset)
    cache._buffer.copy_from(byte ^ 1, offset=offset)
    assert cache.count_wrong(3, WORDS, GENERATIONS, 5) == 1


def test_targets_beyond_the_run_must_still_be_poisoned(cache, device):
    cache.write(3, WORDS, GENERATIONS)
    with kvortex.Stream.create(device) as stream:
        cache.poison(6, 2, stream)
        stream.synchronize()
    assert cache.count_wrong(3, WORDS, GENERATIONS, 3) == 0
    assert cache.count_wrong(3, WORDS, GENERATIONS, 2) == 1
    assert cache.count_wrong(3, WORDS, GENERATIONS, 5) == 2
    assert cache.count_wrong(6, WORDS[:2], GENERATIONS[:2], 0) == 0
