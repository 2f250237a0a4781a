"""Packing: the table by which a kernel packs and unpacks blocks, made from a layout's planes and a codec."""

cimport cython
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex.driver._device cimport Device, check
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._layout cimport KVLayout

import weakref
from dataclasses import replace
from itertools import accumulate

from kvortex.codec import PackedBlock
from kvortex.codec.planes import exact_numbers
from kvortex.errors import ConfigError
from kvortex.transfer.fingerprint import fingerprint_of_packed
from kvortex.transfer.planes import addresses_of, covering


def misfit(KVLayout layout not None):
    """The first run that the kernel cannot move, or None."""
    for base, stride, piece in layout.runs:
        if (base | piece | (stride if layout.num_blocks > 1 else 0)) % _c.KV_PACK_UNIT_BYTES:
            return base, stride, piece
    return None


cdef str why_misfit(KVLayout layout):
    """Why the kernel cannot move a layout, in words; None: it can."""
    run = misfit(layout)
    if run is not None:
        return (f"run {run} (base, block_stride, piece_bytes) is not made of multiples of {_c.KV_PACK_UNIT_BYTES} "
                f"bytes, so the kernel that gathers and packs cannot move it")
    if layout.num_blocks > 0xFFFFFFFF:
        return f"the kernel counts blocks in 32 bits, the layout has {layout.num_blocks}"
    return None


def packed_block(KVLayout layout not None, codec, exact_layers=()):
    """The `PackedBlock` of a layout's blocks by a codec other than "exact".

    Raises
    ------
    ConfigError
        The codec can pack nothing of it, or the layout does not have these `exact_layers`.
    """
    why = why_misfit(layout)
    if why is not None:
        raise ConfigError(f"the codec {codec!r} cannot pack {layout!r}: {why}")
    try:
        packed = lay_out_packed(layout, codec, exact_layers)
    except ValueError as error:
        raise ConfigError(f"the codec {codec!r} cannot pack {layout!r}: {error}") from None
    if packed is None:
        raise ConfigError(f"the codec {codec!r} can pack nothing of {layout!r}: no vectors of bfloat16 are known in it,"
                          f" or all of their layers are exact_layers; name their roles (KVLayout.from_tensors(..., "
                          f"roles='kv')), or leave codec out")
    return packed


def slot_block(KVLayout layout not None, codec, exact_layers=()):
    """The `PackedBlock` of a layout's blocks in their slots; planes of `exact_layers` have the role "exact" in it.

    Raises
    ------
    ConfigError
        Its runs are not made of 16 bytes, or there are no such layers.
    """
    why = why_misfit(layout)
    if why is not None:
        raise ConfigError(f"blocks of {layout!r} cannot be coded: {why}")
    pieces = [piece for _, _, piece in layout.runs]
    try:
        exact = exact_numbers(exact_layers, 1 + max([plane.layer for plane in layout.planes], default=-1))
        planes = [replace(plane, role="exact") if plane.layer in exact else plane for plane in layout.planes]
        return PackedBlock.of(covering(planes, pieces), layout.block_bytes, codec)
    except ValueError as error:
        raise ConfigError(f"blocks of {layout!r} cannot be coded: {error}") from None


def packed_bytes(KVLayout layout not None, codec, exact_layers=()):
    """What a block of a layout takes in its slot; raises what `packed_block` does."""
    return layout.block_bytes if codec == "exact" else packed_block(layout, codec, exact_layers).packed_bytes


cdef object lay_out_packed(KVLayout layout, object codec, object exact_layers):
    """The `PackedBlock`; None if the codec could pack nothing."""
    pieces = [piece for _, _, piece in layout.runs]
    packed = PackedBlock.of(covering(layout.planes, pieces), layout.block_bytes, codec, exact_layers)
    return None if all(bits == _c.KV_PACK_EXACT for bits in packed.bits) else packed


