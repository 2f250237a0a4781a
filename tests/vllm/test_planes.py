"""Where K and V lie in vLLM's KV caches, for codecs: whatever the order of K, V, heads and tokens in memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvortex import ConfigError
from kvortex.integrations.vllm.layouts import layout_of, text_of
from kvortex.integrations.vllm.planes import packed_bytes_of, with_planes
from kvortex.transfer import packed_bytes

BLOCKS, TOKENS, HEADS, DIM, LAYERS = 6, 32, 2, 64, 3
K, V = 1.0, 2.0  # what every number of K is, and of V


class FullAttentionSpec(SimpleNamespace):
    pass


class MLAAttentionSpec(SimpleNamespace):
    pass


class MambaSpec(SimpleNamespace):
    pass


def spec(kind=FullAttentionSpec, tokens=TOKENS, heads=HEADS, dim=DIM, dtype=torch.bfloat16, parts=2):
    page = parts * tokens * heads * dim * 2
    return kind(block_size=tokens, num_kv_heads=heads, head_size=dim, dtype=dtype, page_size_bytes=page)


def latent_of(dim):
    return spec(MLAAttentionSpec, tokens=32 * 128 // dim, heads=1, dim=dim, parts=1)


def config_of(*specs, layers=LAYERS):
    """vLLM's ``KVCacheConfig``, as far as it is looked at."""
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=one) for one in specs])


def k_before_v(blocks, tokens):
    cache = torch.empty(2, blocks, tokens, HEADS, DIM, dtype=torch.bfloat16)
    cache[0], cache[1] = K, V
    return cache, 1


def in_a_block(blocks, tokens):
    cache = torch.empty(blocks, 2, tokens, HEADS, DIM, dtype=torch.bfloat16)
    cache[:, 0], cache[:, 1] = K, V
    return cache, 0


def heads_first(blocks, tokens):
    cache, dim = in_a_block(blocks, tokens)
    return cache.permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4), dim  # so in memory, tokens first to see


def side_by_side(blocks, tokens):
    cache = torch.empty(blocks, tokens, HEADS, 2 * DIM, dtype=torch.bfloat16)
    cache[..., :DIM], cache[..., DIM:] = K, V
    return cache, 0


