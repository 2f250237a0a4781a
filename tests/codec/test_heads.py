"""Which rows of a block belong to one token: what a layout's planes say of heads, in every order there is."""

import numpy as np
import pytest

from kvortex import KVLayout
from kvortex.transfer.planes import heads_of

BLOCKS, TOKENS, HEADS, DIM = 6, 16, 4, 64


def tensor(*shape, order=None):
    """Numbers of this shape that lie in memory in that order of its dimensions."""
    order = range(len(shape)) if order is None else order
    whole = np.arange(np.prod(shape), dtype=np.int64).astype(np.uint16).reshape([shape[dim] for dim in order])
    return whole.transpose(np.argsort(order))


CASES = {
    "tokens outside": (tensor(BLOCKS, TOKENS, HEADS, DIM), 0, "k", False),
    "heads outside": (tensor(BLOCKS, HEADS, TOKENS, DIM), 0, "k", True),
    "heads outside in memory alone": (tensor(BLOCKS, TOKENS, HEADS, DIM, order=(0, 2, 1, 3)), 0, "v", True),
    "K and then V": (tensor(BLOCKS, 2, TOKENS, HEADS, DIM), 0, "kv", False),
    "K and V apart": (tensor(2, BLOCKS, TOKENS, HEADS, DIM), 1, "kv", False),
    "K and V apart, heads outside": (tensor(2, BLOCKS, TOKENS, HEADS, DIM, order=(0, 1, 3, 2, 4)), 1, "kv", True),
    "K beside V": (tensor(BLOCKS, TOKENS, HEADS, 2 * DIM), 0, "interleaved", False),
    "K beside V, heads outside": (tensor(BLOCKS, HEADS, TOKENS, 2 * DIM), 0, "interleaved", True),
}


@pytest.mark.parametrize("name", CASES)
def test_planes_tell_heads_from_tokens(name):
    cache, block_dim, role, heads_first = CASES[name]
    layout = KVLayout.from_tensors([cache], block_dim, roles=role, block_size=TOKENS)
    assert layout.planes
    for plane in layout.planes:
        assert (plane.num_rows, plane.num_heads, plane.heads_first) == (TOKENS * HEADS, HEADS, heads_first)


def test_tokens_come_before_heads_where_nobody_says_how_many_there_are():
    layout = KVLayout.from_tensors([CASES["tokens outside"][0]], roles="k")
    assert {plane.num_heads for plane in layout.planes} == {HEADS}


def test_latents_and_vectors_without_heads_have_one():
    for shape in ((BLOCKS, TOKENS, DIM), (BLOCKS, DIM)):
        layout = KVLayout.from_tensors([tensor(*shape)], roles="k", block_size=TOKENS)
        assert {plane.num_heads for plane in layout.planes} == {1}
    assert heads_of((BLOCKS, 3, TOKENS, HEADS, DIM), (1, 1, 1, 1, 1), 0, 3 * TOKENS * HEADS) == (1, False)


def test_layouts_by_sizes_have_their_heads():
    cache = np.zeros((2, BLOCKS, TOKENS, HEADS, DIM), np.uint16)
    layout = KVLayout.contiguous(
        cache,
        num_layers=1,
        num_blocks=BLOCKS,
        block_size=TOKENS,
        num_heads=HEADS,
        head_dim=DIM,
        itemsize=2,
        dtype="bfloat16",
    )
    assert [(plane.role, plane.num_heads, plane.heads_first) for plane in layout.planes] == [
        ("k", HEADS, False),
        ("v", HEADS, False),
    ]
