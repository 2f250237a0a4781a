"""QueueList: the queues that a thread without the GIL goes round. The map; the code is in _queue_list.pyx."""

from kvortex._c cimport kv_monitor
from kvortex.driver._device cimport Device
from kvortex.transfer._signals cimport JobSignals

cdef enum:
    MAX_QUEUES = 256


cdef class QueueList:
    cdef Device device
    cdef JobSignals signals
    cdef kv_monitor monitor            # guards the next four
    cdef void *listed[MAX_QUEUES]
    cdef int num_listed
    cdef void *round[MAX_QUEUES]       # the list as it stood when the round began; changed by its thread alone
    cdef int num_in_round
    cdef bint has_monitor
    cdef readonly tuple queues         # kept alive; changed under the GIL

    cdef int add(self, object queues) except -1       # ValueError: too many, or of another device or other signals
    cdef bint remove(self, object queues) noexcept    # whether no round uses them any more: keep them until then
    cdef int begin_round(self) noexcept nogil         # -> how many there are in `round`
    cdef void end_round(self) noexcept nogil
