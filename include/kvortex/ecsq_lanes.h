/* ecsq_lanes.h: coding and decoding the planes of a segment (ecsq.h) in vectors of 16 numbers. ecsq.h includes it once for
 * each instruction set, and defines before
 *
 *   KV_ECSQ_SET     what names of this set end in
 *   KV_ECSQ_TARGET  attributes of its functions
 *   KV_ECSQ_X86     512, 256 or 0: which instructions code and decode the 32 states; 0: portable C
 *
 * All sets have the same 16 lanes, whatever the processor makes of them, so that sums are added in the same order.
 */
#include "ecsq_format.h"

#ifndef KV_ECSQ_SET /* the header alone */
#define KV_ECSQ_SET alone
#define KV_ECSQ_TARGET
#define KV_ECSQ_X86 0
#endif

#ifndef KV_ECSQ_ONCE
#define KV_ECSQ_ONCE

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define KV_ECSQ_PASTE(name, set) name##_##set
#define KV_ECSQ_EXPAND(name, set) KV_ECSQ_PASTE(name, set)
#define KV_ECSQ_NAME(name) KV_ECSQ_EXPAND(name, KV_ECSQ_SET)
#endif

/* A product must be rounded before a sum; what has no instruction that does both at once needs no help. */
#if KV_ECSQ_X86 == 512
#define KV_ECSQ_ROUNDED(x) __asm__("" : "+v"(x))
#elif defined(__x86_64__) && !defined(__FMA__)
#define KV_ECSQ_ROUNDED(x) (void)(x)
#else
#define KV_ECSQ_ROUNDED(x) __asm__("" : "+m"(x))
#endif

#define KV_ECSQ_INLINE KV_ECSQ_TARGET static inline __attribute__((always_inline))
#define kv_sum KV_ECSQ_NAME(kv_ecsq_sum)
#define kv_load KV_ECSQ_NAME(kv_ecsq_load)
#define kv_sums KV_ECSQ_NAME(kv_ecsq_sums)
#define kv_quantise KV_ECSQ_NAME(kv_ecsq_quantise)
#define kv_to_symbols KV_ECSQ_NAME(kv_ecsq_to_symbols)
#define kv_encode_plane KV_ECSQ_NAME(kv_ecsq_encode_plane)
#define kv_encode_words KV_ECSQ_NAME(kv_ecsq_encode_words)
#define kv_decode_round KV_ECSQ_NAME(kv_ecsq_decode_round)
#define kv_decode_group KV_ECSQ_NAME(kv_ecsq_decode_group)
#define kv_decode_plane KV_ECSQ_NAME(kv_ecsq_decode_plane)

/* --- Coding ------------------------------------------------------------------------------------------------------ */

KV_ECSQ_INLINE float kv_sum(const kv_e_floats *v)
{
    float lanes[16];
    memcpy(lanes, v, sizeof lanes);
    for (uint32_t h = 8; h; h /= 2)
        for (uint32_t i = 0; i < h; i++)
            lanes[i] += lanes[i + h];
    return lanes[0];
}

KV_ECSQ_INLINE void kv_load(const char *address, kv_e_uints *bits)
{
    kv_e_halves halves;
    memcpy(&halves, address, sizeof halves);
    *bits = __builtin_convertvector(halves, kv_e_uints) << 16;
}

