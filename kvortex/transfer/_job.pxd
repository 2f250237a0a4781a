"""Job: what a caller holds of a job; Loan: the memory that it lent. The map; the code is in _job.pyx."""

from libc.stdint cimport uint32_t

from kvortex.transfer._job_table cimport JobOutcome, JobTable, OutcomeState


cdef class Loan:
    """Memory of the caller that a job copies from or to, held until it is over, however soon its handle is dropped."""
    cdef tuple memory                  # BorrowedMemory, or the part of a layout; () when given back
    cdef JobTable queue           # None: not submitted yet
    cdef uint32_t record, generation

    cdef void give_back_if_over(self) noexcept


cdef class Job:
    cdef JobTable queue           # kept alive; None for a job that moved nothing: it is done from the start
    cdef object owner                  # the engine, kept alive while its job is
    cdef JobOutcome outcome
    cdef uint32_t record, generation
    cdef size_t count
    cdef bint is_withdrawn             # it copied nothing and will not
    cdef readonly object statuses
    cdef tuple earlier                 # jobs before this one on its queue, which it also speaks for; None: it is alone
    cdef Loan loan                     # None: addresses, or blocks of a layout, which the engine holds

    cdef void attach(self, JobTable queue, uint32_t record, object owner)
    cdef void give_loan_back(self) noexcept
    cdef OutcomeState _state(self) noexcept nogil
