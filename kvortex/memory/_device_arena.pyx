"""DeviceArena: contiguous device memory that grows. Addresses are reserved at once, memory is added part by part."""

from cython cimport auto_pickle, no_gc_clear
from libc.string cimport memset
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex._c cimport kv_devptr
from kvortex.driver._buffer cimport DeviceBuffer
from kvortex.driver._device cimport Device, check, try_again
from kvortex.memory._device_limit cimport refuse, require_size, round_up, wait_for_device

from kvortex.errors import PoolExhausted


@auto_pickle(False)
@no_gc_clear  # __dealloc__ needs the pool, which the collector would clear before it
cdef class DeviceArena(DeviceBuffer):
    """A `DeviceBuffer` that grows at its end and never moves; made by `DevicePool.arena`.

    The parts lie behind each other without gaps, as if they had been allocated at once. So a layout over all parts is
    one range, and a strided copy may cross from one part to the next, which it may not with separate allocations.
    `address` is that of the first byte, `nbytes` the sum of what was asked for.

    Attributes
    ----------
    pool : DevicePool
    reserve_bytes : int
        Address space.
    mapped_bytes : int
        Memory taken: `nbytes` rounded up to units (2 MiB). The pool's limit counts this.
    """

    def __init__(self):
        raise TypeError("DeviceArena has no constructor; use DevicePool.arena(reserve_bytes)")

    def grow(self, nbytes):
        """Add memory at the end; it is not initialised. Releases the GIL; of several threads, one grows it at a time.

        Parameters
        ----------
        nbytes : int
            At least 1. If each part is a multiple of 256 bytes, all are aligned as separate allocations are.

        Returns
        -------
        offset : int
            Of the new part.

        Raises
        ------
        PoolExhausted
            The pool's limit, the reserved address space or the device does not allow it; nothing has changed.
        ConfigError
            `nbytes` is outside its limits.
        DriverError, EngineClosed
        """
        cdef size_t offset = 0, needed, mapped
        require_size("nbytes", nbytes, 1)
        with self.growing:
            self.require_open()
            self.pool.require_open()
            offset, needed = self.nbytes, self.nbytes + <size_t>nbytes
            if needed > self.reserve_bytes:
                raise PoolExhausted(f"{nbytes} bytes more than {offset} exceed the arena's address space of "
                                    f"{self.reserve_bytes} bytes; pass a larger reserve_bytes to DevicePool.arena")
            mapped = round_up(needed, self.unit)
            self.exports += 1  # for this call: a close meanwhile must not unmap
            try:
                if mapped > self.mapped_bytes:
                    self.map_more(mapped - self.mapped_bytes)
                self.nbytes = needed
            finally:
                self.take_back()
        return offset

    cdef int map_more(self, size_t nbytes) except -1:
        cdef size_t keep
        cdef int code, mode = 0
        cdef bint is_full = False
        cdef kv_devptr address = self.start + self.mapped_bytes
        self.pool.claim(nbytes)
        self.pool.arenas += nbytes
        keep = self.pool.limit_bytes - self.pool.arenas
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                self.device.drv.mem_pool_trim_to(self.pool.pool, keep)  # what the driver keeps would exceed the limit
                code = self.map_at(address, nbytes)
                is_full = _c.kv_result_code(code) == _c.KV_CUDA_OUT_OF_MEMORY
                self.device.leave(mode)
        if code:
            self.pool.arenas -= nbytes
            self.pool.unclaim(nbytes)
            if is_full:
                refuse(self.device, code, nbytes, self.pool.used, self.pool.limit_bytes)
            check(self.device, code)
        self.pool.arenas_high = max(self.pool.arenas_high, self.pool.arenas)
        self.mappings += (nbytes,)
        self.mapped_bytes += nbytes
        return 0

    cdef int map_at(self, kv_devptr address, size_t nbytes) noexcept nogil:
        """Map new memory at the address; if that fails, nothing is left of it. A CUresult."""
        cdef const _c.kv_driver *drv = self.device.drv
        cdef _c.kv_mem_allocation_props props
        cdef _c.kv_mem_access access
        cdef unsigned long long handle = 0
        cdef int code
        fill_props(&props, self.device)
        access.location, access.flags = props.location, _c.KV_MEM_ACCESS_READWRITE
        code = _c.kv_call(drv, _c.mem_create, &handle, nbytes, &props, 0)
        if code:
            return code
        code = _c.kv_call(drv, _c.mem_map, address, nbytes, 0, handle, 0)
        if code == 0:
            code = _c.kv_call(drv, _c.mem_set_access, address, nbytes, &access, 1)
            if code:
                drv.mem_unmap(address, nbytes)
        drv.mem_release(handle)  # a mapping keeps what it maps
        return code

    def close(self):
        """Free the memory when all work of the device is over; blocks until then (GIL released). Idempotent.

        Memory that others hold (a buffer, a DLPack tensor, a layout over it) is freed when the last of them lets go. If
        the device has not a byte left and one of its streams is capturing a graph, the memory stays taken.
        """
        DeviceBuffer.close(self)

    cdef void release(self) noexcept:
        cdef kv_devptr start = self.start
        cdef size_t offset = 0, nbytes
        cdef int mode = 0, code = 0, attempts
        self.start = 0
        if start == 0 or self.device.closed or getpid() != self.device.pid or not wait_for_device(self.device):
            return
        for size in self.mappings:
            nbytes = size
            attempts = 0
            with nogil:
                while try_again(&attempts, code):
                    code = self.device.enter(&mode)
                    if code == 0:
                        code = self.device.drv.mem_unmap(start + offset, nbytes)
                        self.device.leave(mode)
            offset += nbytes
        attempts = 0
        with nogil:
            while try_again(&attempts, code):
                code = self.device.enter(&mode)
                if code == 0:
                    code = self.device.drv.mem_address_free(start, self.reserve_bytes)
                    self.device.leave(mode)
        self.pool.arenas -= offset
        self.pool.unclaim(offset)
        self.is_unmapped = True

    cdef void give_back(self) noexcept:
        DeviceBuffer.give_back(self)
        if self.is_unmapped:
            self.is_unmapped = False
            self.pool.end_use()  # last: with it the device may be closed

    def __dealloc__(self):
        if self.start != 0:
            self.give_back()


cdef int fill_props(_c.kv_mem_allocation_props *props, Device device) noexcept nogil:
    memset(props, 0, sizeof(props[0]))
    props.type = _c.KV_MEM_ALLOCATION_TYPE_PINNED
    props.location.type, props.location.id = _c.KV_MEM_LOCATION_TYPE_DEVICE, device.ordinal
    return 0
