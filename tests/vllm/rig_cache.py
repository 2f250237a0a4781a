"""The KV cache of a rig: vLLM's configuration of it, its tensors, and what each token's KV must be."""

import inspect
from math import lcm
from types import MethodType, SimpleNamespace

import numpy as np
import torch
from vllm.v1 import kv_cache_interface as interface
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MambaSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker import utils as worker_utils

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups
except ImportError:  # before 0.33
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups

BLOCK_TOKENS = 16
HAS_ONE_ALLOCATION = hasattr(worker_utils, "allocate_kv_cache")  # 0.32: all layers of all groups are views of it


class Group:
    """One KV cache group: which tokens it reads, and where in a cache they lie.

    Parameters
    ----------
    index : int
    form : str
        "full", "mla", "window:64", "chunk:64", or "state", of which a block has one.
    num_blocks, block_tokens : int
    layers : list of str
        Names, of all stages of a pipeline. A group may have none.
    """

    def __init__(self, index, form, num_blocks, block_tokens, layers):
        self.kind, _, reach = form.partition(":")
        self.index, self.reach, self.is_state = index, int(reach or 0), self.kind == "state"
        self.num_blocks, self.block_tokens, self.layers = num_blocks, block_tokens, layers
        self.is_zeroed = False  # before use, by this version and with these other groups

    def spec(self, heads, page_bytes, *, pad_bytes=0):
        """vLLM's, of one layer; a state fills three quarters of its page."""
        if self.is_state:
            words = page_bytes // 4 * 3 // 4
            return MambaSpec(
                block_size=self.block_tokens, shapes=((2,), (words - 2,)), dtypes=(torch.float32,) * 2,
                page_size_padded=page_bytes + pad_bytes, mamba_cache_mode="align",
            )  # fmt: skip
        name, more = {
            "full": ("FullAttentionSpec", {}),
            "mla": ("MLAAttentionSpec", {}),
            "window": ("SlidingWindowSpec", {"sliding_window": self.reach}),
            "chunk": ("ChunkedLocalAttentionSpec", {"attention_chunk_size": self.reach}),
        }[self.kind]
        sizes = {"num_kv_heads": heads, "head_size": 1}
        if self.kind == "mla":
            sizes = {"num_kv_heads": 1, "head_size": 2 * heads}
        if pad_bytes:
            more["page_size_padded"] = page_bytes + pad_bytes
        kind = getattr(interface, name)
        return kind(**known(kind, block_size=self.block_tokens, dtype=torch.float32, **sizes), **more)

    def first_read(self, computed):
        """The first of the computed tokens that the forward of the next one reads."""
        if self.kind == "window":
            return max(0, computed - self.reach + 1)
        if self.kind == "chunk":
            return computed // self.reach * self.reach
        return max(0, computed - 1) // self.block_tokens * self.block_tokens if self.is_state else 0

    def blocks(self, table, first, last):
        """The blocks of a table that have these tokens, the first and the last only in part."""
        return table[first // self.block_tokens : -(-last // self.block_tokens)]

    def state_block(self, table, computed):
        """Where the state lies that has seen so many tokens."""
        return table[(computed - 1) // self.block_tokens]

    def pages(self, cache):
        """One array per tensor of the group: blocks first; then tokens, or the words of a state."""
        for name in filter(cache.__contains__, self.layers):  # of the stage whose cache it is
            tensor = cache[name]
            if isinstance(tensor, list):  # states before 0.32
                yield from (part.numpy() for part in tensor)
            elif self.is_state:
                yield from np.split(tensor.view(torch.float32).numpy()[:, 0, 0], [2], axis=1)
            else:
                dims = [tensor.shape.index(size) for size in (self.num_blocks, self.block_tokens)]
                yield np.moveaxis(tensor.numpy(), dims, (0, 1))

    def planes(self, cache):
        """Where the numbers lie: (block, token) arrays of keys and values of each head, of states (block,) arrays."""
        for page in self.pages(cache):
            if self.is_state:
                yield from (page[:, 0], page[:, -1])
            else:
                yield from (page[(..., *at)] for at in np.ndindex(page.shape[2:]))


def planes(cache, groups):
    """All planes of a cache with their number and group."""
    return enumerate((group, plane) for group in groups for plane in group.planes(cache))


def make_groups(forms, num_blocks, block_tokens, layers, first_layer=0):
    """The groups of these forms; tokens and number of layers as one for all, or as one for each."""
    block_tokens = (block_tokens,) * len(forms) if isinstance(block_tokens, int) else block_tokens
    layers = (layers,) * len(forms) if isinstance(layers, int) else layers
    groups = []
    for number, (form, tokens, count) in enumerate(zip(forms, block_tokens, layers, strict=True)):
        layers_of_one = range(first_layer, first_layer + count)
        names = [f"layer{at * len(forms) + number}" for at in layers_of_one]  # as vLLM deals them out
        groups.append(Group(number, form, num_blocks, tokens, names))
    return groups


def configure_cache(config, num_blocks, groups, *, heads=(1, 1), mixed_pages=False, pad_bytes=0, layout="LBHNC"):
    """vLLM's configuration of the KV cache for one rank, by its own function.

    Parameters
    ----------
    heads : tuple of int
        Of each layer of a group that stands alone, of the first one else.
    mixed_pages : bool
        Whether every second layer of a group has twice the heads; then the specs of its layers are kept apart.
    pad_bytes : int
        Unused, at the end of each page.
    layout : str
        vLLM's name of one, from 0.32 on.
    """
    most_tokens = max(group.block_tokens for group in groups)
    specs = []
    for group in groups:
        base = heads[0] * most_tokens // group.block_tokens  # pages of all groups are of one size
        sizes = heads if len(groups) == 1 and len(heads) == len(group.layers) else (base,) * len(group.layers)
        if mixed_pages:
            sizes = [base * (1 + at % 2) for at in range(len(group.layers))]
        layers = {
            name: group.spec(count, count * group.block_tokens * 8, pad_bytes=pad_bytes)
            for name, count in zip(group.layers, sizes, strict=True)
        }
        of_one = group.spec(base, base * group.block_tokens * 8, pad_bytes=pad_bytes)
        mixed = mixed_pages or len(set(sizes)) > 1
        specs.append(UniformTypeKVCacheSpecs.from_specs(layers) if mixed else of_one)
    config.cache_config.num_gpu_blocks_override = num_blocks
    config.cache_config.block_size = min(group.block_tokens for group in groups)
    if any(group.is_state for group in groups):
        config.cache_config.mamba_cache_mode = "align"
        config.cache_config.mamba_block_size = lcm(*(group.block_tokens for group in groups if group.is_state))
    if hasattr(config.cache_config, "kv_cache_layout"):  # the engine core's choice
        config.cache_config.kv_cache_layout = layout
    of_vllm = [KVCacheGroupSpec(group.layers, spec) for group, spec in zip(groups, specs, strict=True)]
    made = get_kv_cache_config_from_groups(config, of_vllm, 1 << 30)
    if hasattr(made, "kv_cache_layout"):
        made.kv_cache_layout = layout
    return made


def resolve_block_sizes(config, for_scheduler, for_workers):
    """Tokens of the scheduler's blocks and of the hashed ones, as the engine core finds them; it tells the workers."""
    if not hasattr(kv_cache_utils, "resolve_kv_cache_block_sizes"):  # before 0.26
        return config.cache_config.block_size, config.cache_config.block_size
    sizes = kv_cache_utils.resolve_kv_cache_block_sizes(for_scheduler, config)
    if hasattr(for_scheduler, "hash_block_size"):
        alignment = kv_cache_utils.resolve_cache_hit_alignment_tokens(for_scheduler, config, *sizes)
        for one in (for_scheduler, *for_workers):
            one.hash_block_size, one.cache_hit_alignment_tokens = sizes[1], alignment
    return sizes


def make_tensors(cache_config, layout):
    """The tensors of one rank by layer, made by vLLM's own model runner, with the CPU's shape of a cache."""
    if HAS_ONE_ALLOCATION:
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return worker_utils.allocate_kv_cache(cache_config, torch.device("cpu"), KVCacheLayout[layout])
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    parts = []
    for number, group in enumerate(cache_config.kv_cache_groups):
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None) or dict.fromkeys(
            group.layer_names, group.kv_cache_spec
        )
        for name, spec in specs.items():
            backend = TritonMLABackend if isinstance(spec, interface.MLAAttentionSpec) else CPUAttentionBackend
            parts.append(worker_utils.AttentionGroup(backend, [name], spec, number))
    runner = SimpleNamespace(
        device="cpu", runner_only_attn_layers=set(), kv_cache_config=cache_config,
        cache_config=SimpleNamespace(cache_dtype="auto"), _kv_cache_spec_attn_group_iterator=lambda: parts,
    )  # fmt: skip
    for name in ("_has_mixed_attention_kv_layout", "_update_hybrid_attention_mamba_layout"):
        if hasattr(GPUModelRunner, name):
            setattr(runner, name, MethodType(getattr(GPUModelRunner, name), runner))
    made = {
        "kv_cache_config": cache_config,
        "kv_cache_raw_tensors": GPUModelRunner._allocate_kv_cache_tensors(runner, cache_config),
        "kernel_block_sizes": [group.kv_cache_spec.block_size for group in cache_config.kv_cache_groups],
    }
    reshape = GPUModelRunner._reshape_kv_cache_tensors
    return reshape(runner, **known(reshape, **made))


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
