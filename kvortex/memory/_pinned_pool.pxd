"""PinnedPool: pinned host memory cut into slots. The map; the code is in _pinned_pool.pyx."""

from libc.stdint cimport uint32_t, uint64_t

from kvortex._c cimport kv_monitor, kv_slots, kv_touch, pthread_t
from kvortex.driver._device cimport Device
from kvortex.driver._memory cimport Lender
from kvortex.memory._claim cimport Claim

# Told of slots that have become usable. Needs no GIL; runs under the pool's monitor, on the thread that attaches or
# registers.
ctypedef void (*slots_ready_hook)(void *owner, uint32_t first, uint32_t count) noexcept nogil


cdef class PinnedPool(Lender):
    cdef readonly Device device     # kept open for as long as memory is registered with it
    cdef kv_slots slots             # addresses; fixed from creation
    cdef char *mapping              # what munmap gets back: slots.base is aligned inside it
    cdef size_t mapping_bytes
    cdef Claim claim                # on what is not touched yet
    cdef bint driver_allocated      # cuMemHostAlloc instead of mmap + register
    cdef void *allocation           # what it answered, until it is given back
    cdef kv_monitor monitor         # guards num_ready, failure, stopping and the hook
    cdef bint monitor_ready
    cdef uint32_t num_ready         # slots [0, num_ready) are registered
    cdef int failure                # CUresult that ended the registering, or 0
    cdef bint stopping
    cdef bint registering           # the background thread was started and must be joined
    cdef bint thread_is_over        # it is about to return
    cdef bint closed                # changed under the GIL, as are the next three and the exports
    cdef uint32_t num_unregistered  # slots [0, num_unregistered) are registered no more
    cdef bint is_lost               # the driver still knows some pages, or copies may run into them: never unmapped
    cdef bint is_unregistered       # so the last export, which the mapping outlives, unmaps
    cdef pthread_t thread
    cdef kv_touch touching          # the pages behind the first chunk; live while registering
    cdef int num_touchers
    cdef uint64_t longest_call_ns
    cdef readonly object numa_node  # the node whose memory is preferred, or None
    cdef slots_ready_hook hook
    cdef void *hook_owner           # borrowed: the engine keeps the owner until end() has joined the thread
    cdef bint is_attached           # to an engine, which ends it
    cdef object __weakref__

    cdef int start_registering(self, size_t nbytes) except -1
    cdef void give_up(self) noexcept
    cdef void claim_nothing(self) noexcept
    cdef int allocate_by_driver(self, size_t nbytes) except -1
    cdef int map_pages(self, size_t nbytes, bint huge_pages, object node) except -1
    cdef int raise_refused(self, int code, size_t nbytes) except -1
    cdef void attach(self, slots_ready_hook hook, void *owner) noexcept nogil
    cdef int register_chunk(self, uint32_t chunk) noexcept nogil
    cdef void register_rest(self) noexcept nogil
    cdef void register_chunks(self) noexcept nogil
    cdef int join(self, bint interruptible) except -1
    # Only where interruptible do signal handlers run, and may raise; another call then does the rest.
    cdef int end(self, bint interruptible) except -1
    cdef void abandon(self) noexcept
    cdef void unmap(self) noexcept
