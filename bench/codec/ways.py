"""The ways to keep the K and V of a prefix: KVortex's codecs, through an engine and a disk, and others beside them."""

import tempfile

import numpy as np
import torch

from kvortex import DiskTier, KVLayout, KVortexConfig, KVortexEngine, block_keys
from kvortex.slots import PAGE_BYTES

BLOCK_TOKENS, LEVELS = 16, (1, 2, 3, 4)


class Engine:
    """Saves a prefix in blocks, gives their place in the paged cache to others, and loads them into other places."""

    def __init__(self, codec, shape, prefix, **settings):
        _, num_layers, num_heads, _, head_dim = shape
        self.name, self.num_blocks = codec, prefix // BLOCK_TOKENS
        paged = (2, num_layers, 2 * self.num_blocks, BLOCK_TOKENS, num_heads, head_dim)
        self.paged = torch.empty(paged, dtype=torch.bfloat16)
        tensors = [self.paged[part, layer] for layer in range(num_layers) for part in (0, 1)]
        layout = KVLayout.from_tensors(tensors, roles=["k", "v"] * num_layers, block_size=BLOCK_TOKENS)
        pool_bytes = self.num_blocks * (layout.block_bytes + 2 * PAGE_BYTES)
        settings = {"codec": codec, "cpu_pool_size_bytes": pool_bytes} | settings
        config = KVortexConfig(device="host", **settings)
        self.engine = KVortexEngine.create(config, layout=layout)
        self.engine.wait_ready()
        self.rng = np.random.default_rng(1)

    def __call__(self, kv, ids):
        """K and V, ``(2, layers, heads, tokens, head_dim)``, as the model finds them again."""
        saved, loaded = self.rng.permutation(2 * self.num_blocks).reshape(2, -1)
        keys = block_keys(ids.numpy(), block_size=BLOCK_TOKENS)
        self.paged[:, :, saved] = kv.transpose(2, 3).unflatten(2, (-1, BLOCK_TOKENS))
        self.move(self.engine.save_blocks, keys, saved)
        self.leave_ram()
        self.paged.fill_(torch.nan)  # which no logit survives, should a block not come back
        self.move(self.engine.load_blocks, keys, loaded, **self.how)
        self.engine.clear()
        return self.paged[:, :, loaded].flatten(2, 3).transpose(2, 3)

    how = {}  # blocks are loaded

    def leave_ram(self):
        """Blocks stay where they are."""

    def move(self, verb, keys, blocks, **how):
        job = verb(keys, blocks, **how)
        job.wait()
        assert job.num_blocks == self.num_blocks, f"{verb.__name__} moved {job.num_blocks} blocks of {self.num_blocks}"

    @property
    def bits(self):
        """A number of K or V takes so many in a slot: scales, flags and what aligns them counted."""
        stats = self.engine.get_stats()
        return 16 * stats.packed_bytes_saved / stats.bytes_saved


class Disk(Engine):
    """The same through a disk tier with `ecsq`: nothing is left in RAM before blocks are loaded."""

    how = {"promote_timeout_ms": 60_000}

    def __init__(self, level, shape, prefix):
        self.folder = tempfile.TemporaryDirectory(prefix="kvortex-bench-")
        tier = DiskTier(self.folder.name, "2GiB", codec="ecsq", level=level, write_bytes_per_s=0)
        numbers = 2 * np.prod(shape)  # with room for as many blocks again: promotions pin a half of the pool
        super().__init__("exact", shape, prefix, tiers=(tier,), namespace="bench", cpu_pool_size_bytes=int(3 * numbers))
        self.name = f"ecsq {level}"

    def leave_ram(self):
        assert self.engine.flush(60_000) == 0
        self.engine.index.clear()

    @property
    def bits(self):
        """A number of K or V takes so many on the disk: header page and what fills the last page counted."""
        tier = self.engine.get_stats().tiers[0]
        return 16 * tier.bytes_written / (tier.blocks_written * self.engine.layout.block_bytes)


class Bins:
    """LMCache's variant of CacheGen: the largest number of a token in a layer is the last of 32 or 16 bins.

    K has 32 in the first third of the layers, V in the first two. Its bits are those of its own coder, as its
    documentation has them.
    """

    name, bits = "LMCache's bins", 5.35

    def __call__(self, kv, ids):
        num_layers = kv.shape[1]
        layer = torch.arange(num_layers)
        bins = torch.stack([torch.where(layer < first, 32, 16) for first in (num_layers // 3, 2)])
        most = (bins // 2 - 1).float()[..., None, None, None]
        scale = kv.float().abs().amax((2, 4), keepdim=True).clamp(min=2.0**-120) / most
        return ((kv / scale).round().clamp(-most, most) * scale).bfloat16()


class CacheGen:
    """CacheGen as published (SIGCOMM 2024), as we read it: each tenth token in 8 bits, the others as differences to it.

    Differences are rounded to 0.5, 1 or 1.5 of their deviation, in the first, the second and the last third of the
    layers. What its coder makes of them depends on tables of the model; so it has no bits here.
    """

    name, bits = "CacheGen", float("nan")

    def __call__(self, kv, ids):
        numbers, num_layers, num_tokens = kv.float(), kv.shape[1], kv.shape[3]
        third = num_layers // 3
        layer = torch.arange(num_layers)[:, None, None, None]
        step = torch.where(layer < third, 0.5, torch.where(layer < 2 * third, 1.0, 1.5))
        anchors = numbers[..., ::10, :]
        scale = anchors.abs().amax(-1, keepdim=True).clamp(min=2.0**-120) / 127
        anchors = ((anchors / scale).round() * scale).repeat_interleave(10, -2)[..., :num_tokens, :]
        change = numbers - anchors
        step = step * change.std((2, 3), keepdim=True).clamp(min=2.0**-120)
        restored = (change / step).round() * step + anchors
        restored[..., ::10, :] = anchors[..., ::10, :]
        return restored.bfloat16()


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
    ours = [*(Engine(codec, shape, prefix) for codec in codecs), *(Disk(level, shape, prefix) for level in LEVELS)]
    return [*ours, Fp8(), Int8(shape), Bins(), CacheGen()]
