/* ecsq_lanes.h: coding and decoding the planes of a segment (ecsq.h) in vectors of 16 numbers. ecsq.h includes it once
 * for each instruction set, and defines before
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
#define kv_encode_16 KV_ECSQ_NAME(kv_ecsq_encode_16)
#define kv_encode_8 KV_ECSQ_NAME(kv_ecsq_encode_8)
#define kv_look_up KV_ECSQ_NAME(kv_ecsq_look_up)
#define kv_encode_run KV_ECSQ_NAME(kv_ecsq_encode_run)
#define kv_encode_words KV_ECSQ_NAME(kv_ecsq_encode_words)
#define kv_enter_tail KV_ECSQ_NAME(kv_ecsq_enter_tail)
#define kv_decode_16 KV_ECSQ_NAME(kv_ecsq_decode_16)
#define kv_decode_round KV_ECSQ_NAME(kv_ecsq_decode_round)
#define kv_decode_group KV_ECSQ_NAME(kv_ecsq_decode_group)
#define kv_decode_plane KV_ECSQ_NAME(kv_ecsq_decode_plane)

/* --- Coding ------------------------------------------------------------------------------------------------------ */

/* The sum of 16 lanes: of those 8 apart first, then of those 4, 2 and 1 apart. */
KV_ECSQ_INLINE float kv_sum(const kv_e_floats *v)
{
#if KV_ECSQ_X86 == 512
    __m512 sum = (__m512)*v;
    sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4E));
    sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xB1));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
    return _mm512_cvtss_f32(_mm512_add_ps(sum, _mm512_permute_ps(sum, 0xB1)));
#elif KV_ECSQ_X86 == 256
    __m256 halves[2];
    memcpy(halves, v, sizeof halves);
    const __m256 sum = _mm256_add_ps(halves[0], halves[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float lanes[16];
    memcpy(lanes, v, sizeof lanes);
    for (uint32_t h = 8; h; h /= 2)
        for (uint32_t i = 0; i < h; i++)
            lanes[i] += lanes[i + h];
    return lanes[0];
#endif
}

KV_ECSQ_INLINE void kv_load(const char *address, kv_e_uints *bits)
{
    kv_e_halves halves;
    memcpy(&halves, address, sizeof halves);
    *bits = __builtin_convertvector(halves, kv_e_uints) << 16;
}

/* Sums of the plane, and the sum of squares of each vector. */
KV_ECSQ_TARGET static inline kv_ecsq_sums
kv_sums(const kv_ecsq_plane *plane, const char *block, kv_ecsq_encoder *encoder)
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

/* The integers of a group of 16 * `chunks` channels, or their differences along the tokens; how they spread, of token 0
 * and of the others. Returns the largest magnitude before rounding, as bits. */
KV_ECSQ_INLINE uint32_t
kv_quantise(const kv_ecsq_plane *plane, const char *const *columns, const uint32_t *heads, uint32_t chunks,
            int differences, kv_ecsq_encoder *encoder, kv_ecsq_spread spreads[2])
{
    const uint64_t token_bytes = (uint64_t)plane->token_rows * plane->step_bytes;
    const float *inverses = encoder->squares;
    int16_t *group = encoder->group;
    kv_e_uints before[4] = {{0}};
    kv_e_ints largest = {0};
    kv_e_floats squares = {0}, magnitudes = {0};
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
            const kv_e_floats number = __builtin_convertvector(r, kv_e_floats);
            kv_e_floats square = number * number;
            KV_ECSQ_ROUNDED(square);
            squares += square;
            magnitudes += (kv_e_floats)((kv_e_uints)number & 0x7FFFFFFF);
            const kv_e_shorts narrow = __builtin_convertvector(r, kv_e_shorts);
            memcpy(group + 16 * i, &narrow, sizeof narrow);
            at[i] += token_bytes;
        }
        if (token == 0) {
            spreads[0] = (kv_ecsq_spread){kv_sum(&squares), kv_sum(&magnitudes)};
            squares = magnitudes = (kv_e_floats){0};
        }
        inverses += plane->num_heads;
        group += 16 * chunks;
    }
    spreads[1] = (kv_ecsq_spread){kv_sum(&squares), kv_sum(&magnitudes)};
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
    if (count > 0) /* so that there are no more runs than rounds */
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
        kv_ecsq_spread spreads[2] = {{0, 0}, {0, 0}};
        for (uint32_t i = 0; i < chunks; i++) {
            heads[i] = (uint32_t)((first + 16 * i) / dim);
            columns[i] = block + plane->first_byte + (uint64_t)heads[i] * plane->head_rows * plane->step_bytes
                         + (first + 16 * i) % dim * 2;
        }
        if (chunks == 4 && differences)
            largest = kv_quantise(plane, columns, heads, 4, 1, encoder, spreads);
        else if (chunks == 4)
            largest = kv_quantise(plane, columns, heads, 4, 0, encoder, spreads);
        else
            largest = kv_quantise(plane, columns, heads, 2, differences, encoder, spreads);
        if (largest > kv_codec_bits((float)KV_ECSQ_MAX_INTEGER)) {
            encoder->num_symbols = before.num_symbols;
            encoder->num_escapes = before.num_escapes;
            encoder->num_runs = before.num_runs;
            return 0;
        }
        const uint64_t others = (uint64_t)(plane->num_tokens - 1) * chunks * 16;
        classes[group] = (uint8_t)kv_ecsq_class(spreads[0], chunks * 16);
        classes[num_groups + group] = (uint8_t)kv_ecsq_class(spreads[1], others);
        kv_to_symbols(encoder, encoder->group, chunks * 16, classes[group]);
        kv_to_symbols(encoder, encoder->group + chunks * 16, others, classes[num_groups + group]);
    }
    return 1;
}

