"""Copier: a stream and the ways to put the copies of a plan on it. The map; the code is in _copier.pyx."""

from libc.stdint cimport uint64_t

from kvortex._c cimport KV_BATCH_COPIES, kv_copy, kv_devptr, kv_plan
from kvortex.driver._device cimport Device
from kvortex.transfer._gather cimport Gather
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._packing cimport Packing

cdef enum Direction:
    D2H = 0
    H2D = 1


cdef class Copier:
    cdef Device device
    cdef Direction direction
    cdef void *stream                  # ours, non-blocking
    cdef Gather gather                 # kernel for one layout's small pieces, opted in; None: copy engines only
    cdef kv_copy copies[KV_BATCH_COPIES]
    cdef kv_devptr targets[KV_BATCH_COPIES]
    cdef kv_devptr sources[KV_BATCH_COPIES]
    cdef size_t sizes[KV_BATCH_COPIES]

    cdef int open(self) noexcept nogil
    cdef int synchronize(self) noexcept nogil
    cdef void close(self) noexcept nogil
    cdef int copy(self, kv_plan *plan, KVLayout layout, void *packing, uint64_t until_ns) noexcept nogil
    cdef int copy_plan(self, kv_plan *plan, KVLayout layout, uint64_t until_ns) noexcept nogil
    cdef int copy_gathered(self, kv_plan *plan, Packing packing, uint64_t until_ns) noexcept nogil
    cdef int launch(self, const kv_plan *plan, Packing packing, size_t count) noexcept nogil
    cdef int wait_for(self, void *stream, void *event) noexcept nogil
    cdef int pass_on(self, void *event, void *earlier, void *later) noexcept nogil
    cdef int copy_strided(self, const kv_copy *copy) noexcept nogil
    cdef int copy_batch(self, size_t count) noexcept nogil
    cdef int issue_batch(self, size_t count) noexcept nogil
