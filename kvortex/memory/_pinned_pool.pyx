"""The pinned pool: it reserves its address space at once and its memory in chunks; each slot is in one chunk."""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from posix.unistd cimport getpid

cimport kvortex._c as _c
from kvortex._c cimport pthread_t
from kvortex.driver._device cimport Device, check, require_timeout
from kvortex.driver._memory cimport Lender, whole_number
from kvortex.memory._pool_slot cimport PoolSlot

from kvortex.config import bytes_text
from kvortex.errors import EngineClosed, PoolExhausted
from kvortex.log import warn_once
from kvortex.memory.limits import claim_memory, transparent_huge_pages, usable_cpus
from kvortex.slots import CHUNK_BYTES, FIRST_CHUNK_BYTES, Slots


cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int file, long offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
    const int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    const int MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTFORK, MADV_DONTNEED

cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <unistd.h>
    static inline void *kv_map_failed(void) { return MAP_FAILED; }
    /* Pages of the range come from `node` while it has any left: MPOL_PREFERRED, without libnuma. 0, or -1. The kernel
     * takes one bit less than the length that it gets. */
    static inline int kv_prefer_node(void *address, size_t bytes, int node)
    {
        enum { MODE_PREFERRED = 1, BITS = 8 * sizeof(unsigned long), MAX_NODES = 1024 };
        unsigned long mask[MAX_NODES / BITS] = {0};
        if (node < 0 || node >= MAX_NODES)
            return -1;
        mask[node / BITS] = 1ul << node % BITS;
        return (int)syscall(SYS_mbind, address, bytes, MODE_PREFERRED, mask, MAX_NODES + 1ul, 0u);
    }
    """
    void *kv_map_failed() nogil
    int kv_prefer_node(void *address, size_t nbytes, int node) nogil

cdef size_t HUGE_PAGE_BYTES = 2 << 20
cdef uint64_t SIGNALS_NS = 50_000_000  # after so long a wait, Python's signal handlers (Ctrl-C) run
# What registering answers, also if there was no memory to touch.
cdef int OUT_OF_MEMORY = _c.kv_answer(_c.KV_CUDA_OUT_OF_MEMORY, _c.mem_host_register)

cdef enum:
    MAX_TOUCHERS = 8  # sixteen are slower: they contend with the registering thread for the address space's lock


@cython.no_gc_clear  # __dealloc__ and copies in flight need what the collector would clear before
cdef class PinnedPool(Lender):
    """Reserve, touch and pin host memory, cut into slots of equal stride.

    The address space of the whole pool is reserved at once. Memory is touched and registered with the driver chunk by
    chunk: the first chunk inside the constructor, so that its slots serve at once; the rest in the background, by a
    thread that registers and up to eight that touch ahead of it (one for each CPU of the process); none takes the
    GIL. A chunk holds whole slots only, because a copy across two registrations is refused.

    Parameters
    ----------
    pool_bytes : int
        Size of the pool: exactly ``pool_bytes // stride_bytes`` slots; nothing is rounded up.
    payload_bytes : int
        Bytes of one block, 1 to 2^32 - 1.
    device : Device or str, default "auto"
        The device whose driver registers the memory.
    header_bytes : {0, 4096}, default 0
        Room before the payload in each slot; 4096 when lower tiers are configured.
    first_chunk_bytes, chunk_bytes : int
        Sizes of the first and of every later registration, rounded down to whole slots (at least one).
    huge_pages : bool, default True
        Ask for transparent huge pages; without them touching and registering take longer.
    numa : bool, default True
        Prefer memory of the device's NUMA node, if the driver names one. Memory of other nodes serves, too. `numa_node`
        is the node if the kernel took the advice.
    driver_allocated : bool, default False
        Plain mode: one `cuMemHostAlloc` for everything, inside the constructor. Seconds per 16 GiB; pages and node are
        the driver's choice.

    Raises
    ------
    ConfigError
        A size that gives no slot, or a header that is neither 0 nor 4096.
    PoolExhausted
        The machine or the cgroup cannot hold the pool (asked before any page is touched), or the driver refused.
    DriverError
        The driver refused for another reason.

    Notes
    -----
    The constructor blocks for the first chunk (GIL released). Memory is `MADV_DONTFORK`: a forked child has no pool.
    """

    def __cinit__(self, *args, **kwargs):
        self.closed = True
        if _c.kv_monitor_init(&self.monitor):
            raise MemoryError("pthread_mutex_init failed")
        self.monitor_ready = True

    def __init__(self, pool_bytes, payload_bytes, device="auto", *, header_bytes=0,
                 first_chunk_bytes=FIRST_CHUNK_BYTES, chunk_bytes=CHUNK_BYTES, bint huge_pages=True,
                 bint numa=True, bint driver_allocated=False):
        if self.slots.base is not NULL:
            raise RuntimeError("PinnedPool.__init__ may be called once")
        slots = Slots.of(pool_bytes, payload_bytes, header_bytes=header_bytes, first_chunk_bytes=first_chunk_bytes,
                         chunk_bytes=chunk_bytes, one_chunk=driver_allocated)
        cdef size_t nbytes = slots.pool_bytes
        self.slots.stride_bytes = slots.stride_bytes
        self.slots.header_bytes = slots.header_bytes
        self.slots.payload_bytes = slots.payload_bytes
        self.slots.num_slots = slots.num_slots
        self.slots.first_chunk_slots = slots.first_chunk_slots
        self.slots.chunk_slots = slots.chunk_slots
        self.driver_allocated = driver_allocated
        try:
            self.claim = claim_memory(nbytes)
            self.device = device if isinstance(device, Device) else Device.open(device)
            self.device.require_open()
            if driver_allocated:
                self.allocate_by_driver(nbytes)
            else:
                self.map_pages(nbytes, huge_pages, self.device.numa_node if numa else None)
            self.closed = False
            if self.num_ready < self.slots.num_slots:
                self.start_registering(nbytes)
        except BaseException:
            self.give_up()
            raise

    cdef int start_registering(self, size_t nbytes) except -1:
        self.num_touchers = min(MAX_TOUCHERS, usable_cpus())
        if _c.kv_touch_init(&self.touching, self.slots.base, self.num_ready * self.slots.stride_bytes, nbytes,
                            self.claim.left):
            raise MemoryError("no memory for touching the pool")
        self.registering = True
        if _c.pthread_create(&self.thread, NULL, register_main, <void *>self):
            self.registering = False
            raise MemoryError("no thread for registering the pool could be started")
        return 0

    cdef void give_up(self) noexcept:
        """Give back at once what the constructor took: the exception, and with it the pool, may be held for long."""
        if not self.closed:
            self.end(False)
        else:
            self.unmap()
            self.claim_nothing()

    cdef void claim_nothing(self) noexcept:
        if self.claim is not None:
            self.claim.end()

    cdef int allocate_by_driver(self, size_t nbytes) except -1:
        cdef int mode = 0, code
        cdef void *address = NULL
        cdef uint64_t start = _c.kv_now_ns()
        self.claim.left[0] = 0  # from here on the driver touches memory, and does not say how much
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = _c.kv_call(self.device.drv, _c.mem_host_alloc, &address, nbytes, _c.KV_HOST_ALLOC_PORTABLE)
                self.device.leave(mode)
        self.longest_call_ns = _c.kv_now_ns() - start
        self.raise_refused(code, nbytes)
        self.allocation = address
        self.slots.base = <char *>address
        self.num_ready = self.slots.num_slots
        return 0

    cdef int map_pages(self, size_t nbytes, bint huge_pages, object node) except -1:
        # Two MiB more, so that the pool starts on a huge page.
        cdef size_t mapped = nbytes + HUGE_PAGE_BYTES
        cdef int mode = 0, code
        cdef void *address = mmap(NULL, mapped, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if address == kv_map_failed():
            raise PoolExhausted(f"no address space for a pool of {bytes_text(nbytes)}; check ulimit -v or use a "
                                f"smaller pool")
        self.mapping = <char *>address
        self.mapping_bytes = mapped
        self.slots.base = <char *>((<uintptr_t>address + HUGE_PAGE_BYTES - 1) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
        # Both are advice: a kernel without huge pages or nodes works, too.
        madvise(self.slots.base, nbytes, MADV_HUGEPAGE if huge_pages else MADV_NOHUGEPAGE)
        if huge_pages and transparent_huge_pages() == "never":
            warn_once("huge_pages_off", "the kernel gives this process no transparent huge pages, so pinning takes "
                      "longer; write madvise into /sys/kernel/mm/transparent_hugepage/enabled")
        if node is not None:
            if kv_prefer_node(self.slots.base, nbytes, node) == 0:
                self.numa_node = node
            else:
                warn_once("numa_refused", "the kernel refused to place the pool on the device's NUMA node; containers "
                          "need CAP_SYS_NICE for it", device=self.device.name, node=node)
        if madvise(self.slots.base, nbytes, MADV_DONTFORK):
            raise PoolExhausted("the kernel refused MADV_DONTFORK, without which a fork would copy pinned pages")
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = OUT_OF_MEMORY
                if _c.kv_populate(self.slots.base, self.slots.first_chunk_slots * self.slots.stride_bytes,
                                  self.claim.left) == 0:
                    code = self.register_chunk(0)
                self.device.leave(mode)
        self.raise_refused(code, self.slots.first_chunk_slots * self.slots.stride_bytes)
        self.num_ready = self.slots.first_chunk_slots
        return 0

    cdef int raise_refused(self, int code, size_t nbytes) except -1:
        if code in (OUT_OF_MEMORY, _c.kv_answer(_c.KV_CUDA_OUT_OF_MEMORY, _c.mem_host_alloc)):
            call = _c.kv_result_call(code).decode()
            raise PoolExhausted(f"touching or pinning {bytes_text(nbytes)} ({call}) ran out of memory; "
                                f"candidates are RLIMIT_MEMLOCK (ulimit -l), the cgroup's memory limit and free memory")
        return check(self.device, code)

    # ---- registering ------------------------------------------------------------------------------------------------

    cdef int register_chunk(self, uint32_t chunk) noexcept nogil:
        """Register one chunk, touched before, on a thread whose context is current. A CUresult."""
        cdef char *address = self.slots.base + _c.kv_slots_chunk_first(&self.slots, chunk) * self.slots.stride_bytes
        cdef size_t nbytes = _c.kv_slots_chunk_count(&self.slots, chunk) * self.slots.stride_bytes
        cdef uint64_t start = _c.kv_now_ns(), elapsed_ns
        cdef int code = _c.kv_call(self.device.drv, _c.mem_host_register, address, nbytes,
                                   _c.KV_HOST_REGISTER_PORTABLE)
        elapsed_ns = _c.kv_now_ns() - start
        if elapsed_ns > self.longest_call_ns:
            self.longest_call_ns = elapsed_ns
        return code

    cdef void register_rest(self) noexcept nogil:
        cdef pthread_t touchers[MAX_TOUCHERS]
        cdef int started = 0
        cdef size_t touched
        while started < self.num_touchers and _c.pthread_create(&touchers[started], NULL, _c.kv_touch_main,
                                                                &self.touching) == 0:
            started += 1
        self.num_touchers = started  # without the others it is only slower
        self.register_chunks()
        _c.kv_touch_stop(&self.touching)
        while started:
            started -= 1
            _c.pthread_join(touchers[started], NULL)
        if self.failure:  # what was touched ahead is of no use
            touched = self.num_ready * self.slots.stride_bytes
            madvise(self.slots.base + touched, self.slots.num_slots * self.slots.stride_bytes - touched, MADV_DONTNEED)
        self.claim.left[0] = 0  # all is touched, or the rest never will be
        _c.kv_monitor_lock(&self.monitor)
        self.thread_is_over = True
        _c.kv_monitor_broadcast(&self.monitor)
        _c.kv_monitor_unlock(&self.monitor)

    cdef void register_chunks(self) noexcept nogil:
        cdef uint32_t chunk, first, count
        cdef int code = self.device.bind_thread()
        while True:
            _c.kv_monitor_lock(&self.monitor)
            if code:
                self.failure = code
            first = self.num_ready
            if self.failure or self.stopping or first == self.slots.num_slots:
                _c.kv_monitor_broadcast(&self.monitor)
                _c.kv_monitor_unlock(&self.monitor)
                return
            _c.kv_monitor_unlock(&self.monitor)
            chunk = _c.kv_slots_chunk(&self.slots, first)
            count = _c.kv_slots_chunk_count(&self.slots, chunk)
            if _c.kv_touch_until(&self.touching, (first + count) * self.slots.stride_bytes, not self.num_touchers):
                code = 0 if self.stopping else OUT_OF_MEMORY
                continue
            code = self.register_chunk(chunk)
            if code == 0:
                _c.kv_monitor_lock(&self.monitor)
                self.num_ready = first + count
                if self.hook is not NULL:
                    self.hook(self.hook_owner, first, count)
                _c.kv_monitor_broadcast(&self.monitor)
                _c.kv_monitor_unlock(&self.monitor)

    cdef void attach(self, slots_ready_hook hook, void *owner) noexcept nogil:
        """Call `hook` now for all slots that are ready, and for each later chunk when it is ready."""
        _c.kv_monitor_lock(&self.monitor)
        self.hook = hook
        self.hook_owner = owner
        self.is_attached = True
        hook(owner, 0, self.num_ready)
        _c.kv_monitor_unlock(&self.monitor)

    def wait_ready(self, timeout_ms=None):
        """Block (GIL released) until every slot is registered. Ctrl-C ends the wait, not the registering.

        Raises
        ------
        TimeoutError
            `timeout_ms` passed first.
        PoolExhausted, DriverError
            Registering failed. The slots that are ready by then stay usable.
        EngineClosed
            The pool was closed.
        """
        cdef int64_t limit = require_timeout(timeout_ms)
        cdef uint64_t deadline = _c.kv_deadline_ns(limit), now = 0, pause
        cdef bint ready = False, over = False
        self._require_open()
        while not over and now < deadline:
            with nogil:
                now = _c.kv_now_ns()
                pause = min(now + SIGNALS_NS, deadline)
                _c.kv_monitor_lock(&self.monitor)
                if self.num_ready < self.slots.num_slots and not self.failure and not self.stopping:
                    _c.kv_monitor_wait(&self.monitor, pause)
                ready = self.num_ready == self.slots.num_slots
                over = ready or self.failure != 0 or self.stopping
                _c.kv_monitor_unlock(&self.monitor)
            PyErr_CheckSignals()
        if ready:
            return
        if self.failure:
            self.raise_refused(self.failure, self.slots.chunk_slots * self.slots.stride_bytes)
        if self.stopping:
            raise EngineClosed("the pool was closed while it was being registered")
        raise TimeoutError(f"{self.num_ready} of {self.slots.num_slots} slots are registered after {timeout_ms} ms")

    # ---- use --------------------------------------------------------------------------------------------------------

    def _require_open(self):
        if self.device is None:
            raise EngineClosed("this pool was never made; use PinnedPool(pool_bytes, payload_bytes)")
        if self.device.pid != getpid():
            raise EngineClosed("this pool belongs to the parent process; start workers with the spawn method")
        if self.closed:
            raise EngineClosed("the pool is closed; create another one")

    def _require_slot(self, slot):
        slot = whole_number(slot, "slot")
        if not 0 <= slot < self.slots.num_slots:
            raise ValueError(f"slot must be 0 to {self.slots.num_slots - 1}, got {slot}")
        return slot

    def address(self, slot):
        """The host address of a slot's payload."""
        self._require_open()
        return <uintptr_t>_c.kv_slots_payload(&self.slots, self._require_slot(slot))

    def view(self, slot):
        """A writable memoryview of a slot's payload; it keeps the mapping alive, not the slot's content."""
        slot = self._require_registered(slot)
        start = slot * self.slots.stride_bytes + self.slots.header_bytes
        return memoryview(self)[start:start + self.slots.payload_bytes]

    def slot(self, slot):
        """The payload of a slot for numpy, torch, CuPy and the like, as `PoolSlot`; nothing is copied."""
        slot = self._require_registered(slot)
        cdef PoolSlot made = PoolSlot.__new__(PoolSlot)
        made.pool, made.slot, made.is_host = self, slot, self.device.is_host
        made.payload, made.payload_bytes = _c.kv_slots_payload(&self.slots, slot), self.slots.payload_bytes
        return made

    def _require_registered(self, slot):
        self._require_open()
        slot = self._require_slot(slot)
        if slot >= self.num_ready:
            raise ValueError(f"slot {slot} is not registered yet ({self.num_ready} are); call wait_ready()")
        return slot

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self._require_open()
        PyBuffer_FillInfo(buffer, self, self.slots.base, <Py_ssize_t>self.nbytes, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.take_back()

    cdef void all_is_back(self) noexcept:
        if self.is_unregistered:
            self.unmap()

    def __repr__(self):
        if self.device is None:
            return "PinnedPool(never made)"
        state = "closed" if self.closed else f"{self.num_ready} ready"
        return f"PinnedPool({self.slots.num_slots} slots of {self.slots.stride_bytes} bytes, {state})"

    @property
    def num_slots(self):
        """Slots of the pool's address range, as asked for; slot numbers are below it. It never changes."""
        return self.slots.num_slots

    @property
    def slots_usable(self):
        """How many slots may be used when registering is over: `num_slots`, or `slots_ready` if registering failed."""
        return self.num_ready if self.failure else self.slots.num_slots

    @property
    def slots_ready(self):
        """How many slots are registered: slots 0 to slots_ready - 1 may be used."""
        return self.num_ready

    @property
    def nbytes(self):
        """Bytes of the pool's address range: `num_slots` slots."""
        return <size_t>self.slots.num_slots * self.slots.stride_bytes

    @property
    def bytes_usable(self):
        """Bytes of `slots_usable` slots."""
        return <size_t>self.slots_usable * self.slots.stride_bytes

    @property
    def bytes_ready(self):
        """Bytes registered so far."""
        return <size_t>self.num_ready * self.slots.stride_bytes

    @property
    def longest_call_ms(self):
        """The longest call of the driver so far, for which others of this process may have waited."""
        return self.longest_call_ns / 1e6

    @property
    def stride_bytes(self):
        """Distance from one slot to the next."""
        return self.slots.stride_bytes

    @property
    def payload_bytes(self):
        """Bytes of one block."""
        return self.slots.payload_bytes

    @property
    def header_bytes(self):
        """Room before the payload in each slot."""
        return self.slots.header_bytes

    # ---- end --------------------------------------------------------------------------------------------------------

    cdef int join(self, bint interruptible) except -1:
        """End the background thread, which goes on until the chunk at hand is registered."""
        _c.kv_monitor_lock(&self.monitor)
        self.stopping = True
        _c.kv_monitor_broadcast(&self.monitor)
        _c.kv_monitor_unlock(&self.monitor)
        if self.registering:
            _c.kv_touch_stop(&self.touching)
        while self.registering and not self.thread_is_over:
            with nogil:
                _c.kv_monitor_lock(&self.monitor)
                if not self.thread_is_over:
                    _c.kv_monitor_wait(&self.monitor, _c.kv_now_ns() + SIGNALS_NS)
                _c.kv_monitor_unlock(&self.monitor)
            if interruptible:
                PyErr_CheckSignals()
        if self.registering:
            self.registering = False  # before the GIL is released, so that nobody joins it twice
            with nogil:
                _c.pthread_join(self.thread, NULL)
        _c.kv_touch_destroy(&self.touching)
        return 0

    def close(self):
        """Stop registering, unregister and unmap. Idempotent; blocks for the chunk being registered (GIL released).

        If Ctrl-C ends that wait, the pool cannot be used any more, and another call, or the end of the object, does the
        rest. No copy may be in flight: an engine shuts its queues down first. Memory that views still hold is
        unregistered now and unmapped when the last of them is released.

        Raises
        ------
        BufferError
            An engine moves blocks through this pool.
        """
        if self.is_attached and not self.closed:
            raise BufferError("an engine moves blocks through this pool; call the engine's shutdown() instead")
        self.end(True)

    cdef int end(self, bint interruptible) except -1:
        cdef uint32_t first
        cdef int code
        if self.device is None or self.device.pid != getpid():
            return 0
        self.closed = True
        self.join(interruptible)
        self.claim_nothing()
        while self.num_unregistered < self.num_ready and not self.driver_allocated and not self.is_lost:
            first = self.num_unregistered  # a chunk is taken under the GIL, so that nobody unregisters it twice
            self.num_unregistered += _c.kv_slots_chunk_count(&self.slots, _c.kv_slots_chunk(&self.slots, first))
            self.exports += 1  # for this loop: the end of a view must not unmap it meanwhile
            with nogil:
                code = self.device.give_back(self.device.drv.mem_host_unregister,
                                             self.slots.base + first * self.slots.stride_bytes)
            self.exports -= 1
            if code:  # a dead context: the driver still knows these pages
                self.is_lost = True
            if interruptible:
                PyErr_CheckSignals()
        if self.is_lost:
            self.mapping = self.allocation = NULL
        self.is_unregistered = True
        if self.exports == 0:
            self.unmap()
        return 0

    cdef void abandon(self) noexcept:
        """Close without giving memory back: after a sticky error a copy may still be running into it."""
        self.closed = self.is_lost = True
        self.mapping = self.allocation = NULL
        self.join(False)
        self.claim_nothing()

    cdef void unmap(self) noexcept:
        cdef char *mapping = self.mapping
        cdef void *allocation = self.allocation
        self.mapping = self.allocation = NULL  # taken under the GIL, so that nobody gives them back twice
        with nogil:
            if mapping is not NULL:
                munmap(mapping, self.mapping_bytes)
            if allocation is not NULL:
                self.device.give_back(self.device.drv.mem_free_host, allocation)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __dealloc__(self):
        if self.device is not None and self.device.pid != getpid():
            return  # a forked child has neither the mapping nor the thread
        self.end(False)
        if self.monitor_ready:
            _c.kv_monitor_destroy(&self.monitor)


cdef void *register_main(void *pool) noexcept nogil:
    (<PinnedPool>pool).register_rest()
    return NULL