#if KV_ECSQ_X86 == 512
/* Codes 16 symbols of frequencies f: words downwards from `words`, which is returned.
 *
 * The quotient x / f is below 2^20 and computed in float32 to less than 1/8, so 1/4 less than that, cut off, is the
 * quotient or one less. */
KV_ECSQ_INLINE uint16_t *kv_encode_16(__m512i *states, __m512i f, __m512i first, uint16_t *words)
{
    __m512i x = *states;
    const __mmask16 full = _mm512_cmpge_epu32_mask(x, _mm512_slli_epi32(f, 32 - KV_ECSQ_PROB_BITS));
    const uint32_t count = (uint32_t)_mm_popcnt_u32(full);
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, x));
    words -= count;
    _mm256_mask_storeu_epi16(words, (__mmask16)((1u << count) - 1), low);
    x = _mm512_mask_srli_epi32(x, full, x, 16);
    const __m512 ratio = _mm512_div_ps(_mm512_cvtepu32_ps(x), _mm512_cvtepi32_ps(f));
    const __m512i quotient = _mm512_cvttps_epi32(_mm512_sub_ps(ratio, _mm512_set1_ps(0.25f)));
    const __m512i rest = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, f));
    const __mmask16 one_more = _mm512_cmpge_epu32_mask(rest, f);
    x = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(quotient, KV_ECSQ_PROB_BITS), first), rest);
    *states = _mm512_mask_add_epi32(x, one_more, x, _mm512_sub_epi32(_mm512_set1_epi32(1 << KV_ECSQ_PROB_BITS), f));
    return words;
}

/* What a table of 256 words has for 32 symbols. Faster than to gather. */
KV_ECSQ_INLINE __m512i kv_look_up(const uint16_t *table, __m512i symbols)
{
    __m512i quarters[4];
#pragma GCC unroll 4
    for (uint32_t i = 0; i < 4; i++)
        quarters[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(table + 64 * i), symbols,
                                                _mm512_loadu_si512(table + 64 * i + 32));
    const __mmask32 odd = _mm512_test_epi16_mask(symbols, _mm512_set1_epi16(64));
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(symbols, _mm512_set1_epi16(128)),
                                   _mm512_mask_blend_epi16(odd, quarters[0], quarters[1]),
                                   _mm512_mask_blend_epi16(odd, quarters[2], quarters[3]));
}

