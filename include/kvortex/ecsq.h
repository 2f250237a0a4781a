/* ecsq.h: blocks of K and V as entropy-coded integers, for the tiers below RAM. kvortex/codec/ECSQ.md has the format.
 *
 * A kv_ecsq says what is coded: planes (pack.h's, but with heads and tokens told apart) in segments. A record is a
 * header, the length of each segment, and the segments, which are coded and decoded independently of one another.
 *
 * Invariants
 *   - What is coded depends on the numbers alone, bit for bit, whatever the instruction set, and what is decoded, too.
 *   - Decoding any bytes whatever reads the record alone and writes rows of the planes alone. A record that is refused
 *     may have been written to the block in part.
 *   - Nothing is allocated. Coding takes scratch memory of kv_ecsq_scratch_bytes from its caller, decoding a few
 *     hundred bytes of stack. Addresses need no alignment. Needs a little-endian processor.
 */
#ifndef KVORTEX_ECSQ_H
#define KVORTEX_ECSQ_H

#include "ecsq_format.h"

/* --- Instruction sets -------------------------------------------------------------------------------------------- */

typedef struct kv_ecsq_set {
    const char *name;
    int (*encode_plane)(const kv_ecsq_plane *plane, const char *block, kv_ecsq_encoder *encoder, uint8_t *head);
    uint16_t *(*encode_words)(const kv_ecsq_encoder *encoder, uint32_t *states);
    int (*decode_plane)(const kv_ecsq_plane *plane, char *block, const uint8_t *head, kv_ecsq_decoder *decoder);
} kv_ecsq_set;

#define KV_ECSQ_SET c
#define KV_ECSQ_TARGET
#define KV_ECSQ_X86 0
#include "ecsq_lanes.h"
#if defined(__x86_64__)
#define KV_ECSQ_SET avx2
#define KV_ECSQ_TARGET __attribute__((target("avx2,popcnt")))
#define KV_ECSQ_X86 256
#include "ecsq_lanes.h"
#define KV_ECSQ_SET avx512
#define KV_ECSQ_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,popcnt,prefer-vector-width=512")))
#define KV_ECSQ_X86 512
#include "ecsq_lanes.h"
#endif

/* The i-th set that this processor has, the fastest first and portable C last; NULL behind it. */
static inline const kv_ecsq_set *kv_ecsq_set_at(uint32_t i)
{
    static const kv_ecsq_set portable = {"c", kv_ecsq_encode_plane_c, kv_ecsq_encode_words_c, kv_ecsq_decode_plane_c};
#if defined(__x86_64__)
    static const kv_ecsq_set avx512 = {"avx512", kv_ecsq_encode_plane_avx512, kv_ecsq_encode_words_avx512,
                                       kv_ecsq_decode_plane_avx512};
    static const kv_ecsq_set avx2 = {"avx2", kv_ecsq_encode_plane_avx2, kv_ecsq_encode_words_avx2,
                                     kv_ecsq_decode_plane_avx2};
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
        && i-- == 0)
        return &avx512;
    if (__builtin_cpu_supports("avx2") && i-- == 0)
        return &avx2;
#endif
    return i == 0 ? &portable : NULL;
}

/* --- Segments ---------------------------------------------------------------------------------------------------- */

static inline void kv_ecsq_store_u32(char *address, uint64_t number)
{
    const uint32_t word = (uint32_t)number;
    memcpy(address, &word, sizeof word);
}

static inline uint32_t kv_ecsq_load_u32(const char *address)
{
    uint32_t word;
    memcpy(&word, address, sizeof word);
    return word;
}

/* Copies the rows of a plane, in their order, behind a head that says so. */
static inline void kv_ecsq_put_raw(const kv_ecsq_plane *plane, const char *block, char *out)
{
    memset(out, 0, KV_ECSQ_HEAD_BYTES);
    for (uint64_t row = 0; row < plane->num_rows; row++)
        memcpy(out + KV_ECSQ_HEAD_BYTES + row * plane->row_bytes, block + plane->first_byte + row * plane->step_bytes,
               plane->row_bytes);
}

