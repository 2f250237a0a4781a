"""BorrowedMemory, Lender: memory of others, and our own shared with them. The map; the code is in _memory.pyx."""

from libc.stdint cimport uint64_t


cdef class Lender:
    """Memory of ours that others may hold: it counts what is out, and outlives its `close` until all of it is back."""
    cdef Py_ssize_t exports           # buffers, capsules and loans that are out; changed under the GIL

    # Fill in a loan of all of it and count it, or answer 0: borrow it by the protocols, as anybody would.
    cdef int lend(self, BorrowedMemory borrowed) except -1
    cdef void take_back(self) noexcept
    # Nothing is out any more; a closed lender gives its memory up now.
    cdef void all_is_back(self) noexcept
    # A DLPack capsule over bytes of ours, counted until whoever took it calls its deleter.
    cdef object capsule(self, uint64_t address, size_t nbytes, int device_type, int device_id, object max_version)


cdef class BorrowedMemory:
    cdef readonly uint64_t address    # of the first element
    cdef readonly object owner        # the object that was handed in; None for a bare address
    cdef readonly tuple shape         # None: nothing is known but the address
    cdef readonly tuple strides       # in bytes, as long as shape
    cdef readonly size_t itemsize
    cdef readonly bint read_only
    cdef readonly object is_cuda      # None: the protocol does not say
    cdef readonly object stream       # handle of the producer's stream whose work on it may not be over, or None
    cdef object view                  # a memoryview: the buffer stays exported
    cdef Lender lender                # ours: counted there
    cdef void *managed                # what a DLPack capsule held: its deleter is still to be called
    cdef bint is_versioned

    cdef int describe(self, str what, object address, object shape, object strides, object itemsize) except -1
    cdef int read_torch(self, object tensor) except -1
    cdef int read_interface(self, str name, object description) except -1
    cdef int read_buffer(self, object memory) except -1
    cdef int read_dlpack(self, object memory, object stream) except -1
    cdef int take(self, object capsule) except -1
    cdef int require_copyable(self, bint as_target) except -1


cpdef BorrowedMemory borrow_memory(object memory, object stream=*)
cdef bint is_integer(object thing)
# Whole numbers from Python, by operator.index; a TypeError that says which argument is none for a float, text or bool.
cdef object whole_number(object number, str what, str field=*)
cdef tuple whole_numbers(object items, str what, str field=*)
cdef tuple whole_pair(object items, str what, str field=*)
