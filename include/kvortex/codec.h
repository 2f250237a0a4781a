/* codec.h: packs and unpacks the planes of a block (pack.h) on the CPU, with the best instructions that it has.
 *
 * Invariants
 *   - Every kv_codec_set writes the same bytes, in both directions and for any input (codec_rows.h is the measure).
 *   - Packing writes the packed plane, its padding included (zeros), and nothing else. Unpacking any bytes whatever
 *     reads the packed plane alone and writes the rows alone.
 *   - Nothing is allocated. Addresses need no alignment. Needs a little-endian processor.
 *
 * Costs: with AVX-512 on an EPYC of 2022, a vector of 128 numbers takes 35 ns to pack into 8 bits and 22 ns to unpack;
 * in portable C 800 ns. (bench/bench_codec.py)
 */
#ifndef KVORTEX_CODEC_H
#define KVORTEX_CODEC_H

#include "codec_rows.h"

/* --- Instruction sets -------------------------------------------------------------------------------------------- */

typedef struct kv_codec_set {
    const char *name;
    uint32_t (*pack_rows)(const kv_plane *plane, const char *rows, kv_codec_parts parts, uint32_t first,
                          uint32_t count);
    void (*unpack_rows)(const kv_plane *plane, kv_codec_parts parts, char *rows, uint32_t first, uint32_t count);
} kv_codec_set;

#if defined(__x86_64__)
#define KV_LANES 4
#define KV_LANES_SET sse4
#define KV_LANES_TARGET __attribute__((target("sse4.1")))
#include "codec_lanes.h"
#define KV_LANES 8
#define KV_LANES_SET avx2
#define KV_LANES_TARGET __attribute__((target("avx2,fma")))
#include "codec_lanes.h"
#define KV_LANES 16
#define KV_LANES_SET avx512
#define KV_LANES_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#include "codec_lanes.h"
#elif defined(__aarch64__)
#define KV_LANES 4
#define KV_LANES_SET neon
#define KV_LANES_TARGET
#include "codec_lanes.h"
#endif

/* The i-th set that this processor has, the fastest first and portable C last; NULL behind it. */
static inline const kv_codec_set *kv_codec_set_at(uint32_t i)
{
    static const kv_codec_set portable = {"c", kv_codec_pack_rows, kv_codec_unpack_rows};
#if defined(__x86_64__)
    static const kv_codec_set avx512 = {"avx512", kv_codec_pack_rows_avx512, kv_codec_unpack_rows_avx512};
    static const kv_codec_set avx2 = {"avx2", kv_codec_pack_rows_avx2, kv_codec_unpack_rows_avx2};
    static const kv_codec_set sse4 = {"sse4", kv_codec_pack_rows_sse4, kv_codec_unpack_rows_sse4};
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
        && i-- == 0)
        return &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && i-- == 0)
        return &avx2;
    if (__builtin_cpu_supports("sse4.1") && i-- == 0)
        return &sse4;
#elif defined(__aarch64__)
    static const kv_codec_set neon = {"neon", kv_codec_pack_rows_neon, kv_codec_unpack_rows_neon};
    if (i-- == 0)
        return &neon;
#endif
    return i == 0 ? &portable : NULL;
}

static inline const kv_codec_set *kv_codec_best(void)
{
    return kv_codec_set_at(0);
}

/* --- Planes ------------------------------------------------------------------------------------------------------ */

/* Packs a plane whose row 0 is at `rows`. `packed` is the address of the packed plane. Returns its flag, 0 or 1. */
static inline uint32_t
kv_plane_pack_by(const kv_codec_set *set, const kv_plane *plane, const char *rows, char *packed)
{
    if (plane->bits == KV_PACK_EXACT) {
        for (uint64_t row = 0; row < plane->num_rows; row++)
            memcpy(packed + row * plane->row_bytes, rows + row * plane->step_bytes, plane->row_bytes);
        return 0;
    }
    const kv_codec_parts parts = kv_codec_parts_of(plane, packed);
    const uint64_t elements = (uint64_t)plane->num_rows * (plane->row_bytes / 2);
    const uint64_t scale_bytes = 2 * (uint64_t)plane->num_rows;
    const uint64_t low_bytes = kv_codec_low_bytes(elements, plane->bits);
    const uint64_t high_bytes = kv_codec_high_bytes(elements, plane->bits);
    memset(parts.low + low_bytes, 0, kv_plane_low_bytes(plane) - low_bytes);
    memset(parts.high + high_bytes, 0, kv_plane_high_bytes(plane) - high_bytes);
    memset(parts.scales + scale_bytes, 0, kv_pack_align(scale_bytes) - scale_bytes);
    return set->pack_rows(plane, rows, parts, 0, plane->num_rows);
}

static inline void
kv_plane_unpack_by(const kv_codec_set *set, const kv_plane *plane, const char *packed, char *rows)
{
    if (plane->bits == KV_PACK_EXACT)
        for (uint64_t row = 0; row < plane->num_rows; row++)
            memcpy(rows + row * plane->step_bytes, packed + row * plane->row_bytes, plane->row_bytes);
    else
        set->unpack_rows(plane, kv_codec_parts_of(plane, packed), rows, 0, plane->num_rows);
}

static inline uint32_t kv_plane_pack(const kv_plane *plane, const char *rows, char *packed)
{
    return kv_plane_pack_by(kv_codec_best(), plane, rows, packed);
}

static inline void kv_plane_unpack(const kv_plane *plane, const char *packed, char *rows)
{
    kv_plane_unpack_by(kv_codec_best(), plane, packed, rows);
}

/* --- Blocks ------------------------------------------------------------------------------------------------------ */

static inline char *kv_codec_address(const kv_plane *plane, uint64_t block)
{
    return (char *)(uintptr_t)(plane->base + block * plane->block_stride);
}

/* Packs block `block`, whose planes have host addresses, and writes every flag; see kv_packed_is_refused. */
static inline void kv_pack_block_by(const kv_codec_set *set, const kv_plane *planes, uint32_t num_planes,
                                    uint64_t flags_offset, uint64_t block, char *packed)
{
    const uint64_t flags_bytes = 4 * (uint64_t)num_planes;
    if (flags_offset)
        memset(packed + flags_offset + flags_bytes, 0, kv_pack_align(flags_bytes) - flags_bytes);
    for (uint32_t i = 0; i < num_planes; i++) {
        const char *const rows = kv_codec_address(&planes[i], block);
        const uint32_t flag = kv_plane_pack_by(set, &planes[i], rows, packed + planes[i].offset);
        if (flags_offset)
            memcpy(packed + flags_offset + 4 * (uint64_t)i, &flag, sizeof flag);
    }
}

static inline void kv_unpack_block_by(const kv_codec_set *set, const kv_plane *planes, uint32_t num_planes,
                                      uint64_t block, const char *packed)
{
    for (uint32_t i = 0; i < num_planes; i++)
        kv_plane_unpack_by(set, &planes[i], packed + planes[i].offset, kv_codec_address(&planes[i], block));
}

static inline void
kv_pack_block(const kv_plane *planes, uint32_t num_planes, uint64_t flags_offset, uint64_t block, char *packed)
{
    kv_pack_block_by(kv_codec_best(), planes, num_planes, flags_offset, block, packed);
}

static inline void kv_unpack_block(const kv_plane *planes, uint32_t num_planes, uint64_t block, const char *packed)
{
    kv_unpack_block_by(kv_codec_best(), planes, num_planes, block, packed);
}

#endif