/* Sums of the plane, and the sum of squares of each vector. */
KV_ECSQ_TARGET static inline kv_ecsq_sums kv_sums(const kv_ecsq_plane *plane, const char *block, kv_ecsq_encoder *encoder)
{
    const uint32_t dim = plane->row_bytes / 2, chunks = dim / 16, unit = chunks < 4 ? chunks : 4;
    const uint64_t token_bytes = (uint64_t)plane->token_rows * plane->step_bytes;
    kv_ecsq_sums sums = {0, 0, 0, 0, 0};
    kv_e_uints any = {0};
    for (uint32_t head = 0; head < plane->num_heads; head++) {
        kv_e_floats of_channels[KV_CODEC_MAX_DIM / 16] = {{0}}, squares[KV_CODEC_MAX_DIM / 64] = {{0}};
        kv_e_floats differences[KV_CODEC_MAX_DIM / 64] = {{0}};
        const char *row = block + plane->first_byte + (uint64_t)head * plane->head_rows * plane->step_bytes;
        for (uint32_t token = 0; token < plane->num_tokens; token++, row += token_bytes) {
            kv_e_floats of_vector = {0};
            for (uint32_t i = 0; i < chunks; i++) {
                kv_e_uints bits, before;
                kv_load(row + 32 * i, &bits);
                const kv_e_floats x = (kv_e_floats)bits, square = x * x; /* exact, so it may be fused */
                any |= bits;
                of_channels[i] += x;
                of_vector += square;
                if (token > 0) {
                    kv_load(row - token_bytes + 32 * i, &before);
                    const kv_e_floats difference = x - (kv_e_floats)before;
                    kv_e_floats of_difference = difference * difference;
                    KV_ECSQ_ROUNDED(of_difference);
                    squares[i / unit] += square;
                    differences[i / unit] += of_difference;
                }
            }
            const float of_row = kv_sum(&of_vector);
            encoder->squares[(uint64_t)token * plane->num_heads + head] = of_row;
        }
        kv_e_floats of_means = {0};
        for (uint32_t i = 0; i < chunks; i++) {
            kv_e_floats square = of_channels[i] * of_channels[i];
            KV_ECSQ_ROUNDED(square);
            of_means += square;
        }
        sums.of_means += (double)kv_sum(&of_means);
        for (uint32_t i = 0; i < chunks / unit; i++) {
            sums.cost += kv_ecsq_log2(kv_sum(&squares[i]));
            sums.cost_of_differences += kv_ecsq_log2(kv_sum(&differences[i]));
        }
    }
    for (uint64_t i = 0; i < plane->num_rows; i++)
        sums.squares += (double)encoder->squares[i];
    for (uint32_t i = 0; i < 16; i++)
        sums.any_bits |= any[i];
    return sums;
}

/* The integers of a group of 16 * `chunks` channels, or their differences along the tokens; their squares, of token 0 and
 * of the others. Returns the largest magnitude before rounding, as bits. */
KV_ECSQ_INLINE uint32_t
kv_quantise(const kv_ecsq_plane *plane, const char *const *columns, const uint32_t *heads, uint32_t chunks,
            int differences, kv_ecsq_encoder *encoder, float squares[2])
{
    const uint64_t token_bytes = (uint64_t)plane->token_rows * plane->step_bytes;
    const float *inverses = encoder->squares;
    int16_t *group = encoder->group;
    kv_e_uints before[4] = {{0}};
    kv_e_ints largest = {0};
    kv_e_floats sum = {0};
    const char *at[4];
    memcpy(at, columns, chunks * sizeof at[0]);
    for (uint32_t token = 0; token < plane->num_tokens; token++) {
#pragma GCC unroll 4
        for (uint32_t i = 0; i < chunks; i++) {
            kv_e_uints bits;
            kv_load(at[i], &bits);
            kv_e_floats y = (kv_e_floats)bits * inverses[heads[i]];
            KV_ECSQ_ROUNDED(y);
            const kv_e_ints magnitude = (kv_e_ints)y & 0x7FFFFFFF, larger = magnitude > largest;
            largest = (magnitude & larger) | (largest & ~larger);
            const kv_e_uints q = (kv_e_uints)(y + 12582912.0f) - 0x4B400000;
            const kv_e_ints r = (kv_e_ints)(q - before[i]);
            if (differences)
                before[i] = q;
            kv_e_floats square = __builtin_convertvector(r, kv_e_floats);
            square *= square;
            KV_ECSQ_ROUNDED(square);
            sum += square;
            const kv_e_shorts narrow = __builtin_convertvector(r, kv_e_shorts);
            memcpy(group + 16 * i, &narrow, sizeof narrow);
            at[i] += token_bytes;
        }
        if (token == 0) {
            squares[0] = kv_sum(&sum);
            sum = (kv_e_floats){0};
        }
        inverses += plane->num_heads;
        group += 16 * chunks;
    }
    squares[1] = kv_sum(&sum);
    uint32_t most = 0;
    for (uint32_t i = 0; i < 16; i++)
        most = (uint32_t)largest[i] > most ? (uint32_t)largest[i] : most;
    return most;
}

