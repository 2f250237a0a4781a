"""Entropy-coded blocks on one core: 16 tokens, 8 layers, K and V of 8 heads of 128 numbers; bytes of the block."""

import numpy as np
import pytest

from kvortex.codec import Plane
from kvortex.codec._ecsq import Coded, decode_block, encode_block, instruction_sets

TOKENS, HEADS, DIM, LAYERS = 16, 8, 128, 8
TARGETS = {"code": ">= 1.2 G", "decode": ">= 2 G"}  # bytes a second, with AVX-512


def keys_and_values(rng):
    """Numbers that spread as those of a model do: channels of many widths, keys that drift around a mean."""
    widths = np.exp(rng.normal(0, 0.4, (2, LAYERS, 1, HEADS, DIM)))
    numbers = rng.standard_normal((2, LAYERS, TOKENS, HEADS, DIM))
    for token in range(1, TOKENS):
        numbers[0, :, token] = 0.6 * numbers[0, :, token - 1] + 0.8 * numbers[0, :, token]
    numbers *= widths
    numbers[0] += rng.normal(0, 2, (LAYERS, 1, HEADS, DIM))
    return (np.ascontiguousarray(numbers.swapaxes(0, 1), np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("direction", ["code", "decode"])
def test_blocks(benchmark, row, direction, name, level, smoke):
    block = keys_and_values(np.random.default_rng(0))
    rows, plane_bytes = TOKENS * HEADS, TOKENS * HEADS * DIM * 2
    planes = [Plane("kv"[i % 2], i * plane_bytes, rows, 2 * DIM, 2 * DIM, i // 2, HEADS) for i in range(2 * LAYERS)]
    coded = Coded.of(planes, block.nbytes, level)
    record, back = np.empty(coded.max_coded_bytes, np.uint8), np.empty_like(block)
    target = {"target": TARGETS[direction]} if name == "avx512" else {}
    row(f"{direction}, level {level}, {name}", operations=block.nbytes, unit="bytes", in_table=name != "c", **target)
    nbytes = encode_block(coded, block, record)
    benchmark.pedantic(
        encode_block if direction == "code" else decode_block,
        args=(coded, block, record) if direction == "code" else (coded, record[:nbytes], back),
        kwargs={"instruction_set": name},
        rounds=1 if smoke else 10 if name == "c" else 300,
        warmup_rounds=0 if smoke else 2,
    )
    decode_block(coded, record[:nbytes], back, instruction_set=name)
    numbers, found = [(words.astype(np.uint32) << 16).view(np.float32) for words in (block, back)]
    assert np.mean((numbers - found) ** 2) < 0.01 * np.mean(numbers**2) and block.nbytes > 3 * nbytes
