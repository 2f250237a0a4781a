"""The codecs in numpy, one operation of the specification after another: slow, and what every other code must equal."""

import numpy as np

FLIPS = np.unpackbits(np.frombuffer(bytes.fromhex("9e3779b97f4a7c15f39cc0605cedc834" * 2), np.uint8)).astype(bool)
HUGE, NAN = 0x7180, 0x7FC0  # 2^100 and the one NaN, as bits of bfloat16


def to_float(words):
    """Return the float32 that bits of bfloat16 stand for."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def to_words(numbers):
    """Return the nearest bfloat16, ties to even, every NaN the same."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, NAN, nearest).astype(np.uint16)


def butterfly(vectors):
    """Return sums and differences, stage by stage, in float32."""
    y, dim, h = vectors.copy(), vectors.shape[1], 1
    while h < dim:
        for first in range(0, dim, 2 * h):
            a, b = y[:, first : first + h].copy(), y[:, first + h : first + 2 * h].copy()
            y[:, first : first + h], y[:, first + h : first + 2 * h] = a + b, a - b
        h *= 2
    return y


@np.errstate(all="ignore")
def encode(words, bits):
    """Return (integers, scales, whether a vector cannot be packed) of (n, dim) bits of bfloat16."""
    bad = ((words & 0x7FFF) >= HUGE).any(axis=1)
    flipped = words ^ (FLIPS[: words.shape[1]].astype(np.uint16) << 15)
    y = butterfly(to_float(flipped))
    largest = np.abs(y).max(axis=1)
    up = (largest / np.float32(2 ** (bits - 1) - 1)).view(np.uint32).astype(np.uint64) + 0xFFFF >> 16
    scales = np.maximum(up, 0x0380).astype(np.uint16)  # 2^-120
    factors = np.float32(1) / to_float(scales)
    integers = np.rint(y * factors[:, None])
    integers[bad] = 0
    scales[bad] = NAN
    return integers.astype(np.int8), scales, bad


@np.errstate(all="ignore")
def decode(integers, scales):
    """Return bits of bfloat16."""
    dim = integers.shape[1]
    z = butterfly(integers.astype(np.float32) * to_float(scales)[:, None])
    w = z * np.float32(1 / dim)
    return to_words(np.where(FLIPS[:dim], -w, w))


def padded(data):
    """Return the bytes with zeros behind, up to a multiple of 16."""
    return data + bytes(-len(data) % 16)


def pack(words, bits):
    """Return (packed plane, flag) of (n, dim) bits of bfloat16."""
    integers, scales, bad = encode(words, bits)
    u = integers.view(np.uint8)
    if bits == 8:
        low, high = u.tobytes(), b""
    else:
        low = ((u[:, 0::2] & 15) | (u[:, 1::2] & 15) << 4).astype(np.uint8).tobytes()
        above = np.stack([u >> bit & 1 for bit in range(4, bits)] or [u[:0]], axis=-1)
        high = np.packbits(above, bitorder="little").tobytes()
    return padded(low) + padded(high) + padded(scales.tobytes()), int(bad.any())


def parts(packed, num_rows, dim, bits):
    """Return (integers, scales) of a packed plane."""
    n = num_rows * dim
    low_bytes, high_bytes = n * min(bits, 8 if bits == 8 else 4) // 8, n * (bits & 3) // 8
    high_at = -(-low_bytes // 16) * 16
    scales_at = high_at + -(-high_bytes // 16) * 16
    low = np.frombuffer(packed, np.uint8, low_bytes)
    scales = np.frombuffer(packed, np.uint16, num_rows, scales_at)
    if bits == 8:
        return low.view(np.int8).reshape(num_rows, dim), scales
    u = np.stack([low & 15, low >> 4], axis=-1).reshape(num_rows, dim).astype(np.int16)
    above = np.unpackbits(np.frombuffer(packed, np.uint8, high_bytes, high_at), bitorder="little")
    for i in range(bits - 4):
        u |= above[i :: bits - 4].reshape(num_rows, dim).astype(np.int16) << (4 + i)
    sign = 1 << (bits - 1)
    return ((u ^ sign) - sign).astype(np.int8), scales


def unpack(packed, num_rows, dim, bits):
    """Return the bits of bfloat16 of a packed plane."""
    return decode(*parts(packed, num_rows, dim, bits))