/* Appends symbols of one class. */
KV_ECSQ_INLINE void
kv_to_symbols(kv_ecsq_encoder *encoder, const int16_t *integers, uint64_t count, uint32_t class_number)
{
    const int16_t least = (int16_t)encoder->tables->least[class_number];
    const int16_t most = (int16_t)encoder->tables->most[class_number];
    uint8_t *symbols = encoder->symbols + encoder->num_symbols;
    for (uint64_t i = 0; i < count; i += 16) {
        kv_e_shorts v;
        memcpy(&v, integers + i, sizeof v);
        const kv_e_shorts beyond = (v < least) | (v > most);
        const kv_e_bytes bytes = __builtin_convertvector((kv_e_halves)((v + KV_ECSQ_LARGEST) | beyond), kv_e_bytes);
        memcpy(symbols + i, &bytes, sizeof bytes);
        uint64_t any[4];
        memcpy(any, &beyond, sizeof any);
        if (any[0] | any[1] | any[2] | any[3])
            for (uint32_t j = 0; j < 16; j++)
                if (beyond[j])
                    encoder->escapes[encoder->num_escapes++] = v[j];
    }
    encoder->num_symbols += count;
    encoder->runs[encoder->num_runs++] = (kv_ecsq_run){class_number, (uint32_t)(count / KV_ECSQ_LANES)};
}

/* Codes a plane into symbols, and its head with classes and gains into `head`; 0 if it must be kept raw. */
KV_ECSQ_TARGET static inline int
kv_encode_plane(const kv_ecsq_plane *plane, const char *block, kv_ecsq_encoder *encoder, uint8_t *head)
{
    const kv_ecsq_sums sums = kv_sums(plane, block, encoder);
    if (!(sums.squares < 0x1p127))
        return 0;
    const int differences = plane->num_tokens > 1 && sums.cost_of_differences < sums.cost;
    const int drifts = differences && plane->role == KV_ECSQ_K;
    const uint32_t step = kv_ecsq_step(plane, &sums, encoder->level, drifts);
    if (step < KV_ECSQ_MIN_STEP || step > KV_ECSQ_MAX_STEP)
        return 0;
    for (uint64_t i = 0; i < plane->num_rows; i++)
        encoder->logarithms[i] = kv_ecsq_log2(encoder->squares[i]);
    kv_ecsq_gain(encoder->logarithms, plane->num_rows, drifts, encoder->gains);
    const uint64_t num_groups = kv_ecsq_num_groups(plane), num_channels = kv_ecsq_num_channels(plane);
    uint8_t *const classes = head + KV_ECSQ_HEAD_BYTES, *const gains = classes + 2 * num_groups;
    const kv_ecsq_encoder before = *encoder;
    const uint32_t dim = plane->row_bytes / 2;
    const float step_number = kv_codec_float(step << 16);
    memset(gains, 0, (size_t)(((uint64_t)plane->num_rows + 1) / 2));
    for (uint64_t i = 0; i < plane->num_rows; i++) {
        gains[i / 2] |= (uint8_t)(encoder->gains[i] << (i % 2 * 4));
        encoder->squares[i] = 1.0f / kv_codec_product(step_number, kv_ecsq_gains[encoder->gains[i]]);
    }
    kv_codec_store(head, step);
    head[2] = (uint8_t)differences;
    head[3] = 1;
    for (uint64_t group = 0; group < num_groups; group++) {
        const uint64_t first = group * KV_ECSQ_GROUP;
        const uint32_t chunks = num_channels - first < KV_ECSQ_GROUP ? 2 : 4;
        const char *columns[4];
        uint32_t heads[4], largest;
        float squares[2] = {0, 0};
        for (uint32_t i = 0; i < chunks; i++) {
            heads[i] = (uint32_t)((first + 16 * i) / dim);
            columns[i] = block + plane->first_byte + (uint64_t)heads[i] * plane->head_rows * plane->step_bytes
                         + (first + 16 * i) % dim * 2;
        }
        if (chunks == 4 && differences)
            largest = kv_quantise(plane, columns, heads, 4, 1, encoder, squares);
        else if (chunks == 4)
            largest = kv_quantise(plane, columns, heads, 4, 0, encoder, squares);
        else
            largest = kv_quantise(plane, columns, heads, 2, differences, encoder, squares);
        if (largest > kv_codec_bits((float)KV_ECSQ_MAX_INTEGER)) {
            encoder->num_symbols = before.num_symbols;
            encoder->num_escapes = before.num_escapes;
            encoder->num_runs = before.num_runs;
            return 0;
        }
        const uint64_t others = (uint64_t)(plane->num_tokens - 1) * chunks * 16;
        classes[group] = (uint8_t)kv_ecsq_class(squares[0], chunks * 16);
        classes[num_groups + group] = (uint8_t)kv_ecsq_class(squares[1], others);
        kv_to_symbols(encoder, encoder->group, chunks * 16, classes[group]);
        kv_to_symbols(encoder, encoder->group + chunks * 16, others, classes[num_groups + group]);
    }
    return 1;
}

