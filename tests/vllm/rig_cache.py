"""The KV cache of a rig: vLLM's configuration of it, its tensors, and what each token's KV must be."""

import inspect

import numpy as np
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups
except ImportError:  # before 0.33
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups

BLOCK_TOKENS = 16


def configure_cache(config, num_blocks, heads, num_groups):
    """vLLM's configuration of the KV cache for one rank; with two groups, the second one's layers have a window."""

    def spec(count, kind=FullAttentionSpec, **more):
        return kind(
            **known(kind, block_size=BLOCK_TOKENS, num_kv_heads=count, head_size=1, dtype=torch.float32), **more
        )

    layers = [f"layer{number}" for number in range(len(heads))]
    if len(set(heads)) > 1:
        specs = {name: spec(count) for name, count in zip(layers, heads, strict=True)}
        groups = [KVCacheGroupSpec(layers, UniformTypeKVCacheSpecs.from_specs(specs))]
    else:  # vLLM makes one group of layers that are alike
        specs = [spec(heads[0]), spec(heads[0], SlidingWindowSpec, sliding_window=2048)][:num_groups]
        groups = [KVCacheGroupSpec(layers[at::num_groups], one) for at, one in enumerate(specs)]
    config.cache_config.num_gpu_blocks_override = num_blocks
    if hasattr(config.cache_config, "kv_cache_layout"):  # the engine core's choice
        config.cache_config.kv_cache_layout = "LBHNC"
    return get_kv_cache_config_from_groups(config, groups, 1 << 30)


def known(function, **arguments):
    """Only the arguments that this version knows."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


class Truth:
    """The tokens that a prompt is bound to lead to, and a number for each made of all tokens up to it."""

    def __init__(self, prompt):
        self.tokens, self.state, self.numbers = list(prompt), 17, []

    def states(self, count):
        for token in self.tokens[len(self.numbers) : count]:
            self.state = (self.state * 1000003 + token + 1) & 0xFFFFF
            self.numbers.append(self.state)
        return np.asarray(self.numbers[:count], dtype=np.float32)

    def token_after(self, count):
        token = int(self.states(count)[-1]) % 997 + 3
        if len(self.tokens) == count:
            self.tokens.append(token)
        return token


def planes(cache):
    """Keys and values of each layer and head as (block, token) arrays."""
    for tensor in cache.values():
        for part in tensor.numpy():
            for head in range(part.shape[2]):
                yield part[:, :, head, 0]
