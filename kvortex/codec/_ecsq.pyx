"""Blocks of K and V as entropy-coded integers (ECSQ.md): one block is coded and decoded, in memory.

Threads without the GIL call what include/kvortex/ecsq.h has, with the `ecsq` of a `Coded`: `kv_ecsq_encode` and
`kv_ecsq_decode` for a block, `kv_ecsq_encode_segment_by` and `kv_ecsq_decode_segment_by` for a part of it.
"""

import hashlib
import os
import struct
import zlib

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

cimport kvortex._c as _c

from kvortex.arguments import shown, whole_number
from kvortex.codec.planes import Plane, require_units, uncovered
from kvortex.errors import CorruptBlock


FORMAT_VERSION = _c.KV_ECSQ_VERSION  # of records: part of the names under which they are kept
LEVELS = tuple(range(1, _c.KV_ECSQ_LEVELS + 1))
MAX_BLOCK_BYTES = 1 << 31

# Bits of a number in the stream of SmolLM2-135M, at each level. K has more of them and V fewer, by half of the binary
# logarithm of the ratio of their steps.
cdef double[4] STREAM_BITS = [4.97, 4.44, 3.97, 3.49]
cdef double K_BITS = 0.32

cdef _c.kv_ecsq_tables *TABLES = load_tables()
TABLES_ID = TABLES.id  # of the shipped tables: part of those names, too


cdef _c.kv_ecsq_tables *load_tables() except NULL:
    """The shipped tables. They live as long as the process."""
    with open(os.path.join(os.path.dirname(__file__), "ecsq_tables.bin"), "rb") as file:
        content = file.read()
    cdef const uint8_t[::1] frequencies = content
    cdef uint32_t number = struct.unpack("<I", hashlib.sha256(content).digest()[:4])[0]
    cdef _c.kv_ecsq_tables *tables = <_c.kv_ecsq_tables *>malloc(sizeof(_c.kv_ecsq_tables))
    if tables == NULL:
        raise MemoryError
    if len(content) != 2 * _c.KV_ECSQ_CLASSES * _c.KV_ECSQ_SYMBOLS or not _c.kv_ecsq_build_tables(
            <const uint16_t (*)[256]>&frequencies[0], number, tables):
        free(tables)
        raise ImportError(f"ecsq_tables.bin of {len(content)} bytes is damaged; install kvortex again")
    return tables