/* Codes the symbols of a run, the last first. */
KV_ECSQ_INLINE uint16_t *kv_encode_run(const kv_ecsq_tables *tables, uint32_t class_number, uint32_t rounds,
                                       const uint8_t *symbols, kv_e_uints states[2], uint16_t *words)
{
    __m512i low = (__m512i)states[0], high = (__m512i)states[1];
    for (uint32_t round = rounds; round-- > 0;) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(symbols + round * KV_ECSQ_LANES));
        const __m512i numbers = _mm512_cvtepu8_epi16(bytes);
        const __m512i f = kv_look_up(tables->frequencies[class_number], numbers);
        const __m512i first = kv_look_up(tables->firsts[class_number], numbers);
        words = kv_encode_16(&high, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(f, 1)),
                             _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(first, 1)), words);
        words = kv_encode_16(&low, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(f)),
                             _mm512_cvtepu16_epi32(_mm512_castsi512_si256(first)), words);
    }
    states[0] = (kv_e_uints)low;
    states[1] = (kv_e_uints)high;
    return words;
}
#elif KV_ECSQ_X86 == 256
/* Codes 8 symbols. The quotient x / f is below 2^20 and computed in float32 to less than 1/8, so 1/4 less than that,
 * cut off, is the quotient or one less. */
KV_ECSQ_INLINE uint16_t *
kv_encode_8(const kv_ecsq_tables *tables, __m256i *states, const uint32_t *table, const uint8_t *symbols,
            uint16_t *words)
{
    const __m256i numbers = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)symbols));
    const __m256i entries = _mm256_i32gather_epi32((const int *)table, numbers, 4), f = _mm256_srli_epi32(entries, 16);
    __m256i x = *states;
    const __m256i fits = _mm256_cmpgt_epi32(f, _mm256_srli_epi32(x, 32 - KV_ECSQ_PROB_BITS));
    const uint32_t full = ~(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(fits)) & 0xFF;
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&tables->chosen[full]));
    const __m256i low = _mm256_and_si256(_mm256_permutevar8x32_epi32(x, lanes), _mm256_set1_epi32(0xFFFF));
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    uint16_t some[8];
    _mm_storeu_si128((__m128i *)some, packed);
    const uint32_t count = (uint32_t)__builtin_popcount(full);
    words -= count;
    for (uint32_t i = 0; i < count; i++)
        words[i] = some[i];
    x = _mm256_blendv_epi8(_mm256_srli_epi32(x, 16), x, fits);
    const __m256 high = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16)), _mm256_set1_ps(65536));
    const __m256 number = _mm256_add_ps(high, _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xFFFF))));
    const __m256 ratio = _mm256_div_ps(number, _mm256_cvtepi32_ps(f));
    const __m256i quotient = _mm256_cvttps_epi32(_mm256_sub_ps(ratio, _mm256_set1_ps(0.25f)));
    const __m256i rest = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, f));
    const __m256i same = _mm256_cmpgt_epi32(f, rest); /* else one more, and the rest is f less */
    const __m256i more = _mm256_andnot_si256(same, _mm256_sub_epi32(_mm256_set1_epi32(1 << KV_ECSQ_PROB_BITS), f));
    const __m256i first = _mm256_and_si256(entries, _mm256_set1_epi32(0xFFFF));
    x = _mm256_add_epi32(_mm256_slli_epi32(quotient, KV_ECSQ_PROB_BITS), more);
    *states = _mm256_add_epi32(x, _mm256_add_epi32(rest, first));
    return words;
}

KV_ECSQ_INLINE uint16_t *
kv_encode_16(const kv_ecsq_tables *tables, kv_e_uints *states, const uint32_t *table, const uint8_t *symbols,
             uint16_t *words)
{
    __m256i halves[2];
    memcpy(halves, states, sizeof halves);
    words = kv_encode_8(tables, &halves[1], table, symbols + 8, words);
    words = kv_encode_8(tables, &halves[0], table, symbols, words);
    memcpy(states, halves, sizeof halves);
    return words;
}
#else
KV_ECSQ_INLINE uint16_t *
kv_encode_16(const kv_ecsq_tables *tables, kv_e_uints *states, const uint32_t *table, const uint8_t *symbols,
             uint16_t *words)
{
    (void)tables;
    uint32_t numbers[16];
    memcpy(numbers, states, sizeof numbers);
    for (uint32_t i = 16; i-- > 0;) {
        const uint32_t entry = table[symbols[i]], frequency = entry >> 16;
        uint32_t x = numbers[i];
        if (x >= frequency << (32 - KV_ECSQ_PROB_BITS)) {
            *--words = (uint16_t)x;
            x >>= 16;
        }
        numbers[i] = (x / frequency << KV_ECSQ_PROB_BITS) + x % frequency + (entry & 0xFFFF);
    }
    memcpy(states, numbers, sizeof numbers);
    return words;
}
#endif