/* Codes the symbols, the last first. Writes the words downwards, leaves the states as the decoder begins. */
KV_ECSQ_TARGET static inline uint16_t *kv_encode_words(const kv_ecsq_encoder *encoder, uint32_t *states)
{
    uint16_t *words = encoder->words_end;
    const uint8_t *symbols = encoder->symbols + encoder->num_symbols;
    for (uint32_t i = 0; i < KV_ECSQ_LANES; i++)
        states[i] = KV_ECSQ_FIRST_STATE;
    for (uint32_t run = encoder->num_runs; run-- > 0;) {
        const uint32_t *const table = encoder->tables->encode[encoder->runs[run].class_number];
        for (uint32_t round = encoder->runs[run].rounds; round-- > 0;) {
            symbols -= KV_ECSQ_LANES;
            for (uint32_t i = KV_ECSQ_LANES; i-- > 0;) {
                const uint32_t entry = table[symbols[i]], frequency = entry >> 16;
                uint32_t x = states[i];
                if (x >= (uint64_t)frequency << (32 - KV_ECSQ_PROB_BITS)) {
                    *--words = (uint16_t)x;
                    x >>= 16;
                }
                states[i] = (x / frequency << KV_ECSQ_PROB_BITS) + x % frequency + (entry & 0xFFFF);
            }
        }
    }
    return words;
}

/* --- Decoding ---------------------------------------------------------------------------------------------------- */

/* Decodes the integers of 32 channels; 0 if the segment ends before. */
KV_ECSQ_INLINE int kv_decode_round(kv_ecsq_decoder *decoder, const uint32_t *table, kv_e_ints integers[2])
{
    uint64_t left = (uint64_t)(decoder->words_end - decoder->words);
    if (left < 2 * KV_ECSQ_LANES && !decoder->in_tail) { /* so that no more is read than there is */
        memset(decoder->tail, 0, sizeof decoder->tail);
        memcpy(decoder->tail, decoder->words, left);
        decoder->words = decoder->tail;
        decoder->words_end = decoder->tail + left;
        decoder->in_tail = 1;
    }
    const char *words = decoder->words;
    int32_t v[KV_ECSQ_LANES];
    uint32_t escapes = 0;
    for (uint32_t i = 0; i < KV_ECSQ_LANES; i++) {
        uint32_t x = decoder->states[i];
        const uint32_t entry = table[x & ((1 << KV_ECSQ_PROB_BITS) - 1)];
        x = ((entry >> 20) + 1) * (x >> KV_ECSQ_PROB_BITS) + (entry >> 8 & 0xFFF);
        if (x < 1 << 16) {
            x = x << 16 | kv_codec_load(words);
            words += 2;
        }
        decoder->states[i] = x;
        v[i] = (int32_t)(entry & 0xFF) - KV_ECSQ_LARGEST;
        escapes |= (uint32_t)((entry & 0xFF) == KV_ECSQ_ESCAPE) << i;
    }
    if (words > decoder->words_end)
        return 0;
    decoder->words = words;
    for (; escapes; escapes &= escapes - 1) {
        if (decoder->escapes == decoder->escapes_end)
            return 0;
        v[__builtin_ctz(escapes)] = (int16_t)kv_codec_load(decoder->escapes);
        decoder->escapes += 2;
    }
    memcpy(integers, v, sizeof v);
    return 1;
}

