"""KVLayout and its planner, held against arithmetic of our own: which device byte belongs to which byte of which slot.

Nothing is copied here. The planner only computes, so that its layouts may lie at made-up addresses.
"""

import ctypes
import os
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

import kvortex
from kvortex import KVLayout, PinnedPool
from kvortex.transfer._layout import plan_copies

PAGE = 4096
NUM_SLOTS, FIRST_CHUNK, CHUNK = 24, 3, 5


def chunk_of(slot):
    return 0 if slot < FIRST_CHUNK else 1 + (slot - FIRST_CHUNK) // CHUNK


def make_pool(pages=1, header_bytes=0):
    stride = pages * PAGE + header_bytes
    pool = PinnedPool(
        NUM_SLOTS * stride,
        pages * PAGE,
        os.environ.get("KVORTEX_TEST_DEVICE", "host"),
        header_bytes=header_bytes,
        first_chunk_bytes=FIRST_CHUNK * stride,
        chunk_bytes=CHUNK * stride,
    )
    pool.wait_ready(20_000)
    return pool


@pytest.fixture(scope="module", params=[0, PAGE], ids=["without_header", "with_header"])
def pool(request):
    with make_pool(header_bytes=request.param) as made:
        yield made


def rows_of(copies):
    """Every contiguous part of a plan, as (device, host, bytes)."""
    for copy in copies:
        for row in range(copy["rows"]):
            yield (
                copy["device"] + row * copy["device_pitch"],
                copy["host"] + row * copy["host_pitch"],
                copy["row_bytes"],
            )


def image_of(parts, pool):
    """For each byte of the pool the device byte that belongs there, 0 for none; no byte may be named twice."""
    start = pool.address(0) - pool.header_bytes
    image = np.zeros(pool.nbytes, dtype=np.int64)
    for device, host, nbytes in parts:
        span = image[host - start : host - start + nbytes]
        assert span.size == nbytes, "a copy reaches beyond the pool"
        assert not span.any(), "a byte is named twice"
        span[:] = np.arange(device, device + nbytes)
    return image


def wanted_parts(runs, block_ids, slots, pool):
    """What a layout means: the pieces of a block, run after run, one after the other in its slot."""
    for block, slot in zip(block_ids, slots, strict=True):
        host = pool.address(slot)
        for base, stride, piece in runs:
            yield base + block * stride, host, piece
            host += piece


def require_legal(copies, allocations, pool):
    """No part of a copy leaves its allocation or the registration it starts in; strided ones are worth their call."""
    start = pool.address(0) - pool.header_bytes
    for device, host, nbytes in rows_of(copies):
        assert any(first <= device and device + nbytes <= end for first, end in allocations), "crosses allocations"
        slots = (host - start) // pool.stride_bytes, (host - start + nbytes - 1) // pool.stride_bytes
        assert chunk_of(slots[0]) == chunk_of(slots[1]), "crosses registrations"
    for copy in copies:
        if copy["rows"] > 1:
            assert copy["rows"] >= 4
            assert max(copy["device_pitch"], copy["host_pitch"]) < 2 << 30


@st.composite
def layouts(draw):
    """(runs, number of blocks, allocations): allocations of several kinds, side by side or apart."""
    num_blocks = draw(st.sampled_from([1, 2, 3, 6]))
    piece_sizes = st.integers(1, 40)
    runs_of, allocations, address = [], [], 1 << 20
    for _ in range(draw(st.integers(1, 4))):
        count, piece = draw(st.integers(1, 9)), draw(piece_sizes)
        kind = draw(st.sampled_from(["even", "uneven", "interleaved", "touching"]))
        runs, end = [], address
        if kind in ("even", "uneven"):  # layer after layer; each an array of blocks
            stride = piece + draw(st.sampled_from([0, 0, 8]))
            gap = draw(st.sampled_from([0, 16, 1 << 32]))
            for _ in range(count):
                runs.append((end, stride, piece))
                end += num_blocks * stride + (gap if kind == "even" else draw(st.integers(0, 64)))
        else:  # block after block; each has a piece of every run
            pieces = [draw(piece_sizes) for _ in range(count)] if draw(st.booleans()) else [piece] * count
            hole = 0 if kind == "touching" else draw(st.integers(0, 8))
            stride = sum(pieces) + hole * count + draw(st.sampled_from([0, 5]))
            first = address
            for piece in pieces:
                runs.append((first, stride, piece))
                first += piece + hole
            end = address + num_blocks * stride
        runs_of.append(runs)
        allocations.append((address, end))
        address = end + draw(st.sampled_from([0, 0, 256, 4096]))
    if draw(st.booleans()):  # K of layer 0, V of layer 0, K of layer 1, ...
        longest = max(map(len, runs_of))
        runs = [runs[index] for index in range(longest) for runs in runs_of if index < len(runs)]
    else:
        runs = [run for runs in runs_of for run in runs]
    return runs, num_blocks, allocations


