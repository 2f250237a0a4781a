"""Carrier: queues, probe and device-block hazards of one layout over one pool. The map; the code is in _carrier.pyx."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvortex._c cimport kv_monitor
from kvortex.driver._device cimport Device
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._copier cimport Direction
from kvortex.transfer._job_table cimport JobRecord
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._packing cimport Packings
from kvortex.transfer._signals cimport JobSignals
from kvortex.transfer._source cimport Source

cdef enum:
    MAX_STREAMS = 32  # no more than MAX_WAITS

cdef enum:         # who issues a job
    DEFER_NONE = 0
    DEFER_ALL = 1
    DEFER_LONG = 2  # the caller, unless that takes long


cdef class Carrier:
    cdef readonly Device device
    cdef readonly PinnedPool pool
    cdef readonly KVLayout layout        # None: raw memory only
    cdef readonly Packings packings      # how its blocks lie in their slots; None: as they are, moved piece by piece
    cdef readonly JobSignals signals
    cdef readonly tuple queues           # D2H ones, then H2D ones; a job's words name them by position
    cdef int num_queues, num_savers
    cdef void *queue[MAX_STREAMS]        # the same, borrowed, for use without the GIL
    cdef uint32_t next_queue[2]          # by direction, round robin; a lost update only changes the balance
    cdef bint device_memory              # the layout lies in device memory, so a stream is required
    cdef bint refuses                    # no job is taken any more

    cdef kv_monitor hazards              # guards the next three
    cdef bint has_hazards
    cdef uint64_t *last_job              # per device block: the last job that reads or writes it, see job_word()
    cdef uint32_t *stamps                # per device block: the last load that named it
    cdef uint32_t stamp

    cdef void refuse(self) noexcept nogil
    cdef bint any_in_flight(self) noexcept nogil
    cdef uint32_t claim_job(self, Direction direction, size_t n, int *number) noexcept nogil
    cdef void fill(self, int number, uint32_t record, Source source, size_t n) noexcept nogil
    cdef int submit(self, int number, uint32_t record, Source source, int deferred, bint *has_turn) noexcept nogil
    cdef void *packing_on(self, int number, Source source) noexcept nogil
    cdef size_t copies_of_block(self, int number, Source source) noexcept nogil
    cdef void hold_met(self, int number, JobRecord *job, const uint64_t *met, size_t num_met) noexcept nogil
    cdef bint names_block_twice(self, const int64_t *ids, size_t n) noexcept nogil
    cdef size_t claim_blocks(self, int number, uint32_t record, uint64_t *met) noexcept nogil
