"""From vLLM's tensors to runs of bytes: every shape that vLLM registers, and those that cannot be moved."""

import ctypes

import pytest
import torch
from vllm.v1.attention.backend import AttentionBackend

import kvortex
from kvortex.integrations.vllm.layouts import block_dimension, layout_of

NB, BS, H, D, L = 7, 16, 2, 4, 3  # blocks, tokens of a block, heads, numbers of a head, layers


def numbered(shape, order=None, first=0):
    """A tensor of distinct numbers; `order` names its dimensions from the outermost in memory."""
    order = order or range(len(shape))
    tensor = torch.empty([shape[dim] for dim in order]).permute([list(order).index(dim) for dim in range(len(shape))])
    return tensor.copy_(torch.arange(first, first + tensor.numel()).reshape(shape))


def record(layout, block):
    """The numbers that are moved for a block, in their order in the slot."""
    content = b"".join(ctypes.string_at(base + block * stride, nbytes) for base, stride, nbytes in layout.runs)
    return torch.frombuffer(bytearray(content), dtype=torch.float32)


def require_whole_blocks(layout, tensors, block_dim, per_block=1):
    """Each block's record has exactly the block's numbers, each of them once."""
    for block in range(layout.num_blocks):
        parts = range(block * per_block, (block + 1) * per_block)
        wanted = torch.cat([tensor.select(block_dim, part).flatten() for tensor in tensors for part in parts])
        assert torch.equal(record(layout, block).sort().values, wanted.sort().values)


@pytest.mark.parametrize(
    "name, shape, order, block_dim, pieces",
    [
        ("FlashAttention of 0.15", (2, NB, BS, H, D), None, 1, 2),
        ("FlashAttention of 0.15, heads first in memory", (2, NB, BS, H, D), (0, 1, 3, 2, 4), 1, 2),
        ("FlashInfer and Triton of 0.15", (NB, 2, BS, H, D), None, 0, 1),
        ("FlashInfer, heads first in memory", (NB, 2, BS, H, D), (0, 1, 3, 2, 4), 0, 1),
        ("MLA", (NB, BS, 576), None, 0, 1),
        ("CPU of 0.15", (2, NB, H, BS, D), None, 1, 2),
        ("packed, 0.26 and later, tokens first in memory", (NB, H, BS, 2 * D), (0, 2, 1, 3), 0, 1),
        ("packed, 0.26 and later, heads first in memory", (NB, H, BS, 2 * D), None, 0, 1),
    ],
)
def test_a_layer_is_moved_block_by_block(name, shape, order, block_dim, pieces):
    size = torch.Size(shape).numel()
    tensors = [numbered(shape, order, first=layer * size) for layer in range(L)]
    layout = layout_of(tensors, NB, block_dim)
    assert layout.num_blocks == NB and len(layout.runs) == L * pieces
    assert layout.block_bytes == L * size // NB * 4
    require_whole_blocks(layout, tensors, block_dim)


def test_layers_over_each_other_are_refused():
    memory = torch.zeros(NB * 64)
    tensors = [memory.view(NB, 64), memory[16 : 16 + NB * 32].view(NB, 32)]
    with pytest.raises(kvortex.ConfigError, match="share bytes"):
        layout_of(tensors, NB, 0)


def test_keys_come_before_values_and_layers_in_their_order():
    tensors = [numbered((2, NB, BS, H, D), first=layer * 10_000) for layer in range(L)]
    layout = layout_of(tensors, NB, 1)
    for block in range(NB):
        assert torch.equal(record(layout, block), torch.cat([tensor[:, block].flatten() for tensor in tensors]))


def test_one_tensor_for_all_layers_is_one_piece_a_block():
    tensor = numbered((NB, L, 2, BS, H, D))
    layout = layout_of([tensor], NB, 0)
    assert len(layout.runs) == 1 and layout.runs[0][2] == tensor[0].numel() * 4
    require_whole_blocks(layout, [tensor], 0)


@pytest.mark.parametrize("shape, block_dim", [((2, 4 * NB, 4, H, D), 1), ((4 * NB, 2, 4, H, D), 0)])
def test_a_kernels_blocks_may_be_smaller_than_the_schedulers(shape, block_dim):
    tensors = [numbered(shape, first=layer * 10_000) for layer in range(L)]
    layout = layout_of(tensors, NB, block_dim)
    assert layout.num_blocks == NB
    require_whole_blocks(layout, tensors, block_dim, per_block=4)