@given(case=layouts(), strided=st.booleans(), data=st.data())
def test_every_byte_is_named_once_and_belongs_where_it_goes(pool, case, strided, data):
    runs, num_blocks, allocations = case
    layout = KVLayout(runs, num_blocks)
    assert layout.block_bytes == sum(piece for _, _, piece in runs)
    slots = data.draw(st.lists(st.integers(0, NUM_SLOTS - 1), unique=True, min_size=1, max_size=NUM_SLOTS))
    blocks = data.draw(st.lists(st.integers(0, num_blocks - 1), min_size=len(slots), max_size=len(slots)))
    copies = plan_copies(layout, blocks, slots, pool, strided)
    wanted = image_of(wanted_parts(runs, blocks, slots, pool), pool)
    assert np.array_equal(image_of(rows_of(copies), pool), wanted)
    require_legal(copies, allocations, pool)
    if not strided:
        assert all(copy["rows"] == 1 for copy in copies)


stretches = st.lists(
    st.tuples(st.integers(0, NUM_SLOTS - 1), st.integers(0, 30), st.integers(1, 8)), min_size=1, max_size=6
)


@given(stretches=stretches)
def test_neighbours_are_merged_where_both_sides_go_on_and_only_there(stretches):
    """Blocks of one run without gaps, of the size of a slot: what a cross-layer cache is."""
    pairs = {}  # slot -> block, in the order of the call
    for first_slot, first_block, count in stretches:
        pairs |= {first_slot + i: first_block + i for i in range(count) if first_slot + i < NUM_SLOTS}
    pairs = list(pairs.items())[:15]  # below the planner's window of 16 copies, at which a merge ends too
    wanted = []
    for slot, block in pairs:
        last = wanted[-1] if wanted else None
        if last and (slot, block) == (last[0] + last[2], last[1] + last[2]) and chunk_of(last[0]) == chunk_of(slot):
            last[2] += 1
        else:
            wanted.append([slot, block, 1])
    with make_pool() as pool:
        layout = KVLayout.cross_layer(1 << 30, num_blocks=40, block_bytes=PAGE)
        copies = plan_copies(layout, [block for _, block in pairs], [slot for slot, _ in pairs], pool)
        assert [(copy["host"], copy["device"], copy["row_bytes"]) for copy in copies] == [
            (pool.address(slot), (1 << 30) + block * PAGE, count * PAGE) for slot, block, count in wanted
        ]


