"""KVLayout and its planner, held against arithmetic of our own: which device byte belongs to which byte of which slot.

Nothing is copied here. The planner only computes, so that its layouts may lie at made-up addresses.
"""

import ctypes
import os
import random
import re
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

import kvortex
from kvortex import KVLayout, PinnedPool
from kvortex.transfer import overlaps
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
        ([(1 << 20, 64)], 4, r"run 0 must be \(base, block_stride, piece_bytes\), got \(1048576, 64\)"),
        ([(1 << 20, 64, 64), 5], 4, r"run 1 must be \(base, block_stride, piece_bytes\), got 5"),
        ([(-64, 64, 64)], 4, "run 0: base address must not be null, got -0x40"),
        ([(1 << 64, 64, 64)], 4, "run 0: 4 blocks from base 0x1.* reach beyond the address space"),
        ([(1 << 63, 1 << 62, 64)], 4, "run 0: 4 blocks .* reach beyond the address space"),
        ([(1 << 20, 1 << 64, 64)], 1, "block_stride must be 0 to 2.63 - 1, got 18446744073709551616"),
        ([(1 << 20, -64, 64)], 4, r"piece_bytes must be 1 to block_stride \(-64\)"),
        ([(1 << 20, -64, 64)], 1, "block_stride must be 0 to 2.63 - 1, got -64"),
        ([(1 << 20, 1, 1)], 1 << 63, "9223372036854775808 blocks of 0 tokens are too many"),
        ([(1 << 20, 1 << 32, 1 << 32)], 4, "smaller than 2\\^32 bytes, got 4294967296"),
        ([(1 << 20, 1 << 31, 1 << 31), (1 << 40, 1 << 31, 1 << 31)], 4, "smaller than 2\\^32 bytes"),
    ],
)
def test_unfit_runs_are_refused(runs, num_blocks, match):
    with pytest.raises(ValueError, match=match):
        KVLayout(runs, num_blocks)


# ---- blocks that share bytes ----------------------------------------------------------------------------------------

BASE = 1 << 20


def owners_of_bytes(runs, num_blocks):
    """For each byte the (run, block) pairs that hold it, by walking all of them."""
    owners = {}
    for number, (base, stride, piece) in enumerate(runs):
        for block in range(num_blocks):
            for byte in range(base + block * stride, base + block * stride + piece):
                owners.setdefault(byte, []).append((number, block))
    return owners


@st.composite
def crowded_runs(draw):
    """(runs, number of blocks) in a hundred bytes or so: strides equal, related, odd; runs named twice."""
    num_blocks = draw(st.sampled_from([1, 2, 3, 5, 12]))
    common = draw(st.integers(1, 24))
    runs = []
    for _ in range(draw(st.integers(1, 5))):
        piece = draw(st.integers(1, 5))
        stride = max(piece, draw(st.sampled_from([common, 2 * common, 3 * common]) | st.integers(1, 30)))
        runs.append((BASE + draw(st.integers(0, 100)), stride, piece))
    if draw(st.booleans()):
        runs.insert(draw(st.integers(0, len(runs))), draw(st.sampled_from(runs)))
    return runs, num_blocks


def require_refused_exactly_if_bytes_are_shared(runs, num_blocks):
    distinct = list({run if num_blocks > 1 else (run[0], run[2]): run for run in reversed(runs)}.values())[::-1]
    owners = owners_of_bytes(runs, num_blocks)
    shared = [pairs for pairs in owners_of_bytes(distinct, num_blocks).values() if len(pairs) > 1]
    if not shared:
        layout = KVLayout(runs, num_blocks)
        assert layout.block_bytes == sum(piece for _, _, piece in distinct)
        assert sorted(owners_of_bytes(layout.runs, num_blocks)) == sorted(owners)
        return
    with pytest.raises(ValueError, match=r"run \d+, block \d+ and run \d+, block \d+ share bytes") as refused:
        KVLayout(runs, num_blocks)
    one, block, other, other_block = map(int, re.findall(r"(?:run|block) (\d+)", str(refused.value))[:4])
    assert (one, block) != (other, other_block)
    assert any((one, block) in pairs and (other, other_block) in pairs for pairs in owners.values())


@given(case=crowded_runs())
def test_a_layout_is_refused_exactly_if_two_of_its_blocks_share_a_byte(case):
    require_refused_exactly_if_bytes_are_shared(*case)


@given(case=layouts(), moved=st.integers(0, 40), by=st.integers(-60, 60))
def test_a_run_moved_onto_others_is_refused_and_any_other_place_is_taken(case, moved, by):
    runs, num_blocks, _ = case
    base, stride, piece = runs[moved % len(runs)]
    runs[moved % len(runs)] = (base + by, stride, piece)
    require_refused_exactly_if_bytes_are_shared(runs, num_blocks)


