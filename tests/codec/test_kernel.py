"""The source of the kernel, run on a CPU, writes the bytes of the numpy reference; `make test-gpu` runs it on a GPU."""

import ctypes
import hashlib
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference

ROOT = Path(__file__).resolve().parents[2]
DIMS, BITS, EXACT, GUARD = (32, 64, 128, 256), (8, 6, 5, 4), 16, 0xA5
NOT_PACKED = [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81, 0x7180, 0xF180, 0x7F7F]
SCALES = [0, 1, 0x0380, 0x037F, 0x3F80, 0x70FF, 0x7100, 0x7F7F, 0x7F80, 0x7FC0, 0x8000, 0xBF80, 0xFF80]


class Plane(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("base", "block_stride", "offset")] + [
        (name, ctypes.c_uint32) for name in ("num_rows", "row_bytes", "step_bytes", "bits")
    ]


class Pack(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("planes", "staging", "block_bytes", "flags_offset")] + [
        *((name, ctypes.c_uint32) for name in ("num_planes", "num_blocks", "to_staging")),
        ("block_ids", ctypes.c_uint32 * 512),
    ]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Return what launches the kernel. Of its assembly only the meeting of a team has a meaning."""
    source = (ROOT / "kvortex" / "transfer" / "pack.cu").read_text()
    meeting = re.compile(r'asm volatile\("\{.*?"memory"\);', re.DOTALL)
    source, replaced = meeting.subn("any = team_meets(bad, team, threads);", source)
    assert replaced == 1
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "pack.cpp").write_text(f'#include "cuda_on_cpu.h"\n{source}')
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-I{ROOT / 'include'}"]
    subprocess.run(["g++", *flags, f"-I{Path(__file__).parent}", "-o", "pack.so", "pack.cpp"], cwd=folder, check=True)
    return ctypes.CDLL(folder / "pack.so").launch


def test_the_ptx_is_of_these_sources():
    sources = [ROOT / "kvortex/transfer/pack.cu", ROOT / "include/kvortex/pack.h"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    first_line = (ROOT / "kvortex/transfer/pack.ptx").read_text().split("\n", 1)[0]
    assert first_line.split()[1] == digest, "make pack.ptx anew; pack.cu says how"


def aligned(nbytes):
    """Return a buffer that begins at a multiple of 64 bytes, filled with what must stay."""
    whole = np.full(nbytes + 64, GUARD, np.uint8)
    return whole[-whole.ctypes.data % 64 :][:nbytes]


def words(rng, num_rows, dim, spoiled):
    """Return rows of every kind, the last of which cannot be packed if `spoiled`."""
    signs = rng.integers(0, 2, (num_rows, dim)) << 15
    kinds = [
        signs,
        rng.integers(0, 0x80, signs.shape) | signs,
        rng.integers(0, 0x0480, signs.shape) | signs,
        rng.integers(0, 0x7180, signs.shape) | signs,
        rng.integers(0x7000, 0x7180, (num_rows, 1)) | reference.FLIPS[:dim].astype(int) << 15,
        reference.to_words(rng.standard_normal(signs.shape, np.float32)),
    ]
    rows = np.choose(rng.integers(0, len(kinds), (num_rows, 1)), kinds).astype(np.uint16)
    if spoiled == "one number":
        rows[-1, rng.integers(dim)] = rng.choice(NOT_PACKED)
    elif spoiled == "sums that cancel":  # into NaN, all those that are infinite; the differences are 0
        minus = np.isin(np.arange(dim), (2, 3)) ^ reference.FLIPS[:dim]
        rows[-1] = np.where(np.arange(dim) < 8, 0x7F7F, 0) | minus.astype(int) << 15
    return rows


class Blocks:
    """Blocks of several planes whose rows alternate, on a device that is this process."""

    def __init__(self, num_rows, shapes, num_blocks):
        self.num_rows, self.shapes, self.num_blocks = num_rows, shapes, num_blocks
        self.step = sum(row_bytes for row_bytes, _ in shapes) + 16
        self.cache = aligned((num_blocks + 2) * num_rows * self.step)
        self.planes, at, offset = (Plane * len(shapes))(), 0, 0
        for plane, (row_bytes, bits) in zip(self.planes, shapes, strict=True):
            base, stride = self.cache.ctypes.data + at, num_rows * self.step
            plane.__init__(base, stride, offset, num_rows, row_bytes, self.step, bits)
            at += row_bytes
            offset += self.plane_bytes(row_bytes, bits)
        self.flags_offset, self.block_bytes = offset, offset + -(-len(shapes) // 4) * 16
        self.staging = aligned(num_blocks * self.block_bytes + 64)
        self.ids = range(num_blocks + 1, 1, -1)

    def plane_bytes(self, row_bytes, bits):
        if bits == EXACT:
            return self.num_rows * row_bytes
        return len(reference.pack(np.zeros((self.num_rows, row_bytes // 2), np.uint16), bits)[0])

    def rows(self, block, index):
        """Return a plane of a block as it lies in the cache."""
        at = self.planes[index].base - self.cache.ctypes.data
        start = self.ids[block] * self.num_rows * self.step
        return self.cache[start : start + self.num_rows * self.step].reshape(-1, self.step)[
            :, at : at + self.planes[index].row_bytes
        ]

    def packed(self, block, index):
        """Return a plane of a block as it lies in the staging memory."""
        start = block * self.block_bytes + self.planes[index].offset
        return self.staging[start : start + self.plane_bytes(*self.shapes[index])]

    def launch(self, launch, to_staging, thread_blocks):
        told = Pack(ctypes.addressof(self.planes), self.staging.ctypes.data, self.block_bytes, self.flags_offset)
        told.num_planes, told.num_blocks, told.to_staging = len(self.shapes), self.num_blocks, to_staging
        told.block_ids[: self.num_blocks] = self.ids
        launch(ctypes.byref(told), thread_blocks)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("num_rows", [3, 40])
@pytest.mark.parametrize("spoiled", ["nothing", "one number", "sums that cancel"])
def test_planes_are_packed_like_the_reference_packs_them(launch, seed, bits, dim, num_rows, spoiled):
    rng, blocks = np.random.default_rng(seed), Blocks(num_rows, [(2 * dim, bits), (48, EXACT), (2 * dim, bits)], 3)
    expected = blocks.staging.copy()
    for block in range(3):
        flags = np.zeros(4, np.uint32)
        blocks.rows(block, 1)[:] = rng.integers(0, 256, (num_rows, 48))
        plane = [None, blocks.rows(block, 1).tobytes(), None]
        for index in (0, 2):
            numbers = words(rng, num_rows, dim, spoiled if index == block else "nothing")
            blocks.rows(block, index)[:] = numbers.view(np.uint8)
            plane[index], flags[index] = reference.pack(numbers, bits)
        whole = b"".join(plane) + flags.tobytes()
        expected[block * len(whole) : (block + 1) * len(whole)] = np.frombuffer(whole, np.uint8)
    cache = blocks.cache.copy()
    blocks.launch(launch, True, thread_blocks=2)
    assert (blocks.staging == expected).all()
    assert (blocks.cache == cache).all()


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_blocks_without_flags_are_their_planes_and_nothing_else(launch, seed, num_rows):
    rng, blocks = np.random.default_rng(seed), Blocks(num_rows, [(64, EXACT), (48, EXACT)], 3)
    blocks.block_bytes, blocks.flags_offset = blocks.flags_offset, 0
    blocks.cache[:] = rng.integers(0, 256, len(blocks.cache))
    whole = b"".join(blocks.rows(block, index).tobytes() for block in range(3) for index in range(2))
    expected = blocks.staging.copy()
    expected[: len(whole)] = np.frombuffer(whole, np.uint8)
    blocks.launch(launch, True, thread_blocks=2)
    assert (blocks.staging == expected).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("num_rows", [3, 40])
@pytest.mark.parametrize("byte", [None, 0x7F, 0x80])
def test_any_bytes_are_unpacked_like_the_reference_unpacks_them(launch, seed, bits, dim, num_rows, byte):
    rng, blocks = np.random.default_rng(seed), Blocks(num_rows, [(2 * dim, bits), (48, EXACT), (2 * dim, bits)], 3)
    blocks.staging[:] = rng.integers(0, 256, len(blocks.staging)) if byte is None else byte
    for block in range(3):
        for index in (0, 2):
            scales = blocks.packed(block, index)[-(-(-num_rows // 8) * 16) :].view(np.uint16)
            scales[:] = np.where(rng.integers(0, 2, len(scales)), 0x3F81, rng.choice(SCALES, len(scales)))
    expected, staging = Blocks(num_rows, blocks.shapes, 3), blocks.staging.copy()
    for block in range(3):
        expected.rows(block, 1)[:] = blocks.packed(block, 1).reshape(num_rows, 48)
        for index in (0, 2):
            numbers = reference.unpack(blocks.packed(block, index).tobytes(), num_rows, dim, bits)
            expected.rows(block, index)[:] = numbers.view(np.uint8)
    blocks.launch(launch, False, thread_blocks=2)
    assert (blocks.cache == expected.cache).all()
    assert (blocks.staging == staging).all()
