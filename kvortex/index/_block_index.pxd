"""BlockIndex: key -> slot, states, pins and recency. The map; the code is in _block_index.pyx, the table in table.h."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvortex._c cimport kv_entry, kv_lru, kv_table, pthread_mutex_t


ctypedef struct IndexCounters:
    # Since the index was made:
    uint64_t reserved                 # slots handed out by reserve
    uint64_t full                     # keys that reserve answered FULL
    uint64_t evictions                # blocks dropped by reserve and evict, coldest first
    uint64_t dirty_evictions          # of these, those that no lower tier had
    uint64_t hits                     # keys that acquire pinned
    uint64_t misses                   # keys of an acquire that its leading run did not reach
    uint64_t length_mismatches        # acquires whose run a length ended, reserves that replaced one
    uint64_t discards                 # blocks forgotten by discard and clear
    # Now; num_free + num_writing + num_ready == slots_added:
    uint32_t slots_added
    uint32_t num_free
    uint32_t num_writing              # with those discarded meanwhile
    uint32_t num_ready                # with those discarded while pinned
    uint32_t num_pinned               # of num_ready
    uint32_t num_clean                # of num_ready: a lower tier has them


ctypedef struct BlockArrays:          # of the caller: room for as many blocks as may come
    uint32_t *slots
    uint8_t *keys                     # 32 bytes each
    uint32_t *lengths
    uint8_t *facts
    size_t count                      # how many are there


cdef class BlockIndex:
    cdef kv_entry *entries            # num_slots, three sentinels, the table's memory: one allocation, ours
    cdef kv_table table
    cdef pthread_mutex_t mutex        # held for memory loops only; lookup_keys never takes it
    cdef uint32_t free_list           # sentinel; first = next to be handed out
    cdef kv_lru lru                   # which block goes next
    cdef IndexCounters count          # under the mutex
    cdef readonly uint32_t num_slots  # capacity; slots 0 .. num_slots - 1
    cdef readonly size_t memory_bytes

    # The nogil batch verbs. `keys` is n * 32 bytes; `lengths` is read at i * length_step (0: one length for all).
    # slots[i] is NO_SLOT where no slot was given, and is passed over where slots are handed back. None of them touches
    # a device or Python; each takes the index's mutex once for the batch (lookup_keys takes none). A slot handed back
    # in the wrong state aborts the process: going on would serve wrong bytes.
    # -> how many are NEW. `chained`: the keys continue `after`, num_after * 32 bytes that may be none. `stops` (may be
    # NULL) has the slot at which eviction for each key ends. The first `num_admitted` of them are a tier's to have;
    # with `ram_only` none ever is. What was evicted is written to `victims` (may be NULL), n blocks at the most.
    cdef size_t reserve_keys(self, const uint8_t *keys, const uint32_t *lengths, size_t length_step, size_t n,
                             uint32_t *slots, uint8_t *statuses, bint chained=*, const uint8_t *after=*,
                             size_t num_after=*, const uint32_t *stops=*, size_t num_admitted=*,
                             BlockArrays *victims=*, bint ram_only=*) noexcept nogil
    # -> how many became READY; statuses (may be NULL) tells which, the DISCARDED ones are free already, pin or not;
    # nbytes (may be NULL) how long they are together.
    cdef size_t commit_slots(self, const uint32_t *slots, size_t n, bint pin, uint8_t *statuses=*,
                             uint64_t *nbytes=*) noexcept nogil
    cdef void abort_slots(self, const uint32_t *slots, size_t n) noexcept nogil
    # lengths NULL: any length will do. -> how many are pinned: the leading run, or with gaps all that are there.
    cdef size_t acquire_keys(self, const uint8_t *keys, const uint32_t *lengths, size_t length_step, size_t n,
                             uint32_t *slots, bint gaps=*) noexcept nogil
    cdef void release_slots(self, const uint32_t *slots, size_t n) noexcept nogil
    # The cleaner's: the coldest n that it has not passed, pinned; -> how many.
    cdef size_t take_coldest(self, size_t n, BlockArrays *blocks) noexcept nogil
    cdef void take_border_back(self) noexcept nogil                             # nothing counts as passed any more
    cdef size_t lookup_keys(self, const uint8_t *keys, size_t n, uint8_t *mask) noexcept nogil  # -> leading run
    # Tail-first; -> how many are READY; mask (may be NULL) tells which.
    cdef size_t touch_keys(self, const uint8_t *keys, size_t n, uint8_t *mask=*) noexcept nogil
    # slots[i] is NO_SLOT where the key is not there, READY or being written.
    cdef void find_keys(self, const uint8_t *keys, size_t n, uint32_t *slots) noexcept nogil
    cdef void read_lengths(self, const uint32_t *slots, size_t n, uint32_t *lengths) noexcept nogil
    cdef size_t discard_keys(self, const uint8_t *keys, size_t n) noexcept nogil   # -> how many were there
    cdef size_t evict_slots(self, size_t n) noexcept nogil                                # coldest n; -> how many went
    cdef void clear_all(self) noexcept nogil
    cdef void add_slot_range(self, uint32_t first, uint32_t count) noexcept nogil
    cdef void read_counters(self, IndexCounters *target) noexcept nogil

    # With the mutex held.
    cdef void hash_chunk(self, const uint8_t *keys, size_t n, size_t i, uint64_t *hashes) noexcept nogil
    cdef uint64_t hash_of(self, uint32_t slot) noexcept nogil
    cdef uint32_t find(self, const uint8_t *key, uint64_t hash) noexcept nogil
    cdef uint32_t take_slot(self, uint32_t kept, uint32_t kept_too, BlockArrays *victims) noexcept nogil
    cdef void note_block(self, BlockArrays *blocks, uint32_t slot) noexcept nogil
    cdef size_t touch_locked(self, const uint8_t *keys, size_t n, uint8_t *mask, uint32_t *coldest) noexcept nogil
    cdef void free_slot(self, uint32_t slot) noexcept nogil
    cdef void set_clean(self, kv_entry *entry, bint is_clean) noexcept nogil
    cdef uint32_t look_ahead(self, uint32_t scout) noexcept nogil
    cdef void forget(self, uint32_t slot, uint64_t hash) noexcept nogil
    cdef void drop(self, uint32_t slot) noexcept nogil
    cdef size_t commit_locked(self, const uint32_t *slots, size_t n, const uint32_t *pins, size_t pin_step,
                              uint8_t *statuses, bint clean, uint64_t *nbytes=*, bint ram_only=*) noexcept nogil
    cdef void abort_locked(self, const uint32_t *slots, size_t n) noexcept nogil
    cdef void release_locked(self, const uint32_t *slots, size_t n) noexcept nogil
    cdef void release_offered_locked(self, const uint32_t *slots, const uint8_t *passed, const uint8_t *clean,
                                     const uint8_t *ram_only, size_t n) noexcept nogil
    cdef void add_locked(self, uint32_t first, uint32_t count) noexcept nogil
    cdef size_t first_not_in_state(self, const uint32_t *slots, size_t n, uint32_t state) noexcept nogil
    cdef size_t first_not_pinned(self, const uint32_t *slots, size_t n) noexcept nogil
