"""EngineCore: index + pool + queues, joined without the GIL. The map; the code is in _engine.pyx."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kvortex._c cimport kv_histogram, kv_monitor
from kvortex.driver._device cimport Device
from kvortex.index._block_index cimport BlockIndex
from kvortex.memory._device_pool cimport DevicePool
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._carrier cimport Carrier
from kvortex.transfer._carriers cimport Carriers
from kvortex.transfer._copier cimport Direction
from kvortex.transfer._job cimport Job, Loan
from kvortex.transfer._job_table cimport JobRecord
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._source cimport Source

cdef struct Counters:
    uint64_t blocks_checked, blocks_hit, blocks_saved, blocks_loaded
    uint64_t blocks_present, blocks_pending, blocks_refused
    uint64_t bytes_saved, bytes_loaded, packed_bytes_saved, packed_bytes_loaded, jobs_failed
    uint64_t blocks_not_packed
    uint64_t blocks_admitted, blocks_not_admitted  # NEW blocks that a tier was to have, and not
    kv_histogram lookup_ns, save_ns, load_ns


cdef class Admission:
    cdef readonly size_t num_blocks, granted, num_used
    cdef readonly bint ram_only          # the tier gets none of them
    cdef public bint is_over             # the save was called, well or badly


cdef class EngineCore:
    cdef readonly Device device
    cdef readonly PinnedPool pool
    cdef readonly DevicePool device_pool  # or None; with a Device of its own, as memory of it may outlive us
    cdef readonly BlockIndex index
    cdef readonly KVLayout layout        # of calls that name none; None when the engine moves raw memory only
    cdef readonly tuple queues           # of all carriers
    cdef Carriers carriers               # and the threads that serve them
    cdef Carrier carrier                 # of calls that name no layout; None: all layouts were removed
    cdef bytes digest                    # what keys are xored with where no layout is named; None: nothing
    cdef readonly object tiering         # kvortex.engine.tiering.Tiering, or None
    cdef BlockIndex catalogue            # of the tier
    cdef object deferred                 # of calls that do not say: False, True or "auto"

    cdef kv_monitor counting             # guards the counters
    cdef Counters count
    cdef bint has_counting
    cdef bint logged_failure, logged_pool, logged_refusal    # what went wrong in the background was logged
    cdef bint leaked                     # pinned memory was left to copies that may still run into it
    cdef int failure                     # sticky CUresult: jobs fail, lookups miss, nothing is reused
    cdef int calls                       # threads inside a verb, where no Python code runs; changed under the GIL
    cdef bint closing                    # no call is let in any more
    cdef bint ended                      # everything was given back, or leaked on purpose
    cdef tuple loans                     # Loan of every job on memory that came as objects; let go by later calls

    cdef int require_open(self) except -1
    cdef int enter_call(self) except -1
    cdef int log_failures(self) except -1
    cdef int choose(self) except -1
    cdef bytes digest_for(self, KVLayout layout)
    cdef const uint8_t[:, ::1] keys_of(self, object keys, object layout)
    cdef Carrier carrier_of(self, object layout)
    cdef Source source_of(self, Carrier carrier, object layout, Direction direction, Py_ssize_t n, object block_ids,
                          object data_ptrs, object sizes, object stream)
    cdef void give_loans_back(self) noexcept
    cdef int deferral(self, object deferred) except -1
    cdef Job run(self, Carrier carrier, Direction direction, const uint8_t[:, ::1] keys, Source source, object statuses,
                 int deferred, Admission admission, const uint32_t[::1] expected, int number)
    cdef size_t num_missing(self, const uint8_t[:, ::1] keys) except? 0
    cdef tuple tiering_of(self, object prefetched)
    cdef Job load_as_it_comes(self, Carrier carrier, const uint8_t[:, ::1] keys, Source source, object timeout_ms,
                              int deferred)
    cdef void retire_job(self, Direction direction, const JobRecord *job, int code) noexcept nogil
    cdef size_t commit(self, const JobRecord *job, uint64_t *nbytes) noexcept nogil
    cdef bint any_in_flight(self) noexcept
    cdef bint close_parts(self, int64_t timeout_ms, bint interruptible) except -1