def test_layers_may_differ_in_pages_shapes_and_kernel_blocks():
    """As of several attention backends in one model."""
    tensors = [numbered((2, NB, BS, H, D)), numbered((NB, BS, 5), first=10_000), numbered((4 * NB, 4, 3), first=20_000)]
    layout = layout_of(tensors, NB, [1, 0, 0])
    assert layout.num_blocks == NB
    for block in range(NB):
        parts = tensors[2][4 * block : 4 * block + 4]
        wanted = [tensors[0][:, block].flatten(), tensors[1][block].flatten(), parts.flatten()]
        assert torch.equal(record(layout, block), torch.cat(wanted))


def test_small_blocks_of_layers_side_by_side_are_one_piece():
    whole = numbered((4 * NB, L, 4, H, D))
    tensors = [whole[:, layer] for layer in range(L)]
    layout = layout_of(tensors, NB, 0)
    assert len(layout.runs) == 1
    require_whole_blocks(layout, tensors, 0, per_block=4)


def test_layers_that_share_a_tensor_are_moved_once():
    tensor = numbered((2, NB, BS, H, D))
    assert layout_of([tensor, tensor, tensor.view(tensor.shape)], NB, 1).runs == layout_of([tensor], NB, 1).runs


def test_layers_that_lie_in_one_storage_are_moved_each():
    whole = numbered((L, 2, NB, BS, H, D))
    layout = layout_of(list(whole), NB, 1)
    require_whole_blocks(layout, list(whole), 1)


def test_heads_outside_of_blocks_are_pieces_of_their_own():
    tensor = numbered((2, NB, BS, H, D), (0, 3, 1, 2, 4))
    layout = layout_of([tensor], NB, 1)
    assert len(layout.runs) == 2 * H
    require_whole_blocks(layout, [tensor], 1)


@pytest.mark.parametrize(
    "tensor",
    [numbered((2, NB, BS, H, 2 * D))[..., :D], numbered((2, NB, BS, H, D))[:, :, :, :1]],
    ids=["numbers_of_heads", "heads"],
)
def test_blocks_with_gaps_are_refused(tensor):
    with pytest.raises(kvortex.ConfigError, match="cannot move this KV cache"):
        layout_of([tensor], NB, 1)


@pytest.mark.parametrize("num_blocks", [NB - 1, NB + 1, 2 * NB])
def test_another_number_of_blocks_is_refused(num_blocks):
    with pytest.raises(kvortex.ConfigError, match=f"vLLM counts {num_blocks} blocks, but the KV cache has {NB}"):
        layout_of([numbered((2, NB, BS, H, D))], num_blocks, 1)


# ---- which dimension counts blocks -----------------------------------------------------------------------------------


class Spec:
    block_size, num_kv_heads, head_size = BS, H, D


def backend(shape_of):
    class Backend(AttentionBackend):
        get_kv_cache_shape = staticmethod(shape_of)

    return Backend


@pytest.mark.parametrize(
    "shape_of, block_dim",
    [
        (lambda blocks, size, heads, width, *more: (2, blocks, size, heads, width), 1),
        (lambda blocks, size, heads, width, *more: (blocks, 2, size, heads, width), 0),
        (lambda blocks, size, heads, width, *more: (blocks, heads, size, 2 * width), 0),
    ],
)
@pytest.mark.parametrize("num_blocks", [2, BS, H, D, 31])
def test_the_attention_backend_says_where_blocks_are_counted(shape_of, block_dim, num_blocks):
    tensor = torch.zeros(shape_of(num_blocks, BS, H, D))
    assert block_dimension(backend(shape_of), Spec, tensor, num_blocks) == block_dim


def test_without_a_backend_the_only_dimension_that_fits_counts_blocks():
    assert block_dimension(None, Spec, torch.zeros(2, 31, BS, H, D), 31) == 1
    assert block_dimension(None, Spec, torch.zeros(62, BS, 576), 31) == 0


def test_a_shape_in_which_two_dimensions_may_count_blocks_is_refused():
    with pytest.raises(kvortex.ConfigError, match=r"which dimension .* its 16 blocks\? Shape \(2, 16, 16, 2, 4\)"):
        block_dimension(None, Spec, torch.zeros(2, 16, 16, 2, 4), 16)


def test_a_backend_that_speaks_of_another_shape_is_not_believed():
    other = backend(lambda blocks, size, heads, width, *more: (blocks, size))
    assert block_dimension(other, Spec, torch.zeros(2, 31, BS, H, D), 31) == 1
