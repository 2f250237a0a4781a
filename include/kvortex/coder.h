/* coder.h: what a store makes of a block before it writes it, and the reverse, as functions that it is given.
 *
 * Blocks of another length than the coder is made for stay as they are.
 *
 * Invariants
 *   - Both functions may run in many threads at once, each with scratch memory of its own.
 *   - `decode` reads nothing outside `coded_bytes` and writes nothing outside the payload, whatever the bytes are.
 */
#ifndef KVORTEX_CODER_H
#define KVORTEX_CODER_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct kv_coder {
    uint32_t codec;         /* of the record's header; 0 is what has no coder */
    uint32_t payload_bytes; /* of a block as its slot in RAM has it */
    uint32_t coded_bytes;   /* the most that a record has room for */
    size_t scratch_bytes;   /* of each thread */
    /* The bytes of the coded block, at most `coded_bytes`; 0: it takes more. */
    uint32_t (*encode)(const struct kv_coder *coder, const void *payload, void *coded, void *scratch);
    /* 1; or 0: no block was coded like this, and the payload may have any bytes. */
    int (*decode)(const struct kv_coder *coder, const void *coded, uint32_t coded_bytes, void *payload, void *scratch);
} kv_coder;

/* As `encode`, of a block of `length` bytes. */
static inline uint32_t
kv_coder_encode(const kv_coder *coder, const void *payload, uint32_t length, void *coded, void *scratch)
{
    if (length == coder->payload_bytes)
        return coder->encode(coder, payload, coded, scratch);
    if (length > coder->coded_bytes)
        return 0;
    memcpy(coded, payload, length);
    return length;
}

/* As `decode`, of a block of `length` bytes. */
static inline int kv_coder_decode(const kv_coder *coder, const void *coded, uint32_t coded_bytes, void *payload,
                                  uint32_t length, void *scratch)
{
    if (length == coder->payload_bytes)
        return coder->decode(coder, coded, coded_bytes, payload, scratch);
    if (length != coded_bytes)
        return 0;
    memcpy(payload, coded, length);
    return 1;
}

#endif
