# cython: nonecheck=False
"""Job: the caller's handle on a record of a JobTable."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint64_t
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex.driver._device cimport check, require_timeout
from kvortex.transfer._job_table cimport ENTER_NS, OUTCOME_FAILED, OUTCOME_PENDING, SIGNALS_NS, JobRecord, JobTable, \
    OutcomeState

from kvortex.errors import DriverError, EngineClosed
from kvortex.transfer.awaiting import wait_in_loop


@cython.no_gc_clear  # in a garbage cycle the memory must outlive the copies
cdef class Loan:
    cdef void give_back_if_over(self) noexcept:
        if self.queue is not None and self.queue.is_over(self.record, self.generation):
            self.memory = ()


@cython.no_gc_clear  # __dealloc__ takes the pointer to `outcome` back from the queue
cdef class Job:
    """What a save or a load did, and when it is over.

    Made by `save_blocks`, `load_blocks` and `TransferQueue.submit`. Dropping it neither stops nor waits for the copies.
    """

    def __repr__(self):
        if self.queue is None:
            return "Job(done, 0 blocks)"
        if self.queue.device.pid != getpid():
            return "Job(of the parent process)"
        state = self._state()
        return (f"Job({'under way' if state == OUTCOME_PENDING else 'failed' if state == OUTCOME_FAILED else 'done'}, "
                f"{self.count} blocks)")

    @property
    def num_blocks(self):
        """Blocks moved. Load: the leading run really transferred; targets beyond it are untouched. Save: the NEW ones.

        Raises `DriverError` when the job failed.
        """
        self._raise_failed()
        return self.count

    @property
    def submitted(self):
        """True when every copy is on its stream, so that `wait_on` will not block the host."""
        if self.queue is None:
            return True
        self._require_owner_process()
        return self.queue.is_submitted(self.record, self.generation)

    def done(self):
        """Whether the job is over, done or failed. Never blocks on the device.

        Only True allows memory to be reused; if the driver cannot be asked, it is False. Exception: if a dead context
        failed a job, or a shutdown or close did not wait long enough for it, the job counts as over while a copy may
        still run. Then `wait` raises, and memory that the job was given must not be used again.
        """
        cdef int mode = 0
        if self.queue is None:
            self.give_loan_back()
            return True
        self._require_owner_process()
        with nogil:
            if self._state() == OUTCOME_PENDING and self.queue.enter(&mode) == 0:
                self.queue.poll_once()
                self.queue.device.leave(mode)
        cdef bint is_over = self._state() != OUTCOME_PENDING
        self.give_loan_back()  # after the last look: when a caller sees the job over, its memory is released
        return is_over

    def wait(self, timeout_ms=None):
        """Block the calling thread (GIL released) until the copies are complete and their slots committed or released.

        Raises
        ------
        TimeoutError
            `timeout_ms` passed first; the job goes on.
        DriverError
            The job failed. If only the waiting has trouble, nothing is raised, and the waiting goes on.
        EngineClosed
            The device was closed before the job was over: the job's end is not known.
        """
        cdef int mode = 0, code
        cdef OutcomeState state
        cdef int64_t limit = require_timeout(timeout_ms)
        cdef uint64_t deadline = _c.kv_deadline_ns(limit), pause
        if self.queue is None:
            self.give_loan_back()
            return
        self._require_owner_process()
        state = self._state()
        while state == OUTCOME_PENDING:
            with nogil:
                code = self.queue.enter(&mode)  # if that fails, an engine's thread asks, or the next round does
                pause = _c.kv_now_ns() + (ENTER_NS if code else SIGNALS_NS)
                state = self.queue.wait_outcome(&self.outcome, min(pause, deadline), code == 0)
                if code == 0:
                    self.queue.device.leave(mode)
            PyErr_CheckSignals()
            if state == OUTCOME_PENDING:
                state = self._state()  # a signal handler may have ended the job, and closed its device
            if state == OUTCOME_PENDING:
                self.queue.device.require_open()
            if state == OUTCOME_PENDING and _c.kv_now_ns() >= deadline:
                raise TimeoutError(f"the job is not done after {timeout_ms} ms")
        self.give_loan_back()
        self._raise_failed()

    def wait_on(self, stream):
        """Make later work on `stream` wait for this job, on the device.

        The host blocks (GIL released) only while copies of a deferred job are still to be submitted, see `submitted`,
        or, as in `wait`, if the driver refuses to make the stream wait. Either way, work that is submitted after this
        call comes after the job.

        Parameters
        ----------
        stream : int or stream object
            Of the same device and not capturing; 0 is the legacy default stream.

        Raises
        ------
        ValueError
            The stream is missing, capturing, or another device's.
        DriverError
            The job failed.
        """
        cdef JobTable queue = self.queue
        cdef void *caller
        cdef int mode = 0, code = 0, held = -1
        if queue is None:
            return
        self._require_owner_process()
        for job in self.earlier or ():  # some of them may have failed
            (<Job>job).wait_on(stream)
        try:
            caller = queue.device.borrow_stream(stream)
        except DriverError:  # the driver could not say whether the stream is fit
            return self.wait()
        while held == -1:  # until it is sealed
            with nogil:
                held = queue.hold_sealed(self.record, self.generation, _c.kv_now_ns() + SIGNALS_NS)
                if held == 1:
                    code = queue.records[self.record].code  # if it failed: `wait` below raises
                    if code == 0:
                        code = queue.device.enter(&mode)
                    if code == 0:
                        code = _c.kv_call(queue.device.drv, _c.stream_wait_event, caller,
                                          queue.records[self.record].done_event, 0)
                        queue.device.leave(mode)
                    queue.drop_hold(self.record)
            if held == -1:
                PyErr_CheckSignals()
                queue.device.require_open()
        if code:
            return self.wait()
        self._raise_failed()
        if held == -2:  # nobody will put the rest of its copies on the stream
            check(queue.device, queue.failure)

    def __await__(self):
        """Wait in an asyncio event loop; the result is the job. Cancelling stops the waiting, never the copies."""
        if not self.done():
            yield from wait_in_loop(self, self.queue.signals).__await__()
        self._raise_failed()
        return self

    cdef void attach(self, JobTable queue, uint32_t record, object owner):
        """Become the handle of a claimed record. Called before the copies are submitted, so that no outcome is missed.

        Raises nothing and runs no Python code: whoever claimed the record must submit or unclaim it.
        """
        self.queue = queue
        self.owner = owner
        self.record = record
        self.generation = queue.records[record].generation
        queue.watch(record, &self.outcome)

    cdef void give_loan_back(self) noexcept:
        if self.loan is not None:
            self.loan.give_back_if_over()

    cdef OutcomeState _state(self) noexcept nogil:
        return self.queue.ask(&self.outcome)

    def _require_owner_process(self):
        if self.queue.device.pid != getpid():
            raise EngineClosed("this job belongs to the parent process")

    def _raise_failed(self):
        if self.queue is not None:
            self._require_owner_process()
            if self._state() == OUTCOME_FAILED:
                check(self.queue.device, self.outcome.code)
            for job in self.earlier or ():
                (<Job>job)._raise_failed()

    def __dealloc__(self):
        cdef JobRecord *job
        if self.queue is None or self.queue.device.pid != getpid():
            return
        _c.kv_monitor_lock(&self.queue.monitor)
        job = &self.queue.records[self.record]
        if job.outcome == &self.outcome:
            job.outcome = NULL
        _c.kv_monitor_unlock(&self.queue.monitor)