def test_merging_stops_at_a_registration():
    with make_pool() as pool:
        layout = KVLayout.cross_layer(1 << 30, num_blocks=10, block_bytes=PAGE)
        copies = plan_copies(layout, range(10), range(10), pool)
    assert [copy["row_bytes"] // PAGE for copy in copies] == [3, 5, 2]


@pytest.mark.parametrize("stride", [PAGE + 64, 2 * PAGE])
def test_nothing_is_merged_over_a_gap_on_the_device(stride):
    with make_pool() as pool:
        copies = plan_copies(KVLayout([(1 << 30, stride, PAGE)], 4), range(3), range(3), pool)
    assert [copy["row_bytes"] for copy in copies] == [PAGE] * 3


def test_nothing_is_merged_over_a_gap_in_the_pool():
    with make_pool(header_bytes=PAGE) as pool:
        copies = plan_copies(KVLayout([(1 << 30, PAGE, PAGE)], 4), range(3), range(3), pool)
    assert [copy["row_bytes"] for copy in copies] == [PAGE] * 3


def test_runs_that_touch_in_a_layout_of_one_block_stay_apart(pool):
    """They may be two allocations, across which the driver refuses to copy."""
    runs = [(1 << 30, 64, 64), ((1 << 30) + 64, 64, 64)]
    layout = KVLayout(runs, 1)
    assert layout.runs == tuple(runs)
    assert [copy["row_bytes"] for copy in plan_copies(layout, [0], [0], pool, False)] == [64, 64]
    assert KVLayout([(base, 128, piece) for base, _, piece in runs], 2).runs == ((1 << 30, 128, 128),)


@pytest.mark.parametrize(
    ("rows", "row_bytes", "pitch", "strided"),
    [
        (4, 32 << 10, 1 << 20, True),
        (3, 32 << 10, 1 << 20, False),
        (4, 256 << 10, 1 << 20, True),
        (4, 64, (2 << 30) - 1, True),
        (4, 64, 2 << 30, False),
        (64, 64, 64, True),
    ],
)
def test_a_strided_copy_is_used_exactly_where_its_shape_admits_it(rows, row_bytes, pitch, strided):
    with make_pool(pages=64) as pool:
        layout = KVLayout([(1 << 40 | row * pitch, row_bytes, row_bytes) for row in range(rows)], 1)
        copies = plan_copies(layout, [0], [5], pool, True)
        assert [copy["rows"] for copy in copies] == ([rows] if strided else [1] * rows)
        assert all(copy["rows"] == 1 for copy in plan_copies(layout, [0], [5], pool, False))


@pytest.mark.parametrize("kv", [1, 2, 3, 4])
def test_a_contiguous_cache_takes_one_strided_copy_for_each_of_its_parts(pool, kv):
    sizes = {"num_layers": 8, "num_blocks": 6, "block_size": 4, "num_heads": 1, "head_dim": 8, "itemsize": 2}
    layout = KVLayout.contiguous(1 << 30, kv=kv, **sizes)
    assert (layout.pieces_per_block, layout.piece_bytes, layout.num_groups) == (8 * kv, 64, kv)
    assert [copy["rows"] for copy in plan_copies(layout, [5, 0], [1, 9], pool, True)] == [8] * 2 * kv


# ---- constructors: the record of a block, read through the runs -----------------------------------------------------


def record(layout, block):
    return b"".join(ctypes.string_at(base + block * stride, piece) for base, stride, piece in layout.runs)


def filled(*shape, dtype=np.uint16):
    array = np.random.default_rng(9).integers(0, 1 << 16, shape)
    return array.astype(dtype)


def require_records(layout, wanted):
    assert layout.num_blocks == len(wanted)
    assert [record(layout, block) for block in range(layout.num_blocks)] == wanted
    assert layout.block_bytes == len(wanted[0])


def test_contiguous_records_go_layer_by_layer_k_before_v():
    cache = filled(2, 3, 5, 4, 2, 8)
    layout = KVLayout.contiguous(cache, num_layers=3, num_blocks=5, block_size=4, num_heads=2, head_dim=8, itemsize=2)
    require_records(layout, [cache[:, :, block].swapaxes(0, 1).tobytes() for block in range(5)])
    assert layout.block_size == 4


def test_mla_records_go_layer_by_layer():
    layers = [filled(5, 4, 72) for _ in range(3)]
    layout = KVLayout.mla(layers, num_blocks=5, block_size=4, latent_dim=72, itemsize=2)
    require_records(layout, [b"".join(layer[block].tobytes() for layer in layers) for block in range(5)])


def test_cross_layer_records_are_the_rows():
    cache = filled(5, 300)
    layout = KVLayout.cross_layer(cache, num_blocks=5, block_bytes=600)
    require_records(layout, [row.tobytes() for row in cache])
    assert layout.pieces_per_block == 1


@pytest.mark.parametrize(
    ("shape", "block_dim", "pieces"),
    [
        ((2, 6, 4, 3, 8), 1, 2),  # K and V apart
        ((6, 2, 4, 3, 8), 0, 1),  # together in each block
        ((6, 4, 576), 0, 1),  # latent
        ((6, 4, 576), -3, 1),
        ((2, 3, 6, 16), 2, 6),  # layers and K, V outside
        ((1, 6, 1, 16), 1, 1),
        ((2, 1, 4, 8), 1, 1),  # a single block is one piece if it is dense
    ],
)
def test_tensors_of_the_usual_shapes_are_read_by_their_strides(shape, block_dim, pieces):
    tensors = [filled(*shape) for _ in range(3)]
    layout = KVLayout.from_tensors(tensors, block_dim, block_size=4)
    blocks = [np.moveaxis(tensor, block_dim, 0) for tensor in tensors]
    require_records(layout, [b"".join(part[number].tobytes() for part in blocks) for number in range(len(blocks[0]))])
    assert layout.pieces_per_block == 3 * pieces


def test_a_block_of_a_transposed_view_is_its_memory():
    memory = filled(6, 16, 8, 32)  # (block, token, head, dim), shown as (block, head, token, dim)
    layout = KVLayout.from_tensors([memory.transpose(0, 2, 1, 3)])
    require_records(layout, [block.tobytes() for block in memory])


def test_every_other_block_is_a_layout_with_a_longer_stride():
    memory = filled(6, 16)
    require_records(KVLayout.from_tensors([memory[::2]]), [block.tobytes() for block in memory[::2]])


class TorchLike:
    """What torch offers: an address, and strides in elements."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self):
        return self.array.itemsize


def test_torch_strides_count_elements():
    memory = filled(2, 6, 4, 8)
    layout = KVLayout.from_tensors([TorchLike(memory)], 1)
    require_records(layout, [memory[:, block].tobytes() for block in range(6)])


def test_tensors_live_as_long_as_their_layout():
    memory = filled(6, 16)
    alive = weakref.ref(memory)
    layout = KVLayout.from_tensors([memory])
    del memory
    assert alive() is not None
    del layout
    assert alive() is None


@pytest.mark.parametrize(
    ("tensor", "block_dim", "match"),
    [
        (filled(6, 4, 16)[:, :, :8], 0, "not block-contiguous"),
        (filled(6, 4, 16)[:, ::2], 0, "not block-contiguous"),
        (np.broadcast_to(filled(6, 1, 16), (6, 4, 16)), 0, "not block-contiguous"),
        (np.broadcast_to(filled(1, 16), (6, 16)), 0, "overlap at a stride of 0"),
        (as_strided(filled(64), (2, 3, 2), (12, 8, 2)), 1, "blocks interleave"),
        (as_strided(filled(64), (6, 8), (8, 2)), 0, "blocks of 16 bytes overlap at a stride of 8"),
        (filled(6, 16)[::-1], 0, "runs backwards"),
        (filled(0, 16), 0, "no elements"),
        (filled(6, 16), 2, "block_dim 2 is outside its 2 dimensions"),
        (filled(6, 16), -3, "block_dim -3 is outside"),
    ],
)
def test_tensors_that_are_not_block_contiguous_are_refused(tensor, block_dim, match):
    with pytest.raises(ValueError, match=match):
        KVLayout.from_tensors([tensor], block_dim)


def test_tensors_that_disagree_or_say_nothing_are_refused():
    with pytest.raises(ValueError, match="tensor 1 has 5 blocks, the others 6; check block_dim"):
        KVLayout.from_tensors([filled(6, 8), filled(5, 8)])
    with pytest.raises(ValueError, match="at least one run"):
        KVLayout.from_tensors([])
    with pytest.raises(TypeError, match="object has no address"):
        KVLayout.from_tensors([object()])
    with pytest.raises(TypeError, match="tensor 1: an address describes no strides"):
        KVLayout.from_tensors([filled(6, 8), 1 << 30])
    with pytest.raises(TypeError, match="has no address"):
        KVLayout.cross_layer("cache", num_blocks=4, block_bytes=64)


@pytest.mark.parametrize(
    ("runs", "num_blocks", "match"),
    [
        ([], 4, "at least one run, got none"),
        ([(1 << 20, 64, 64)], 0, "num_blocks must be at least 1, got 0"),
        ([(1 << 20, 64, 64), (0, 64, 64)], 4, "run 1: base address must not be null, got 0x0"),
        ([(1 << 20, 64, 0)], 4, r"run 0: piece_bytes must be 1 to block_stride \(64\), got 0"),
        ([(1 << 20, 64, 65)], 4, r"piece_bytes must be 1 to block_stride \(64\), got 65"),
        ([(1 << 20, 1 << 32, 1 << 32)], 4, "smaller than 2\\^32 bytes, got 4294967296"),
        ([(1 << 20, 1 << 31, 1 << 31), (1 << 40, 1 << 31, 1 << 31)], 4, "smaller than 2\\^32 bytes"),
    ],
)
def test_unfit_runs_are_refused(runs, num_blocks, match):
    with pytest.raises(ValueError, match=match):
        KVLayout(runs, num_blocks)


def test_other_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="block_size must not be negative, got -1"):
        KVLayout([(1 << 20, 64, 64)], 4, block_size=-1)
    layout = KVLayout([(1 << 20, 64, 64)], 4)
    with pytest.raises(RuntimeError, match="once"):
        layout.__init__([(1 << 20, 64, 64)], 4)
    assert "4 blocks of 64 bytes" in repr(layout)


def test_slot_mapping_counts_tokens():
    layout = KVLayout.cross_layer(1 << 20, num_blocks=8, block_bytes=64, block_size=4)
    assert layout.slot_mapping([3, 0]).tolist() == [12, 13, 14, 15, 0, 1, 2, 3]
    assert layout.slot_mapping([3, 0], num_tokens=6).tolist() == [12, 13, 14, 15, 0, 1]
    assert layout.slot_mapping([]).tolist() == []
    assert layout.slot_mapping([7]).dtype == np.int64
    for num_tokens in (-1, 9):
        with pytest.raises(ValueError, match=f"num_tokens must be 0 to 8 for 2 blocks, got {num_tokens}"):
            layout.slot_mapping([3, 0], num_tokens)
    with pytest.raises(ValueError, match="block_size of this layout is unknown"):
        kvortex.KVLayout.cross_layer(1 << 20, num_blocks=8, block_bytes=64).slot_mapping([0])
