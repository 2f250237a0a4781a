"""Slot arithmetic beside a count by hand, beside the C that finds addresses with it, and beside the pools it makes."""

import ctypes
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kvortex import ConfigError, PinnedPool
from kvortex.slots import Slots, stride_bytes

ROOT = Path(__file__).resolve().parents[2]
PAGE = 4096


@pytest.mark.parametrize(
    "payload_bytes, header_bytes, expected",
    [
        (1, 0, PAGE), (PAGE, 0, PAGE), (PAGE + 1, 0, 2 * PAGE),
        (1, PAGE, 2 * PAGE), (PAGE, PAGE, 2 * PAGE), (PAGE + 1, PAGE, 3 * PAGE),
        ((1 << 32) - 1, PAGE, (1 << 32) + PAGE),
    ],
)  # fmt: skip
def test_a_stride_is_header_and_payload_in_whole_pages(payload_bytes, header_bytes, expected):
    assert stride_bytes(payload_bytes, header_bytes) == expected


def some_slots(draw):
    """Small pools, whose chunks end everywhere."""
    payload_bytes, header_bytes = draw.randrange(1, 4 * PAGE), draw.choice([0, PAGE])
    stride = stride_bytes(payload_bytes, header_bytes)
    return Slots.of(
        draw.randrange(stride, 50 * stride),
        payload_bytes,
        header_bytes=header_bytes,
        first_chunk_bytes=draw.randrange(1, 30 * stride),
        chunk_bytes=draw.randrange(1, 30 * stride),
        one_chunk=draw.random() < 0.1,
    )


def chunks_of(slots):
    """(first slot, count) of each chunk."""
    chunks = [slots.chunk(0)]
    while slots.chunk(len(chunks))[1]:
        chunks.append(slots.chunk(len(chunks)))
    return chunks


def test_the_chunks_of_a_pool_hold_each_slot_once(seed):
    draw = random.Random(seed)
    for _ in range(500):
        slots = some_slots(draw)
        chunks = chunks_of(slots)
        held = [slot for first, count in chunks for slot in range(first, first + count)]
        assert held == list(range(slots.num_slots)), slots
        assert all(count == slots.chunk_slots for _, count in chunks[1:-1])


@pytest.fixture(scope="module")
def in_c(tmp_path_factory):
    """What slots.h finds, as functions of (num_slots, first_chunk_slots, chunk_slots, chunk or slot)."""
    folder = tmp_path_factory.mktemp("slots")
    names = ("kv_slots_chunk_first", "kv_slots_chunk_count", "kv_slots_chunk")
    (folder / "slots.c").write_text('#include "kvortex/slots.h"\n' + "".join(
        f"uint32_t c_{name}(uint32_t num, uint32_t first, uint32_t rest, uint32_t at)\n"
        "{ kv_slots s = {.num_slots = num, .first_chunk_slots = first, .chunk_slots = rest};"
        f" return {name}(&s, at); }}\n" for name in names
    ))  # fmt: skip
    command = ["gcc", "-std=gnu11", "-shared", "-fPIC", "-I", ROOT / "include", folder / "slots.c"]
    subprocess.run([*command, "-o", folder / "slots.so"], check=True)
    library = ctypes.CDLL(str(folder / "slots.so"))
    functions = [getattr(library, f"c_{name}") for name in names]
    for function in functions:
        function.restype, function.argtypes = ctypes.c_uint32, [ctypes.c_uint32] * 4
    return functions


def test_c_finds_the_same_chunks(in_c, seed):
    first_of, count_of, chunk_of = in_c
    draw = random.Random(seed)
    for _ in range(200):
        slots = some_slots(draw)
        numbers = slots.num_slots, slots.first_chunk_slots, slots.chunk_slots
        for number, (first, count) in enumerate(chunks_of(slots)):
            assert (first_of(*numbers, number), count_of(*numbers, number)) == (first, count), slots
            assert {chunk_of(*numbers, slot) for slot in range(first, first + count)} == {number}, slots


@pytest.mark.parametrize("header_bytes", [0, PAGE])
@pytest.mark.parametrize("driver_allocated", [False, True])
@pytest.mark.parametrize("payload_bytes", [1, PAGE, 3 * PAGE + 5])
def test_a_pool_has_the_slots_that_were_counted_without_it(device, payload_bytes, header_bytes, driver_allocated):
    sizes = {"header_bytes": header_bytes, "first_chunk_bytes": 5 * PAGE, "chunk_bytes": 9 * PAGE}
    slots = Slots.of(1 << 18, payload_bytes, one_chunk=driver_allocated, **sizes)
    with PinnedPool(1 << 18, payload_bytes, device, driver_allocated=driver_allocated, **sizes) as pool:
        assert pool.slots_ready >= slots.chunk(0)[1]
        pool.wait_ready(20_000)
        assert (pool.num_slots, pool.stride_bytes, pool.nbytes) == (
            slots.num_slots, slots.stride_bytes, slots.pool_bytes,
        )  # fmt: skip
        steps = np.diff([pool.address(slot) for slot in range(pool.num_slots)])
        assert (steps == slots.stride_bytes).all()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"pool_bytes": -1}, "holds no slot of 4096 bytes; set cpu_pool_size_bytes to at least 4096"),
        ({"pool_bytes": PAGE, "header_bytes": PAGE}, "holds no slot of 8192 bytes"),
        ({"pool_bytes": PAGE << 32}, "2\\^32 - 2"),
        ({"payload_bytes": 0}, "payload_bytes must be 1 to"),
        ({"payload_bytes": 1 << 32}, "payload_bytes must be 1 to"),
        ({"header_bytes": 512}, "header_bytes must be 0 or 4096, got 512"),
        ({"first_chunk_bytes": 0}, "chunks must be larger than 0 bytes, got 0 and"),
        ({"chunk_bytes": -5}, "chunks must be larger than 0 bytes, got 134217728 and -5"),
    ],
)
def test_sizes_without_a_pool_are_refused(arguments, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Slots.of(**{"pool_bytes": 1 << 20, "payload_bytes": PAGE, **arguments})


def test_sizes_that_are_no_whole_numbers_are_refused():
    for name in ("pool_bytes", "payload_bytes", "first_chunk_bytes", "chunk_bytes"):
        with pytest.raises(TypeError):
            Slots.of(**{"pool_bytes": 1 << 20, "payload_bytes": PAGE, name: 4096.0})
