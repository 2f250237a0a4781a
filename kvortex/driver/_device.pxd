"""Device: one driver table, one primary context. The map; the code is in _device.pyx."""

from libc.stdint cimport int64_t, uint64_t

from kvortex._c cimport kv_devptr, kv_driver, kv_result_is_sticky


cdef class Device:
    cdef const kv_driver *drv         # table of the driver that serves this device; static, outlives everything
    cdef void *context                # primary context, retained here until close()
    cdef readonly int ordinal
    cdef readonly bint is_host        # the host driver, not CUDA
    cdef readonly str name            # "host:0", "cuda:1"
    cdef readonly int pid             # process that created it; in a forked child the device counts as closed
    cdef readonly bint closed
    cdef object __weakref__

    cdef int retain(self) except -1
    cdef void release(self) noexcept
    # Makes the context current and the thread's capture mode RELAXED; *mode keeps what leave() restores. A CUresult
    # that carries its row: a context that could not be entered says nothing about what was to be asked in it.
    cdef int enter(self, int *mode) noexcept nogil
    cdef void leave(self, int mode) noexcept nogil   # what it cannot restore, the thread's next enter() does
    # End what the driver made, by the row for it, such as drv.stream_destroy; give_memory_back calls mem_free. An error
    # that passes is no reason to leak, so they try three times. Need no context that is entered. A CUresult.
    cdef int give_back(self, int (*end)(void *) noexcept nogil, void *thing) noexcept nogil
    cdef int give_memory_back(self, kv_devptr address) noexcept nogil
    # For threads of our own: the same once, for the thread's life.
    cdef int bind_thread(self) noexcept nogil
    # Raises EngineClosed when closed or in a forked child; touches no lock and no driver.
    cdef int require_open(self) except -1
    # A caller's stream, as it comes from Python, to its handle; refuses None, capturing ones, other devices'.
    cdef void *borrow_stream(self, object stream) except? NULL
    # The same checks on a handle: 0 fine, INVALID_DEVICE where it is another device's, else a CUresult with its row.
    cdef int check_stream(self, void *handle) noexcept nogil
    # Whether the driver says so; host memory, pinned or not, and what it does not know, is not. A CUresult: an answer
    # that could not be had is not "no".
    cdef int lies_on_device(self, uint64_t address, bint *answer) noexcept nogil


# For a loop over calls of the driver that give something back: True the first time, and twice more after an error that
# may pass.
cdef inline bint try_again(int *attempts, int code) noexcept nogil:
    attempts[0] += 1
    return attempts[0] == 1 or (attempts[0] <= 3 and code != 0 and not kv_result_is_sticky(code))


# Milliseconds of a timeout as it comes from Python; -1 for None, which waits for ever. Refuses what is no whole number.
cdef int64_t require_timeout(object timeout_ms) except? -2

# Raises DriverError(code, name, call) unless code is 0. The call is that of the row which the code carries (kv_call);
# `call` is for codes that carry none. Needs no GIL when it is 0.
cdef int check(Device device, int code, const char *call=*) except -1 nogil
