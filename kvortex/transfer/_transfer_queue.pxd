"""TransferQueue: one stream, one direction, FIFO. The map; the code is in _transfer_queue.pyx."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvortex.memory._device_pool cimport DevicePool
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._copier cimport Copier
from kvortex.transfer._job_table cimport JobOutcome, JobTable
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._packing cimport Packings


cdef class TransferQueue(JobTable):
    cdef Copier copier                 # how copies get onto the stream; theirs whose turn it is
    cdef bint ended                    # given back, or leaked on purpose
    cdef set used                      # pools and layouts that jobs were submitted with; kept until close

    # For callers without the GIL, who keep queue, layout and pool alive, and `outcome` in its place, until it is no
    # longer pending. Nothing is checked: blocks within the layout, slots that are registered, no larger than a payload,
    # a stream of the device that is not capturing, n not 0.
    # 0, or why nothing was submitted, as outcome.code says too: NOT_READY when all jobs are in flight, else a CUresult;
    # INVALID_VALUE where the queue packs blocks of another layout, or of the layout that this is a part of.
    cdef int submit_blocks(self, KVLayout layout, const int64_t *block_ids, PinnedPool pool, const uint32_t *slot_ids,
                           size_t n, void *stream, JobOutcome *outcome) noexcept nogil

    cdef int order(self, uint32_t record, void *caller) noexcept nogil
    cdef int issue(self, uint32_t record, uint64_t until_ns) noexcept nogil
    cdef int seal(self, uint32_t record, int code) noexcept nogil
    cdef int issue_in_turn(self, uint32_t record) noexcept nogil
    cdef int hand_over(self, uint32_t record) noexcept nogil
    cdef int issue_next(self, uint64_t slice_ns) noexcept nogil

    cdef uint32_t claim_blocks(self, KVLayout layout, void *packing, const int64_t *block_ids, PinnedPool pool,
                               const uint32_t *slot_ids, size_t n) noexcept nogil
    cdef int gather_by(self, Packings packings, object num_ctas, DevicePool pool) except -1
    cdef void plan_blocks(self, uint32_t record, KVLayout layout, void *packing, PinnedPool pool) noexcept nogil
    cdef int submit_claimed(self, uint32_t record, void *caller, bint deferred, JobOutcome *outcome) noexcept nogil
    cdef int end(self, uint64_t deadline_ns, bint interruptible) except -1


cdef uint32_t[::1] as_slot_ids(object slot_ids, PinnedPool pool) except *
