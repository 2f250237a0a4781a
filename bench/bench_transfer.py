"""Transfer: 64 MiB in blocks of 1 MiB, one job, through every shape of cache; random bytes, shuffled ids and slots."""

import numpy as np
import pytest
from kvcache import SHAPES, DeviceCache

from kvortex import PinnedPool, TransferQueue
from kvortex.slots import stride_bytes
from kvortex.transfer import probe_layout

NBYTES = 64 << 20
PIECE_BYTES = 32 << 10
ROUNDS = {"rounds": 20, "warmup_rounds": 2}


class Paired:
    """A cache, a pool with a slot for each of its blocks, and a shuffled pairing of the two."""

    def __init__(self, device, shape):
        layers = 32 if shape == "mla" else 16  # which has one piece a layer, not two
        self.shape = shape.replace("_", " ")
        self.cache = DeviceCache(device, shape, NBYTES >> 20, layers, PIECE_BYTES)
        self.num_blocks = self.cache.num_blocks
        self.pool = PinnedPool(self.num_blocks * stride_bytes(self.cache.block_bytes), self.cache.block_bytes, device)
        self.pool.wait_ready(60_000)
        rng = np.random.default_rng(5)
        self.blocks, self.slots = rng.permutation(self.num_blocks), rng.permutation(self.num_blocks)
        self.records = [rng.bytes(self.cache.block_bytes) for _ in range(self.num_blocks)]

    def describe(self, row, direction):
        nbytes = self.num_blocks * self.cache.block_bytes
        row(f"{direction} of {self.num_blocks} blocks, {self.shape}", operations=nbytes, unit="bytes")

    def submit(self, queue, stream):
        job = queue.submit(self.cache.layout, self.blocks, self.pool, self.slots, stream=stream)
        job.wait(60_000)
        return job.num_blocks

    def close(self):
        self.pool.close()
        self.cache.close()


@pytest.fixture(params=SHAPES)
def paired(request, device):
    made = Paired(device, request.param)
    yield made
    made.close()


def test_d2h(benchmark, row, device, stream, paired):
    paired.describe(row, "D2H")
    for block, record in zip(paired.blocks, paired.records, strict=True):
        paired.cache.write(block, record)
    with TransferQueue(device, "D2H") as queue:
        probe_layout(paired.cache.layout, queue)
        assert benchmark.pedantic(paired.submit, args=(queue, stream), **ROUNDS) == paired.num_blocks
    for slot, record in zip(paired.slots, paired.records, strict=True):
        assert paired.pool.view(slot) == record


def test_h2d(benchmark, row, device, stream, paired):
    paired.describe(row, "H2D")
    for slot, record in zip(paired.slots, paired.records, strict=True):
        paired.pool.view(slot)[:] = record
    with TransferQueue(device, "H2D") as queue, TransferQueue(device, "D2H") as prober:
        probe_layout(paired.cache.layout, prober)
        probe_layout(paired.cache.layout, queue)
        assert benchmark.pedantic(paired.submit, args=(queue, stream), **ROUNDS) == paired.num_blocks
    for block, record in zip(paired.blocks, paired.records, strict=True):
        assert paired.cache.read(block) == record
