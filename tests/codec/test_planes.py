"""Where planes lie in a block and in the packed block, what the packed block weighs, and what is refused."""

import dataclasses
import random

import numpy as np
import pytest

from kvortex.codec import CODECS, PackedBlock, Plane, planes_of
from kvortex.codec._codec import pack_block


def eight_billion():
    """Return the planes of 16 tokens of an 8B model: 32 layers, K and V of 8 heads of 128 numbers each."""
    rows, plane_bytes = 16 * 8, 16 * 8 * 256
    return [
        Plane(role, (2 * layer + half) * plane_bytes, rows, 256, 256, layer)
        for layer in range(32)
        for half, role in enumerate("kv")
    ]


BLOCK_BYTES = 32 * 2 * 16 * 8 * 256


@pytest.mark.parametrize("codec, ratio", [("exact", 1.00), ("q8", 1.97), ("k8v5", 2.42), ("k6v4", 3.12), ("q4", 3.88)])
def test_a_packed_block_of_an_8b_model_is_as_small_as_promised(codec, ratio):
    layout = PackedBlock.of(eight_billion(), BLOCK_BYTES, codec)
    assert layout.block_bytes / layout.packed_bytes == pytest.approx(ratio, abs=0.01)
    assert layout.packed_bytes % 16 == 0


def test_a_packed_block_has_the_size_that_c_computes():
    """Packing refuses any other, so that it does pack is the test."""
    rng = random.Random(7)
    for codec in CODECS:
        for _ in range(20):
            planes, end = [], 0
            for layer in range(rng.randrange(1, 5)):
                rows, dim, gap = rng.randrange(1, 40), rng.choice([32, 64, 128, 256]), 16 * rng.randrange(3)
                planes.append(Plane(rng.choice("kv"), end, rows, 2 * dim, 2 * dim + gap, layer))
                end = planes[-1].end_byte + 16 * rng.randrange(2)
            layout = PackedBlock.of(planes, end, codec)
            assert pack_block(layout, bytes(end), np.empty(layout.packed_bytes, np.uint8))


def test_layers_that_are_kept_exact():
    layout = PackedBlock.of(eight_billion(), BLOCK_BYTES, "k8v5", exact_layers=(0, -1))
    assert layout.bits == (16, 16) + (8, 5) * 30 + (16, 16)
    assert layout == PackedBlock.of(eight_billion(), BLOCK_BYTES, "k8v5", exact_layers=(31, 0, -32))
    for layer in (32, -33):
        with pytest.raises(ValueError, match="exact_layers must be from -32 to 31"):
            PackedBlock.of(eight_billion(), BLOCK_BYTES, "q8", exact_layers=(layer,))


def test_bytes_that_no_plane_covers_become_exact_planes():
    layout = PackedBlock.of([Plane("k", 32, 4, 64, 128), Plane("v", 608, 2, 64, 64)], 1024, "q8")
    assert layout.planes[2:] == (
        Plane("exact", 0, 1, 32, 32),
        Plane("exact", 96, 3, 64, 128),
        Plane("exact", 480, 1, 128, 128),
        Plane("exact", 736, 1, 288, 288),
    )
    assert layout.bits == (8, 8, 16, 16, 16, 16)
    nothing = PackedBlock.of([], 1024, "q8")
    assert nothing.planes == (Plane("exact", 0, 1, 1024, 1024),)


def test_every_byte_is_in_one_plane(seed):
    rng = random.Random(seed)
    for _ in range(100):
        units = [False] * 64
        planes = []
        for _ in range(rng.randrange(4)):
            plane = Plane(
                "exact", 16 * rng.randrange(64), rng.randrange(1, 4), 16 * rng.randrange(1, 4), 16 * rng.randrange(3, 9)
            )
            covered = units_of(plane)
            if max(covered) < 64 and not any(units[unit] for unit in covered):
                planes.append(plane)
                for unit in covered:
                    units[unit] = True
        layout = PackedBlock.of(planes, 1024, "q4")
        assert layout.planes[: len(planes)] == tuple(planes)
        assert sorted(unit for plane in layout.planes for unit in units_of(plane)) == list(range(64))


def units_of(plane):
    return [
        (plane.first_byte + row * plane.step_bytes + at) // 16
        for row in range(plane.num_rows)
        for at in range(0, plane.row_bytes, 16)
    ]


