"""Packing and unpacking one block in host memory, for tests, benchmarks and tools."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

cimport kvortex._c as _c

from kvortex.arguments import shown
from kvortex.codec.planes import PackedBlock


FORMAT_VERSION = _c.KV_PACK_VERSION  # of packed blocks: part of the names under which they are kept


def instruction_sets():
    """Return the names of the instruction sets that this processor has code for, the fastest first and "c" last."""
    cdef const _c.kv_codec_set *found
    names = []
    while (found := _c.kv_codec_set_at(<uint32_t>len(names))) != NULL:
        names.append(found.name.decode())
    return tuple(names)


def pack_block(layout, block, packed, *, instruction_set=None):
    """Pack one block; releases the GIL.

    Parameters
    ----------
    layout : PackedBlock
    block : contiguous buffer of ``layout.block_bytes`` bytes
    packed : writable contiguous buffer of ``layout.packed_bytes`` bytes
        Each of its bytes is written.
    instruction_set : str, optional
        One of `instruction_sets()`. All of them write the same bytes.

    Returns
    -------
    bool
        False if the block has a number that cannot be packed (Inf, NaN, or 2^100 and more in magnitude), so that it
        must not be kept; its flags in `packed` say so too.
    """
    cdef const uint8_t[::1] source = as_bytes(block, layout.block_bytes, "block")
    cdef uint8_t[::1] target = as_bytes(packed, layout.packed_bytes, "packed")
    cdef const _c.kv_codec_set *chosen = find(instruction_set)
    cdef uint32_t num_planes = len(layout.planes)
    cdef uint64_t flags_offset = layout.flags_offset
    cdef _c.kv_plane *planes = <_c.kv_plane *>malloc(num_planes * sizeof(_c.kv_plane))
    cdef bint refused
    if planes == NULL:
        raise MemoryError
    try:
        fill_planes(layout, <uintptr_t>&source[0], 0, planes)
        with nogil:
            _c.kv_pack_block_by(chosen, planes, num_planes, flags_offset, 0, <char *>&target[0])
            refused = _c.kv_packed_is_refused(<char *>&target[0], flags_offset, num_planes)
    finally:
        free(planes)
    return not refused


def unpack_block(layout, packed, block, *, instruction_set=None):
    """Unpack one block; releases the GIL. The opposite of `pack_block`; no bytes are refused here.

    Parameters
    ----------
    layout : PackedBlock
    packed : contiguous buffer of ``layout.packed_bytes`` bytes
    block : writable contiguous buffer of ``layout.block_bytes`` bytes
    instruction_set : str, optional
        One of `instruction_sets()`. All of them write the same bytes.
    """
    cdef const uint8_t[::1] source = as_bytes(packed, layout.packed_bytes, "packed")
    cdef uint8_t[::1] target = as_bytes(block, layout.block_bytes, "block")
    cdef const _c.kv_codec_set *chosen = find(instruction_set)
    cdef uint32_t num_planes = len(layout.planes)
    cdef _c.kv_plane *planes = <_c.kv_plane *>malloc(num_planes * sizeof(_c.kv_plane))
    if planes == NULL:
        raise MemoryError
    try:
        fill_planes(layout, <uintptr_t>&target[0], 0, planes)
        with nogil:
            _c.kv_unpack_block_by(chosen, planes, num_planes, 0, <char *>&source[0])
    finally:
        free(planes)


cdef int fill_planes(object layout, uint64_t base, uint64_t block_stride, _c.kv_plane *planes) except -1:
    """Fill one kv_plane for each plane of a PackedBlock, of which block 0 begins at `base`.

    ValueError if the offsets are not those that C computes, so that no hand-made PackedBlock leads outside a block.
    """
    cdef uint64_t end = 0
    cdef _c.kv_plane *filled = planes
    if not isinstance(layout, PackedBlock):
        raise TypeError(f"layout must be a PackedBlock, got {shown(layout)}")
    for plane, bits, offset in zip(layout.planes, layout.bits, layout.offsets, strict=True):
        if plane.end_byte > layout.block_bytes or bits not in (4, 5, 6, 8, _c.KV_PACK_EXACT):
            raise ValueError(f"{plane} of {bits} bits does not fit into a block of {layout.block_bytes} bytes")
        if bits != _c.KV_PACK_EXACT and plane.row_bytes not in (64, 128, 256, 512):
            raise ValueError(f"{plane} has no vectors that could be coded")
        filled.base, filled.block_stride, filled.offset = base + <uint64_t>plane.first_byte, block_stride, offset
        filled.num_rows, filled.row_bytes, filled.step_bytes = plane.num_rows, plane.row_bytes, plane.step_bytes
        filled.bits = bits
        if filled.offset != end:
            raise ValueError(f"the packed {plane} must begin at byte {end}, got {offset}; pass PackedBlock.of")
        end += _c.kv_plane_packed_bytes(filled)
        filled += 1
    if layout.flags_offset != end or layout.packed_bytes != end + _c.kv_pack_align(4 * len(layout.planes)):
        raise ValueError(f"flags must begin at byte {end}, got {layout.flags_offset}; pass PackedBlock.of")
    return 0


cdef const _c.kv_codec_set *find(object name) except NULL:
    """The set of that name, or the fastest for None."""
    if name is None:
        return _c.kv_codec_best()
    names = instruction_sets()
    if name not in names:
        raise ValueError(f"instruction_set must be one of {', '.join(names)}, got {shown(name)}")
    return _c.kv_codec_set_at(<uint32_t>names.index(name))


cdef object as_bytes(object buffer, object nbytes, str name):
    """The buffer as a memory view of bytes; ValueError if it is not contiguous or has another size."""
    view = memoryview(buffer)
    if not view.c_contiguous or view.nbytes != nbytes:
        raise ValueError(f"{name} must be contiguous and have {nbytes} bytes, got {view.nbytes}")
    return view.cast("B")