static inline void kv_ecsq_get_raw(const kv_ecsq_plane *plane, const char *rows, char *block)
{
    for (uint64_t row = 0; row < plane->num_rows; row++)
        memcpy(block + plane->first_byte + row * plane->step_bytes, rows + row * plane->row_bytes, plane->row_bytes);
}

static inline uint64_t
kv_ecsq_encode_raw(const kv_ecsq *ecsq, uint32_t segment, const char *block, char *out, uint64_t room)
{
    uint64_t at = 4;
    if (kv_ecsq_max_segment_bytes(ecsq, segment) > room)
        return 0;
    kv_ecsq_store_u32(out, 0);
    for (uint32_t i = ecsq->segments[segment]; i < ecsq->segments[segment + 1]; i++) {
        kv_ecsq_put_raw(&ecsq->planes[i], block, out + at);
        at += KV_ECSQ_HEAD_BYTES + kv_ecsq_plane_bytes(&ecsq->planes[i]);
    }
    return at;
}

/* Codes a segment of a block into `room` bytes at most. Returns the bytes, or 0 if there is too little room, in which
 * case what was written means nothing. */
static inline uint64_t kv_ecsq_encode_segment_by(const kv_ecsq_set *set, const kv_ecsq *ecsq, uint32_t segment,
                                                 const char *block, char *out, uint64_t room, void *scratch)
{
    kv_ecsq_encoder encoder = kv_ecsq_encoder_of(ecsq, scratch);
    const uint64_t raw_bytes = kv_ecsq_max_segment_bytes(ecsq, segment);
    const uint64_t most = raw_bytes < room ? raw_bytes : room;
    uint64_t at = 4;
    if (most < at)
        return 0;
    for (uint32_t i = ecsq->segments[segment]; i < ecsq->segments[segment + 1]; i++) {
        const kv_ecsq_plane *const plane = &ecsq->planes[i];
        const uint64_t side_bytes = kv_ecsq_side_bytes(plane), plane_bytes = kv_ecsq_plane_bytes(plane);
        if (plane->role != KV_ECSQ_EXACT && side_bytes < plane_bytes && most - at >= KV_ECSQ_HEAD_BYTES + side_bytes
            && set->encode_plane(plane, block, &encoder, (uint8_t *)out + at)) {
            at += KV_ECSQ_HEAD_BYTES + side_bytes;
            continue;
        }
        if (most - at < KV_ECSQ_HEAD_BYTES + plane_bytes)
            return kv_ecsq_encode_raw(ecsq, segment, block, out, room);
        kv_ecsq_put_raw(plane, block, out + at);
        at += KV_ECSQ_HEAD_BYTES + plane_bytes;
    }
    kv_ecsq_store_u32(out, 0);
    if (encoder.num_runs == 0)
        return at;
    uint32_t states[KV_ECSQ_LANES];
    const uint16_t *const words = set->encode_words(&encoder, states);
    const uint64_t words_bytes = 2 * (uint64_t)(encoder.words_end - words), escapes_bytes = 2 * encoder.num_escapes;
    if (words_bytes + escapes_bytes + KV_ECSQ_STATES_BYTES > most - at)
        return kv_ecsq_encode_raw(ecsq, segment, block, out, room);
    kv_ecsq_store_u32(out, words_bytes / 2);
    memcpy(out + at, states, sizeof states);
    memcpy(out + at + KV_ECSQ_STATES_BYTES, words, words_bytes);
    memcpy(out + at + KV_ECSQ_STATES_BYTES + words_bytes, encoder.escapes, escapes_bytes);
    return at + KV_ECSQ_STATES_BYTES + words_bytes + escapes_bytes;
}

