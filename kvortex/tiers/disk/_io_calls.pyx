"""The table of system calls for Python: what opens and lays out segments."""

import os

from libc.stdint cimport int64_t, uintptr_t

cimport kvortex._c as _c


cdef class IoCalls:
    """The system calls of the disk tier; each raises OSError with its errno.

    Parameters
    ----------
    address : int, default 0
        Of a `kv_io_calls` to call instead of the system's, for tests; it stays where it is.
    """

    def __cinit__(self, uintptr_t address=0):
        self.table = <const _c.kv_io_calls *>address if address else &_c.kv_io_system

    def open(self, path, int flags):
        """Open a file, mode 0600 where it is made."""
        name = os.fsencode(path)
        cdef const char *text = name
        cdef int answer
        with nogil:
            answer = self.table.open(text, flags, 0o600)
        return require(answer, path)

    def allocate(self, int file, int64_t nbytes):
        """Give the whole file its room on the disk."""
        cdef int answer
        with nogil:
            answer = self.table.allocate(file, nbytes)
        require(answer)

    def resize(self, int file, int64_t nbytes):
        """Cut the file, or make it longer without room on the disk."""
        cdef int answer
        with nogil:
            answer = self.table.resize(file, nbytes)
        require(answer)

    def direct_align(self, int file):
        """To what direct I/O must be aligned, in bytes; 0 where the file has none. ENOSYS: the kernel doesn't tell."""
        return require(self.table.direct_align(file))

    def set_direct(self, int file, bint direct):
        """Go past the page cache, or through it again."""
        require(self.table.set_direct(file, direct))

    def read(self, int file, size_t nbytes, int64_t offset):
        """Read `nbytes`, all or ENODATA."""
        data = bytes(nbytes)
        cdef char *target = data
        cdef int answer
        with nogil:
            answer = _c.kv_read_all(self.table, file, target, nbytes, offset)
        require(answer)
        return data

    def write(self, int file, bytes data, int64_t offset):
        """Write all of `data`."""
        cdef const char *source = data
        cdef size_t nbytes = len(data)
        cdef int answer
        with nogil:
            answer = _c.kv_write_all(self.table, file, source, nbytes, offset)
        require(answer)

    def sync(self, int file):
        """Make the file's data durable."""
        cdef int answer
        with nogil:
            answer = self.table.sync(file)
        require(answer)

    def close(self, int file):
        """Close the file."""
        cdef int answer
        with nogil:
            answer = self.table.close(file)
        require(answer)


cdef int require(int answer, path=None) except -1:
    if answer < 0:
        raise OSError(-answer, os.strerror(-answer), path)
    return answer