#if KV_ECSQ_X86 != 512
/* Codes the symbols of a run, the last first. */
KV_ECSQ_INLINE uint16_t *kv_encode_run(const kv_ecsq_tables *tables, uint32_t class_number, uint32_t rounds,
                                       const uint8_t *symbols, kv_e_uints states[2], uint16_t *words)
{
    const uint32_t *const table = tables->encode[class_number];
    for (uint32_t half = 2 * rounds; half-- > 0;)
        words = kv_encode_16(tables, &states[half % 2], table, symbols + 16 * half, words);
    return words;
}
#endif

/* Codes all symbols, the last first. Writes the words downwards, leaves the states as the decoder begins. */
KV_ECSQ_TARGET static inline uint16_t *kv_encode_words(const kv_ecsq_encoder *encoder, uint32_t *states)
{
    uint16_t *words = encoder->words_end;
    const uint8_t *symbols = encoder->symbols + encoder->num_symbols;
    kv_e_uints both[2] = {(kv_e_uints){0} + KV_ECSQ_FIRST_STATE, (kv_e_uints){0} + KV_ECSQ_FIRST_STATE};
    for (uint32_t i = encoder->num_runs; i-- > 0;) {
        const kv_ecsq_run run = encoder->runs[i];
        symbols -= (uint64_t)run.rounds * KV_ECSQ_LANES;
        words = kv_encode_run(encoder->tables, run.class_number, run.rounds, symbols, both, words);
    }
    memcpy(states, both, sizeof both);
    return words;
}

/* --- Decoding ---------------------------------------------------------------------------------------------------- */

/* Moves the last words to where zeros stand behind them, so that no more is read than there is. */
KV_ECSQ_INLINE void kv_enter_tail(kv_ecsq_decoder *decoder)
{
    const uint64_t left = (uint64_t)(decoder->words_end - decoder->words);
    memset(decoder->tail, 0, 4 * KV_ECSQ_LANES);
    memcpy(decoder->tail, decoder->words, left);
    decoder->words = decoder->tail;
    decoder->words_end = decoder->tail + left;
    decoder->tail = NULL;
}

/* Decodes 16 integers; returns a bit for each that is an escape. */
KV_ECSQ_INLINE uint32_t
kv_decode_16(const kv_ecsq_tables *tables, kv_e_uints *states, const uint32_t *table, const char **words,
             kv_e_ints *integers)
{
    (void)tables;
#if KV_ECSQ_X86 == 512
    const __m512i x = (__m512i)*states, slots = _mm512_and_si512(x, _mm512_set1_epi32((1 << KV_ECSQ_PROB_BITS) - 1));
    const __m512i entries = _mm512_i32gather_epi32(slots, table, 4);
    const __m512i next =
        _mm512_add_epi32(_mm512_mullo_epi32(_mm512_srli_epi32(entries, 20), _mm512_srli_epi32(x, KV_ECSQ_PROB_BITS)),
                         _mm512_and_si512(_mm512_srli_epi32(entries, 8), _mm512_set1_epi32(0xFFF)));
    const __mmask16 low = _mm512_cmplt_epu32_mask(next, _mm512_set1_epi32(1 << 16));
    const __m512i more = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)*words));
    *words += 2 * _mm_popcnt_u32(low);
    *states = (kv_e_uints)_mm512_mask_or_epi32(next, low, _mm512_slli_epi32(next, 16),
                                               _mm512_maskz_expand_epi32(low, more));
    const __m512i symbols = _mm512_and_si512(entries, _mm512_set1_epi32(0xFF));
    *integers = (kv_e_ints)_mm512_sub_epi32(symbols, _mm512_set1_epi32(KV_ECSQ_LARGEST));
    return _mm512_cmpeq_epi32_mask(symbols, _mm512_set1_epi32(KV_ECSQ_ESCAPE));
#elif KV_ECSQ_X86 == 256
    __m256i x[2], v[2];
    uint32_t escapes = 0;
    memcpy(x, states, sizeof x);
