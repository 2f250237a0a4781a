"""The ways to keep the K and V of a prefix: KVortex's codecs, through an engine, and two others beside them."""

import numpy as np
import torch

from kvortex import KVLayout, KVortexConfig, KVortexEngine, block_keys
from kvortex.slots import PAGE_BYTES

BLOCK_TOKENS = 16


class Engine:
    """Saves a prefix in blocks, gives their place in the paged cache to others, and loads them into other places."""

    def __init__(self, codec, shape, prefix):
        _, num_layers, num_heads, _, head_dim = shape
        self.name, self.num_blocks = codec, prefix // BLOCK_TOKENS
        paged = (2, num_layers, 2 * self.num_blocks, BLOCK_TOKENS, num_heads, head_dim)
        self.paged = torch.empty(paged, dtype=torch.bfloat16)
        tensors = [self.paged[part, layer] for layer in range(num_layers) for part in (0, 1)]
        layout = KVLayout.from_tensors(tensors, roles=["k", "v"] * num_layers, block_size=BLOCK_TOKENS)
        pool_bytes = self.num_blocks * (layout.block_bytes + 2 * PAGE_BYTES)
        config = KVortexConfig(cpu_pool_size_bytes=pool_bytes, device="host", codec=codec)
        self.engine = KVortexEngine.create(config, layout=layout)
        self.engine.wait_ready()
        self.rng = np.random.default_rng(1)

    def __call__(self, kv, ids):
        """K and V, ``(2, layers, heads, tokens, head_dim)``, as the model finds them again."""
        saved, loaded = self.rng.permutation(2 * self.num_blocks).reshape(2, -1)
        keys = block_keys(ids.numpy(), block_size=BLOCK_TOKENS)
        self.paged[:, :, saved] = kv.transpose(2, 3).unflatten(2, (-1, BLOCK_TOKENS))
        self.move(self.engine.save_blocks, keys, saved)
        self.paged.fill_(torch.nan)  # which no logit survives, should a block not come back
        self.move(self.engine.load_blocks, keys, loaded)
        self.engine.clear()
        return self.paged[:, :, loaded].flatten(2, 3).transpose(2, 3)

    def move(self, verb, keys, blocks):
        job = verb(keys, blocks)
        job.wait()
        assert job.num_blocks == self.num_blocks, f"{verb.__name__} moved {job.num_blocks} blocks of {self.num_blocks}"

    @property
    def bits(self):
        """A number of K or V takes so many in a slot: scales, flags and what aligns them counted."""
        stats = self.engine.get_stats()
        return 16 * stats.packed_bytes_saved / stats.bytes_saved


class Fp8:
    """e4m3 as an engine's fp8 cache holds it, each head of a layer scaled to the largest number of its prefix."""

    name, bits = "fp8 e4m3", 8.0

    def __call__(self, kv, ids):
        scale = kv.float().abs().amax((-2, -1), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        return ((kv / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16()


class Int8:
    """8 bits and one bfloat16 scale a vector, as q8, but not rotated."""

    name = "int8"

    def __init__(self, shape):
        self.bits = 8 + 16 / shape[-1]

    def __call__(self, kv, ids):
        scale = (kv.float().abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-120)
        scale = (scale.view(torch.int32) + 0xFFFF >> 16 << 16).view(torch.float32)  # rounded up to bfloat16
        return ((kv / scale).round() * scale).bfloat16()


def all_ways(codecs, shape, prefix):
    return [*(Engine(codec, shape, prefix) for codec in codecs), Fp8(), Int8(shape)]
