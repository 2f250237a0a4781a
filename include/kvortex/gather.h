/* gather.h: what the gather kernel is told, shared by the kernel, the host driver and whoever launches it.
 *
 * One launch moves whole blocks between their pieces on the device and staging memory on the device, where a block lies
 * as it does in its slot. A piece is moved by one thread block, in units of 16 bytes.
 *
 * Invariants
 *   - Bases, strides, offsets and sizes are multiples of KV_GATHER_UNIT_BYTES.
 *   - kv_gather is passed by value, so nothing it holds must outlive the launch; `runs` names device memory that does.
 *
 * Costs: num_ctas streaming multiprocessors while it runs, at about 10 GB/s each.
 */
#ifndef KVORTEX_GATHER_H
#define KVORTEX_GATHER_H

#include <stdint.h>

enum {
    KV_GATHER_UNIT_BYTES = 16,
    KV_GATHER_THREADS = 512, /* of a thread block */
    KV_GATHER_BLOCKS = 512   /* KV blocks in one launch: what fits into kernel parameters (4 KiB) */
};

typedef struct kv_gather_run { /* the piece of block b: base + b * block_stride on the device, offset in the block */
    uint64_t base, block_stride, offset, bytes;
} kv_gather_run;

typedef struct kv_gather {
    uint64_t runs;    /* device address of num_runs kv_gather_run */
    uint64_t staging; /* device address of the first block; the others follow at block_bytes */
    uint64_t block_bytes;
    uint32_t num_runs, num_blocks;
    uint32_t to_staging; /* or from it */
    uint32_t block_ids[KV_GATHER_BLOCKS];
} kv_gather;

#endif
