"""Codecs on one core: a plane of 16 tokens of 8 heads of 128 bfloat16 numbers, packed and unpacked; bytes unpacked."""

import numpy as np
import pytest

from kvortex.codec import PackedBlock, Plane
from kvortex.codec._codec import instruction_sets, pack_block, unpack_block

ROWS, DIM, PLANES = 128, 128, 8  # 256 KiB, so that what is packed and unpacked stays in the second cache
CODEC_OF = {8: ("q8", "k"), 6: ("k6v4", "k"), 5: ("k8v5", "v"), 4: ("q4", "k")}
TARGETS = {("pack", 8): ">= 8 G", ("unpack", 8): ">= 12 G"}  # bytes a second, with AVX-512


@pytest.mark.parametrize("bits", CODEC_OF)
@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_planes(benchmark, row, direction, name, bits, smoke):
    codec, role = CODEC_OF[bits]
    planes = [Plane(role, number * ROWS * DIM * 2, ROWS, DIM * 2, DIM * 2) for number in range(PLANES)]
    layout = PackedBlock.of(planes, PLANES * ROWS * DIM * 2, codec)
    numbers = np.random.default_rng(0).standard_normal(PLANES * ROWS * DIM, np.float32)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    packed = np.empty(layout.packed_bytes, np.uint8)
    target = {"target": TARGETS[direction, bits]} if name == "avx512" and (direction, bits) in TARGETS else {}
    row(
        f"{direction}, {bits} bits, {name}", operations=layout.block_bytes, unit="bytes", in_table=name != "c", **target
    )
    assert pack_block(layout, block, packed, instruction_set=name)
    buffers = (block, packed) if direction == "pack" else (packed, np.empty_like(block))
    call = pack_block if direction == "pack" else unpack_block
    benchmark.pedantic(
        call,
        args=(layout, *buffers),
        kwargs={"instruction_set": name},
        rounds=1 if smoke else 20 if name == "c" else 1000,
        warmup_rounds=0 if smoke else 2,
    )
    error = np.empty_like(block)
    unpack_block(layout, packed, error, instruction_set=name)
    assert np.abs((error.astype(np.uint32) << 16).view(np.float32) - numbers).max() < 4 / 2**bits * 4
