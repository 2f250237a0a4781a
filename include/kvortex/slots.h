/* slots.h: slot number -> host address, and which registration a slot lies in.
 *
 * Invariants
 *   - Slot i starts at base + i * stride_bytes; its payload at header_bytes into it. Strides are multiples of 4 KiB.
 *   - Registration (chunk) boundaries are slot boundaries: no slot straddles two, so no copy of one slot does. A copy
 *     that merges two slots must ask kv_slots_same_chunk first: the driver refuses one across two registrations.
 *
 * Costs: arithmetic only.
 */
#ifndef KVORTEX_SLOTS_H
#define KVORTEX_SLOTS_H

#include <stddef.h>
#include <stdint.h>

typedef struct kv_slots {
    char *base;
    size_t stride_bytes, header_bytes, payload_bytes;
    uint32_t num_slots;
    uint32_t first_chunk_slots; /* the first registration is small, so that it serves at once */
    uint32_t chunk_slots;       /* every later one */
} kv_slots;

static inline char *kv_slots_payload(const kv_slots *slots, uint32_t slot)
{
    return slots->base + (size_t)slot * slots->stride_bytes + slots->header_bytes;
}

static inline uint32_t kv_slots_chunk(const kv_slots *slots, uint32_t slot)
{
    return slot < slots->first_chunk_slots ? 0 : 1 + (slot - slots->first_chunk_slots) / slots->chunk_slots;
}

static inline uint32_t kv_slots_chunk_first(const kv_slots *slots, uint32_t chunk)
{
    return chunk ? slots->first_chunk_slots + (chunk - 1) * slots->chunk_slots : 0;
}

static inline uint32_t kv_slots_chunk_count(const kv_slots *slots, uint32_t chunk)
{
    uint32_t first = kv_slots_chunk_first(slots, chunk), left = slots->num_slots - first;
    uint32_t full = chunk ? slots->chunk_slots : slots->first_chunk_slots;
    return left < full ? left : full;
}

static inline int kv_slots_same_chunk(const kv_slots *slots, uint32_t first, uint32_t second)
{
    return kv_slots_chunk(slots, first) == kv_slots_chunk(slots, second);
}

#endif