/* The bytes of a plane's head and what stands behind it, of `left`; 0 if it is not in order. */
static inline uint64_t kv_ecsq_checked_head(const kv_ecsq_plane *plane, const char *head, uint64_t left)
{
    if (left < KV_ECSQ_HEAD_BYTES)
        return 0;
    const uint8_t *const bytes = (const uint8_t *)head;
    const uint32_t step = kv_codec_load(head);
    if (bytes[3] == 0) {
        const uint64_t nbytes = KV_ECSQ_HEAD_BYTES + kv_ecsq_plane_bytes(plane);
        return step == 0 && bytes[2] == 0 && nbytes <= left ? nbytes : 0;
    }
    const uint64_t nbytes = KV_ECSQ_HEAD_BYTES + kv_ecsq_side_bytes(plane);
    if (plane->role == KV_ECSQ_EXACT || bytes[3] != 1 || bytes[2] > 1 || step < KV_ECSQ_MIN_STEP
        || step > KV_ECSQ_MAX_STEP || nbytes > left)
        return 0;
    for (uint64_t i = 0; i < 2 * kv_ecsq_num_groups(plane); i++)
        if (bytes[KV_ECSQ_HEAD_BYTES + i] >= KV_ECSQ_CLASSES)
            return 0;
    return nbytes;
}

/* Decodes the `nbytes` of a segment into a block; 0 if they are not a segment, and then rows may have been written. */
static inline int kv_ecsq_decode_segment_by(const kv_ecsq_set *set, const kv_ecsq *ecsq, uint32_t segment,
                                            const char *bytes, uint64_t nbytes, char *block)
{
    const kv_ecsq_plane *const first = &ecsq->planes[ecsq->segments[segment]];
    const kv_ecsq_plane *const end = &ecsq->planes[ecsq->segments[segment + 1]];
    char tail[4 * KV_ECSQ_LANES];
    kv_ecsq_decoder decoder = {.tables = ecsq->tables, .tail = tail};
    uint64_t at = 4;
    int any_coded = 0;
    if (nbytes < at)
        return 0;
    const uint64_t words_bytes = 2 * (uint64_t)kv_ecsq_load_u32(bytes);
    for (const kv_ecsq_plane *plane = first; plane < end; plane++) {
        const uint64_t head_bytes = kv_ecsq_checked_head(plane, bytes + at, nbytes - at);
        if (head_bytes == 0)
            return 0;
        any_coded |= bytes[at + 3];
        at += head_bytes;
    }
    if (any_coded) {
        if (nbytes - at < KV_ECSQ_STATES_BYTES || nbytes - at - KV_ECSQ_STATES_BYTES < words_bytes
            || (nbytes - at - words_bytes) % 2)
            return 0;
        memcpy(&decoder.states, bytes + at, KV_ECSQ_STATES_BYTES);
        decoder.words = bytes + at + KV_ECSQ_STATES_BYTES;
        decoder.escapes = decoder.words_end = decoder.words + words_bytes;
        decoder.escapes_end = bytes + nbytes;
    } else if (words_bytes != 0 || at != nbytes)
        return 0;
    at = 4;
    for (const kv_ecsq_plane *plane = first; plane < end; plane++) {
        if (bytes[at + 3] == 0)
            kv_ecsq_get_raw(plane, bytes + at + KV_ECSQ_HEAD_BYTES, block);
        else if (!set->decode_plane(plane, block, (const uint8_t *)bytes + at, &decoder))
            return 0;
        at += KV_ECSQ_HEAD_BYTES + (bytes[at + 3] ? kv_ecsq_side_bytes(plane) : kv_ecsq_plane_bytes(plane));
    }
    for (uint32_t i = 0; any_coded && i < KV_ECSQ_LANES; i++)
        if (decoder.states[i / 16][i % 16] != KV_ECSQ_FIRST_STATE)
            return 0;
    return decoder.words == decoder.words_end && decoder.escapes == decoder.escapes_end;
}

/* --- Records ----------------------------------------------------------------------------------------------------- */

