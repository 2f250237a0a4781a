"""A cache, an engine over it with eight slots, and what the tests of the invariants do with them again and again."""

import numpy as np
import pytest
from kvcache import DeviceCache, keys_of, make_engine


class Bench:
    """An engine, its device cache, and blocks whose content is known."""

    def __init__(self, cache, engine, stream):
        self.cache, self.engine, self.stream = cache, engine, stream

    def save(self, key_ids, blocks=None, generation=0):
        """Write the contents of the keys into blocks (0, 1, ... unless given) and save them; returns the job."""
        blocks = range(len(key_ids)) if blocks is None else blocks
        for key_id, block in zip(key_ids, blocks, strict=True):
            self.cache.write(block, self.cache.content(key_id, generation))
        return self.engine.save_blocks(keys_of(key_ids), np.asarray(blocks), stream=self.stream)

    def saved(self, key_ids, generation=0):
        self.save(key_ids, generation=generation).wait(20_000)

    def load(self, key_ids, blocks):
        return self.engine.load_blocks(keys_of(key_ids), np.asarray(blocks), stream=self.stream)

    def holds(self, block, key_id, generation=0):
        """Whether the device block has the content of that key, byte by byte."""
        return self.cache.read(block) == self.cache.loaded(key_id, generation)

    def leading(self, key_ids):
        return self.engine.check_blocks(keys_of(key_ids)).leading


@pytest.fixture
def make_bench(device, stream):
    """Build a `Bench`; engine and cache are closed after the test."""
    built = []

    def build(num_slots=8, shape="one_allocation", piece_bytes=256, **settings):
        cache = DeviceCache(device, shape, piece_bytes=piece_bytes)
        bench = Bench(cache, make_engine(cache, num_slots, **settings), stream)
        built.append(bench)
        return bench

    yield build
    for bench in built:
        bench.engine.shutdown()
        bench.cache.close()


@pytest.fixture
def bench(make_bench):
    return make_bench()
