/* pack.h: how a codec lays out a block, and what its kernel is told. Shared by the kernel, the host driver and the CPU code.
 *
 * A block is a list of planes: rows of equal length at equal distances, all of one meaning. A coded plane has one vector
 * of `dim` bfloat16 numbers a row, packed to `bits` each with one scale a vector; an exact plane (bits 16) is opaque
 * bytes. Packed, a plane is
 *
 *   low     8 bits: num_rows * dim bytes. 4, 5, 6 bits: nibbles, num_rows * dim / 2 bytes, even elements in the low half
 *   high    5 bits: the fifth bits, num_rows * dim / 8 bytes; 6 bits: the fifth and sixth, num_rows * dim / 4 bytes;
 *           little end first; else nothing
 *   scales  one bfloat16 a row
 *
 * or, exact, its rows one after the other. Each of these parts begins at a multiple of 16 bytes. Behind the planes of a
 * block stands one 32-bit word a plane, its flag: not 0 if the plane has a number that cannot be packed (Inf, NaN, or
 * 2^100 and more in magnitude). Whoever packs writes every flag; a block with any flag set must not be kept.
 *
 * Invariants
 *   - Bases, strides, steps and row sizes are multiples of KV_PACK_UNIT_BYTES; dim is 32, 64, 128 or 256.
 *   - What is packed depends on the numbers alone, bit for bit, whoever packs or unpacks: single IEEE float32 operations
 *     in one order (kvortex/codec/README.md).
 *   - kv_pack is passed to the kernel by value, so nothing it holds must outlive the launch; `planes` names device memory
 *     that does.
 */
#ifndef KVORTEX_PACK_H
#define KVORTEX_PACK_H

#include <stdint.h>

enum {
    KV_PACK_VERSION = 1, /* of all that stands here; it is part of a block's persistent name */
    KV_PACK_UNIT_BYTES = 16,
    KV_PACK_EXACT = 16,   /* bits of an exact plane */
    KV_PACK_MAX_DIM = 256,
    KV_PACK_THREADS = 512, /* of a thread block of the kernel */
    KV_PACK_BLOCKS = 512   /* KV blocks in one launch: what fits into kernel parameters (4 KiB) */
};

typedef struct kv_plane {
    uint64_t base, block_stride; /* row 0 of the plane of block b: base + b * block_stride, on the device */
    uint64_t offset;             /* of the packed plane in a packed block */
    uint32_t num_rows, row_bytes, step_bytes; /* step: from row to row on the device */
    uint32_t bits;                            /* 4, 5, 6, 8, or KV_PACK_EXACT; dim is row_bytes / 2 */
} kv_plane;

typedef struct kv_pack {
    uint64_t planes;  /* device address of num_planes kv_plane */
    uint64_t staging; /* device address of the first packed block; the others follow at block_bytes */
    uint64_t block_bytes;
    uint64_t flags_offset; /* 0: every plane is exact, and no flag is written */
    uint32_t num_planes, num_blocks;
    uint32_t to_staging; /* pack, or unpack */
    uint32_t block_ids[KV_PACK_BLOCKS];
} kv_pack;

#ifndef __CUDACC__
#define KV_PACK_HD static inline
#else
#define KV_PACK_HD static __host__ __device__ inline
#endif

KV_PACK_HD uint64_t kv_pack_align(uint64_t nbytes)
{
    return (nbytes + KV_PACK_UNIT_BYTES - 1) / KV_PACK_UNIT_BYTES * KV_PACK_UNIT_BYTES;
}

/* Bytes of the low and the high part of a coded plane, each with what aligns the next. */
KV_PACK_HD uint64_t kv_plane_low_bytes(const kv_plane *plane)
{
    const uint64_t elements = (uint64_t)plane->num_rows * plane->row_bytes / 2;
    return kv_pack_align(plane->bits == 8 ? elements : elements / 2);
}

KV_PACK_HD uint64_t kv_plane_high_bytes(const kv_plane *plane)
{
    const uint64_t elements = (uint64_t)plane->num_rows * plane->row_bytes / 2;
    return kv_pack_align(plane->bits == 5 ? elements / 8 : plane->bits == 6 ? elements / 4 : 0);
}

KV_PACK_HD uint64_t kv_plane_packed_bytes(const kv_plane *plane)
{
    if (plane->bits == KV_PACK_EXACT)
        return (uint64_t)plane->num_rows * plane->row_bytes;
    return kv_plane_low_bytes(plane) + kv_plane_high_bytes(plane) + kv_pack_align(2 * (uint64_t)plane->num_rows);
}

/* Whether a packed block has a flag set. */
KV_PACK_HD int kv_packed_is_refused(const char *packed, uint64_t flags_offset, uint32_t num_planes)
{
    uint32_t any = 0;
    for (uint32_t i = 0; flags_offset && i < num_planes; i++)
        any |= ((const uint32_t *)(packed + flags_offset))[i];
    return any != 0;
}

#endif
