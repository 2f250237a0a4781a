"""CompletionThread: retires the jobs of an engine's queues. The map; the code is in _completion.pyx."""

from kvortex._c cimport pthread_t
from kvortex.driver._device cimport Device
from kvortex.transfer._signals cimport JobSignals

cdef enum:
    MAX_QUEUES = 64


cdef class CompletionThread:
    cdef Device device
    cdef JobSignals signals
    cdef tuple queues                 # kept alive; the thread reads them through `polled`
    cdef void *polled[MAX_QUEUES]
    cdef int num_queues
    cdef pthread_t thread
    cdef bint running

    cdef void run(self) noexcept nogil
    cdef void stop(self) noexcept nogil
