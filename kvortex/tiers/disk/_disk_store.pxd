"""DiskStore: blocks between a pinned pool and segments. The map; code in _disk_store.pyx, the I/O in disk_io.h."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvortex._c cimport kv_disk, kv_disk_aio, kv_io_batch, kv_io_queue
from kvortex.codec._coder cimport BlockCoder
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.tiers.disk._io_calls cimport IoCalls


ctypedef struct DiskCore:             # one allocation: it outlives the store where a thread's I/O does not return
    kv_io_queue queue
    kv_disk disk
    kv_disk_aio aio                   # context 0: it has none


cdef class DiskStore:
    cdef DiskCore *core
    cdef readonly PinnedPool pool     # mapped for as long as a thread may touch it
    cdef readonly object segments     # whose files the core uses; closed with it
    cdef IoCalls calls
    cdef readonly BlockCoder coder    # whose numbers the core uses; None: blocks are written as they are
    cdef readonly uint32_t num_slots
    cdef bytes space
    cdef bint is_aio
    cdef str threads_reason           # why threads do the I/O although AIO was asked for
    cdef bint running                 # threads are there
    cdef bint closed
    cdef bint is_lost                 # a thread's I/O does not return: the core is never freed
    cdef int pid
    cdef object __weakref__

    cdef kv_io_batch *new_batch(self, uint8_t verb, object slots, object timeout_ms) except NULL
    cdef DiskBatch submit(self, kv_io_batch *batch)
    cdef int name_blocks(self, kv_io_batch *batch, object pool_slots, object keys, object lengths, object tag,
                         object group) except -1
    cdef str error_text(self)
    cdef int start(self, uint32_t num_threads, uint32_t queue_blocks, object io) except -1
    cdef bint set_up_aio(self, uint32_t depth) except -1
    cdef int require_made(self) except -1
    cdef int require_open(self) except -1
    cdef int end(self, uint64_t deadline) except -1
    cdef void end_aio(self) noexcept
    cdef void free_core(self) noexcept


cdef class DiskBatch:
    cdef DiskStore store
    cdef kv_io_batch *batch           # a reference of ours

    cdef bint wait_until(self, uint64_t until) noexcept nogil
    cdef object copy(self, const void *source, size_t item_bytes, object dtype)
