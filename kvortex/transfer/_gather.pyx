"""A kernel gathers the pieces of blocks on the device, and a copy engine moves them as whole blocks.

Opt-in for small pieces in separate allocations; a codec always needs it, because the same kernel packs.

Copy engines need 0.4 us of CPU time and about as much of their own for each piece, whatever its size, so that 16 KiB
pieces stay at two thirds of the link and smaller ones below that. A kernel of a few thread blocks gathers the pieces
into staging memory on the device instead, while a copy engine moves what it gathered before.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset

cimport kvortex._c as _c
from kvortex.driver._device cimport Device, check
from kvortex.driver._memory cimport whole_number
from kvortex.memory._device_pool cimport DevicePool
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._packing cimport Packing, Packings

import os

from kvortex.transfer._packing import misfit

cdef size_t HALF_BYTES = 8 << 20
# Clamped by the driver. When thread blocks of a large kernel end, those of the gather then run first; otherwise the
# gather would wait until the last thread block of that kernel has begun, a millisecond each time.
cdef int HIGHEST_PRIORITY = -1000
cdef size_t MAX_PIECE_BYTES = 32 << 10  # from here on copy engines are as fast


cdef bytes read_kernel():
    with open(os.path.join(os.path.dirname(__file__), "pack.ptx"), "rb") as file:
        return file.read()


def gather_pays(KVLayout layout not None, direction):
    """Whether a layout's pieces are what the kernel is for: small, aligned, and moved by batches otherwise.

    `direction` is "D2H" or "H2D"; the layout has been probed in it.
    """
    if any(row.direction == direction and row.backend == "strided" for row in layout.planner):
        return False
    return layout.piece_bytes < MAX_PIECE_BYTES and misfit(layout) is None


@cython.no_gc_clear  # close needs all of it
cdef class Gather:
    """Made by `TransferQueue.use_gather`, used by the job whose turn it is, closed or leaked with the queue."""

    def __init__(self, Packings packings not None, num_ctas, DevicePool pool=None):
        cdef Device device = packings.device
        cdef int mode = 0, code
        cdef bytes image = read_kernel()
        cdef const char *text = image
        if self.device is not None:
            raise RuntimeError("Gather.__init__ may be called once")
        num_ctas = whole_number(num_ctas, "num_ctas")
        if not 1 <= num_ctas <= 1024:
            raise ValueError(f"num_ctas must be 1 to 1024, got {num_ctas}")
        self.device, self.layout, self.num_ctas = device, packings.layout, num_ctas
        self.packings, self.whole = packings, packings.whole
        self.whole.require_table()
        packings.num_users += 1
        self.half_bytes = max(HALF_BYTES, self.whole.packed_bytes)
        memset(&self.told, 0, sizeof(self.told))
        self.pool = pool
        with nogil:
            code = device.enter(&mode)
            if code == 0:
                code = self.build(text)
                if code == 0:
                    code = self.allocate()
                if code:
                    self.close()
                device.leave(mode)
        if self.refusal is not None:
            raise self.refusal
        check(device, code)

    cdef Packing packing_of(self, KVLayout layout):
        """The `Packing` that moves blocks of a layout; None: they move piece by piece."""
        cdef Packing packing
        if (layout.whole or layout) is self.layout:
            packing = self.packings.of(layout)
            if packing is not None:
                packing.require_table()
            return packing
        if self.packings.codec != "exact":
            raise ValueError(f"this queue packs blocks of {self.layout!r}, not of {layout!r}; use one queue a layout")
        return None

    cdef int build(self, const char *image) noexcept nogil:
        cdef const _c.kv_driver *drv = self.device.drv
        cdef int code, index
        code = _c.kv_call(drv, _c.module_load_data, &self.module, image)
        if code == 0:
            code = _c.kv_call(drv, _c.module_get_function, &self.function, self.module, b"kv_pack_blocks")
        if code == 0:
            code = _c.kv_call(drv, _c.stream_create_with_priority, &self.stream, _c.KV_STREAM_NON_BLOCKING,
                              HIGHEST_PRIORITY)
        if code == 0:
            code = _c.kv_call(drv, _c.event_create, &self.began, _c.KV_EVENT_DISABLE_TIMING)
        for index in range(2):
            if code == 0:
                code = _c.kv_call(drv, _c.event_create, &self.filled[index], _c.KV_EVENT_DISABLE_TIMING)
            if code == 0:
                code = _c.kv_call(drv, _c.event_create, &self.emptied[index], _c.KV_EVENT_DISABLE_TIMING)
        return code

    cdef int allocate(self) noexcept nogil:
        cdef const _c.kv_driver *drv = self.device.drv
        if self.pool is None:
            return _c.kv_call(drv, _c.mem_alloc, &self.staging, 2 * self.half_bytes)
        with gil:
            try:
                self.staging = self.pool.take(2 * self.half_bytes, self.stream)
            except BaseException as error:  # raised when the rest has been undone
                self.refusal = error
                return _c.KV_CUDA_OUT_OF_MEMORY
        # From here on other streams may use the memory, too.
        return _c.kv_call(drv, _c.stream_synchronize, self.stream)

    cdef size_t blocks_at_once(self, Packing packing) noexcept nogil:
        """How many blocks half of the staging holds, and one launch and one batch of copies take."""
        return min(self.half_bytes // packing.packed_bytes,
                   min(<size_t>_c.KV_PACK_BLOCKS, <size_t>_c.KV_BATCH_COPIES))

    cdef int launch(self, Packing packing, const int64_t *block_ids, size_t n, bint to_staging) noexcept nogil:
        """Pack `n` blocks, at most `blocks_at_once`, into the half in turn, or unpack them from it. A CUresult."""
        cdef void *parameters[1]
        cdef size_t index
        self.told.planes, self.told.num_planes = packing.table, packing.num_planes
        self.told.block_bytes, self.told.flags_offset = packing.packed_bytes, packing.flags_offset
        self.told.staging = self.staging + self.half * self.half_bytes
        self.told.num_blocks = <uint32_t>n
        self.told.to_staging = to_staging
        for index in range(n):
            self.told.block_ids[index] = <uint32_t>block_ids[index]
        parameters[0] = &self.told
        return _c.kv_call(self.device.drv, _c.launch_kernel, self.function, self.num_ctas, 1, 1, _c.KV_PACK_THREADS,
                          1, 1, 0, self.stream, parameters, NULL)

    cdef void close(self) noexcept nogil:
        """Give everything back; no job is in flight, and the context is current."""
        cdef const _c.kv_driver *drv = self.device.drv
        cdef int index
        if self.pool is None and self.staging:
            self.device.give_memory_back(self.staging)
        with gil:
            self.give_back()
        for index in range(2):
            if self.filled[index] is not NULL:
                self.device.give_back(drv.event_destroy, self.filled[index])
            if self.emptied[index] is not NULL:
                self.device.give_back(drv.event_destroy, self.emptied[index])
        if self.began is not NULL:
            self.device.give_back(drv.event_destroy, self.began)
        if self.stream is not NULL:
            self.device.give_back(drv.stream_destroy, self.stream)
        if self.module is not NULL:
            self.device.give_back(drv.module_unload, self.module)

    cdef void give_back(self) noexcept:
        if self.pool is not None and self.staging:
            self.pool.give(self.staging, 2 * self.half_bytes, self.stream)
        self.packings.let_go()
