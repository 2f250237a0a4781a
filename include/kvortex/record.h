/* record.h: a block as it lies outside RAM: a header page, then the payload.
 *
 * Invariants
 *   - A header is a pure function of what names the block, its lengths and its payload: no clock, no counter. Writing
 *     it again writes the same bytes.
 *   - Every bit of the page is under the header's sum, every bit of the payload under the payload's.
 *   - Nothing in a page is believed before its sum is right. The only size in it that is used is that of a coded
 *     payload, if it is at most what a slot holds.
 *   - Fields are little-endian.
 *
 * Costs: a header about 0.3 us; the payload's sums as sums.h says.
 */
#ifndef KVORTEX_RECORD_H
#define KVORTEX_RECORD_H

#include "sums.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "records are read and written in place, as little-endian numbers"
#endif

enum { KV_RECORD_HEADER_BYTES = 4096, KV_RECORD_VERSION = 1, KV_DIGEST_BYTES = 32 };

#define KV_RECORD_MAGIC UINT64_C(0x31524b5854524f56) /* "VORTXKR1" */

/* What a check answers: the first thing that is not as expected, in this order. */
enum {
    KV_RECORD_OK = 0,
    KV_RECORD_MISSING = 1, /* another magic: nothing was written here, or it was erased */
    KV_RECORD_VERSION_DIFFERS = 2,
    KV_RECORD_HEADER_DAMAGED = 3, /* its sum differs */
    KV_RECORD_NAMESPACE_DIFFERS = 4,
    KV_RECORD_RANK_DIFFERS = 5,
    KV_RECORD_CODEC_DIFFERS = 6,
    KV_RECORD_TAG_DIFFERS = 7,
    KV_RECORD_KEY_DIFFERS = 8,
    KV_RECORD_NAME_DIFFERS = 9,
    KV_RECORD_LENGTH_DIFFERS = 10,
    KV_RECORD_PAYLOAD_DAMAGED = 11 /* its sum differs */
};

typedef struct kv_record_header {
    uint64_t magic;
    uint32_t version, codec; /* 0: the payload is the block's bytes */
    uint32_t rank, group;    /* the KV cache group of the key */
    uint32_t stored_bytes;   /* of the payload */
    uint32_t block_bytes;    /* of the block when it is decoded */
    uint8_t space[KV_DIGEST_BYTES], tag[KV_DIGEST_BYTES], key[KV_DIGEST_BYTES], name[KV_DIGEST_BYTES];
    uint64_t payload_xxh3, payload_weighted;
    uint8_t zeros[KV_RECORD_HEADER_BYTES - 4 * KV_DIGEST_BYTES - 56];
    uint64_t header_xxh3; /* of all bytes before it */
} kv_record_header;

_Static_assert(sizeof(kv_record_header) == KV_RECORD_HEADER_BYTES, "a header is one page");
_Static_assert(offsetof(kv_record_header, space) == 32 && offsetof(kv_record_header, payload_xxh3) == 160,
               "the layout of version 1");

/* What a record is to be: the digests have 32 bytes each and belong to the caller. */
typedef struct kv_record {
    const uint8_t *space, *tag, *key, *name;
    uint32_t rank, group, codec, stored_bytes, block_bytes; /* checked with a codec: the most that is stored */
} kv_record;

static inline uint64_t kv_record_header_sum(const kv_record_header *header, int vectors)
{
    return kv_xxh3_64((const uint8_t *)header, offsetof(kv_record_header, header_xxh3), vectors);
}

/* Fills the page in front of a payload. */
static inline void kv_record_write(kv_record_header *header, const kv_record *record, int vectors)
{
    const kv_sums sums = kv_sums_of((const uint8_t *)(header + 1), record->stored_bytes, vectors);
    memset(header, 0, sizeof *header);
    header->magic = KV_RECORD_MAGIC;
    header->version = KV_RECORD_VERSION;
    header->codec = record->codec;
    header->rank = record->rank;
    header->group = record->group;
    header->stored_bytes = record->stored_bytes;
    header->block_bytes = record->block_bytes;
    memcpy(header->space, record->space, KV_DIGEST_BYTES);
    memcpy(header->tag, record->tag, KV_DIGEST_BYTES);
    memcpy(header->key, record->key, KV_DIGEST_BYTES);
    memcpy(header->name, record->name, KV_DIGEST_BYTES);
    header->payload_xxh3 = sums.xxh3;
    header->payload_weighted = sums.weighted;
    header->header_xxh3 = kv_record_header_sum(header, vectors);
}

/* Whether the page is a header that somebody wrote, whole. */
static inline int kv_record_check_page(const kv_record_header *header, int vectors)
{
    if (header->magic != KV_RECORD_MAGIC)
        return KV_RECORD_MISSING;
    if (header->version != KV_RECORD_VERSION)
        return KV_RECORD_VERSION_DIFFERS;
    if (header->header_xxh3 != kv_record_header_sum(header, vectors))
        return KV_RECORD_HEADER_DAMAGED;
    return KV_RECORD_OK;
}

/* Whether it is one of those that its store may hold now, whatever its key. */
static inline int kv_record_check_store(const kv_record_header *header, const kv_record *expected, int vectors)
{
    const int status = kv_record_check_page(header, vectors);
    if (status)
        return status;
    if (memcmp(header->space, expected->space, KV_DIGEST_BYTES) != 0)
        return KV_RECORD_NAMESPACE_DIFFERS;
    if (header->rank != expected->rank)
        return KV_RECORD_RANK_DIFFERS;
    if (header->codec != expected->codec)
        return KV_RECORD_CODEC_DIFFERS;
    if (memcmp(header->tag, expected->tag, KV_DIGEST_BYTES) != 0)
        return KV_RECORD_TAG_DIFFERS;
    return KV_RECORD_OK;
}

/* KV_RECORD_OK, or that they differ. Every coded payload has a length of its own. */
static inline int kv_record_check_lengths(const kv_record_header *header, const kv_record *expected)
{
    const uint32_t stored = header->stored_bytes, most = expected->stored_bytes;
    const int fits = expected->codec ? stored >= 1 && stored <= most : stored == most;
    return fits && header->block_bytes == expected->block_bytes ? KV_RECORD_OK : KV_RECORD_LENGTH_DIFFERS;
}

/* Header and payload: everything that was read. */
static inline int kv_record_check(const kv_record_header *header, const kv_record *expected, int vectors)
{
    const int status = kv_record_check_store(header, expected, vectors);
    if (status)
        return status;
    if (memcmp(header->key, expected->key, KV_DIGEST_BYTES) != 0)
        return KV_RECORD_KEY_DIFFERS;
    if (memcmp(header->name, expected->name, KV_DIGEST_BYTES) != 0)
        return KV_RECORD_NAME_DIFFERS;
    if (kv_record_check_lengths(header, expected))
        return KV_RECORD_LENGTH_DIFFERS;
    if (header->payload_xxh3 != kv_xxh3_64((const uint8_t *)(header + 1), header->stored_bytes, vectors))
        return KV_RECORD_PAYLOAD_DAMAGED;
    return KV_RECORD_OK;
}

#endif
