"""The opt-in way for small pieces in separate allocations: gathered on the device, moved as whole blocks.

Copy engines need 0.4 us of CPU time and about as much of their own for each piece, whatever its size, so that 16 KiB
pieces stay at two thirds of the link and smaller ones below that. A kernel of a few thread blocks gathers the pieces
into staging memory on the device instead, while a copy engine moves what it gathered before.
"""

from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cimport kvortex._c as _c
from kvortex.driver._device cimport Device, check
from kvortex.driver._memory cimport whole_number
from kvortex.memory._device_pool cimport DevicePool
from kvortex.transfer._layout cimport KVLayout

import os

cdef size_t HALF_BYTES = 8 << 20
# Clamped by the driver. Thread blocks of large kernels then make room as they end; otherwise a gather would wait for
# the last of them to begin, a millisecond each time.
cdef int HIGHEST_PRIORITY = -1000
cdef size_t MAX_PIECE_BYTES = 32 << 10  # from here on copy engines are as fast


cdef bytes read_kernel():
    with open(os.path.join(os.path.dirname(__file__), "gather.ptx"), "rb") as file:
        return file.read()


def gather_pays(KVLayout layout not None, direction):
    """Whether a layout's pieces are what the kernel is for: small, aligned, and moved by batches otherwise.

    `direction` is "D2H" or "H2D"; the layout has been probed in it.
    """
    if any(row.direction == direction and row.backend == "strided" for row in layout.planner):
        return False
    return layout.piece_bytes < MAX_PIECE_BYTES and misfit(layout) is None


def misfit(KVLayout layout):
    """The first run that the kernel cannot move, or None."""
    for run in layout.runs:
        if any(number % _c.KV_GATHER_UNIT_BYTES for number in run):
            return run
    return None


cdef class Gather:
    """Made by `TransferQueue.use_gather`, used by the job whose turn it is, closed or leaked with the queue."""

    def __init__(self, Device device not None, KVLayout layout not None, num_ctas, DevicePool pool=None):
        cdef _c.kv_gather_run *table
        cdef uint32_t num_runs = len(layout.runs), index
        cdef size_t offset = 0
        cdef int mode = 0, code
        cdef bytes image = read_kernel()
        cdef const char *text = image
        if self.device is not None:
            raise RuntimeError("Gather.__init__ may be called once")
        num_ctas = whole_number(num_ctas, "num_ctas")
        if not 1 <= num_ctas <= 1024:
            raise ValueError(f"num_ctas must be 1 to 1024, got {num_ctas}")
        run = misfit(layout)
        if run is not None:
            raise ValueError(f"run {run} (base, block_stride, piece_bytes) is not made of multiples of "
                             f"{_c.KV_GATHER_UNIT_BYTES} bytes, so the gather kernel cannot move it")
        if layout.num_blocks > 0xFFFFFFFF:
            raise ValueError(f"the gather kernel counts blocks in 32 bits, the layout has {layout.num_blocks}")
        self.device, self.layout, self.num_ctas = device, layout, num_ctas
        self.half_bytes = max(HALF_BYTES, layout.block_bytes)
        self.blocks_at_once = min(self.half_bytes // layout.block_bytes,
                                  min(<size_t>_c.KV_GATHER_BLOCKS, <size_t>_c.KV_BATCH_COPIES))
        table = <_c.kv_gather_run *>calloc(num_runs, sizeof(_c.kv_gather_run))
        if table is NULL:
            raise MemoryError(f"no memory for a table of {num_runs} runs")
        for index, (base, stride, piece) in enumerate(layout.runs):
            table[index].base, table[index].block_stride = base, stride
            table[index].offset, table[index].bytes = offset, piece
            offset += piece
        memset(&self.told, 0, sizeof(self.told))
        self.told.num_runs = num_runs
        self.told.block_bytes = layout.block_bytes
        self.runs_bytes = num_runs * sizeof(_c.kv_gather_run)
        self.pool = pool
        with nogil:
            code = device.enter(&mode)
            if code == 0:
                code = self.build(text)
                if code == 0:
                    code = self.allocate()
                if code == 0:
                    code = self.upload(table)
                if code:
                    self.close()
                device.leave(mode)
        free(table)
        if self.refusal is not None:
            raise self.refusal
        check(device, code)

    cdef int build(self, const char *image) noexcept nogil:
        cdef const _c.kv_driver *drv = self.device.drv
        cdef int code, index
        code = _c.kv_call(drv, _c.module_load_data, &self.module, image)
        if code == 0:
            code = _c.kv_call(drv, _c.module_get_function, &self.function, self.module, b"kv_gather_blocks")
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
        cdef int code
        if self.pool is None:
            code = _c.kv_call(drv, _c.mem_alloc, &self.runs, self.runs_bytes)
            return code if code else _c.kv_call(drv, _c.mem_alloc, &self.staging, 2 * self.half_bytes)
        with gil:
            try:
                self.runs = self.pool.take(self.runs_bytes, self.stream)
                self.staging = self.pool.take(2 * self.half_bytes, self.stream)
            except BaseException as error:  # raised when the rest has been undone
                self.refusal = error
                return _c.KV_CUDA_OUT_OF_MEMORY
        return 0

    cdef int upload(self, const void *table) noexcept nogil:
        cdef const _c.kv_driver *drv = self.device.drv
        cdef int code
        code = _c.kv_call(drv, _c.memcpy_htod_async, self.runs, table, self.runs_bytes, self.stream)
        if code == 0:  # from here on the memory is there for other streams, too
            code = _c.kv_call(drv, _c.stream_synchronize, self.stream)
        self.told.runs = self.runs
        return code

    cdef int launch(self, const int64_t *block_ids, size_t n, bint to_staging) noexcept nogil:
        """Move the pieces of `n` blocks, at most `blocks_at_once`, into the half in turn or out of it. A CUresult."""
        cdef void *parameters[1]
        cdef size_t index
        self.told.staging = self.staging + self.half * self.half_bytes
        self.told.num_blocks = <uint32_t>n
        self.told.to_staging = to_staging
        for index in range(n):
            self.told.block_ids[index] = <uint32_t>block_ids[index]
        parameters[0] = &self.told
        return _c.kv_call(self.device.drv, _c.launch_kernel, self.function, self.num_ctas, 1, 1, _c.KV_GATHER_THREADS,
                          1, 1, 0, self.stream, parameters, NULL)

    cdef void close(self) noexcept nogil:
        """Give everything back; no job is in flight, and the context is current."""
        cdef const _c.kv_driver *drv = self.device.drv
        cdef int index
        if self.pool is not None:
            with gil:
                self.give_back()
        else:
            if self.staging:
                self.device.give_memory_back(self.staging)
            if self.runs:
                self.device.give_memory_back(self.runs)
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
        if self.staging:
            self.pool.give(self.staging, 2 * self.half_bytes, self.stream)
        if self.runs:
            self.pool.give(self.runs, self.runs_bytes, self.stream)
