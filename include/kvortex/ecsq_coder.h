/* ecsq_coder.h: a coder (coder.h) that makes records of ecsq.h, of blocks as their slots have them.
 *
 * If slots have blocks packed, a block is unpacked into scratch memory before it is coded, and packed behind decoding.
 *
 * Costs: those of ecsq.h, and of codec.h for packed blocks.
 */
#ifndef KVORTEX_ECSQ_CODER_H
#define KVORTEX_ECSQ_CODER_H

#include "codec.h"
#include "coder.h"
#include "ecsq.h"

typedef struct kv_ecsq_coder {
    kv_coder coder; /* first */
    const kv_ecsq *ecsq;
    const kv_plane *planes; /* of packed blocks, with addresses from 0 and a stride of 1; NULL: they are not packed */
    uint32_t num_planes;
    uint64_t flags_offset;
} kv_ecsq_coder;

/* The block itself stands first in the scratch memory, if slots have it packed. */
static inline size_t kv_ecsq_coder_block_bytes(const kv_ecsq_coder *own)
{
    return own->planes ? (own->ecsq->block_bytes + 63) / 64 * 64 : 0;
}

static inline uint32_t kv_ecsq_coder_encode(const kv_coder *coder, const void *payload, void *coded, void *scratch)
{
    const kv_ecsq_coder *own = (const void *)coder;
    if (own->planes)
        kv_unpack_block(own->planes, own->num_planes, (uintptr_t)scratch, payload);
    return (uint32_t)kv_ecsq_encode(own->ecsq, own->planes ? scratch : payload, coded, coder->coded_bytes,
                                    (char *)scratch + kv_ecsq_coder_block_bytes(own));
}

static inline int
kv_ecsq_coder_decode(const kv_coder *coder, const void *coded, uint32_t coded_bytes, void *payload, void *scratch)
{
    const kv_ecsq_coder *own = (const void *)coder;
    if (!kv_ecsq_decode(own->ecsq, coded, coded_bytes, own->planes ? scratch : payload))
        return 0;
    if (!own->planes)
        return 1;
    kv_pack_block(own->planes, own->num_planes, own->flags_offset, (uintptr_t)scratch, payload);
    return !kv_packed_is_refused(payload, own->flags_offset, own->num_planes);
}

#endif
