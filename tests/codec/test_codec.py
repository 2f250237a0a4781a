"""Every instruction set writes the bytes of the numpy reference, in both directions and whatever the input."""

import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from kvortex.codec import CODECS, PackedBlock, Plane
from kvortex.codec._codec import instruction_sets, pack_block, unpack_block

ROOT = Path(__file__).resolve().parents[2]
DIMS, BITS, ROWS = (32, 64, 128, 256), (8, 6, 5, 4), (1, 3, 16, 17, 33)
CODEC_OF = {8: ("q8", "k"), 6: ("k6v4", "k"), 5: ("k8v5", "v"), 4: ("q4", "k")}
GUARD = 0xA5

# Bits of bfloat16: what a kind of input is drawn from.
KINDS = {
    "zeros": lambda rng, shape: rng.integers(0, 2, shape) << 15,
    "denormals": lambda rng, shape: rng.integers(0, 0x100, shape) | rng.integers(0, 2, shape) << 15,
    "around the least scale": lambda rng, shape: rng.integers(0, 0x0480, shape) | rng.integers(0, 2, shape) << 15,
    "of all sizes": lambda rng, shape: rng.integers(0, 0x7180, shape) | rng.integers(0, 2, shape) << 15,
    "just below 2^100": lambda rng, shape: rng.integers(0x7000, 0x7180, shape) | rng.integers(0, 2, shape) << 15,
    "anything": lambda rng, shape: rng.integers(0, 1 << 16, shape),
    "gaussian": lambda rng, shape: reference.to_words(rng.standard_normal(shape, np.float32)),
    "sparse": lambda rng, shape: np.where(rng.random(shape) < 0.02, rng.integers(0x3F00, 0x4100, shape), 0),
    "one number": lambda rng, shape: np.broadcast_to(rng.integers(0, 0x7180, (shape[0], 1)), shape),
    "a huge number": lambda rng, shape: np.where(
        np.arange(shape[1]) == rng.integers(0, shape[1], (shape[0], 1)), rng.choice([0x7180, 0x717F, 0xFF80, 0x7F81]), 1
    ),
}


def drawn(kind, rng, num_rows, dim):
    return np.ascontiguousarray(KINDS[kind](rng, (num_rows, dim)), np.uint16)


def layout_of(num_rows, dim, bits, gap=0):
    codec, role = CODEC_OF[bits]
    step = 2 * dim + gap
    return PackedBlock.of([Plane(role, 0, num_rows, 2 * dim, step)], num_rows * step, codec)


def with_guards(nbytes):
    """Return a buffer between bytes that must stay, and what checks them."""
    whole = np.full(nbytes + 128, GUARD, np.uint8)
    return whole[64:-64], lambda: (whole[:64] == GUARD).all() and (whole[-64:] == GUARD).all()


def packed_by(name, layout, block):
    packed, untouched = with_guards(layout.packed_bytes)
    kept = pack_block(layout, block, packed, instruction_set=name)
    assert untouched()
    return packed.tobytes(), kept


def unpacked_by(name, layout, packed):
    block, untouched = with_guards(layout.block_bytes)
    unpack_block(layout, packed, block, instruction_set=name)
    assert untouched()
    return block.tobytes()


def flags(layout, values):
    return reference.padded(np.array(values, np.uint32).tobytes())


SHAPES = st.tuples(st.sampled_from(ROWS), st.sampled_from(DIMS), st.sampled_from(BITS))


@given(shape=SHAPES, kind=st.sampled_from(list(KINDS)), number=st.integers(0, 2**32 - 1))
def test_every_instruction_set_packs_like_the_reference(shape, kind, number):
    num_rows, dim, bits = shape
    words, layout = drawn(kind, np.random.default_rng(number), num_rows, dim), layout_of(*shape)
    plane, flag = reference.pack(words, bits)
    for name in instruction_sets():
        assert packed_by(name, layout, words) == (plane + flags(layout, [flag]), not flag), name
        assert unpacked_by(name, layout, plane + flags(layout, [flag])) == reference.unpack(plane, *shape).tobytes()