/* Writes the header of a record of `nbytes`. */
static inline void kv_ecsq_put_header(const kv_ecsq *ecsq, uint64_t nbytes, char *out)
{
    const uint64_t body_bytes = nbytes - KV_ECSQ_HEADER_BYTES;
    kv_ecsq_store_u32(out, KV_ECSQ_MAGIC);
    out[4] = KV_ECSQ_CODEC, out[5] = (char)ecsq->level, out[6] = 0, out[7] = 0;
    kv_ecsq_store_u32(out + 8, ecsq->tables->id);
    kv_ecsq_store_u32(out + 12, ecsq->num_planes);
    memcpy(out + 16, &ecsq->block_bytes, 8);
    memcpy(out + 24, &body_bytes, 8);
    kv_codec_store(out + 32, ecsq->vector_numbers);
    kv_codec_store(out + 34, KV_ECSQ_LANES);
    kv_ecsq_store_u32(out + 36, ecsq->planes_crc);
}

/* Codes a block into `room` bytes at most. Returns the bytes of the record, or 0 if there is too little room. */
static inline uint64_t kv_ecsq_encode_by(const kv_ecsq_set *set, const kv_ecsq *ecsq, const char *block, char *out,
                                         uint64_t room, void *scratch)
{
    uint64_t at = kv_ecsq_body_offset(ecsq);
    if (at > room)
        return 0;
    for (uint32_t i = 0; i < ecsq->num_segments; i++) {
        const uint64_t nbytes = kv_ecsq_encode_segment_by(set, ecsq, i, block, out + at, room - at, scratch);
        if (nbytes == 0)
            return 0;
        kv_ecsq_store_u32(out + KV_ECSQ_HEADER_BYTES + 4 * (uint64_t)i, nbytes);
        at += nbytes;
    }
    kv_ecsq_put_header(ecsq, at, out);
    return at;
}

/* Whether the `nbytes` are a record of this kind, as far as its header and the lengths of its segments tell. */
static inline int kv_ecsq_check(const kv_ecsq *ecsq, const char *record, uint64_t nbytes)
{
    char header[KV_ECSQ_HEADER_BYTES];
    uint64_t end = kv_ecsq_body_offset(ecsq);
    if (nbytes < end)
        return 0;
    kv_ecsq_put_header(ecsq, nbytes, header);
    if (memcmp(header, record, sizeof header) != 0)
        return 0;
    for (uint32_t i = 0; i < ecsq->num_segments; i++)
        end += kv_ecsq_load_u32(record + KV_ECSQ_HEADER_BYTES + 4 * (uint64_t)i);
    return end == nbytes;
}

/* Decodes a record into a block; 0 if it is not one, and then rows may have been written. */
static inline int
kv_ecsq_decode_by(const kv_ecsq_set *set, const kv_ecsq *ecsq, const char *record, uint64_t nbytes, char *block)
{
    uint64_t at = kv_ecsq_body_offset(ecsq);
    if (!kv_ecsq_check(ecsq, record, nbytes))
        return 0;
    for (uint32_t i = 0; i < ecsq->num_segments; i++) {
        const uint64_t length = kv_ecsq_load_u32(record + KV_ECSQ_HEADER_BYTES + 4 * (uint64_t)i);
        if (!kv_ecsq_decode_segment_by(set, ecsq, i, record + at, length, block))
            return 0;
        at += length;
    }
    return 1;
}

static inline uint64_t
kv_ecsq_encode(const kv_ecsq *ecsq, const char *block, char *out, uint64_t room, void *scratch)
{
    return kv_ecsq_encode_by(kv_ecsq_set_at(0), ecsq, block, out, room, scratch);
}

static inline int kv_ecsq_decode(const kv_ecsq *ecsq, const char *record, uint64_t nbytes, char *block)
{
    return kv_ecsq_decode_by(kv_ecsq_set_at(0), ecsq, record, nbytes, block);
}

#endif
