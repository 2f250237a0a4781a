/* host_memory.h: which address ranges the host driver knows (allocations and registrations).
 *
 * Invariants: ranges never overlap; the array is sorted by start. A lookup is a binary search under a read lock, which
 * a batch takes once; with the hint, neighbours of one range cost two comparisons.
 */
#ifndef KVORTEX_HOST_MEMORY_H
#define KVORTEX_HOST_MEMORY_H

#include "kvortex/driver.h"

typedef enum kv_range_kind {
    KV_RANGE_DEVICE,
    KV_RANGE_HOST,
    KV_RANGE_REGISTERED,
    KV_RANGE_POOLED, /* handed out by a memory pool */
    KV_RANGE_MAPPED, /* memory mapped into reserved address space, with access */
    KV_RANGE_CLOSED, /* nobody's to touch: freed to a pool, or address space without access */
    KV_RANGE_NUM_KINDS
} kv_range_kind;

typedef struct kv_range {
    uintptr_t start;
    size_t bytes;
    kv_range_kind kind;
    int ordinal;     /* device whose context owns it */
    uintptr_t space; /* where the reserved address space begins that it is part of; 0: none */
} kv_range;

typedef enum kv_range_answer {
    KV_RANGE_OUTSIDE,
    KV_RANGE_INSIDE, /* of one range, or of neighbouring mappings in one reserved address space */
    KV_RANGE_STRADDLES,
    KV_RANGE_IS_CLOSED
} kv_range_answer;

/* ALREADY_REGISTERED over a host range, INVALID_VALUE over a device allocation, OUT_OF_MEMORY. */
kv_result kv_ranges_add(kv_range range);
/* Takes the range that starts there and is of that kind; 0 if there is none. */
int kv_ranges_remove(uintptr_t start, kv_range_kind kind, kv_range *range);
/* Takes any range of that device; 0 when none is left. */
int kv_ranges_remove_any(int ordinal, kv_range *range);
/* Makes part of a range of one kind a range of another, splitting it; what is closed joins its closed neighbours of the
 * same address space. INVALID_VALUE if the part does not lie in one range of kind `from`; OUT_OF_MEMORY. */
kv_result kv_ranges_recast(uintptr_t start, size_t bytes, kv_range_kind from, kv_range_kind to);
size_t kv_ranges_count(kv_range_kind kind);

void kv_ranges_lock(void); /* for reading */
void kv_ranges_unlock(void);
/* Call it locked. *hint starts at 0 and is kept between the lookups of one locked section. */
kv_range_answer kv_ranges_find(uintptr_t start, size_t bytes, size_t *hint, kv_range *range);

#endif