@given(shape=SHAPES, number=st.integers(0, 2**32 - 1), honest=st.booleans())
def test_any_bytes_unpack_alike_everywhere(shape, number, honest):
    rng, layout = np.random.default_rng(number), layout_of(*shape)
    packed = rng.integers(0, 256, layout.packed_bytes, np.uint8)
    if honest:  # scales of every size, that are no NaN
        scales = packed[: layout.flags_offset].view(np.uint16)[-(-(-shape[0] // 8) * 8) :]
        scales[:] = rng.integers(0x0300, 0x7600, len(scales))
    expected = reference.unpack(packed.tobytes(), *shape).tobytes()
    for name in instruction_sets():
        assert unpacked_by(name, layout, packed) == expected, name


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize(
    "scale", [0x0000, 0x0001, 0x0D7F, 0x0D80, 0x3F80, 0x717F, 0x7180, 0x7F7F, 0x7F80, 0x7FFF, 0xBF80]
)
def test_extreme_integers_and_scales(name, byte, scale):
    for dim in DIMS:
        for bits in BITS:
            layout = layout_of(16, dim, bits)
            packed = np.full(layout.packed_bytes, byte, np.uint8)
            packed[layout.flags_offset - 32 : layout.flags_offset].view(np.uint16)[:] = scale
            expected = reference.unpack(packed.tobytes(), 16, dim, bits).tobytes()
            assert unpacked_by(name, layout, packed) == expected


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_one_bit_at_any_place_is_unpacked_like_the_reference(name, dim, bits):
    """A wrong lane, or one that two stages share, shows for some place; each row has its bit elsewhere."""
    layout = layout_of(dim * bits, dim, bits)
    integers_bytes = layout.flags_offset - 2 * dim * bits
    packed = np.zeros(layout.packed_bytes, np.uint8)
    packed[integers_bytes : layout.flags_offset].view(np.uint16)[:] = 0x3F80
    width = 8 if bits == 8 else 4
    for row in range(dim * bits):
        element, bit = row * dim + row // bits, row % bits
        at = element * width + bit if bit < width else 8 * (dim * bits * dim // 2) + element * (bits - 4) + bit - 4
        packed[at // 8] |= 1 << at % 8
    assert unpacked_by(name, layout, packed) == reference.unpack(packed.tobytes(), dim * bits, dim, bits).tobytes()


@pytest.mark.parametrize("bits", BITS)
def test_products_are_rounded_before_they_are_rounded_to_integers(bits, seed):
    """Where a processor could round once instead of twice, the result would differ for some of these numbers."""
    rng = np.random.default_rng(seed)
    words, fused, m = None, 0, np.float32(2 ** (bits - 1) - 1)
    for _ in range(200):
        words = drawn("gaussian", rng, 512, 128)
        y = reference.butterfly(reference.to_float(words ^ (reference.FLIPS[:128].astype(np.uint16) << 15)))
        up = ((np.abs(y).max(axis=1) / m).view(np.uint32) + 0xFFFF >> 16).astype(np.uint16)
        r = (np.float32(1) / reference.to_float(up))[:, None]
        fused = np.count_nonzero(np.rint(y.astype(np.float64) * r) != np.rint(y * r))
        if fused:
            break
    assert fused
    layout = layout_of(512, 128, bits)
    for name in instruction_sets():
        assert packed_by(name, layout, words)[0][: layout.flags_offset] == reference.pack(words, bits)[0]


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("gap", [16, 64])
def test_rows_with_others_between_them(name, gap, seed):
    rng = np.random.default_rng(seed)
    for dim in DIMS:
        for bits in BITS:
            for num_rows in ROWS:
                block = rng.integers(0, 256, (num_rows, 2 * dim + gap), np.uint8)
                block[:, : 2 * dim].view(np.uint16)[:] = drawn("gaussian", rng, num_rows, dim)
                words = np.ascontiguousarray(block[:, : 2 * dim]).view(np.uint16)
                layout, plane = layout_of(num_rows, dim, bits, gap), reference.pack(words, bits)[0]
                between = block[:, 2 * dim :].tobytes()
                packed, kept = packed_by(name, layout, block)
                assert kept and packed == plane + between + flags(layout, [0] * len(layout.planes))
                block[:, : 2 * dim] = reference.unpack(plane, num_rows, dim, bits).view(np.uint8).reshape(num_rows, -1)
                assert unpacked_by(name, layout, packed) == block.tobytes()


@pytest.mark.parametrize("name", instruction_sets())
def test_keys_and_values_that_alternate(name, seed):
    words = drawn("gaussian", np.random.default_rng(seed), 2 * 17, 64)
    for codec, bits in CODECS.items():
        layout = PackedBlock.of([Plane("k", 0, 17, 128, 256), Plane("v", 128, 17, 128, 256)], words.nbytes, codec)
        planes = [
            half.tobytes() if width == 16 else reference.pack(np.ascontiguousarray(half), width)[0]
            for half, width in zip((words[0::2], words[1::2]), bits, strict=True)
        ]
        packed, kept = packed_by(name, layout, words)
        assert kept and packed == b"".join(planes) + flags(layout, [0, 0])
        back = np.empty_like(words)
        for first, plane, width in zip((0, 1), planes, bits, strict=True):
            half = words[first::2] if width == 16 else reference.unpack(plane, 17, 64, width)
            back[first::2] = half
        assert unpacked_by(name, layout, packed) == back.tobytes()


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("word", [0x7180, 0xF180, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF])
def test_a_number_that_cannot_be_packed_is_flagged_and_comes_back_as_nan(name, word, seed):
    rng = np.random.default_rng(seed)
    for dim in DIMS:
        for bits in BITS:
            codec, role = CODEC_OF[bits]
            words = drawn("gaussian", rng, 2 * 20, dim)
            row = int(rng.integers(20, 40))
            words[row, rng.integers(0, dim)] = word
            planes = [Plane(role, at * 20 * 2 * dim, 20, 2 * dim, 2 * dim) for at in (0, 1)]
            layout = PackedBlock.of(planes, words.nbytes, codec)
            packed, kept = packed_by(name, layout, words)
            assert not kept and packed[layout.flags_offset :] == flags(layout, [0, 1])
            back = np.frombuffer(unpacked_by(name, layout, packed), np.uint16).reshape(words.shape)
            assert (back[row] == reference.NAN).all()
            assert ((np.delete(back, row, axis=0) & 0x7FFF) < reference.HUGE).all()


@pytest.mark.parametrize("name", instruction_sets())
def test_the_largest_numbers_are_kept(name, seed):
    words = drawn("just below 2^100", np.random.default_rng(seed), 33, 128)
    for bits in BITS:
        _, kept = packed_by(name, layout_of(33, 128, bits), words)
        assert kept


def test_flags_of_a_packed_block_are_written_each_time(seed):
    layout = layout_of(16, 128, 8)
    words = drawn("gaussian", np.random.default_rng(seed), 16, 128)
    packed = np.full(layout.packed_bytes, 0xFF, np.uint8)
    assert pack_block(layout, words, packed)
    words[3, 5] = 0x7F80
    assert not pack_block(layout, words, packed)
    words[3, 5] = 0
    assert pack_block(layout, words, packed)


@pytest.mark.parametrize(
    "bits, low, high", [(8, 0.0060, 0.0073), (6, 0.022, 0.030), (5, 0.046, 0.062), (4, 0.097, 0.13)]
)
def test_mean_error_of_gaussian_numbers(bits, low, high, seed):
    words = drawn("gaussian", np.random.default_rng(seed), 1024, 128)
    layout = layout_of(1024, 128, bits)
    back = np.frombuffer(unpacked_by(None, layout, packed_by(None, layout, words)[0]), np.uint16).reshape(words.shape)
    x, error = reference.to_float(words), reference.to_float(back) - reference.to_float(words)
    assert low < math.sqrt(np.mean(error**2) / np.mean(x**2)) < high


@pytest.mark.parametrize("name", instruction_sets())
def test_an_outlier_is_spread_over_its_vector(name):
    """A rotated vector of one number is flat, so that it comes back exactly at any width."""
    words = np.zeros((16, 128), np.uint16)
    words[:, 77] = 0x4000
    for bits in BITS:
        layout = layout_of(16, 128, bits)
        back = unpacked_by(name, layout, packed_by(name, layout, words)[0])
        error = reference.to_float(np.frombuffer(back, np.uint16)) - reference.to_float(words.reshape(-1))
        assert np.abs(error).max() <= 2 / 128


def test_what_does_not_fit_is_refused():
    layout = layout_of(16, 128, 8)
    block, packed = np.zeros(layout.block_bytes, np.uint8), np.zeros(layout.packed_bytes, np.uint8)
    for call in (
        lambda: pack_block(layout, block[1:], packed),
        lambda: pack_block(layout, block, packed[1:]),
        lambda: unpack_block(layout, packed[:-16], block),
        lambda: pack_block(layout, np.zeros((layout.block_bytes, 2), np.uint8)[:, 0], packed),
        lambda: pack_block(layout, block, packed, instruction_set="mmx"),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
    with pytest.raises((TypeError, ValueError, BufferError)):
        pack_block(layout, block, bytes(layout.packed_bytes))


@pytest.mark.parametrize(
    "flags", [["-O2"], ["-O3", "-ffp-contract=fast"], ["-O0", "-g", "-fsanitize=address,undefined"]]
)
def test_every_set_agrees_in_c(tmp_path, flags):
    program = tmp_path / "codec_sets"
    build = [os.environ.get("CC", "cc"), "-std=gnu11", "-Wall", "-Wextra", "-Werror", *flags]
    subprocess.run(
        [*build, f"-I{ROOT / 'include'}", str(ROOT / "tests/c/codec_sets.c"), "-o", str(program)], check=True
    )
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "")
