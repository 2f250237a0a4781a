"""The entropy-coded codec in the words of kvortex/codec/ECSQ.md, in numpy: slow, for tests to compare with.

A block is a list of planes (role, words, heads_first): words are bits of bfloat16 [tokens, heads, dim]; with
`heads_first` the block has them as [heads, tokens, dim].
"""

import math
import struct
import zlib

import numpy as np
from reference import to_float, to_words

LANES, GROUP, SEGMENT, CLASSES, ESCAPE = 32, 64, 65536, 48, 255
STEPS = {1: 0.125, 2: 0.18, 3: 0.25, 4: 0.35}
GAINS = (2.0 ** ((4 - np.arange(16)) / 4)).astype(np.float32)


class Tables:
    def __init__(self, content):
        self.frequencies = np.frombuffer(content, "<u2").reshape(CLASSES, 256).astype(np.int64)
        self.firsts = np.cumsum(self.frequencies, axis=1) - self.frequencies
        self.symbols = np.stack([np.repeat(np.arange(256), row) for row in self.frequencies])


# ---- what an encoder decides -----------------------------------------------------------------------------------------


def sum_of_lanes(v):
    for half in (8, 4, 2, 1):
        v = v[..., :half] + v[..., half : 2 * half]
    return v[..., 0]


def running_sum(v):
    """The sum over the first axis, one after the other, as float32."""
    total = np.zeros(v.shape[1:], np.float32)
    for part in v:
        total = total + part
    return total


def log2(x):
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.int64)
    m = (bits & 0x7FFFFF) >> 7
    return ((bits >> 23) - 127) * 65536 + m + ((m * (65536 - m) >> 16) * 22512 >> 16)


