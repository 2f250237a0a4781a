"""Entropy-coded blocks: every instruction set does what the numpy reference does, and no bytes lead it astray."""

import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import ecsq_reference as ecsq
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import to_float, to_words

from kvortex import CorruptBlock
from kvortex.codec import Plane, _ecsq
from kvortex.codec._ecsq import Coded, decode_block, encode_block, instruction_sets

SOAK = os.environ.get("KVORTEX_SOAK") == "1"
LEVELS = (1, 2, 3, 4)
GUARD = 0xA5
MUTATIONS = int(os.environ.get("KVORTEX_MUTATED_RECORDS") or (1_000_000 if SOAK else 3_000))
ROOT = Path(__file__).resolve().parents[2]
TABLES_FILE = Path(_ecsq.__file__).with_name("ecsq_tables.bin")
TABLES = ecsq.Tables(TABLES_FILE.read_bytes())
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fsanitize-coverage=trace-pc"]


def smooth(rng, shape):
    """Channels with a mean and a width of their own, whose numbers move slowly from token to token."""
    tokens, heads, dim = shape
    x = np.cumsum(rng.standard_normal(shape), axis=0) * 0.3 + rng.standard_normal(shape)
    return x * np.exp(rng.normal(0, 0.5, (heads, dim))) + rng.normal(0, 2, (heads, dim))


def of_all_sizes(rng, shape):
    """Finite numbers, some so large or so small that a plane is kept raw."""
    return rng.standard_normal(shape) * 2.0 ** rng.integers(-60, 70)


# float32 numbers of a plane [tokens, heads, dim].
KINDS = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "smooth": smooth,
    "outliers": lambda rng, shape: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 300, 1),
    "vectors of all sizes": lambda rng, shape: rng.standard_normal(shape) * 10 ** rng.uniform(-2, 2, (*shape[:2], 1)),
    "half of it zeros": lambda rng, shape: rng.standard_normal(shape) * (rng.random((*shape[:2], 1)) < 0.5),
    "zeros": lambda rng, shape: np.zeros(shape),
    "one token repeated": lambda rng, shape: np.broadcast_to(rng.standard_normal(shape[1:]), shape),
    "of all sizes": of_all_sizes,
    "one number is far out": lambda rng, shape: np.where(np.arange(math.prod(shape)).reshape(shape) == 77, 3e4, 1e-3),
    "nan": lambda rng, shape: np.where(rng.random(shape) < 0.001, np.nan, rng.standard_normal(shape)),
    "any bits": lambda rng, shape: to_float(rng.integers(0, 1 << 16, shape).astype(np.uint16)),
}


class Block:
    """Planes one after another, each with its numbers."""

    def __init__(self, parts):
        """`parts`: (role, numbers [tokens, heads, dim], whether heads come first)."""
        self.planes, self.parts, pieces, at = [], [], [], 0
        for role, numbers, heads_first in parts:
            words = to_words(np.asarray(numbers, np.float32))
            tokens, heads, dim = words.shape
            in_memory = ecsq.in_memory(words, heads_first)
            self.planes.append(Plane(role, at, tokens * heads, 2 * dim, 2 * dim, 0, heads, heads_first))
            self.parts.append((role, words, heads_first))
            pieces.append(in_memory.reshape(-1))
            at += in_memory.nbytes
        self.words = np.concatenate(pieces)

    def coded(self, level):
        return Coded.of(self.planes, self.words.nbytes, level)

    def record(self, level):
        """What the reference makes of it."""
        crc = ecsq.planes_crc(
            (
                plane.role,
                plane.first_byte,
                plane.num_rows,
                plane.row_bytes,
                plane.step_bytes,
                plane.num_heads,
                1 if plane.heads_first else plane.num_heads,
                plane.num_rows // plane.num_heads if plane.heads_first else 1,
            )
            for plane in self.planes
        )
        return ecsq.encode(self.parts, level, TABLES, _ecsq.TABLES_ID, crc)

    def decoded(self, record):
        """The bytes of the block that the reference decodes."""
        found = ecsq.decode(record, self.parts, TABLES)
        return b"".join(
            ecsq.in_memory(words, first).tobytes() for (_, _, first), words in zip(self.parts, found, strict=True)
        )


def with_guards(nbytes):
    """Return a buffer between bytes that must stay, and what checks them."""
    whole = np.full(nbytes + 128, GUARD, np.uint8)
    return whole[64:-64], lambda: (whole[:64] == GUARD).all() and (whole[-64:] == GUARD).all()


