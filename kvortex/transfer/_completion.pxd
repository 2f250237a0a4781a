"""CompletionThread: retires the jobs of an engine's queues. The map; the code is in _completion.pyx."""

from libc.stdint cimport uint64_t

from kvortex._c cimport pthread_t
from kvortex.driver._device cimport Device
from kvortex.transfer._queue_list cimport QueueList
from kvortex.transfer._signals cimport JobSignals


cdef class CompletionThread:
    cdef Device device
    cdef JobSignals signals
    cdef QueueList polled
    cdef pthread_t thread
    cdef bint running
    cdef bint has_ended               # under the monitor of `signals`

    cdef void run(self) noexcept nogil
    cdef bint stop(self, uint64_t deadline_ns) noexcept nogil
