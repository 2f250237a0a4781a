/* list.h: circular doubly linked lists threaded through the entries by 32-bit entry numbers.
 *
 * Invariants
 *   - A list is named by its sentinel, an entry of its own that no slot has. Thanks to it no operation branches on
 *     the ends, and an empty list is a sentinel linked to itself.
 *   - An entry is on at most one list; an unlinked entry's links are garbage.
 *   - The caller holds the lock of the index that owns the entries.
 *
 * Costs: O(1) each, two neighbours' cache lines.
 */
#ifndef KVORTEX_LIST_H
#define KVORTEX_LIST_H

#include "entry.h"

static inline void kv_list_init(kv_entry *entries, uint32_t sentinel)
{
    entries[sentinel].prev = entries[sentinel].next = sentinel;
}

static inline int kv_list_is_empty(const kv_entry *entries, uint32_t sentinel)
{
    return entries[sentinel].next == sentinel;
}

static inline uint32_t kv_list_first(const kv_entry *entries, uint32_t sentinel)
{
    return entries[sentinel].next;
}

static inline uint32_t kv_list_last(const kv_entry *entries, uint32_t sentinel)
{
    return entries[sentinel].prev;
}

/* One nearer to the first; before the sentinel comes the last. */
static inline uint32_t kv_list_before(const kv_entry *entries, uint32_t entry)
{
    return entries[entry].prev;
}

/* Asks memory for what unlinking the entry writes. */
KV_PREFETCH_INLINE void kv_list_prefetch_neighbours(const kv_entry *entries, uint32_t entry)
{
    kv_entry_prefetch(entries, entries[entry].prev);
    kv_entry_prefetch(entries, entries[entry].next);
}

static inline void kv_list_unlink(kv_entry *entries, uint32_t entry)
{
    const uint32_t prev = entries[entry].prev, next = entries[entry].next;
    entries[prev].next = next;
    entries[next].prev = prev;
}

static inline void kv_list_link_after(kv_entry *entries, uint32_t prev, uint32_t entry)
{
    const uint32_t next = entries[prev].next;
    entries[entry].prev = prev;
    entries[entry].next = next;
    entries[prev].next = entry;
    entries[next].prev = entry;
}

static inline void kv_list_push_first(kv_entry *entries, uint32_t sentinel, uint32_t entry)
{
    kv_list_link_after(entries, sentinel, entry);
}

static inline void kv_list_push_last(kv_entry *entries, uint32_t sentinel, uint32_t entry)
{
    kv_list_link_after(entries, entries[sentinel].prev, entry);
}

static inline void kv_list_move_first(kv_entry *entries, uint32_t sentinel, uint32_t entry)
{
    kv_list_unlink(entries, entry);
    kv_list_link_after(entries, sentinel, entry);
}

/* The entries of `other` go behind the last one of the list, in their order; `other` is empty then. */
static inline void kv_list_append(kv_entry *entries, uint32_t sentinel, uint32_t other)
{
    if (kv_list_is_empty(entries, other))
        return;
    const uint32_t last = entries[sentinel].prev, first = entries[other].next, end = entries[other].prev;
    entries[last].next = first;
    entries[first].prev = last;
    entries[end].next = sentinel;
    entries[sentinel].prev = end;
    kv_list_init(entries, other);
}

#endif
