/* lru.h: in which order blocks go when room is needed.
 *
 * Two lists of the index's entries: `recent`, which a cleaner has not passed yet, and `offered`, which it has. The border
 * lies between them: every offered block is colder than every other. Victims come from the cold end of `offered`, and
 * from that of `recent` when nothing is offered.
 *
 * Invariants
 *   - A READY block without pins is on one of the two lists; any other entry is on neither.
 *   - Whoever uses a block puts it first on `recent`. The cleaner takes the last of `recent`, and puts it first on
 *     `offered` when it has passed. So both lists together are in the order of use, with a cleaner or without.
 *   - The caller holds the lock of the index that owns the entries.
 *
 * Costs: O(1) each; without a cleaner, one look at an empty list for each victim.
 */
#ifndef KVORTEX_LRU_H
#define KVORTEX_LRU_H

#include "list.h"

typedef struct kv_lru {
    kv_entry *entries;
    uint32_t recent, offered; /* sentinels */
} kv_lru;

static inline void kv_lru_init(kv_lru *lru, kv_entry *entries, uint32_t recent, uint32_t offered)
{
    *lru = (kv_lru){entries, recent, offered};
    kv_list_init(entries, recent);
    kv_list_init(entries, offered);
}

/* The list that the next victim is the last of. */
static inline uint32_t kv_lru_cold_list(const kv_lru *lru)
{
    return kv_list_is_empty(lru->entries, lru->offered) ? lru->recent : lru->offered;
}

/* The block that goes next; the sentinel `recent` if there is none. */
static inline uint32_t kv_lru_coldest(const kv_lru *lru)
{
    return kv_list_last(lru->entries, kv_lru_cold_list(lru));
}

/* The coldest that the cleaner has not passed; the sentinel `recent` if there is none. */
static inline uint32_t kv_lru_coldest_recent(const kv_lru *lru)
{
    return kv_list_last(lru->entries, lru->recent);
}

static inline int kv_lru_is_empty(const kv_lru *lru)
{
    return kv_lru_coldest(lru) == lru->recent;
}

static inline void kv_lru_unlink(kv_lru *lru, uint32_t slot)
{
    kv_list_unlink(lru->entries, slot);
}

/* A slot that is on neither list becomes most recently used. */
static inline void kv_lru_push(kv_lru *lru, uint32_t slot)
{
    kv_list_push_first(lru->entries, lru->recent, slot);
}

/* A slot on one of the lists becomes most recently used. */
static inline void kv_lru_use(kv_lru *lru, uint32_t slot)
{
    kv_list_move_first(lru->entries, lru->recent, slot);
}

/* A slot on one of the lists becomes the next colder one of `hotter`, which may be the sentinel `recent`. */
static inline void kv_lru_use_behind(kv_lru *lru, uint32_t hotter, uint32_t slot)
{
    if (kv_list_before(lru->entries, slot) == hotter) /* as when a prefix is saved again */
        return;
    kv_list_unlink(lru->entries, slot);
    kv_list_link_after(lru->entries, hotter, slot);
}

/* At the border: hotter than every offered block, colder than every other. */
static inline void kv_lru_push_offered(kv_lru *lru, uint32_t slot)
{
    kv_list_push_first(lru->entries, lru->offered, slot);
}

/* The next that the cleaner takes again. */
static inline void kv_lru_push_coldest_recent(kv_lru *lru, uint32_t slot)
{
    kv_list_push_last(lru->entries, lru->recent, slot);
}

/* A slot that is on neither list goes next of all. */
static inline void kv_lru_push_coldest(kv_lru *lru, uint32_t slot)
{
    kv_list_push_last(lru->entries, kv_lru_cold_list(lru), slot);
}

/* The border goes to the cold end: nothing is offered, all blocks keep their order. */
static inline void kv_lru_offer_again(kv_lru *lru)
{
    kv_list_append(lru->entries, lru->recent, lru->offered);
}

#endif
