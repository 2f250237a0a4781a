"""Stream and Event: ours or borrowed. The map; the code is in _stream.pyx."""

from kvortex.driver._device cimport Device


cdef class Stream:
    cdef readonly Device device
    cdef void *stream                 # may be 0: the legacy default stream
    cdef object owner                 # of a borrowed stream: kept alive as long as this object
    cdef readonly bint is_owned       # created here, so destroyed here
    cdef readonly bint closed
    cdef object __weakref__

    cdef int require_open(self) except -1
    cdef void destroy(self) noexcept


cdef class Event:
    cdef readonly Device device
    cdef void *event
    cdef readonly bint closed
    cdef object __weakref__

    cdef int require_open(self) except -1
    cdef void destroy(self) noexcept


# Whether a stream is over, or an event that is not NULL. A CUresult: NOT_READY, it is not yet; else it is, or nobody
# knows. With `waiting` not before it is, or 50 ms have passed: a longer wait lets signal handlers (Ctrl-C) run then.
# Such a wait lets the driver's memory pools give back, too; asking alone does not.
cdef int ask(Device device, void *stream, void *event, bint waiting) noexcept nogil

# The same for who holds the GIL, for 50 ms at the most: True when it is over, False when it is not yet. Signal handlers
# run before it returns, and what they raise is raised.
cdef bint wait_a_while(Device device, void *stream, void *event) except -1

# Let later work on one stream wait, on the device, for what is on another one now.
cdef int order_streams(Device device, void *later, void *earlier) except -1
