"""IoCalls: the system calls of the disk tier. The map; the code is in _io_calls.pyx."""

from kvortex._c cimport kv_io_calls


cdef class IoCalls:
    cdef const kv_io_calls *table     # the system's, or one that a test keeps alive