def encoded_by(name, coded, words, room=None):
    out, untouched = with_guards(coded.max_coded_bytes if room is None else room)
    nbytes = encode_block(coded, words, out, instruction_set=name)
    assert untouched() and nbytes <= len(out)
    return out[:nbytes].tobytes()


def decoded_by(name, coded, record):
    block, untouched = with_guards(coded.block_bytes)
    try:
        decode_block(coded, np.frombuffer(record, np.uint8).copy(), block, instruction_set=name)
    finally:
        assert untouched()
    return block.tobytes()


def error(words, back):
    x, y = to_float(words.reshape(-1)), to_float(np.frombuffer(back, np.uint16))
    return math.sqrt(np.mean((x - y) ** 2) / np.mean(x**2))


PARTS = st.tuples(
    st.sampled_from(["k", "v", "exact"]),
    st.sampled_from([1, 2, 3, 16, 33]),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([32, 64, 128, 256]),
    st.booleans(),
    st.sampled_from(list(KINDS)),
)


def block_of(parts, number):
    rng = np.random.default_rng(number)
    return Block(
        [(role, KINDS[kind](rng, (tokens, heads, dim)), first) for role, tokens, heads, dim, first, kind in parts]
    )


@given(parts=st.lists(PARTS, min_size=1, max_size=4), level=st.sampled_from(LEVELS), number=st.integers(0, 2**32 - 1))
@settings(max_examples=5000 if SOAK else 40)
def test_every_instruction_set_codes_like_the_reference(parts, level, number):
    block = block_of(parts, number)
    coded, record = block.coded(level), block.record(level)
    back = block.decoded(record)
    assert len(record) <= coded.max_coded_bytes
    for name in instruction_sets():
        assert encoded_by(name, coded, block.words) == record, name
        assert decoded_by(name, coded, record) == back, name


@pytest.mark.parametrize("kind", KINDS)
def test_planes_of_a_model_are_coded_like_the_reference(kind, seed):
    """More than one segment, and planes of both roles."""
    rng = np.random.default_rng(seed)
    block = Block([(role, KINDS[kind](rng, (16, 8, 128)), False) for role in "kvkvk"])
    record = block.record(1)
    assert block.coded(1).num_segments == 2
    for name in instruction_sets():
        assert encoded_by(name, block.coded(1), block.words) == record
        assert decoded_by(name, block.coded(1), record) == block.decoded(record)


@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 3, 32), (1, 1, 64)])
def test_many_small_planes_are_coded_like_the_reference(shape, seed):
    """Each takes from the memory for coding what a plane takes at the least."""
    rng = np.random.default_rng(seed)
    block = Block([("kv"[i % 2], rng.standard_normal(shape), False) for i in range(300)])
    record = block.record(1)
    for name in instruction_sets():
        assert encoded_by(name, block.coded(1), block.words) == record
        assert decoded_by(name, block.coded(1), record) == block.decoded(record)


ERRORS = {1: (0.030, 0.047), 2: (0.043, 0.067), 3: (0.060, 0.094), 4: (0.084, 0.131)}  # of K, of V


@pytest.mark.parametrize("level", LEVELS)
def test_error_of_a_level(level, seed):
    """Of Gaussian numbers; keys are coded finer."""
    for role, expected in zip("kv", ERRORS[level], strict=True):
        block = Block([(role, np.random.default_rng(seed).standard_normal((16, 8, 128)), False)])
        coded = block.coded(level)
        found = error(block.words, decoded_by(None, coded, encoded_by(None, coded, block.words)))
        assert found == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("level, ratio", [(1, 3.1), (2, 3.4), (3, 3.8), (4, 4.2)])
