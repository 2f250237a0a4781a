"""Carriers: those of an engine, one a layout. The map; the code is in _carriers.pyx."""

from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._carrier cimport Carrier
from kvortex.transfer._layout cimport KVLayout


cdef class Carriers:
    cdef PinnedPool pool
    cdef dict by_layout                 # in the order of adding; None names the one for raw memory alone
    cdef readonly Carrier first         # what calls use that name no layout; None: all layouts were removed
    cdef readonly tuple queues          # of all carriers

    cdef Carrier of(self, object layout)              # of a layout or a part of one; ValueError: there is none
    cdef int require_fit(self, KVLayout layout) except -1
    cdef int add(self, Carrier carrier) except -1
    cdef int refuse(self, Carrier carrier) except -1  # no call may use it any more; its jobs go on
    cdef int remove(self, Carrier carrier) except -1  # nothing, where it is not there
    cdef int choose(self) except -1