@pytest.mark.parametrize("parts", [1, 2])  # blocks of the kernel in one of the scheduler
@pytest.mark.parametrize("shape", [k_before_v, in_a_block, heads_first, side_by_side])
def test_every_row_of_k_and_of_v_is_in_a_plane_of_its_kind(shape, parts):
    caches, dims = zip(*[shape(BLOCKS * parts, TOKENS // parts) for _ in range(LAYERS)], strict=True)
    layout = with_planes(layout_of(caches, BLOCKS, dims), caches, dims, [spec()] * LAYERS, BLOCKS)
    block = b"".join(bytes_at(base + 2 * stride, piece) for base, stride, piece in layout.runs)
    numbers = np.frombuffer(block, np.uint16)
    seen = {"k": 0, "v": 0}
    for plane in layout.planes:
        for row in range(plane.num_rows):
            first = (plane.first_byte + row * plane.step_bytes) // 2
            assert set(numbers[first : first + plane.row_bytes // 2]) == {{"k": 0x3F80, "v": 0x4000}[plane.role]}
        assert (plane.num_heads, plane.heads_first) == (HEADS, shape is heads_first)
        seen[plane.role] += plane.num_rows
    assert seen == {"k": LAYERS * TOKENS * HEADS, "v": LAYERS * TOKENS * HEADS}
    most = packed_bytes_of(config_of(spec()), layout.block_bytes, "k6v4", (0,))
    assert most - 4096 < packed_bytes(layout, "k6v4", (0,)) <= most


def bytes_at(address, nbytes):
    import ctypes

    return ctypes.string_at(address, nbytes)


@pytest.mark.parametrize("tokens, parts", [(16, 1), (32, 1), (32, 2), (64, 1), (64, 4)])
def test_the_end_of_a_latent_is_left_as_it_is(tokens, parts):
    latent = spec(MLAAttentionSpec, tokens=tokens, heads=1, dim=576, parts=1)
    caches = [torch.zeros(BLOCKS * parts, tokens // parts, 576, dtype=torch.bfloat16) for _ in range(LAYERS)]
    layout = with_planes(layout_of(caches, BLOCKS, 0), caches, [0] * LAYERS, [latent] * LAYERS, BLOCKS)
    assert {plane.row_bytes for plane in layout.planes} == {256} and len(layout.planes) == 4 * LAYERS * parts
    most = packed_bytes_of(config_of(latent), layout.block_bytes, "q8", ())
    assert most - 4096 < packed_bytes(layout, "q8") <= most


@pytest.mark.parametrize(
    "specs, why",
    [
        ([spec(dtype=torch.float16)], "float16"),
        ([spec(dtype=torch.uint8)], "uint8"),
        ([spec(), spec(dim=128)], "pages of one size"),
        ([spec(), spec(MLAAttentionSpec, heads=4, parts=1)], "pages of one size"),
        ([latent_of(64), latent_of(128)], "pages of one size"),
        ([spec(dim=64), spec(tokens=16, dim=128), spec(tokens=128, dim=16)], "heads of 16"),
        ([spec(), MambaSpec(block_size=TOKENS, page_size_bytes=8192)], "MambaSpec"),
        ([spec(dim=40)], "heads of 40"),
    ],
)
def test_what_cannot_be_packed_is_refused_at_start(specs, why):
    block_bytes = LAYERS * specs[0].page_size_bytes
    with pytest.raises(ConfigError, match=why):
        packed_bytes_of(config_of(*specs), block_bytes, "q8", ())
    with pytest.raises(ConfigError, match=f"disk_codec 'ecsq' .*{why}"):
        packed_bytes_of(config_of(*specs), block_bytes, "q8", (), name="disk_codec 'ecsq'")


def test_layers_of_several_groups_that_share_a_page_have_one_number():
    (one, dim), (other, _) = (in_a_block(BLOCKS, TOKENS) for _ in range(2))
    layout = layout_of([one, one, other, other], BLOCKS, [dim] * 4, overlap=True)
    layout = with_planes(layout, [one, one, other, other], [dim] * 4, [spec()] * 4, BLOCKS)
    assert {plane.layer for plane in layout.planes} == {0, 1}


# Groups that share pages: tokens, heads and numbers a head of each, and the kernel's blocks in one of its blocks.
ONE_DIM = ((32, 2, 64, 1), (64, 1, 64, 1))
KERNEL_BLOCKS = ((32, 2, 64, 1), (64, 1, 64, 4))
TWO_DIMS = ((32, 2, 64, 1), (32, 1, 128, 2))


@pytest.mark.parametrize("groups", [ONE_DIM, KERNEL_BLOCKS, TWO_DIMS])
@pytest.mark.parametrize("shape", ["k_before_v", "in_a_block", "side_by_side"])
def test_where_groups_share_pages_but_not_the_shape_of_heads_a_page_is_vectors_of_one_length(shape, groups):
    memory = [torch.randn(BLOCKS * 2 * TOKENS * HEADS * DIM, dtype=torch.bfloat16) for _ in range(LAYERS)]
    caches, dims, specs = [], [], []
    for tokens, heads, dim, parts in groups:
        sizes, rows = (BLOCKS * parts,), (tokens // parts, heads, dim)
        view = {
            "k_before_v": (2, *sizes, *rows),
            "in_a_block": (*sizes, 2, *rows),
            "side_by_side": (*sizes, *rows[:2], 2 * dim),
        }[shape]
        caches += [one.view(view) for one in memory]
        dims += [int(shape == "k_before_v")] * LAYERS
        specs += [spec(tokens=tokens, heads=heads, dim=dim)] * LAYERS
    layout = with_planes(layout_of(caches, BLOCKS, dims, overlap=True), caches, dims, specs, BLOCKS)
    assert {plane.row_bytes for plane in layout.planes} == {2 * DIM}
    assert sum(plane.num_rows for plane in layout.planes) * 2 * DIM == layout.block_bytes
    assert {plane.layer for plane in layout.planes} == set(range(LAYERS))
    for codec in ("q8", "q4"):
        most = packed_bytes_of(config_of(*specs), layout.block_bytes, codec, (0,))
        assert most - 4096 < packed_bytes(layout, codec, (0,)) <= most
    for codec in ("k8v5", "k6v4"):  # what is K in a block of one group may be V in one of the other
        with pytest.raises(ConfigError, match="use q8 or q4"):
            packed_bytes_of(config_of(*specs), layout.block_bytes, codec, ())


@pytest.mark.parametrize("kind, dim, row_bytes", [(FullAttentionSpec, 64, 64), (MLAAttentionSpec, 576, 256)])
def test_on_cpus_attention_has_rows_of_32_numbers_and_a_latent_its_own(kind, dim, row_bytes):
    parts, heads = (2, HEADS) if kind is FullAttentionSpec else (1, 1)
    one = spec(kind, heads=heads, dim=dim, parts=parts)
    shape = (BLOCKS, heads, TOKENS, 2 * dim) if parts == 2 else (BLOCKS, TOKENS, dim)
    caches = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(LAYERS)]
    layout = layout_of(caches, BLOCKS, 0)
    layout = with_planes(layout, caches, [0] * LAYERS, [one] * LAYERS, BLOCKS, on_cpu=True)
    assert {plane.row_bytes for plane in layout.planes} == {row_bytes}
    most = packed_bytes_of(config_of(one), layout.block_bytes, "q8", (), on_cpu=True)
    assert most - 4096 < packed_bytes(layout, "q8") <= most
    if parts == 2:
        with pytest.raises(ConfigError, match="on CPUs.*use q8 or q4"):
            packed_bytes_of(config_of(one), layout.block_bytes, "k8v5", (), on_cpu=True)


def test_blocks_that_are_packed_otherwise_have_other_names():
    cache = torch.zeros(BLOCKS, TOKENS, HEADS, 2 * DIM, dtype=torch.bfloat16)
    layout = layout_of([cache], BLOCKS, 0)
    layouts = [
        layout,
        *(with_planes(layout, [cache], [0], [spec()], BLOCKS, on_cpu=on_cpu) for on_cpu in (True, False)),
    ]
    assert len({text_of(one, [cache], [0], ()) for one in layouts}) == 3


def test_groups_of_one_shape_whose_kernels_have_blocks_of_their_own_are_refused():
    memory = torch.zeros(BLOCKS * 2 * TOKENS * HEADS * DIM, dtype=torch.bfloat16)
    caches = [memory.view(BLOCKS, 2, TOKENS, HEADS, DIM), memory.view(2 * BLOCKS, 2, TOKENS // 2, HEADS, DIM)]
    with pytest.raises(ConfigError, match="K and V at different places"):
        with_planes(layout_of(caches, BLOCKS, [0, 0], overlap=True), caches, [0, 0], [spec()] * 2, BLOCKS)


def test_a_cache_of_unknown_shape_is_refused():
    cache = torch.zeros(BLOCKS, TOKENS, HEADS, DIM, 2, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="does not know where K and V lie"):
        with_planes(layout_of([cache], BLOCKS, 0), [cache], [0], [spec()], BLOCKS)