def test_size_of_a_level(level, ratio, seed):
    """Of blocks of 1 MiB, their slots on disk with a page before them: channels of many widths, keys that drift."""
    rng, parts = np.random.default_rng(seed), []
    for role in "kv" * 16:
        x = rng.standard_normal((16, 8, 128))
        if role == "k":
            for token in range(1, 16):
                x[token] = 0.6 * x[token - 1] + 0.8 * x[token]
        x *= np.exp(rng.normal(0, 0.4, (8, 128)))
        parts.append((role, x + (rng.normal(0, 2, (8, 128)) if role == "k" else 0), False))
    block = Block(parts)
    coded = block.coded(level)
    nbytes = len(encoded_by(None, coded, block.words))
    assert block.words.nbytes / (-(-(nbytes + 4096) // 4096) * 4096) > ratio
    assert 0.9 * coded.typical_bytes < nbytes < 1.03 * coded.typical_bytes


def test_a_small_vector_keeps_its_precision(seed):
    """The first token of a text is small and weighs much: its error must shrink with it."""
    x = np.random.default_rng(seed).standard_normal((16, 8, 128))
    x[0] /= 6
    block = Block([("v", x, False)])
    back = decoded_by(None, block.coded(3), encoded_by(None, block.coded(3), block.words))
    first = slice(0, 8 * 128)
    assert error(block.words[first], np.frombuffer(back, np.uint16)[first].tobytes()) < 0.12


@pytest.mark.parametrize("role", ["k", "v"])
def test_a_block_of_one_repeated_token_is_small(role, seed):
    """It has no deviation from the means of its channels, and yet must not be coded to its last bit."""
    rng = np.random.default_rng(seed)
    token, noise = rng.standard_normal((1, 8, 128)), rng.standard_normal((16, 8, 128))
    for level in LEVELS:
        sizes = []
        for numbers in (np.broadcast_to(token, noise.shape), noise):
            block = Block([(role, numbers, False)])
            sizes.append(len(encoded_by(None, block.coded(level), block.words)))
        assert sizes[0] < 0.5 * sizes[1]


def test_vectors_of_zeros_do_not_spoil_the_others(seed):
    """The rest of a block that is filled in part."""
    x = np.random.default_rng(seed).standard_normal((16, 8, 128))
    x[8:] = 0
    block = Block([("k", x, False), ("v", x, False)])
    back = decoded_by(None, block.coded(1), encoded_by(None, block.coded(1), block.words))
    assert error(block.words, back) < 0.07
    assert not np.frombuffer(back, np.uint16).reshape(2, 16, -1)[:, 8:].any()


@pytest.mark.parametrize("word", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x7F7F, 0x6000])
def test_a_plane_that_cannot_be_coded_comes_back_as_it_was(word, seed):
    rng = np.random.default_rng(seed)
    block = Block([(role, rng.standard_normal((16, 8, 128)), False) for role in "kvk"])
    block.words[20_000] = word  # of the second plane
    for name in instruction_sets():
        record = encoded_by(name, block.coded(1), block.words)
        back = np.frombuffer(decoded_by(name, block.coded(1), record), np.uint16)
        assert (back[16_384:32_768] == block.words[16_384:32_768]).all()
        assert len(record) < block.words.nbytes / 1.5


def test_bytes_that_are_no_numbers_come_back_as_they_were(seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 16, 16 * 8 * (128 + 32)).astype(np.uint16)
    rows = words.reshape(-1, 160)
    rows[:, :128] = to_words(rng.standard_normal((128, 128)).astype(np.float32))
    coded = Coded.of([Plane("k", 0, 128, 256, 320, 0, 8)], words.nbytes, 2)
    for name in instruction_sets():
        back = np.frombuffer(decoded_by(name, coded, encoded_by(name, coded, words)), np.uint16).reshape(-1, 160)
        assert (back[:, 128:] == rows[:, 128:]).all()
        assert error(rows[:, :128], back[:, :128].tobytes()) < 0.1


def test_the_order_of_heads_and_tokens_makes_no_difference(seed):
    x = smooth(np.random.default_rng(seed), (16, 8, 128))
    records = []
    for heads_first in (False, True):
        block = Block([("k", x, heads_first)])
        record = encoded_by(None, block.coded(1), block.words)
        back = np.frombuffer(decoded_by(None, block.coded(1), record), np.uint16)
        records.append((record[44:], np.sort(back).tobytes()))
    assert records[0] == records[1]


def test_numbers_that_were_decoded_are_coded_again(seed):
    x = smooth(np.random.default_rng(seed), (16, 8, 128))
    block = Block([("k", x, False)])
    back = decoded_by(None, block.coded(1), encoded_by(None, block.coded(1), block.words))
    again = decoded_by(None, block.coded(1), encoded_by(None, block.coded(1), np.frombuffer(back, np.uint16)))
    assert error(np.frombuffer(back, np.uint16), again) < 0.041


# ---- too little room, and records that are none ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A block with all that a record can have: differences, gains, escapes, raw planes, exact bytes; two segments."""
    rng = np.random.default_rng(5)
    parts = [("k", smooth(rng, (16, 2, 64)), False), ("exact", rng.standard_normal((1, 1, 32)), False)]
    parts.append(("v", KINDS["outliers"](rng, (16, 3, 32)), True))
    parts.append(("v", KINDS["nan"](rng, (4, 1, 256)) * np.inf, False))
    parts.append(("exact", np.zeros((1, 1, 65536)), False))
    parts.append(("v", rng.standard_normal((16, 2, 128)), False))
    return Block(parts)


def test_a_record_that_does_not_fit_is_not_written(small):
    coded = small.coded(1)
    whole = encoded_by(None, coded, small.words)
    rooms = [0, 1, 39, 40, 47, 48, *range(49, len(whole), 997), len(whole) - 1]
    for name in instruction_sets():
        assert encoded_by(name, coded, small.words, room=len(whole)) == whole
        for room in rooms:
            assert encoded_by(name, coded, small.words, room=room) == b""


def test_noise_takes_no_more_than_its_own_bytes(seed):
    words = np.random.default_rng(seed).integers(0, 1 << 16, 3 * 16_384).astype(np.uint16)
    block = Block([(role, np.zeros((16, 8, 128)), False) for role in "kvk"])
    block.words[:] = words
    for name in instruction_sets():
        record = encoded_by(name, block.coded(1), words)
        assert len(record) <= words.nbytes + 40 + 3 * 4 + 2 * 8
        assert decoded_by(name, block.coded(1), record) == words.tobytes()


def test_a_truncated_record_is_refused(small):
    coded = small.coded(2)
    record = encoded_by(None, coded, small.words)
    sides = [*range(200), *range(len(record) - 200, len(record)), *range(200, len(record) - 200, 13)]
    for name in instruction_sets():
        for length in sides if name != "c" else sides[::7]:
            with pytest.raises(CorruptBlock):
                decoded_by(name, coded, record[:length])
        with pytest.raises(CorruptBlock):
            decoded_by(name, coded, record + b"\0")


def resealed(record, length):
    """The first `length` bytes with a header and a last segment that claim to be whole."""
    changed = np.frombuffer(record[:length], np.uint8).copy()
    changed[24:32].view(np.uint64)[0] = length - 40
    changed[40:48].view(np.uint32)[1] -= len(record) - length
    return changed.tobytes()


def test_a_segment_that_was_cut_is_refused(small):
    """Though every length agrees: its states, words or escapes are too few, or their count is another."""
    coded = small.coded(2)
    record = encoded_by(None, coded, small.words)
    last = int(np.frombuffer(record, np.uint32, 2, 40)[1])
    for name in instruction_sets():
        for cut in range(1, last, 1 if name == "avx512" else 17):
            with pytest.raises(CorruptBlock):
                decoded_by(name, coded, resealed(record, len(record) - cut))


@pytest.mark.parametrize("at", range(40))
def test_a_header_of_another_kind_is_refused(small, at):
    coded = small.coded(1)
    record = bytearray(encoded_by(None, coded, small.words))
    record[at] ^= 1 << at % 8
    with pytest.raises(CorruptBlock):
        decoded_by(None, coded, bytes(record))


def test_a_record_of_other_planes_or_another_level_is_refused(small):
    record = encoded_by(None, small.coded(1), small.words)
    with pytest.raises(CorruptBlock):
        decoded_by(None, small.coded(2), record)
    other = Coded.of([*small.planes[:-1], replace(small.planes[-1], role="k")], small.words.nbytes, 1)
    with pytest.raises(CorruptBlock):
        decoded_by(None, other, record)


@pytest.mark.parametrize("at, number", [(1, 0x26), (1, 0x5E), (1, 0xBF), (2, 2), (3, 2), (4, 48), (7, 255)])
def test_a_head_that_is_out_of_range_is_refused(small, at, number):
    """Of the first plane: a step too small, too large or negative; no such flag; no such class."""
    coded = small.coded(1)
    record = bytearray(encoded_by(None, coded, small.words))
    record[48 + 4 + at] = number
    if at == 1:
        record[48 + 4] = 0x7F
    for name in instruction_sets():
        with pytest.raises(CorruptBlock):
            decoded_by(name, coded, bytes(record))


def test_states_that_do_not_end_as_they_began_are_refused(small):
    coded = small.coded(1)
    record = encoded_by(None, coded, small.words)
    lengths = np.frombuffer(record, np.uint32, 2, 40)
    segment = 48 + int(lengths[0])
    states = segment + 4 + 4 + 2 * 4 + 16  # behind the one plane's head, classes and gains
    for lane in range(32):
        changed = bytearray(record)
        changed[states + 4 * lane + 3] ^= 0x01
        with pytest.raises(CorruptBlock):
            decoded_by(None, coded, bytes(changed))


def mutated(rng, record):
    """A few bytes changed, or a stretch of them; anywhere, or where lengths, heads and states are."""
    changed = np.frombuffer(record, np.uint8).copy()
    first = int(rng.choice([40, 48, 48 + int(changed[40:44].view(np.uint32)[0])]))
    for _ in range(rng.integers(1, 4)):
        end = int(rng.choice([min(first + 64, len(changed)), len(changed)]))
        at = int(rng.integers(first, end))
        kind = rng.integers(0, 4)
        if kind == 0:
            changed[at] ^= 1 << rng.integers(0, 8)
        elif kind == 1:
            changed[at] = rng.choice([0, 1, 2, 47, 48, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            stretch = changed[at : at + rng.integers(1, 64)]
            stretch[:] = rng.integers(0, 256, len(stretch))
        else:
            changed[at : at + 4] = np.frombuffer(
                np.int64(rng.choice([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(changed)])).tobytes(), np.uint8
            )[: len(changed[at : at + 4])]
    if rng.integers(0, 2):  # the two lengths still add up
        lengths = changed[40:48].view(np.uint32)
        lengths[1] = (len(changed) - 48 - int(lengths[0])) % (1 << 32)
    return changed


@pytest.mark.timeout(36_000)
def test_no_mutated_record_leads_outside(small, seed):
    """Most are refused; what is not has changed numbers, and all sets agree about them."""
    rng, names = np.random.default_rng(seed), instruction_sets()
    coded = small.coded(1)
    record = encoded_by(None, coded, small.words)
    block, untouched = with_guards(coded.block_bytes)
    outcomes = {True: 0, False: 0}
    for number in range(MUTATIONS):
        changed = mutated(rng, record)
        found = []
        for name in names if number % 8 == 0 else (names[number % len(names)],):
            try:
                decode_block(coded, changed, block, instruction_set=name)
                found.append(block.tobytes())
            except CorruptBlock:
                found.append(None)
        assert len(set(found)) == 1
        outcomes[found[0] is None] += 1
    assert untouched()
    assert outcomes[True] > 0.5 * MUTATIONS


@pytest.mark.timeout(36_000)
@pytest.mark.parametrize("flags", [["-O3", "-ffp-contract=fast"], ["-O1", "-g", *SANITIZERS]], ids=" ".join)
def test_no_mutated_record_leads_outside_in_c(tmp_path, flags, seed):
    """In memory that ends where record and block do; what leads the decoder to new places is mutated further."""
    program = tmp_path / "ecsq_mutated"
    build = [os.environ.get("CC", "cc"), "-std=gnu11", "-Wall", "-Wextra", "-Werror", *flags, f"-I{ROOT / 'include'}"]
    subprocess.run([*build, str(ROOT / "tests/c/ecsq_mutated.c"), "-o", str(program), "-lm"], check=True)
    command = [str(program), str(TABLES_FILE), str(MUTATIONS), str(seed)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout.split()[2]) > 0.7 * MUTATIONS


def test_what_cannot_be_coded_is_refused():
    plane = Plane("k", 0, 128, 256, 256, 0, 8)
    for planes, block_bytes, level in (
        ([plane], 128 * 256, 0),
        ([plane], 128 * 256, 5),
        ([plane], 128 * 256 - 16, 1),
        ([plane, plane], 128 * 256, 1),
        ([plane], (1 << 31) + 16, 1),
        ([], 0, 1),
    ):
        with pytest.raises(ValueError, match="must be|block of|share"):
            Coded.of(planes, block_bytes, level)
    with pytest.raises(TypeError, match="Plane"):
        Coded.of(["k"], 16, 1)
    with pytest.raises(TypeError, match=r"Coded\.of"):
        Coded()
    with pytest.raises(ValueError, match="num_heads"):
        Plane("k", 0, 128, 256, 256, 0, 3)
    coded = Coded.of([plane], 128 * 256, 1)
    block, out = np.zeros(coded.block_bytes, np.uint8), np.zeros(coded.max_coded_bytes, np.uint8)
    for call in (
        lambda: encode_block(coded, block[1:], out),
        lambda: encode_block(coded, np.zeros((coded.block_bytes, 2), np.uint8)[:, 0], out),
        lambda: encode_block(coded, block, out, instruction_set="mmx"),
        lambda: decode_block(coded, out, block[16:]),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
    with pytest.raises((TypeError, ValueError, BufferError)):
        encode_block(coded, block, bytes(coded.max_coded_bytes))