@cython.no_gc_clear  # __dealloc__ needs the device
cdef class Packing:
    """Made by `Packings`; gives its memory back when nobody holds it any more."""

    def __init__(self, Device device not None, KVLayout layout not None, packed=None):
        cdef uint32_t index
        cdef _c.kv_plane *planes
        if self.device is not None:
            raise RuntimeError("Packing.__init__ may be called once")
        why = why_misfit(layout)
        if why is not None:
            raise ValueError(why)
        if packed is None:  # every piece as it is
            pieces = [piece for _, _, piece in layout.runs]
            rows = [(start, 1, piece, piece, _c.KV_PACK_EXACT, start)
                    for start, piece in zip(accumulate(pieces, initial=0), pieces, strict=False)]
            self.packed_bytes, self.fingerprint = layout.block_bytes, layout.fingerprint
        else:
            rows = [(plane.first_byte, plane.num_rows, plane.row_bytes, plane.step_bytes, bits, offset)
                    for plane, bits, offset in zip(packed.planes, packed.bits, packed.offsets, strict=True)]
            self.packed_bytes, self.flags_offset = packed.packed_bytes, packed.flags_offset
            self.fingerprint = fingerprint_of_packed(layout.fingerprint, _c.KV_PACK_VERSION, rows)
        self.num_planes, self.block_bytes = len(rows), layout.block_bytes
        self.planes = planes = <_c.kv_plane *>calloc(self.num_planes, sizeof(_c.kv_plane))
        if planes is NULL:
            raise MemoryError(f"no memory for a table of {self.num_planes} planes")
        places = addresses_of([row[0] for row in rows], layout.runs)
        for index, ((_, num_rows, row_bytes, step_bytes, bits, offset), (address, stride)) in enumerate(
                zip(rows, places, strict=True)):
            planes[index].base = address
            planes[index].block_stride = stride if layout.num_blocks > 1 else 0
            planes[index].offset, planes[index].bits = offset, bits
            planes[index].num_rows, planes[index].row_bytes = num_rows, row_bytes
            planes[index].step_bytes = step_bytes
        self.device = device

    cdef int require_table(self) except -1:
        """Put the table on the device, if it is not there. Lookups alone never need it."""
        cdef _c.kv_devptr table = 0
        cdef int code, mode = 0
        if self.table:
            return 0
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = self.place(&table)
                self.device.leave(mode)
        if code == 0 and self.table == 0:  # no other thread did so meanwhile
            self.table, table = table, 0
        if table:
            with nogil:
                self.device.give_memory_back(table)
        return check(self.device, code)

    cdef bint is_refused(self, PinnedPool pool, uint32_t slot) noexcept nogil:
        return _c.kv_packed_is_refused(_c.kv_slots_payload(&pool.slots, slot), self.flags_offset, self.num_planes)

    cdef int place(self, _c.kv_devptr *table) noexcept nogil:
        """Copy the table to new device memory. A CUresult; the context is current."""
        cdef const _c.kv_driver *drv = self.device.drv
        cdef size_t nbytes = self.num_planes * sizeof(_c.kv_plane)
        cdef void *stream = NULL
        cdef int code = _c.kv_call(drv, _c.mem_alloc, table, nbytes)
        if code == 0:
            code = _c.kv_call(drv, _c.stream_create, &stream, _c.KV_STREAM_NON_BLOCKING)
        if code == 0:
            code = _c.kv_call(drv, _c.memcpy_htod_async, table[0], <const void *>self.planes, nbytes, stream)
        if code == 0:  # from here on other streams may use the table, too
            code = _c.kv_call(drv, _c.stream_synchronize, stream)
        if stream is not NULL:
            self.device.give_back(drv.stream_destroy, stream)
        return code

    cdef void close(self) noexcept:
        """Give the table back; no kernel reads it any more."""
        cdef _c.kv_devptr table = self.table
        self.table = 0  # taken under the GIL, so that nobody frees it twice
        if table and not self.device.closed and self.device.pid == getpid():
            with nogil:
                self.device.give_memory_back(table)

    def __dealloc__(self):  # for a part that neither a caller nor a job names any more
        self.close()
        free(self.planes)


@cython.no_gc_clear  # in a garbage cycle gathers still close its tables
cdef class Packings:
    def __init__(self, Device device not None, KVLayout layout not None, codec="exact", exact_layers=()):
        self.device, self.layout, self.codec, self.exact_layers = device, layout, codec, tuple(exact_layers)
        self.known = weakref.WeakKeyDictionary()
        packed = None if codec == "exact" else packed_block(layout, codec, exact_layers)
        if packed is not None:
            self.exact = exact_numbers(exact_layers, 1 + max([plane.layer for plane in layout.planes]))
        self.whole = Packing(device, layout, packed)

    cdef Packing of(self, KVLayout layout):
        cdef Packing packing
        if layout is self.layout:
            return self.whole
        if self.codec == "exact":
            return None
        packing = self.known.get(layout)
        if packing is None:
            named = [plane.layer for plane in layout.planes if plane.layer in self.exact]
            packing = Packing(self.device, layout, lay_out_packed(layout, self.codec, named))
            if packing.packed_bytes > self.whole.packed_bytes:
                raise ValueError(f"packed, a block of {layout!r} takes {packing.packed_bytes} bytes, and a slot holds "
                                 f"{self.whole.packed_bytes}: the part cuts through planes, which then stay exact; "
                                 f"choose parts that have planes whole")
            packing = self.known.setdefault(layout, packing)  # another thread may have made one meanwhile
        return packing

    cdef void let_go(self) noexcept:
        cdef Packing packing
        self.num_users -= 1
        if self.num_users == 0:
            for packing in (self.whole, *self.known.data.values()):  # one step, so that no thread adds one meanwhile
                packing.close()