def costs(squares, unit):
    """Sums of logarithms over units of channels; `squares` is [tokens, heads, chunks, 16]."""
    tokens, heads, chunks, _ = squares.shape
    squares = squares.reshape(tokens, heads, chunks // unit, unit, 16).transpose(0, 3, 1, 2, 4)
    return int(log2(sum_of_lanes(running_sum(squares.reshape(-1, heads, chunks // unit, 16)))).sum())


def plan(x, role, level):
    """The step of the plane as a bfloat16, whether differences are coded, and a gain for each vector; or None."""
    tokens, heads, dim = x.shape
    lanes = x.reshape(tokens, heads, dim // 16, 16)
    squares = sum_of_lanes(running_sum((lanes * lanes).transpose(2, 0, 1, 3)))
    total = 0.0
    for square in squares.reshape(-1).tolist():
        total += square
    if not total < 2.0**127:
        return None
    differences = False
    if tokens > 1:
        unit, between = min(dim // 16, 4), lanes[1:] - lanes[:-1]
        differences = costs(between * between, unit) < costs(lanes[1:] ** 2, unit)
    drifts = differences and role == "k"
    means = running_sum(lanes)
    of_means = 0.0
    for number in sum_of_lanes(running_sum((means * means).transpose(1, 0, 2))).tolist():
        of_means += number
    mean_square = total / x.size
    if total == 0:
        step = 0 if (x.view(np.uint32) & 0x7FFFFFFF).any() else 0x3F80
    else:
        variance = (total - of_means / tokens) / (x.size - x.size / tokens) if tokens > 1 else mean_square / 16
        variance = max(variance, mean_square / 4096)
        number = np.float32(STEPS[level] * (1.283 if role == "v" else 1.03 if drifts else 0.821) * math.sqrt(variance))
        step = (int(number.view(np.uint32)) + 0xFFFF) >> 16
    if not 0x2680 <= step <= 0x5D80:
        return None
    sizes = log2(squares).reshape(-1)
    if drifts:
        below = np.sort(sizes)[(len(sizes) - 1) // 2] - sizes
        gains = np.where(below > 67446, 4 + 2 * ((below + 32768) >> 16), 4)
    else:
        counted = sizes[sizes > sizes.max() - 10 * 65536]
        mean = int(math.copysign(abs(int(counted.sum())) // len(counted), int(counted.sum())))
        gains = 4 - ((2 * (sizes - mean) + 32768) >> 16)
    return step, differences, np.clip(gains, 0, 15)


def class_of(numbers):
    """Of integers [.., 16], added up in that order."""
    if not numbers.size:
        return 0
    square, magnitude = (
        int(log2(sum_of_lanes(running_sum(part)) / np.float32(numbers.size))) for part in (numbers**2, np.abs(numbers))
    )
    size = min(max(((3 * square + 65536) >> 17) + 7, 0), CLASSES // 2 - 1)
    return 2 * size + (2 * magnitude - square < -54397)


def groups(r):
    """The integers [tokens, channels] of each group of channels."""
    return [r[:, first : first + GROUP] for first in range(0, r.shape[1], GROUP)]


# ---- records ---------------------------------------------------------------------------------------------------------


def in_memory(words, heads_first):
    return np.ascontiguousarray(words.transpose(1, 0, 2) if heads_first else words)


def raw(words, heads_first):
    return struct.pack("<HBB", 0, 0, 0) + in_memory(words, heads_first).tobytes(), [], []


def encode_plane(role, words, heads_first, level):
    """The head of the plane, with classes and gains, and the classes and integers that are to be coded."""
    if role == "exact":
        return raw(words, heads_first)
    tokens, heads, dim = words.shape
    x = to_float(words)
    with np.errstate(all="ignore"):
        planned = plan(x, role, level)
        if planned is None:
            return raw(words, heads_first)
        step, differences, gains = planned
        inverse = np.float32(1) / (to_float(np.uint16(step)) * GAINS[gains]).reshape(tokens, heads, 1)
        y = x * inverse
        if np.abs(y).max() > 16000:
            return raw(words, heads_first)
    q = np.rint(y).astype(np.int64).reshape(tokens, heads * dim)
    r = np.diff(q, axis=0, prepend=0 * q[:1]) if differences else q
    classes, integers = [[], []], []
    numbers = []
    for group in groups(r):
        count = group.shape[1]
        for part, chosen in enumerate((group[:1], group[1:])):
            classes[part].append(class_of(chosen.astype(np.float32).reshape(-1, 16)))
        numbers += [classes[0][-1]] * count + [classes[1][-1]] * (group.size - count)
        integers += group.reshape(-1).tolist()
    gains = np.pad(gains, (0, len(gains) % 2))
    side = bytes(classes[0]) + bytes(classes[1]) + (gains[0::2] | gains[1::2] << 4).astype(np.uint8).tobytes()
    return struct.pack("<HBB", step, differences, 1) + side, numbers, integers


def encode_segment(planes, level, tables):
    coded = [encode_plane(*plane, level) for plane in planes]
    heads = b"".join(head for head, _, _ in coded)
    k = np.array(sum((numbers for _, numbers, _ in coded), []), np.int64)
    v = np.array(sum((integers for _, _, integers in coded), []), np.int64)
    if not len(k):
        return struct.pack("<I", 0) + heads
    symbols = np.where(np.abs(v) > 126, ESCAPE, v + 126)
    symbols = np.where(tables.frequencies[k, symbols] == 0, ESCAPE, symbols)
    frequencies, firsts = tables.frequencies[k, symbols], tables.firsts[k, symbols]
    states, words = np.full(LANES, 1 << 16, np.int64), []
    for at in range(len(k) - LANES, -1, -LANES):
        f = frequencies[at : at + LANES]
        full = states >= f << 20
        words.append((states[full] & 0xFFFF).astype("<u2").tobytes())
        states = np.where(full, states >> 16, states)
        states = (states // f << 12) + states % f + firsts[at : at + LANES]
    stream = b"".join(reversed(words))
    segment = struct.pack("<I", len(stream) // 2) + heads + states.astype("<u4").tobytes() + stream
    segment += v[symbols == ESCAPE].astype("<i2").tobytes()
    whole = struct.pack("<I", 0) + b"".join(raw(*plane[1:])[0] for plane in planes)
    return segment if len(segment) <= len(whole) else whole


def segments(planes):
    found, numbers = [[]], 0
    for plane in planes:
        if numbers >= SEGMENT:
            found.append([])
            numbers = 0
        found[-1].append(plane)
        numbers += plane[1].size
    return found


def encode(planes, level, tables, tables_id, planes_crc):
    body = [encode_segment(part, level, tables) for part in segments(planes)]
    body = b"".join(struct.pack("<I", len(part)) for part in body) + b"".join(body)
    block_bytes = sum(words.nbytes for _, words, _ in planes)
    dim = next((words.shape[2] for role, words, _ in planes if role != "exact"), 0)
    kind, sizes = (b"KVC1", 5, level, 0, 0, tables_id), (len(planes), block_bytes, len(body))
    return struct.pack("<4sBBBBIIQQHHI", *kind, *sizes, dim, LANES, planes_crc) + body


def decode_segment(segment, planes, tables):
    num_words, at, heads = struct.unpack_from("<I", segment)[0], 4, []
    for _, like, heads_first in planes:
        step, differences, is_coded = struct.unpack_from("<HBB", segment, at)
        at += 4
        if not is_coded:
            words = np.frombuffer(segment, np.uint16, like.size, at)
            tokens, num_heads, dim = like.shape
            words = (
                words.reshape(num_heads, tokens, dim).transpose(1, 0, 2) if heads_first else words.reshape(like.shape)
            )
            heads.append((words,))
            at += like.nbytes
            continue
        tokens, num_heads, dim = like.shape
        num_groups = -(-num_heads * dim // GROUP)
        classes = np.frombuffer(segment, np.uint8, 2 * num_groups, at).reshape(2, num_groups)
        packed = np.frombuffer(segment, np.uint8, (tokens * num_heads + 1) // 2, at + 2 * num_groups)
        gains = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: tokens * num_heads]
        heads.append((to_float(np.uint16(step)) * GAINS[gains].reshape(tokens, num_heads, 1), differences, classes))
        at += 2 * num_groups + len(packed)
    states = np.frombuffer(segment, "<u4", LANES, at).astype(np.int64) if at < len(segment) else None
    words = iter(np.frombuffer(segment, "<u2", num_words, at + 4 * LANES).tolist() if at < len(segment) else [])
    escapes = iter(np.frombuffer(segment[at + 4 * LANES + 2 * num_words :], "<i2").tolist())
    found = []
    for (_, like, _), head in zip(planes, heads, strict=True):
        if len(head) == 1:
            found.append(head[0])
            continue
        tokens, num_heads, dim = like.shape
        factors, differences, classes = head
        r = np.zeros((tokens, num_heads * dim), np.int64)
        for number, group in enumerate(groups(r)):
            for token in range(tokens):
                k = classes[min(token, 1), number]
                for first in range(0, group.shape[1], LANES):
                    slots = states & 4095
                    symbols = tables.symbols[k, slots]
                    states = tables.frequencies[k, symbols] * (states >> 12) + slots - tables.firsts[k, symbols]
                    for lane in np.flatnonzero(states < 1 << 16):
                        states[lane] = states[lane] << 16 | next(words)
                    values = symbols - 126
                    for lane in np.flatnonzero(symbols == ESCAPE):
                        values[lane] = next(escapes)
                    group[token, first : first + LANES] = values
        q = np.cumsum(r, axis=0) if differences else r
        found.append(to_words(q.reshape(like.shape).astype(np.float32) * factors))
    assert states is None or (states == 1 << 16).all()
    assert next(words, None) is None and next(escapes, None) is None
    return found


def decode(record, planes, tables):
    """The planes of a record that is in order; `planes` have the shapes."""
    parts = segments(planes)
    lengths, at, found = struct.unpack_from(f"<{len(parts)}I", record, 40), 40 + 4 * len(parts), []
    for part, length in zip(parts, lengths, strict=True):
        found += decode_segment(record[at : at + length], part, tables)
        at += length
    assert at == len(record)
    return found


def planes_crc(planes):
    """Of planes (role, first_byte, num_rows, row_bytes, step_bytes, num_heads, token_rows, head_rows)."""
    roles = {"exact": 0, "k": 1, "v": 2}
    return zlib.crc32(b"".join(struct.pack("<Q7I", *numbers, roles[role]) for role, *numbers in planes))