#pragma GCC unroll 2
    for (uint32_t i = 0; i < 2; i++) {
        const __m256i slots = _mm256_and_si256(x[i], _mm256_set1_epi32((1 << KV_ECSQ_PROB_BITS) - 1));
        const __m256i entries = _mm256_i32gather_epi32((const int *)table, slots, 4);
        const __m256i next = _mm256_add_epi32(
            _mm256_mullo_epi32(_mm256_srli_epi32(entries, 20), _mm256_srli_epi32(x[i], KV_ECSQ_PROB_BITS)),
            _mm256_and_si256(_mm256_srli_epi32(entries, 8), _mm256_set1_epi32(0xFFF)));
        const __m256i is_low = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 16), _mm256_setzero_si256());
        const uint32_t low = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(is_low));
        const __m256i more = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)*words));
        const __m256i places = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&tables->places[low]));
        const __m256i longer =
            _mm256_or_si256(_mm256_slli_epi32(next, 16), _mm256_permutevar8x32_epi32(more, places));
        x[i] = _mm256_blendv_epi8(next, longer, is_low);
        *words += 2 * __builtin_popcount(low);
        const __m256i symbols = _mm256_and_si256(entries, _mm256_set1_epi32(0xFF));
        v[i] = _mm256_sub_epi32(symbols, _mm256_set1_epi32(KV_ECSQ_LARGEST));
        const __m256i is_escape = _mm256_cmpeq_epi32(symbols, _mm256_set1_epi32(KV_ECSQ_ESCAPE));
        escapes |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(is_escape)) << (8 * i);
    }
    memcpy(states, x, sizeof x);
    memcpy(integers, v, sizeof v);
    return escapes;
#else
    uint32_t escapes = 0, x[16];
    int32_t v[16];
    memcpy(x, states, sizeof x);
    for (uint32_t i = 0; i < 16; i++) {
        const uint32_t entry = table[x[i] & ((1 << KV_ECSQ_PROB_BITS) - 1)], symbol = entry & 0xFF;
        x[i] = (entry >> 20) * (x[i] >> KV_ECSQ_PROB_BITS) + (entry >> 8 & 0xFFF);
        const uint32_t is_low = x[i] < 1 << 16;
        x[i] = is_low ? x[i] << 16 | kv_codec_load(*words) : x[i];
        *words += 2 * is_low;
        v[i] = (int32_t)symbol - KV_ECSQ_LARGEST;
        escapes |= (uint32_t)(symbol == KV_ECSQ_ESCAPE) << i;
    }
    memcpy(states, x, sizeof x);
    memcpy(integers, v, sizeof v);
    return escapes;
#endif
}

/* Decodes the integers of 32 channels; 0 if the segment ends before. */
KV_ECSQ_INLINE int kv_decode_round(kv_ecsq_decoder *decoder, const uint32_t *table, kv_e_ints integers[2])
{
    if (decoder->words_end - decoder->words < 2 * KV_ECSQ_LANES && decoder->tail != NULL)
        kv_enter_tail(decoder);
    const char *words = decoder->words;
    uint32_t escapes = kv_decode_16(decoder->tables, &decoder->states[0], table, &words, &integers[0]);
    escapes |= kv_decode_16(decoder->tables, &decoder->states[1], table, &words, &integers[1]) << 16;
    if (words > decoder->words_end)
        return 0;
    decoder->words = words;
    for (; __builtin_expect(escapes != 0, 0); escapes &= escapes - 1) {
        const int lane = __builtin_ctz(escapes);
        if (decoder->escapes == decoder->escapes_end)
            return 0;
        integers[lane / 16][lane % 16] = (int16_t)kv_codec_load(decoder->escapes);
        decoder->escapes += 2;
    }
    return 1;
}

/* Decodes a group of 32 * `rounds` channels. */
KV_ECSQ_INLINE int
kv_decode_group(const kv_ecsq_plane *plane, char *const *columns, const uint32_t *heads, uint32_t rounds,
                int differences, float step, const uint8_t *gains, const uint32_t *const tables[2],
                kv_ecsq_decoder *whole)
{
    kv_ecsq_decoder local = *whole, *const decoder = &local; /* what no store to the block can change */
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
    *whole = local;
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
#undef kv_encode_16
#undef kv_encode_8
#undef kv_look_up
#undef kv_encode_run
#undef kv_encode_words
#undef kv_enter_tail
#undef kv_decode_16
#undef kv_decode_round
#undef kv_decode_group
#undef kv_decode_plane