cdef class Coded:
    """What is coded of a block, and at which level; made by `of`, never changed.

    Attributes
    ----------
    block_bytes, level : int
    num_segments : int
        Parts that are coded and decoded independently.
    max_coded_bytes : int
        No record is larger.
    typical_bytes : int
        What a record of K and V in blocks of 16 tokens is likely to have; single ones have up to 3 % more.
    scratch_bytes : int
        Memory that coding one block takes, beside the block and the record.
    planes_crc : int
        Of the description of the planes; each record has it.
    """

    def __cinit__(self):
        self.planes, self.segments = NULL, NULL

    def __init__(self):
        raise TypeError("make one with Coded.of")

    def __dealloc__(self):
        free(self.planes)
        free(self.segments)

    @staticmethod
    def of(planes, block_bytes, level):
        """Return what is coded of blocks of `block_bytes` bytes.

        Parameters
        ----------
        planes : iterable of Plane
            Bytes that none of them covers, and planes of role "exact", are kept as they are.
        block_bytes : int
            A multiple of 16, at most 2^31.
        level : int
            1 to 4: the higher, the smaller and the less exact.

        Raises
        ------
        ValueError
            Planes share bytes or leave the block, or there is no such level.
        """
        if not 0 < whole_number(block_bytes, "block_bytes") <= MAX_BLOCK_BYTES:
            raise ValueError(f"block_bytes must be from 16 to 2^31, got {shown(block_bytes)}")
        require_units("block_bytes", block_bytes)
        if whole_number(level, "level") not in LEVELS:
            raise ValueError(f"level must be from 1 to {LEVELS[-1]}, got {shown(level)}")
        planes = tuple(planes)
        for plane in planes:
            if not isinstance(plane, Plane):
                raise TypeError(f"planes must be Plane, got {shown(plane)}")
        planes += tuple(uncovered(planes, block_bytes))
        if len(planes) >= 1 << 31:
            raise ValueError(f"a block must have less than 2^31 planes, got {len(planes)}")
        return build(planes, block_bytes, level)

    @property
    def block_bytes(self):
        return self.ecsq.block_bytes

    @property
    def level(self):
        return self.ecsq.level

    @property
    def num_segments(self):
        return self.ecsq.num_segments

    @property
    def planes_crc(self):
        return self.ecsq.planes_crc

    @property
    def typical_bytes(self):
        cdef uint64_t nbytes = _c.kv_ecsq_body_offset(&self.ecsq)
        cdef uint32_t i
        cdef double bits
        nbytes += self.ecsq.num_segments * <uint64_t>(4 + _c.KV_ECSQ_STATES_BYTES)
        for i in range(self.ecsq.num_planes):
            nbytes += _c.KV_ECSQ_HEAD_BYTES
            if self.planes[i].role == _c.KV_ECSQ_EXACT:
                nbytes += _c.kv_ecsq_plane_bytes(&self.planes[i])
            else:
                nbytes += _c.kv_ecsq_side_bytes(&self.planes[i])
                bits = STREAM_BITS[self.ecsq.level - 1] + (K_BITS if self.planes[i].role == _c.KV_ECSQ_K else -K_BITS)
                nbytes += <uint64_t>(_c.kv_ecsq_plane_bytes(&self.planes[i]) * bits / 16)
        return nbytes


cdef Coded build(tuple planes, object block_bytes, object level):
    cdef Coded coded = Coded.__new__(Coded)
    cdef size_t num_planes = len(planes)
    cdef uint64_t numbers = 0
    cdef uint32_t num_segments = 0, dim = 0, i = 0
    cdef _c.kv_ecsq_plane *plane
    coded.planes = <_c.kv_ecsq_plane *>calloc(num_planes, sizeof(_c.kv_ecsq_plane))
    coded.segments = <uint32_t *>calloc(num_planes + 1, sizeof(uint32_t))
    if coded.planes == NULL or coded.segments == NULL:
        raise MemoryError
    described = []
    for given in planes:
        plane = &coded.planes[i]
        plane.first_byte, plane.num_rows = given.first_byte, given.num_rows
        plane.row_bytes, plane.step_bytes = given.row_bytes, given.step_bytes
        plane.num_heads, plane.num_tokens = given.num_heads, given.num_rows // given.num_heads
        plane.token_rows = 1 if given.heads_first else plane.num_heads
        plane.head_rows = plane.num_tokens if given.heads_first else 1
        plane.role = {"exact": _c.KV_ECSQ_EXACT, "k": _c.KV_ECSQ_K, "v": _c.KV_ECSQ_V}[given.role]
        described.append(struct.pack(
            "<Q7I", plane.first_byte, plane.num_rows, plane.row_bytes, plane.step_bytes, plane.num_heads,
            plane.token_rows, plane.head_rows, plane.role))
        if dim == 0 and plane.role != _c.KV_ECSQ_EXACT:
            dim = plane.row_bytes // 2
        numbers += <uint64_t>plane.num_rows * plane.row_bytes // 2
        i += 1
        if numbers >= _c.KV_ECSQ_SEGMENT or i == num_planes:
            num_segments += 1
            coded.segments[num_segments] = i
            numbers = 0
    coded.ecsq.planes, coded.ecsq.segments, coded.ecsq.tables = coded.planes, coded.segments, TABLES
    coded.ecsq.block_bytes, coded.ecsq.level = block_bytes, level
    coded.ecsq.num_planes, coded.ecsq.num_segments, coded.ecsq.vector_numbers = i, num_segments, dim
    coded.ecsq.planes_crc = zlib.crc32(b"".join(described))
    coded.ecsq.needs = _c.kv_ecsq_needs_of(&coded.ecsq)
    coded.max_coded_bytes = _c.kv_ecsq_max_bytes(&coded.ecsq)
    coded.scratch_bytes = _c.kv_ecsq_scratch_bytes(&coded.ecsq)
    return coded


