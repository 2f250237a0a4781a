"""Claim: memory that a pool has yet to touch, for others to see. The map; the code is in _claim.pyx."""

from libc.stdint cimport uint64_t


cdef class Claim:
    cdef uint64_t *left     # bytes not touched yet, in the file's page or `here`; valid for as long as the object is
    cdef uint64_t here
    cdef bytes path         # of the file, which this process has locked; None: there is none (any more)
    cdef int file
    cdef int pid            # process that may remove the file

    cdef bint share(self, bytes hidden, bytes path, bytes about) noexcept
    cdef void end(self) noexcept
