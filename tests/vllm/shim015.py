"""The three attention kernels of vLLM 0.15's CPU extension, in torch: importing this lets 0.15 run without it.

The names and the order of the arguments are vLLM's.
"""

import torch
import torch.nn.functional as F
import vllm._custom_ops as ops


def scheduler_metadata(**sizes):
    return torch.zeros(1, dtype=torch.int8)


def reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa):
    block_tokens = key_cache.shape[2]
    blocks, offsets = slot_mapping // block_tokens, slot_mapping % block_tokens
    key_cache[blocks, :, offsets] = key[: slot_mapping.numel()]
    value_cache[blocks, :, offsets] = value[: slot_mapping.numel()]


def attention_with_kv_cache(
    query, key_cache, value_cache, output, query_start_loc, seq_lens, scale, causal, alibi_slopes, sliding_window,
    block_table, softcap, scheduler_metadata, s_aux,
):  # fmt: skip
    block_tokens = key_cache.shape[2]
    queries_per_head = query.shape[1] // key_cache.shape[1]
    starts = query_start_loc.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        first, end = starts[row], starts[row + 1]
        if first == end:
            continue
        blocks = block_table[row, : -(-length // block_tokens)].long()

        def gathered(cache, blocks=blocks, length=length):  # (heads of the queries, tokens, head size)
            heads = cache[blocks].transpose(1, 2).reshape(-1, cache.shape[1], cache.shape[3])[:length]
            return heads.repeat_interleave(queries_per_head, 1).transpose(0, 1)

        num_queries = end - first
        mask = torch.ones(num_queries, length, dtype=torch.bool).tril(length - num_queries)
        part = F.scaled_dot_product_attention(
            query[first:end].transpose(0, 1)[None],
            gathered(key_cache)[None],
            gathered(value_cache)[None],
            attn_mask=mask,
            scale=scale,
        )[0]
        output[first:end].view(num_queries, query.shape[1], -1).copy_(part.transpose(0, 1))


if not hasattr(torch._C._cpu, "_is_amx_tile_supported"):
    torch._C._cpu._is_amx_tile_supported = lambda: False
ops.cpu_attn_get_scheduler_metadata = scheduler_metadata
ops.cpu_attn_reshape_and_cache = reshape_and_cache
ops.cpu_attention_with_kv_cache = attention_with_kv_cache