# ---- one block -------------------------------------------------------------------------------------------------------


def instruction_sets():
    """Return the names of the instruction sets that this processor has code for, the fastest first and "c" last."""
    cdef const _c.kv_ecsq_set *found
    names = []
    while (found := _c.kv_ecsq_set_at(<uint32_t>len(names))) != NULL:
        names.append(found.name.decode())
    return tuple(names)


def encode_block(Coded coded not None, block, out, *, instruction_set=None):
    """Code one block; releases the GIL.

    Parameters
    ----------
    coded : Coded
    block : contiguous buffer of ``coded.block_bytes`` bytes
    out : writable contiguous buffer
        ``coded.max_coded_bytes`` always suffice.
    instruction_set : str, optional
        One of `instruction_sets()`. All of them write the same bytes.

    Returns
    -------
    int
        The bytes of the record, which begins `out`; 0 if it does not fit, and then `out` has nothing of use.
    """
    cdef const uint8_t[::1] source = as_bytes(block, "block", coded.ecsq.block_bytes)
    cdef uint8_t[::1] target = as_bytes(out, "out")
    cdef const _c.kv_ecsq_set *chosen = find(instruction_set)
    cdef uint64_t room = target.shape[0], nbytes = 0
    cdef void *scratch = malloc(_c.kv_ecsq_scratch_bytes(&coded.ecsq))
    if scratch == NULL:
        raise MemoryError
    if room:
        with nogil:
            nbytes = _c.kv_ecsq_encode_by(chosen, &coded.ecsq, <char *>&source[0], <char *>&target[0], room, scratch)
    free(scratch)
    return nbytes


def decode_block(Coded coded not None, record, block, *, instruction_set=None):
    """Decode one block; releases the GIL.

    Parameters
    ----------
    coded : Coded
        As it was for `encode_block`.
    record : contiguous buffer
        The bytes that `encode_block` wrote, and no others behind them.
    block : writable contiguous buffer of ``coded.block_bytes`` bytes
    instruction_set : str, optional
        One of `instruction_sets()`. All of them write the same bytes.

    Raises
    ------
    CorruptBlock
        The record is damaged, or was coded otherwise. Then `block` may hold anything.
    """
    cdef const uint8_t[::1] source = as_bytes(record, "record")
    cdef uint8_t[::1] target = as_bytes(block, "block", coded.ecsq.block_bytes)
    cdef const _c.kv_ecsq_set *chosen = find(instruction_set)
    cdef uint64_t nbytes = source.shape[0]
    cdef bint whole = False
    if nbytes:
        with nogil:
            whole = _c.kv_ecsq_decode_by(chosen, &coded.ecsq, <char *>&source[0], nbytes, <char *>&target[0])
    if not whole:
        raise CorruptBlock(f"a record of {nbytes} bytes is damaged, or of other planes, another level or other tables")


cdef const _c.kv_ecsq_set *find(object name) except NULL:
    """The set of that name, or the fastest for None."""
    names = instruction_sets()
    if name is not None and name not in names:
        raise ValueError(f"instruction_set must be one of {', '.join(names)}, got {shown(name)}")
    return _c.kv_ecsq_set_at(0 if name is None else <uint32_t>names.index(name))


cdef object as_bytes(object buffer, str name, object nbytes=None):
    """The buffer as a memory view of bytes; ValueError if it is not contiguous or has another size."""
    view = memoryview(buffer)
    if not view.c_contiguous or (nbytes is not None and view.nbytes != nbytes):
        wanted = "" if nbytes is None else f" and have {nbytes} bytes, got {view.nbytes}"
        raise ValueError(f"{name} must be contiguous{wanted}")
    return view.cast("B")
