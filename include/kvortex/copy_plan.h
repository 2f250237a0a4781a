/* copy_plan.h: from (blocks, slots) to a list of copies the driver can run.
 *
 * A layout is a list of runs (base, block_stride, piece_bytes): the piece of block b in run r lies at
 * base_r + b * block_stride_r on the device, and the pieces of one block lie one after the other in its slot. Runs whose
 * pieces are evenly spaced on both sides form a group; one strided copy moves a whole group of a block.
 *
 * Invariants
 *   - Every byte of every block is named by exactly one copy; copies of one plan have no order among themselves.
 *   - A copy stays inside one run (or one group, when strided is legal for the layout) and one registration of the pool.
 *     Pieces are merged only along one run, block after block: two runs that touch may be two allocations, and the
 *     driver refuses a copy across those.
 *   - The plan is a cursor over the caller's arrays: it allocates nothing and may be consumed in windows.
 *
 * Costs: 3-5 ns a copy.
 */
#ifndef KVORTEX_COPY_PLAN_H
#define KVORTEX_COPY_PLAN_H

#include "kvortex/slots.h"

enum {
    KV_STRIDED_MIN_ROWS = 4, /* strided operations pay only with many rows each */
    KV_BATCH_COPIES = 256    /* copies in one batch call: thousands in one are slower, and so are a few dozen */
};
#define KV_STRIDED_MAX_PITCH ((size_t)0x7fffffff) /* CU_DEVICE_ATTRIBUTE_MAX_PITCH: beyond it refused, or a third as fast */

typedef struct kv_group {
    uint64_t base;         /* device address of row 0 of block 0 */
    uint64_t block_stride; /* from block b to block b + 1, on the device */
    size_t slot_offset;    /* of row 0 in the payload of a slot */
    size_t row_bytes;
    size_t device_pitch, slot_pitch; /* from row to row */
    uint32_t rows;
    uint32_t strided; /* directions in which a strided copy pays, a bit each; counts only where the layout allows any */
} kv_group;

typedef struct kv_copy { /* rows = 1 is a plain copy */
    uint64_t device;
    char *host;
    size_t row_bytes, device_pitch, host_pitch;
    uint32_t rows;
} kv_copy;

typedef struct kv_plan {
    /* What to move: either groups and block ids, or (groups NULL) raw addresses with a size each. */
    const kv_group *groups;
    uint32_t num_groups;
    uint32_t strided; /* bit of the direction: one copy for each group that has it, otherwise one a row. 0: none */
    const int64_t *block_ids;
    const uint64_t *addresses;
    const uint32_t *sizes;
    const kv_slots *slots;
    const uint32_t *slot_ids;
    size_t num_blocks;
    /* Where the cursor stands. */
    size_t block;
    uint32_t group, row;
    uint32_t last_slot; /* slot of the copy emitted last, for the registration check of a merge */
} kv_plan;

/* A plan over blocks of a layout. */
static inline kv_plan kv_plan_of_blocks(const kv_group *groups, uint32_t num_groups, uint32_t strided,
                                        const int64_t *block_ids, const kv_slots *slots, const uint32_t *slot_ids,
                                        size_t num_blocks)
{
    return (kv_plan){.groups = groups, .num_groups = num_groups, .strided = strided, .block_ids = block_ids,
                     .slots = slots, .slot_ids = slot_ids, .num_blocks = num_blocks};
}

/* A plan over raw addresses, each with its size. */
static inline kv_plan kv_plan_of_addresses(const uint64_t *addresses, const uint32_t *sizes, const kv_slots *slots,
                                           const uint32_t *slot_ids, size_t num_blocks)
{
    return (kv_plan){.addresses = addresses, .sizes = sizes, .slots = slots, .slot_ids = slot_ids,
                     .num_blocks = num_blocks};
}

static inline int kv_plan_is_begun(const kv_plan *plan) { return plan->block || plan->group || plan->row; }
static inline int kv_plan_is_done(const kv_plan *plan) { return plan->block == plan->num_blocks; }

/* Whether the shape of a group admits a strided copy at all; a probe says whether it is legal and pays. */
static inline int kv_group_may_be_strided(const kv_group *group)
{
    return group->rows >= KV_STRIDED_MIN_ROWS && group->device_pitch <= KV_STRIDED_MAX_PITCH &&
           group->slot_pitch <= KV_STRIDED_MAX_PITCH;
}

/* Appends one plain copy, or lengthens the last one where both sides go on. Returns the new count. */
static inline size_t kv_plan_append(kv_plan *plan, kv_copy *copies, size_t count, uint64_t device, char *host,
                                    size_t bytes, uint32_t slot)
{
    kv_copy *last = count ? &copies[count - 1] : NULL;
    int one_run = plan->num_groups == 1 && plan->groups[0].rows == 1;
    if (last && one_run && last->device + last->row_bytes == device && last->host + last->row_bytes == host &&
        kv_slots_same_chunk(plan->slots, plan->last_slot, slot)) {
        last->row_bytes += bytes;
        return count;
    }
    copies[count] = (kv_copy){device, host, bytes, bytes, bytes, 1};
    plan->last_slot = slot;
    return count + 1;
}

/* Fills at most `capacity` copies and moves the cursor on; 0 means the plan is used up. */
static inline size_t kv_plan_next(kv_plan *plan, kv_copy *copies, size_t capacity)
{
    size_t count = 0;
    while (plan->block < plan->num_blocks && count < capacity) {
        uint32_t slot = plan->slot_ids[plan->block];
        char *payload = kv_slots_payload(plan->slots, slot);
        if (!plan->groups) {
            copies[count++] = (kv_copy){plan->addresses[plan->block], payload, plan->sizes[plan->block],
                                        plan->sizes[plan->block], plan->sizes[plan->block], 1};
            plan->block++;
            continue;
        }
        const kv_group *group = &plan->groups[plan->group];
        uint64_t device = group->base + (uint64_t)plan->block_ids[plan->block] * group->block_stride;
        char *host = payload + group->slot_offset;
        if (plan->row == 0 && (group->strided & plan->strided)) {
            copies[count++] =
                (kv_copy){device, host, group->row_bytes, group->device_pitch, group->slot_pitch, group->rows};
            plan->row = group->rows;
        } else {
            count = kv_plan_append(plan, copies, count, device + plan->row * (uint64_t)group->device_pitch,
                                   host + plan->row * group->slot_pitch, group->row_bytes, slot);
            plan->row++;
        }
        if (plan->row == group->rows) {
            plan->row = 0;
            if (++plan->group == plan->num_groups) {
                plan->group = 0;
                plan->block++;
            }
        }
    }
    return count;
}

#endif