@pytest.mark.parametrize("num_blocks", [1, 2, 10**6])
@pytest.mark.parametrize("shuffled", [False, True])
def test_thousands_of_interleaved_runs_and_a_million_blocks_are_compared_at_once(num_blocks, shuffled, seed):
    """One more byte in one of them is found. There is no time limit here: a loop over blocks would take for ever."""
    runs = [(BASE + index * 64, 4000 * 64, 64) for index in range(4000)]
    if shuffled:
        random.Random(seed).shuffle(runs)
    assert KVLayout(runs, num_blocks).block_bytes == 4000 * 64
    base, stride, _ = runs[1234]
    runs[1234] = (base - 1, stride, 64)
    with pytest.raises(ValueError, match="run 1234, block .* share bytes|and run 1234, block .* share bytes"):
        KVLayout(runs, num_blocks)


def test_two_strides_meet_in_the_one_block_where_they_do():
    """Strides that have no factor in common and pieces of one byte: of the first 1700 blocks, two share a byte."""
    start = 1009 * 900 - 1013 * 700  # block 900 of the one is block 700 of the other
    runs = [(BASE, 1009, 1), (BASE + start, 1013, 1)]
    with pytest.raises(ValueError, match="run 0, block 900 and run 1, block 700 share bytes"):
        KVLayout(runs, 1700)
    KVLayout(runs, 900)


def test_runs_of_different_strides_that_cannot_be_compared_soon_are_refused(monkeypatch):
    monkeypatch.setattr(overlaps, "MAX_PAIRS", 3)
    runs = [(BASE + 128 * index, 1024 * (1 + index % 2), 64) for index in range(4)]
    with pytest.raises(ValueError, match="4 runs with 2 different strides interleave.* 4 pairs.* 3 are the limit"):
        KVLayout(runs, 4)
    KVLayout([(base, 1024, piece) for base, _, piece in runs], 4)
    KVLayout([(base + (index << 20), *rest) for index, (base, *rest) in enumerate(runs)], 4)  # apart


def test_a_run_named_twice_counts_once_where_it_stands_first():
    first, second = (BASE, 256, 64), (BASE + 128, 256, 64)
    layout = KVLayout([first, second, first, second, first], 4)
    assert (layout.runs, layout.block_bytes) == ((first, second), 128)
    cache = filled(6, 4, 16)
    layout = KVLayout.from_tensors([cache, filled(6, 16), cache])
    assert layout.block_bytes == (64 + 16) * 2
    assert KVLayout([(BASE, 64, 64), (BASE, 4096, 64)], 1).block_bytes == 64  # of one block the stride says nothing


def test_every_constructor_refuses_blocks_that_share_bytes():
    memory = np.zeros(4096, np.uint8)
    halves = [memory[:2048].reshape(4, 512), memory[512:2560].reshape(4, 512)]
    with pytest.raises(ValueError, match="run 0, block 1 and run 1, block 0 share bytes"):
        KVLayout.from_tensors(halves)
    with pytest.raises(ValueError, match="run 0, block 1 and run 1, block 0 share bytes"):
        KVLayout.mla(halves, num_blocks=4, block_size=4, latent_dim=64, itemsize=2)
    with pytest.raises(ValueError, match="run 0, block 1 and run 1, block 0 share bytes"):
        KVLayout([(half, 512, 512) for half in halves], 4)


# ---- numbers --------------------------------------------------------------------------------------------------------

NO_WHOLE_NUMBERS = [1.0, 64.5, "64", b"64", True, None, np.float32(64), np.bool_(True), 64j, [64], np.array([64, 64])]
SIZES = {
    "contiguous": {
        "kv": 2,
        "num_layers": 3,
        "num_blocks": 5,
        "block_size": 4,
        "num_heads": 2,
        "head_dim": 8,
        "itemsize": 2,
    },
    "mla": {"num_blocks": 5, "block_size": 4, "latent_dim": 72, "itemsize": 2},
    "cross_layer": {"num_blocks": 5, "block_bytes": 64, "block_size": 4},
}


def bare_runs(base=BASE, stride=64, piece=64, *, num_blocks=4, block_size=16):
    return KVLayout([(base, stride, piece)], num_blocks, block_size=block_size)


@pytest.mark.parametrize("wrong", NO_WHOLE_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["stride", "piece", "num_blocks", "block_size"])
def test_what_is_no_whole_number_is_none_of_a_run(name, wrong):
    with pytest.raises(TypeError, match=f"{name}.* must be a whole number, got "):
        bare_runs(**{name: wrong})


@pytest.mark.parametrize("wrong", NO_WHOLE_NUMBERS, ids=repr)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, sizes in SIZES.items() for name in sizes])
def test_what_is_no_whole_number_is_no_size(kind, name, wrong):
    base = [BASE, 2 * BASE] if kind == "mla" else BASE
    with pytest.raises(TypeError, match=f"{name} must be a whole number, got "):
        getattr(KVLayout, kind)(base, **SIZES[kind] | {name: wrong})


