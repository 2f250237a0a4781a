"""Carriers: those of an engine, and the threads that serve them. The map; the code is in _carriers.pyx."""

from libc.stdint cimport uint64_t

from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._carrier cimport Carrier
from kvortex.transfer._completion cimport CompletionThread
from kvortex.transfer._job_table cimport retire_hook
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._signals cimport JobSignals
from kvortex.transfer._submitter cimport Submitter


cdef class Carriers:
    cdef PinnedPool pool
    cdef dict by_layout                 # in the order of adding; None names the one for raw memory alone
    cdef readonly Carrier first         # what calls use that name no layout; None: all layouts were removed
    cdef bytes fingerprint              # of the first layout that there ever was; None: there was none
    cdef readonly tuple queues          # of all carriers
    cdef readonly JobSignals signals    # of all queues
    cdef CompletionThread thread
    cdef Submitter submitter            # None until the first deferred call
    cdef retire_hook hook               # of all queues
    cdef void *hook_owner

    cdef int start(self, Carrier first, retire_hook hook, void *owner) except -1
    cdef int require_submitter(self) except -1

    cdef Carrier of(self, object layout)              # of a layout or a part of one; ValueError: there is none
    cdef int require_fit(self, KVLayout layout, object codec, object exact_layers) except -1
    cdef int add(self, Carrier carrier) except -1     # where it raises, nothing has changed
    cdef Carrier refuse(self, object layout)          # no call may use the carrier of a layout any more
    # Until no thread looks at the carrier any more, or `closing`.
    cdef int await_jobs(self, Carrier carrier, object timeout_ms, const bint *closing) except -1
    cdef bint is_left(self, Carrier carrier) noexcept
    cdef int drop(self, Carrier carrier, bint ended) except -1   # it has no jobs; added or not, its queues are closed
    cdef int choose(self) except -1
    cdef bytes fingerprint_of(self, KVLayout layout)
