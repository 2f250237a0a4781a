"""Gather: kernel, staging and stream with which a queue gathers, or packs, blocks. The code is in _gather.pyx."""

from libc.stdint cimport int64_t

from kvortex._c cimport kv_devptr, kv_pack
from kvortex.driver._device cimport Device
from kvortex.memory._device_pool cimport DevicePool
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._packing cimport Packing, Packings


cdef class Gather:
    cdef Device device
    cdef readonly KVLayout layout      # the one it moves
    cdef Packings packings             # how its blocks and those of its parts lie in their slots
    cdef Packing whole                 # of the layout itself
    cdef readonly unsigned int num_ctas
    cdef void *module
    cdef void *function
    cdef void *stream                  # of the kernels; the copies are on the queue's
    cdef void *began                   # on the queue's stream: what the job has to wait for is over
    cdef void *filled[2]               # of each half of the staging: the first step is done, the second may begin
    cdef void *emptied[2]              # and the second step: the half may be filled again
    cdef readonly DevicePool pool      # where the next comes from; None: from the device
    cdef kv_devptr staging             # device memory, ours
    cdef object refusal                # what the pool raised while this was made
    cdef size_t half_bytes
    cdef int half                      # the next to be filled
    cdef kv_pack told                  # scratch of the queue's one submitter

    cdef Packing packing_of(self, KVLayout layout)
    cdef size_t blocks_at_once(self, Packing packing) noexcept nogil
    cdef int launch(self, Packing packing, const int64_t *block_ids, size_t n, bint to_staging) noexcept nogil
    cdef int build(self, const char *image) noexcept nogil
    cdef int allocate(self) noexcept nogil
    cdef void give_back(self) noexcept
    cdef void close(self) noexcept nogil
