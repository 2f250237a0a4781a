"""How many bytes of a device may be handed out: a count that a pool and its arenas share."""


from cython cimport auto_pickle, no_gc_clear
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex._c cimport kv_devptr
from kvortex.driver._device cimport Device, try_again

from kvortex.arguments import whole_number
from kvortex.errors import ConfigError, EngineClosed, PoolExhausted


@auto_pickle(False)  # copy.copy would make a second owner
@no_gc_clear  # buffers that are collected with it still give their memory back
cdef class DeviceLimit:
    def __cinit__(self, *args, **kwargs):
        self.closed = True

    cdef int require_open(self) except -1:
        if self.closed:
            raise EngineClosed("this DevicePool is closed; make another")
        return self.device.require_open()

    cdef int claim(self, size_t nbytes) except -1:
        if nbytes > self.limit_bytes - self.used:
            raise PoolExhausted(f"{nbytes} bytes were asked of a device pool that has {self.used} of its "
                                f"{self.limit_bytes} bytes in use; free buffers first, or raise its limit_bytes "
                                f"(gpu_pool_size_bytes)")
        self.used += nbytes
        self.used_high = max(self.used_high, self.used)
        return 0

    cdef void unclaim(self, size_t nbytes) noexcept:
        self.used -= nbytes

    cdef void end_use(self) noexcept:
        pass


cdef int require_size(str name, object nbytes, int least) except -1:
    nbytes = whole_number(nbytes, name)
    if not least <= nbytes < 1 << 48:
        raise ConfigError(f"{name} must be in {least}..2**48-1, got {nbytes}")
    return 0


cdef size_t round_up(size_t nbytes, size_t unit) noexcept nogil:
    return (nbytes + unit - 1) // unit * unit


cdef object refuse(Device device, int code, size_t nbytes, size_t used, size_t limit):
    call = _c.kv_result_call(code).decode()
    raise PoolExhausted(f"{device.name} has no {nbytes} bytes for a device pool with {used} of its {limit} bytes in "
                        f"use ({call} ran out of memory): freed memory counts until its stream gets "
                        f"to the free; synchronise the streams and call trim(), or lower the limit")


cdef bint wait_for_device(Device device) noexcept:
    """Wait for all work of the context; False if that is not possible.

    To wait, it allocates a byte and frees it: CUDA waits for all work then. cuCtxSynchronize would be refused, whatever
    the thread's mode, while somebody captures a graph, and would spoil the capture.
    """
    cdef kv_devptr scratch = 0
    cdef int code = 0, mode = 0, attempts = 0
    if device.closed or getpid() != device.pid:
        return False
    with nogil:
        while try_again(&attempts, code):
            code = device.enter(&mode)
            if code == 0:
                code = device.drv.mem_alloc(&scratch, 1)
                if code == 0:
                    code = device.give_memory_back(scratch)
                elif code == _c.KV_CUDA_OUT_OF_MEMORY:
                    code = device.drv.ctx_synchronize()
                device.leave(mode)
    return code == 0
