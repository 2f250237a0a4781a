"""Keys: a prompt of 32 768 tokens is 2048 blocks of 16, and as many keys, each two SHA-256 blocks long."""

import hashlib

import numpy as np
import pytest

from kvortex.keys import block_keys, block_keys_many

TOKENS = np.random.default_rng(1).integers(0, 128_000, 32_768)
RATE = {"operations": TOKENS.size, "unit": "tokens"}


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_block_keys(benchmark, row, dtype):
    row(f"block_keys of one prompt, {np.dtype(dtype).name}", group="block_keys", **RATE, target=">= 150 M")
    keys = benchmark.pedantic(block_keys, args=(TOKENS.astype(dtype), 16), rounds=300, warmup_rounds=5)
    assert keys.shape == (2048, 32)
    assert (keys[:10] == block_keys(TOKENS[:160], 16)).all()


def test_block_keys_of_many_prompts(benchmark, row):
    row("block_keys of 64 prompts", group="block_keys", **RATE, target=">= 150 M")
    prompts = TOKENS.reshape(64, 512)
    keys, offsets = benchmark.pedantic(block_keys_many, args=(prompts, 16), rounds=300, warmup_rounds=5)
    assert offsets[-1] == len(keys) == 2048
    assert (keys[offsets[5] : offsets[6]] == block_keys(prompts[5], 16)).all()


@pytest.mark.peer
def test_hashlib_for_comparison(benchmark, row):
    """The same chain in Python, one hashlib call a block."""
    row("block_keys", side="hashlib", group="block_keys", **RATE)
    tokens = TOKENS.astype("<u4")

    def chain():
        parent = hashlib.sha256(b"kvortex-keys-v1" + bytes([16, 0, 0, 0, 0, 0, 0, 0])).digest()
        for first in range(0, len(tokens), 16):
            parent = hashlib.sha256(parent + tokens[first : first + 16].tobytes()).digest()
        return parent

    assert benchmark.pedantic(chain, rounds=50, warmup_rounds=2) == block_keys(tokens, 16)[-1].tobytes()
