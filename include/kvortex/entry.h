/* entry.h: what the index knows about one slot, in one cache line. Entry i describes slot i, for good.
 *
 * Life of a slot:  ABSENT -> FREE -> WRITING -> READY -> FREE ...  (READY -> WRITING where one is evicted for the next)
 *
 * Invariants
 *   - Every field is written under the index's lock. `key` and `version` are atomic because lookups read them
 *     without it; the other fields are read under the lock too.
 *   - `version` holds state, discarded flag and generation in one word, so that one load tells all three. The
 *     generation grows with each new tenant: two equal loads of a READY version enclose reads of one tenant only.
 *   - The key changes only after the version has left READY, and the version becomes READY only after the key is
 *     whole. Release stores and acquire loads of both keep that order visible on every machine.
 *   - A discarded entry is in no table bucket and never answers again; its last holder frees it.
 *
 * Costs: 64 bytes a slot.
 */
#ifndef KVORTEX_ENTRY_H
#define KVORTEX_ENTRY_H

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "status.h"

enum { KV_KEY_BYTES = 32, KV_KEY_WORDS = KV_KEY_BYTES / 8 };

enum { /* states; 0 is what zeroed memory says */
    KV_ABSENT = 0,  /* not added yet: no memory behind it */
    KV_FREE = 1,    /* on the free list */
    KV_WRITING = 2, /* reserved by one writer; invisible */
    KV_READY = 3,   /* visible; on the LRU list unless pinned */
    KV_STATE_MASK = 3,
    KV_DISCARDED = 4, /* flag beside WRITING or READY: forgotten, held until commit, abort or the last release */
    KV_GENERATION_ONE = 8
};

enum { /* facts of a tenant, for who keeps copies of it elsewhere */
    KV_ADMITTED = 1, /* a lower tier is to have it */
    KV_CLEAN = 2,    /* a lower tier has it */
    KV_OFFERED = 4,  /* the cleaner took it, and nobody has used it since; lru.h */
    KV_RAM_ONLY = 8  /* no lower tier is given it: it was coded with loss before, or would not fit there */
};

typedef struct kv_key {
    uint64_t words[KV_KEY_WORDS];
} kv_key;

typedef struct kv_entry {
    _Alignas(64) _Atomic uint64_t key[KV_KEY_WORDS];
    _Atomic uint32_t version; /* generation * KV_GENERATION_ONE | discarded flag | state */
    uint32_t prev, next;      /* links of the list it is on: free or LRU; neither while WRITING or pinned */
    uint32_t length;          /* bytes this tenant wrote, fixed at reserve */
    uint32_t pins;
    uint32_t mark;            /* 1 while a batch is being validated and this slot was already met in it, else 0 */
    uint32_t facts;           /* KV_ADMITTED, ... */
} kv_entry;

_Static_assert(sizeof(kv_entry) == 64, "one entry, one cache line");

/* For functions that do nothing but prefetch: GCC 12 takes them for functions without effect and drops the calls,
 * unless they are inlined before it looks. */
#define KV_PREFETCH_INLINE static inline __attribute__((always_inline))

KV_PREFETCH_INLINE void kv_entry_prefetch(const kv_entry *entries, uint32_t entry)
{
    __builtin_prefetch(&entries[entry], 1);
}

/* Callers' keys need no alignment. */
static inline kv_key kv_key_load(const uint8_t *bytes)
{
    kv_key key;
    memcpy(&key, bytes, sizeof key);
    return key;
}

/* Under the lock. */
static inline kv_key kv_entry_key(const kv_entry *entry)
{
    kv_key key;
    for (int i = 0; i < KV_KEY_WORDS; i++)
        key.words[i] = atomic_load_explicit(&entry->key[i], memory_order_relaxed);
    return key;
}

static inline uint32_t kv_entry_version(const kv_entry *entry)
{
    return atomic_load_explicit(&entry->version, memory_order_relaxed);
}

static inline uint32_t kv_entry_state(const kv_entry *entry)
{
    return kv_entry_version(entry) & KV_STATE_MASK;
}

static inline int kv_entry_is_discarded(const kv_entry *entry)
{
    return (kv_entry_version(entry) & KV_DISCARDED) != 0;
}

static inline uint32_t kv_entry_generation(const kv_entry *entry)
{
    return kv_entry_version(entry) / KV_GENERATION_ONE;
}

/* FREE, ABSENT or READY: same tenant, new state, not discarded. Under the lock. */
static inline void kv_entry_set_state(kv_entry *entry, uint32_t state)
{
    const uint32_t keep = ~(uint32_t)(KV_STATE_MASK | KV_DISCARDED);
    atomic_store_explicit(&entry->version, (kv_entry_version(entry) & keep) | state, memory_order_release);
}

static inline void kv_entry_set_discarded(kv_entry *entry)
{
    atomic_store_explicit(&entry->version, kv_entry_version(entry) | KV_DISCARDED, memory_order_release);
}

/* FREE or READY (then in no bucket any more) -> WRITING for a new tenant. Under the lock. */
static inline void kv_entry_begin(kv_entry *entry, kv_key key, uint32_t length, uint32_t facts)
{
    const uint32_t keep = ~(uint32_t)(KV_STATE_MASK | KV_DISCARDED);
    const uint32_t next = (kv_entry_version(entry) & keep) + KV_GENERATION_ONE;
    /* Relaxed will do here: the release stores of the key, after it, are what publishes it. */
    atomic_store_explicit(&entry->version, next | KV_WRITING, memory_order_relaxed);
    for (int i = 0; i < KV_KEY_WORDS; i++)
        atomic_store_explicit(&entry->key[i], key.words[i], memory_order_release);
    entry->length = length;
    entry->pins = 0;
    entry->facts = facts;
}

/* True under the lock if the entry's tenant is `key`, whatever its state. */
static inline int kv_entry_has_key(const kv_entry *entry, const kv_key *key)
{
    uint64_t difference = 0;
    for (int i = 0; i < KV_KEY_WORDS; i++)
        difference |= atomic_load_explicit(&entry->key[i], memory_order_relaxed) ^ key->words[i];
    return difference == 0;
}

/* True if at one moment during the call the entry was READY, not discarded, with this key. Needs no lock.
 *
 * A key word of a later tenant can only be seen together with that tenant's version (its release store came after
 * the version's, and the load here acquires), so an unchanged version proves the four words belong together. */
static inline int kv_entry_is_ready_with_key(const kv_entry *entry, const kv_key *key)
{
    const uint32_t before = atomic_load_explicit(&entry->version, memory_order_acquire);
    if ((before & (KV_STATE_MASK | KV_DISCARDED)) != KV_READY)
        return 0;
    uint64_t difference = 0;
    for (int i = 0; i < KV_KEY_WORDS; i++)
        difference |= atomic_load_explicit(&entry->key[i], memory_order_acquire) ^ key->words[i];
    return difference == 0 && atomic_load_explicit(&entry->version, memory_order_relaxed) == before;
}

#endif