@pytest.mark.parametrize("wrong", [0, -1, -(1 << 70)])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, sizes in SIZES.items() for name in sizes])
def test_two_negative_sizes_make_no_positive_one(kind, name, wrong):
    if kind == "cross_layer" and name == "block_size" and wrong == 0:
        return  # unknown
    base = [BASE, 2 * BASE] if kind == "mla" else BASE
    others = {other: -size for other, size in SIZES[kind].items() if other not in ("num_blocks", "block_size")}
    with pytest.raises(ValueError, match=r"must (be at least 1|not be negative), got -?\d+"):
        getattr(KVLayout, kind)(base, **SIZES[kind] | others | {name: wrong})
    with pytest.raises(ValueError, match=f"{name} must (be at least 1|not be negative), got {wrong}"):
        getattr(KVLayout, kind)(base, **SIZES[kind] | {name: wrong})


@pytest.mark.parametrize("wrong", NO_WHOLE_NUMBERS[:-2], ids=repr)
def test_what_is_no_whole_number_is_no_block_token_or_dimension(wrong):
    layout = bare_runs()
    for block_ids in ([wrong], np.array([wrong])):
        with pytest.raises(ValueError, match="block_ids must be a one-dimensional array of integers"):
            layout.slot_mapping(block_ids)
    if wrong is not None:
        with pytest.raises(TypeError, match="num_tokens must be a whole number"):
            layout.slot_mapping([1, 2], wrong)
    with pytest.raises(TypeError, match="block_dim must be a whole number"):
        KVLayout.from_tensors([filled(6, 8)], wrong)


def test_masked_and_timed_arrays_are_no_block_ids():
    layout = bare_runs()
    with pytest.raises(ValueError, match="block_ids is a masked array"):
        layout.slot_mapping(np.ma.masked_array([1, 2], [0, 1]))
    with pytest.raises(ValueError, match="integers, got shape .* dtype timedelta64"):
        layout.slot_mapping(np.arange(2).astype("m8[s]"))


@pytest.mark.parametrize("number", [np.int64(64), np.uint8(64), np.array(64)])
def test_whole_numbers_of_numpy_are_whole_numbers(number):
    assert bare_runs(stride=number, piece=number, num_blocks=number, block_size=number).runs == bare_runs().runs


def test_other_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="block_size must not be negative, got -1"):
        KVLayout([(1 << 20, 64, 64)], 4, block_size=-1)
    with pytest.raises(ValueError, match="4 blocks of 9223372036854775808 tokens are too many"):
        KVLayout([(1 << 20, 64, 64)], 4, block_size=1 << 63)
    for make, what in ((KVLayout, "runs"), (KVLayout.from_tensors, "tensors")):
        with pytest.raises(TypeError, match=f"{what} must be an iterable, got int"):
            make(5, 4)
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


@given(st.data())
def test_two_layouts_share_memory_exactly_where_two_of_their_blocks_share_a_byte(data):
    def draw_layout():
        runs, num_blocks = [], data.draw(st.integers(1, 6))
        for _ in range(data.draw(st.integers(1, 3))):
            piece = data.draw(st.integers(1, 5))
            stride = data.draw(st.integers(piece if num_blocks > 1 else 0, 12))
            runs.append((data.draw(st.integers(0, 40)), stride, piece))
        return runs, num_blocks

    def bytes_of(run, block):
        base, stride, piece = run
        return set(range(base + block * stride, base + block * stride + piece))

    (runs, num_blocks), (other_runs, other_blocks) = draw_layout(), draw_layout()
    pieces = [bytes_of(run, block) for run in runs for block in range(num_blocks)]
    others = [bytes_of(run, block) for run in other_runs for block in range(other_blocks)]
    found = overlaps.find_shared(runs, num_blocks, other_runs, other_blocks)
    assert (found is not None) == any(piece & other for piece in pieces for other in others)
    if found:
        (run, block), (other, other_block) = found
        assert block < num_blocks and other_block < other_blocks
        assert bytes_of(runs[run], block) & bytes_of(other_runs[other], other_block)


def test_two_layouts_that_interleave_too_much_are_refused(monkeypatch):
    monkeypatch.setattr(overlaps, "MAX_PAIRS", 3)
    runs, others = ([(base + at, 64, 4) for at in range(0, 16, 4)] for base in (BASE, BASE + 32))
    with pytest.raises(ValueError, match="4 and 4 runs interleave.* more than 3 pairs"):
        overlaps.find_shared(runs, 9, others, 9)
    assert overlaps.find_shared(runs[:1], 9, others[:3], 9) is None