@pytest.mark.parametrize(
    "planes, complaint",
    [
        ([Plane("k", 0, 4, 256, 256), Plane("v", 1008, 1, 256, 256)], "share byte 1008"),
        ([Plane("k", 0, 2, 64, 256), Plane("v", 256, 1, 64, 64)], "share byte 256"),
        ([Plane("k", 0, 2, 64, 64), Plane("v", 0, 1, 64, 64)], "share byte 0"),
        ([Plane("k", 0, 9, 256, 256)], "ends at byte 2304 of a block of 2048"),
        ([Plane("k", 2048, 1, 64, 64)], "ends at byte 2112"),
    ],
)
def test_planes_that_share_bytes_or_leave_the_block_are_refused(planes, complaint):
    for chosen in (planes, planes[::-1]):
        with pytest.raises(ValueError, match=complaint):
            PackedBlock.of(chosen, 2048, "q8")


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"role": "q"}, "role must be one of k, v, exact, got 'q'"),
        ({"first_byte": 8}, "first_byte must be a multiple of 16, got 8"),
        ({"first_byte": -16}, "first_byte must be from 0"),
        ({"num_rows": 0}, "num_rows must be from 1"),
        ({"num_rows": 1 << 32}, "num_rows must be from 1"),
        ({"row_bytes": 255}, "row_bytes must be a multiple of 16, got 255"),
        ({"row_bytes": 8, "step_bytes": 16}, "row_bytes must be a multiple of 16, got 8"),
        ({"row_bytes": 96}, "a vector must have 32, 64, 128 or 256 numbers"),
        ({"row_bytes": 1024, "step_bytes": 1024}, "a vector must have 32, 64, 128 or 256 numbers"),
        ({"step_bytes": 264}, "step_bytes must be a multiple of 16, got 264"),
        ({"step_bytes": 128}, "step_bytes must be at least row_bytes"),
        ({"layer": -1}, "layer must be from 0"),
    ],
)
def test_planes_that_cannot_be_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(Plane("k", 0, 4, 256, 256), **change)


@pytest.mark.parametrize("value", [1.5, "16", None, True])
def test_numbers_of_a_plane_are_whole(value):
    with pytest.raises(TypeError, match="num_rows must be a whole number"):
        Plane("k", 0, value, 256, 256)


@pytest.mark.parametrize(
    "block_bytes, codec, complaint",
    [(1000, "q8", "multiple of 16"), (0, "q8", "positive"), (1024, "q7", "codec must be one of exact, q8")],
)
def test_blocks_that_cannot_be_are_refused(block_bytes, codec, complaint):
    with pytest.raises(ValueError, match=complaint):
        PackedBlock.of([], block_bytes, codec)


@pytest.mark.parametrize(
    "dim, pieces",
    [(32, [32]), (64, [64]), (128, [128]), (256, [256]), (96, [32] * 3), (192, [64] * 3), (384, [128] * 3)]
    + [(512, [128] * 4), (576, [64] * 9), (160, [32] * 5), (80, None), (16, None), (8, None)],
)
def test_vectors_of_any_length_are_coded_in_pieces(dim, pieces):
    planes = planes_of("v", 64, 5, 2 * dim, 4 * dim, 3)
    if pieces is None:
        assert planes == (Plane("exact", 64, 5, 2 * dim, 4 * dim, 3),)
    else:
        assert [plane.row_bytes for plane in planes] == [2 * piece for piece in pieces]
        assert [plane.first_byte for plane in planes] == [64 + 2 * sum(pieces[:i]) for i in range(len(pieces))]
        assert {(p.role, p.num_rows, p.step_bytes, p.layer) for p in planes} == {("v", 5, 4 * dim, 3)}
    PackedBlock.of(planes, 64 + 5 * 4 * dim, "k6v4")


def test_vectors_of_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="row_bytes must be a multiple of 16, got 90"):
        planes_of("k", 0, 4, 90, 96)


@pytest.mark.parametrize("change", [{"offsets": (16,)}, {"flags_offset": 16}, {"packed_bytes": 16}, {"bits": (7,)}])
def test_a_packed_block_made_by_hand_leads_nowhere(change):
    layout = dataclasses.replace(PackedBlock.of([Plane("k", 0, 4, 256, 256)], 1024, "q8"), **change)
    with pytest.raises(ValueError):
        pack_block(layout, bytes(1024), bytearray(layout.packed_bytes))