/* Decodes a group of 32 * `rounds` channels. */
KV_ECSQ_INLINE int
kv_decode_group(const kv_ecsq_plane *plane, char *const *columns, const uint32_t *heads, uint32_t rounds, int differences,
                float step, const uint8_t *gains, const uint32_t *const tables[2], kv_ecsq_decoder *decoder)
{
    const uint64_t token_bytes = (uint64_t)plane->token_rows * plane->step_bytes;
    kv_e_uints sums[4] = {{0}};
    const uint32_t *table = tables[0];
    char *at[4];
    memcpy(at, columns, 2 * rounds * sizeof at[0]);
    for (uint32_t token = 0; token < plane->num_tokens; token++, table = tables[1]) {
#pragma GCC unroll 2
        for (uint32_t round = 0; round < rounds; round++) {
            kv_e_ints integers[2];
            if (!kv_decode_round(decoder, table, integers))
                return 0;
            const uint64_t vector = (uint64_t)token * plane->num_heads + heads[round];
            const float factor = kv_codec_product(step, kv_ecsq_gains[gains[vector / 2] >> (vector % 2 * 4) & 15]);
#pragma GCC unroll 2
            for (uint32_t half = 0; half < 2; half++) {
                const uint32_t i = 2 * round + half;
                sums[i] = differences ? sums[i] + (kv_e_uints)integers[half] : (kv_e_uints)integers[half];
                const kv_e_floats x = __builtin_convertvector((kv_e_ints)sums[i], kv_e_floats) * factor;
                const kv_e_uints bits = (kv_e_uints)x;
                const kv_e_halves halves =
                    __builtin_convertvector((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, kv_e_halves);
                memcpy(at[i], &halves, sizeof halves);
                at[i] += token_bytes;
            }
        }
    }
    return 1;
}

/* Decodes a plane whose head, classes and gains were found to be in order; 0 if the segment ends before. */
KV_ECSQ_TARGET static inline int
kv_decode_plane(const kv_ecsq_plane *plane, char *block, const uint8_t *head, kv_ecsq_decoder *decoder)
{
    const uint64_t num_groups = kv_ecsq_num_groups(plane), num_channels = kv_ecsq_num_channels(plane);
    const uint8_t *const classes = head + KV_ECSQ_HEAD_BYTES, *const gains = classes + 2 * num_groups;
    const uint32_t dim = plane->row_bytes / 2;
    const float step = kv_codec_float((uint32_t)kv_codec_load(head) << 16);
    const int differences = head[2];
    for (uint64_t group = 0; group < num_groups; group++) {
        const uint64_t first = group * KV_ECSQ_GROUP;
        const uint32_t rounds = num_channels - first < KV_ECSQ_GROUP ? 1 : 2;
        const uint32_t *const tables[2] = {decoder->tables->decode[classes[group]],
                                           decoder->tables->decode[classes[num_groups + group]]};
        char *columns[4];
        uint32_t heads[2];
        int whole;
        for (uint32_t i = 0; i < 2 * rounds; i++) {
            const uint64_t channel = first + 16 * i;
            heads[i / 2] = (uint32_t)(channel / dim);
            columns[i] = block + plane->first_byte + (uint64_t)heads[i / 2] * plane->head_rows * plane->step_bytes
                         + channel % dim * 2;
        }
        if (rounds == 2 && differences)
            whole = kv_decode_group(plane, columns, heads, 2, 1, step, gains, tables, decoder);
        else if (rounds == 2)
            whole = kv_decode_group(plane, columns, heads, 2, 0, step, gains, tables, decoder);
        else
            whole = kv_decode_group(plane, columns, heads, 1, differences, step, gains, tables, decoder);
        if (!whole)
            return 0;
    }
    return 1;
}

#undef KV_ECSQ_SET
#undef KV_ECSQ_TARGET
#undef KV_ECSQ_X86
#undef KV_ECSQ_INLINE
#undef KV_ECSQ_ROUNDED
#undef kv_sum
#undef kv_load
#undef kv_sums
#undef kv_quantise
#undef kv_to_symbols
#undef kv_encode_plane
#undef kv_encode_words
#undef kv_decode_round
#undef kv_decode_group
#undef kv_decode_plane
