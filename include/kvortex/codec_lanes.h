/* codec_lanes.h: the functions of codec_rows.h in vectors of KV_LANES numbers of 32 bits. codec.h includes it once for
 * each instruction set, and defines before
 *
 *   KV_LANES        4, 8 or 16
 *   KV_LANES_SET    what names of this set end in
 *   KV_LANES_TARGET attributes of its functions
 *
 * Why it gives the bytes of codec_rows.h
 *   - Packing does the same operations in the same order, on float32; what the vectors change is where numbers lie. A
 *     stage of the butterfly adds and subtracts whole vectors, so the bit of the element's index that the stage is
 *     about must be one that tells vectors apart ("register bit"). Between stages a shuffle of two vectors exchanges
 *     the register bit for a bit within the vector ("lane bit"). The comments tell the bits of the index as R (register
 *     bit) and l0, l1 .. (lane bits, lowest first); b0, b1 .. are the bits of an element's index in its row.
 *   - Unpacking adds integers: q * s has 8 + 8 bits, and a sum of 256 of them 24 at the most, so no sum of the
 *     specification is ever rounded, and the scale may be multiplied in at the end. That holds as long as nothing
 *     overflows or becomes denormal: rows with a scale outside 2^-100 .. 2^100 go through codec_rows.h. The sums fit
 *     into 16 bits: each has the first element with a plus, so it is at most 127 + 255 * 128.
 *   - A row with a number of 2^100 or more goes through codec_rows.h, too. Such a row shows in the largest magnitude
 *     behind the butterfly, since max(|a + b|, |a - b|) = |a| + |b| is at least max(|a|, |b|) in every stage, rounded
 *     or not, and Inf and NaN stay Inf or NaN.
 *
 * Rows are taken 16 at a time, so that their scales are computed side by side.
 */
#include "codec_rows.h"

#ifndef KV_LANES /* the header alone */
#define KV_LANES 4
#define KV_LANES_SET alone
#define KV_LANES_TARGET
#endif

#ifndef KV_LANES_ONCE
#define KV_LANES_ONCE

#ifdef __x86_64__
#include <immintrin.h>
#endif

enum {
    KV_CODEC_GROUP = 16,        /* rows */
    KV_CODEC_FAST_MIN = 0x0D80, /* 2^-100 */
    KV_CODEC_FAST_MAX = 0x7180  /* 2^100 */
};

#define KV_LANES_PASTE(name, set) name##_##set
#define KV_LANES_EXPAND(name, set) KV_LANES_PASTE(name, set)
#define KV_LANES_NAME(name) KV_LANES_EXPAND(name, KV_LANES_SET)
#define KV_LANES_INLINE KV_LANES_TARGET static inline __attribute__((always_inline))

#ifdef __clang__
#define KV_SHUFFLE(indices, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KV_SHUFFLE(indices, a, b, ...) __builtin_shuffle(a, b, (indices){__VA_ARGS__})
#endif

/* Indices within 128 bits from lane i on, `n` being the lanes of a vector. */
#define KV_EVEN(i, n) i, i + 2, i + n, i + n + 2
#define KV_ODD(i, n) i + 1, i + 3, i + n + 1, i + n + 3
#define KV_QUAD(i) i, i + 1, i + 2, i + 3
#define KV_ZIP(i, n) i, i + n, i + 1, i + n + 1, i + 2, i + n + 2, i + 3, i + n + 3
#define KV_BYTES(i) \
    i, i + 4, i + 8, i + 12, i + 2, i + 6, i + 10, i + 14, i + 1, i + 5, i + 9, i + 13, i + 3, i + 7, i + 11, i + 15
#define KV_HALVES(i) \
    i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14, i + 1, i + 3, i + 5, i + 7, i + 9, i + 11, i + 13, i + 15
#endif

#if defined(__x86_64__)
#define KV_LANES_ROUNDED(x) __asm__("" : "+v"(x))
#elif defined(__aarch64__)
#define KV_LANES_ROUNDED(x) __asm__("" : "+w"(x))
#else
#define KV_LANES_ROUNDED(x) __asm__("" : "+m"(x))
#endif

#define kv_floats KV_LANES_NAME(kv_floats)
#define kv_ints KV_LANES_NAME(kv_ints)
#define kv_uints KV_LANES_NAME(kv_uints)
#define kv_words KV_LANES_NAME(kv_words)
#define kv_uwords KV_LANES_NAME(kv_uwords)
#define kv_bytes KV_LANES_NAME(kv_bytes)
#define kv_longs KV_LANES_NAME(kv_longs)
#define kv_few_bytes KV_LANES_NAME(kv_few_bytes)
#define kv_half_bytes KV_LANES_NAME(kv_half_bytes)
typedef float kv_floats __attribute__((vector_size(4 * KV_LANES)));
typedef int32_t kv_ints __attribute__((vector_size(4 * KV_LANES), may_alias)); /* others are swapped as these */
typedef uint32_t kv_uints __attribute__((vector_size(4 * KV_LANES)));
typedef int16_t kv_words __attribute__((vector_size(4 * KV_LANES)));
typedef uint16_t kv_uwords __attribute__((vector_size(4 * KV_LANES)));
typedef uint8_t kv_bytes __attribute__((vector_size(4 * KV_LANES)));
typedef int64_t kv_longs __attribute__((vector_size(4 * KV_LANES)));
typedef uint8_t kv_few_bytes __attribute__((vector_size(KV_LANES)));
typedef uint8_t kv_half_bytes __attribute__((vector_size(2 * KV_LANES)));

/* --- Moving numbers between vectors ------------------------------------------------------------------------------ */

#define kv_swap_lane KV_LANES_NAME(kv_swap_lane)
#define kv_swap_quad KV_LANES_NAME(kv_swap_quad)
#define kv_swap_word KV_LANES_NAME(kv_swap_word)
#define kv_join_bytes KV_LANES_NAME(kv_join_bytes)
#define kv_join_nibbles KV_LANES_NAME(kv_join_nibbles)

/* R, l0, l1 -> l0, l1, R within each quad, of numbers of 32 bits. */
KV_LANES_INLINE void kv_swap_lane(kv_ints *a, kv_ints *b)
{
    const kv_floats x = (kv_floats)*a, y = (kv_floats)*b; /* for these, GCC knows a shuffle without an index vector */
#if KV_LANES == 4
    *a = (kv_ints)KV_SHUFFLE(kv_ints, x, y, KV_EVEN(0, 4));
    *b = (kv_ints)KV_SHUFFLE(kv_ints, x, y, KV_ODD(0, 4));
#elif KV_LANES == 8
    *a = (kv_ints)KV_SHUFFLE(kv_ints, x, y, KV_EVEN(0, 8), KV_EVEN(4, 8));
    *b = (kv_ints)KV_SHUFFLE(kv_ints, x, y, KV_ODD(0, 8), KV_ODD(4, 8));
#else
    *a = (kv_ints)KV_SHUFFLE(kv_ints, x, y, KV_EVEN(0, 16), KV_EVEN(4, 16), KV_EVEN(8, 16), KV_EVEN(12, 16));
    *b = (kv_ints)KV_SHUFFLE(kv_ints, x, y, KV_ODD(0, 16), KV_ODD(4, 16), KV_ODD(8, 16), KV_ODD(12, 16));
#endif
}

/* The same among quads, if there are any: R, l2 -> l2, R with 8 lanes; R, l2, l3 -> l2, l3, R with 16. */
KV_LANES_INLINE void kv_swap_quad(kv_ints *a, kv_ints *b)
{
    const kv_ints x = *a, y = *b;
#if KV_LANES == 4
    *a = x, *b = y;
#elif KV_LANES == 8
    *a = KV_SHUFFLE(kv_ints, x, y, KV_QUAD(0), KV_QUAD(8));
    *b = KV_SHUFFLE(kv_ints, x, y, KV_QUAD(4), KV_QUAD(12));
#else
    *a = KV_SHUFFLE(kv_ints, x, y, KV_QUAD(0), KV_QUAD(8), KV_QUAD(16), KV_QUAD(24));
    *b = KV_SHUFFLE(kv_ints, x, y, KV_QUAD(4), KV_QUAD(12), KV_QUAD(20), KV_QUAD(28));
#endif
}

/* R, l0, l1, l2 -> l2, R, l0, l1 within each quad, of numbers of 16 bits. */
KV_LANES_INLINE void kv_swap_word(kv_words *a, kv_words *b)
{
    const kv_words x = *a, y = *b;
#if KV_LANES == 4
    *a = KV_SHUFFLE(kv_words, x, y, KV_ZIP(0, 8));
    *b = KV_SHUFFLE(kv_words, x, y, KV_ZIP(4, 8));
#elif KV_LANES == 8
    *a = KV_SHUFFLE(kv_words, x, y, KV_ZIP(0, 16), KV_ZIP(8, 16));
    *b = KV_SHUFFLE(kv_words, x, y, KV_ZIP(4, 16), KV_ZIP(12, 16));
#else
    *a = KV_SHUFFLE(kv_words, x, y, KV_ZIP(0, 32), KV_ZIP(8, 32), KV_ZIP(16, 32), KV_ZIP(24, 32));
    *b = KV_SHUFFLE(kv_words, x, y, KV_ZIP(4, 32), KV_ZIP(12, 32), KV_ZIP(20, 32), KV_ZIP(28, 32));
#endif
}

/* The lowest bytes of four vectors, one vector behind the other. */
KV_LANES_INLINE kv_bytes kv_join_bytes(const kv_uints *v)
{
    const kv_uints near = (v[0] & 0xFF) | v[1] << 16, far = (v[2] & 0xFF) | v[3] << 16; /* v0 . v1 ., v2 . v3 . */
    const kv_bytes mixed = (kv_bytes)((near & 0x00FF00FF) | far << 8);                  /* v0 v2 v1 v3 */
#if KV_LANES == 4
    return KV_SHUFFLE(kv_bytes, mixed, mixed, KV_BYTES(0));
#elif KV_LANES == 8
    const kv_ints quads = (kv_ints)KV_SHUFFLE(kv_bytes, mixed, mixed, KV_BYTES(0), KV_BYTES(16));
    return (kv_bytes)KV_SHUFFLE(kv_ints, quads, quads, 0, 4, 1, 5, 2, 6, 3, 7);
#else
    const kv_ints quads =
        (kv_ints)KV_SHUFFLE(kv_bytes, mixed, mixed, KV_BYTES(0), KV_BYTES(16), KV_BYTES(32), KV_BYTES(48));
    return (kv_bytes)KV_SHUFFLE(kv_ints, quads, quads, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#endif
}

/* The lower halves of the bytes of two vectors, two halves a byte. */
KV_LANES_INLINE kv_bytes kv_join_nibbles(kv_bytes a, kv_bytes b)
{
    const kv_uwords x = (kv_uwords)a, y = (kv_uwords)b;
    const kv_bytes mixed = (kv_bytes)((x & 0x0F) | (x >> 4 & 0xF0) | (y << 8 & 0x0F00) | (y << 4 & 0xF000));
#if KV_LANES == 4
    return KV_SHUFFLE(kv_bytes, mixed, mixed, KV_HALVES(0));
#elif KV_LANES == 8
    const kv_longs halves = (kv_longs)KV_SHUFFLE(kv_bytes, mixed, mixed, KV_HALVES(0), KV_HALVES(16));
    return (kv_bytes)KV_SHUFFLE(kv_longs, halves, halves, 0, 2, 1, 3);
#else
    const kv_longs halves =
        (kv_longs)KV_SHUFFLE(kv_bytes, mixed, mixed, KV_HALVES(0), KV_HALVES(16), KV_HALVES(32), KV_HALVES(48));
    return (kv_bytes)KV_SHUFFLE(kv_longs, halves, halves, 0, 2, 4, 6, 1, 3, 5, 7);
#endif
}

/* --- Packing ----------------------------------------------------------------------------------------------------- */

#define kv_float_stage KV_LANES_NAME(kv_float_stage)
#define kv_rotate_row KV_LANES_NAME(kv_rotate_row)
#define kv_scale_group KV_LANES_NAME(kv_scale_group)
#define kv_put_group KV_LANES_NAME(kv_put_group)
#define kv_rotate_group KV_LANES_NAME(kv_rotate_group)
#define kv_larger KV_LANES_NAME(kv_larger)

KV_LANES_INLINE void kv_float_stage(kv_floats *a, kv_floats *b)
{
    const kv_floats x = *a, y = *b;
    *a = x + y;
    *b = x - y;
}

KV_LANES_INLINE kv_ints kv_larger(kv_ints a, kv_ints b)
{
#if defined(__x86_64__) && KV_LANES == 4
    return (kv_ints)_mm_max_epi32((__m128i)a, (__m128i)b);
#elif defined(__x86_64__) && KV_LANES == 8
    return (kv_ints)_mm256_max_epi32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return (kv_ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    const kv_ints is_a = a > b;
    return (a & is_a) | (b & ~is_a);
#endif
}

/* y = butterfly(flip(row)); returns the largest magnitudes, a lane each. */
KV_LANES_INLINE kv_ints kv_rotate_row(const char *row, float *y, uint32_t dim)
{
    kv_floats v[KV_CODEC_MAX_DIM / KV_LANES];
    kv_ints largest = {0};
#pragma GCC unroll 64
    for (uint32_t i = 0; i < dim / KV_LANES; i += 2) {
        kv_uints pairs, flips;
        memcpy(&pairs, row + 2 * i * KV_LANES, sizeof pairs);
        memcpy(&flips, kv_codec_flips + i * KV_LANES % 128, sizeof flips);
        pairs ^= flips;
        kv_floats a = (kv_floats)(pairs << 16), b = (kv_floats)(pairs & 0xFFFF0000); /* R = b0, l0 = b1, .. */
        kv_float_stage(&a, &b);
        kv_swap_lane((kv_ints *)&a, (kv_ints *)&b); /* R = b1 */
        kv_float_stage(&a, &b);
        kv_swap_lane((kv_ints *)&a, (kv_ints *)&b); /* R = b2, l0 = b0, l1 = b1 */
        kv_float_stage(&a, &b);
        for (int quads = KV_LANES / 4; quads > 1; quads /= 2) {
            kv_swap_quad((kv_ints *)&a, (kv_ints *)&b); /* R = b3, then b4; the lanes below are in order */
            kv_float_stage(&a, &b);
        }
        v[i] = a, v[i + 1] = b;
    }
#pragma GCC unroll 8
    for (uint32_t h = 2; h < dim / KV_LANES; h *= 2)
#pragma GCC unroll 32
        for (uint32_t i = 0; i < dim / KV_LANES / 2; i++)
            kv_float_stage(&v[i / h * 2 * h + i % h], &v[i / h * 2 * h + i % h + h]);
#pragma GCC unroll 64
    for (uint32_t i = 0; i < dim / KV_LANES; i++) {
        largest = kv_larger(largest, (kv_ints)v[i] & 0x7FFFFFFF);
        memcpy(y + i * KV_LANES, &v[i], sizeof v[i]);
    }
    return largest;
}

KV_LANES_INLINE void kv_rotate_group(const char *rows, uint64_t step, uint32_t count, uint32_t dim, float *y,
                                     kv_ints *largest)
{
    for (uint32_t i = 0; i < count; i++)
        largest[i] = kv_rotate_row(rows + i * step, y + i * dim, dim);
}

/* Scales of a group, as bits of bfloat16, and what to multiply with; largest[0 ..] become the largest magnitudes. */
KV_LANES_INLINE void kv_scale_group(kv_ints *largest, uint32_t bits, uint32_t *scales, float *factors)
{
    const float m = (float)((1 << (bits - 1)) - 1);
#pragma GCC unroll 4
    for (uint32_t i = 0; i < KV_CODEC_GROUP / KV_LANES; i++) {
        kv_ints *const rows = largest + i * KV_LANES;
#pragma GCC unroll 4
        for (uint32_t left = KV_LANES; left > 1; left /= 2)
#pragma GCC unroll 8
            for (uint32_t j = 0; j < left / 2; j++) {
                kv_ints a = rows[2 * j], b = rows[2 * j + 1];
                if (left > KV_LANES / 4)
                    kv_swap_lane(&a, &b); /* twice: lane j of each quad belongs to row j */
                else
                    kv_swap_quad(&a, &b);
                rows[j] = kv_larger(a, b);
            }
        const kv_ints up = (kv_ints)((kv_uints)((kv_floats)rows[0] / m) + 0xFFFF) >> 16;
        const kv_ints s = kv_larger(up, (kv_ints){0} + KV_CODEC_MIN_SCALE);
        const kv_floats r = 1.0f / (kv_floats)((kv_uints)s << 16);
        memcpy(scales + i * KV_LANES, &s, sizeof s);
        memcpy(factors + i * KV_LANES, &r, sizeof r);
        memcpy((char *)largest + i * sizeof rows[0], &rows[0], sizeof rows[0]);
    }
}

/* Rounds `elements` numbers, rounded up to a multiple of 16 vectors, and writes their bits. */
KV_LANES_INLINE void kv_put_group(const float *y, const float *factors, uint32_t elements, uint32_t log2_dim,
                                  uint32_t bits, uint8_t *low, uint8_t *high)
{
    for (uint32_t first = 0; first < elements; first += 16 * KV_LANES) {
        kv_bytes q[4];
        kv_uints parts[4];
#pragma GCC unroll 4
        for (uint32_t i = 0; i < 4; i++) {
#pragma GCC unroll 4
            for (uint32_t j = 0; j < 4; j++) {
                const uint32_t element = first + (4 * i + j) * KV_LANES;
                kv_floats v;
                memcpy(&v, y + element, sizeof v);
                v *= factors[element >> log2_dim];
                KV_LANES_ROUNDED(v);
                parts[j] = (kv_uints)(v + 12582912.0f); /* its lowest byte is q */
            }
            q[i] = kv_join_bytes(parts);
        }
        if (bits == 8) {
            memcpy(low, q, sizeof q);
            low += sizeof q;
            continue;
        }
        const kv_bytes nibbles[2] = {kv_join_nibbles(q[0], q[1]), kv_join_nibbles(q[2], q[3])};
        memcpy(low, nibbles, sizeof nibbles);
        low += sizeof nibbles;
        if (bits == 4)
            continue;
#pragma GCC unroll 4
        for (uint32_t i = 0; i < 4; i++) { /* what is above the nibbles of four elements, into a byte */
            kv_uints x = (kv_uints)q[i] >> 4 & (bits == 6 ? 0x03030303 : 0x01010101);
            x |= x >> (bits == 6 ? 6 : 7);
            parts[i] = x | x >> (bits == 6 ? 12 : 14);
        }
        kv_bytes bytes = kv_join_bytes(parts);
        if (bits == 5)
            bytes = kv_join_nibbles(bytes, bytes);
        memcpy(high, &bytes, bits == 6 ? sizeof bytes : sizeof bytes / 2);
        high += bits == 6 ? sizeof bytes : sizeof bytes / 2;
    }
}

#define kv_pack_rows KV_LANES_NAME(kv_codec_pack_rows)
#define kv_unpack_rows KV_LANES_NAME(kv_codec_unpack_rows)

KV_LANES_TARGET static inline uint32_t
kv_pack_rows(const kv_plane *plane, const char *rows, kv_codec_parts parts, uint32_t first, uint32_t count)
{
    const uint32_t dim = plane->row_bytes / 2, log2_dim = (uint32_t)__builtin_ctz(dim), bits = plane->bits;
    uint8_t spare_low[KV_CODEC_GROUP * KV_CODEC_MAX_DIM], spare_high[KV_CODEC_GROUP * KV_CODEC_MAX_DIM / 4];
    float y[KV_CODEC_GROUP * KV_CODEC_MAX_DIM] __attribute__((aligned(64)));
    uint32_t flag = 0;
    for (uint32_t done = 0; done < count; done += KV_CODEC_GROUP) {
        const uint64_t row = (uint64_t)first + done;
        const uint32_t now = count - done < KV_CODEC_GROUP ? count - done : KV_CODEC_GROUP, elements = now * dim;
        const char *const from = rows + row * plane->step_bytes;
        const int whole = now == KV_CODEC_GROUP;
        uint8_t *const low = parts.low + kv_codec_low_bytes(row * dim, bits);
        uint8_t *const high = parts.high + kv_codec_high_bytes(row * dim, bits);
        uint8_t *const low_now = whole ? low : spare_low, *const high_now = whole ? high : spare_high;
        uint32_t scales[KV_CODEC_GROUP], largest_bits[KV_CODEC_GROUP];
        float factors[KV_CODEC_GROUP];
        kv_ints largest[KV_CODEC_GROUP];
        if (!whole) { /* rows of zeros behind them */
            memset(largest, 0, sizeof largest);
            memset(y + elements, 0, sizeof y - elements * sizeof y[0]);
        }
        switch (dim) {
        case 32: kv_rotate_group(from, plane->step_bytes, now, 32, y, largest); break;
        case 64: kv_rotate_group(from, plane->step_bytes, now, 64, y, largest); break;
        case 128: kv_rotate_group(from, plane->step_bytes, now, 128, y, largest); break;
        default: kv_rotate_group(from, plane->step_bytes, now, 256, y, largest);
        }
        kv_scale_group(largest, bits, scales, factors);
        memcpy(largest_bits, largest, sizeof largest_bits);
        switch (bits) {
        case 4: kv_put_group(y, factors, elements, log2_dim, 4, low_now, high_now); break;
        case 5: kv_put_group(y, factors, elements, log2_dim, 5, low_now, high_now); break;
        case 6: kv_put_group(y, factors, elements, log2_dim, 6, low_now, high_now); break;
        default: kv_put_group(y, factors, elements, log2_dim, 8, low_now, high_now);
        }
        if (!whole) {
            memcpy(low, spare_low, kv_codec_low_bytes(elements, bits));
            memcpy(high, spare_high, kv_codec_high_bytes(elements, bits));
        }
        for (uint32_t i = 0; i < now; i++) {
            if (largest_bits[i] < (uint32_t)KV_CODEC_HUGE << 16)
                kv_codec_store(parts.scales + 2 * (row + i), scales[i]);
            else
                flag |= kv_codec_pack_rows(plane, rows, parts, (uint32_t)row + i, 1);
        }
    }
    return flag;
}

/* --- Unpacking --------------------------------------------------------------------------------------------------- */

#define kv_word_stage KV_LANES_NAME(kv_word_stage)
#define kv_get_words KV_LANES_NAME(kv_get_words)
#define kv_mix_words KV_LANES_NAME(kv_mix_words)
#define kv_get_group KV_LANES_NAME(kv_get_group)
#define kv_finish_row KV_LANES_NAME(kv_finish_row)
#define kv_to_8_bits KV_LANES_NAME(kv_to_8_bits)

KV_LANES_INLINE void kv_word_stage(kv_words *a, kv_words *b)
{
    const kv_words x = *a, y = *b;
    *a = x + y;
    *b = x - y;
}

/* Stages b3, b2, and b1 if asked for, of two vectors with R = b3; l0, l1, l2 = b0, b1, b2, then and afterwards. */
KV_LANES_INLINE void kv_mix_words(kv_words *a, kv_words *b, int with_b1)
{
    kv_word_stage(a, b);
    kv_swap_lane((kv_ints *)a, (kv_ints *)b); /* R = b1; l0, l1, l2 = b0, b2, b3 */
    if (with_b1)
        kv_word_stage(a, b);
    kv_swap_lane((kv_ints *)a, (kv_ints *)b); /* R = b2; b0, b3, b1 */
    kv_word_stage(a, b);
    kv_swap_lane((kv_ints *)a, (kv_ints *)b);
}

/* Reads 8 * KV_LANES elements and does every stage of the butterfly within them, except those of `dim` and above. */
KV_LANES_INLINE void kv_get_words(const uint8_t *low, const uint8_t *high, uint32_t bits, uint32_t dim, int16_t *sums)
{
    kv_words v[4];
    if (bits == 8) {
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
            kv_words a, b;
            memcpy(&b, low + 2 * i * KV_LANES, sizeof b);
            a = (kv_words)((kv_uwords)b << 8) >> 8, b >>= 8; /* R = b0; l0, l1, l2 = b1, b2, b3 */
            kv_word_stage(&a, &b);
            kv_swap_word(&a, &b); /* R = b3; b0, b1, b2 */
            kv_mix_words(&a, &b, 1);
            if (KV_LANES >= 8) {
                kv_swap_quad((kv_ints *)&a, (kv_ints *)&b); /* R = b4, among quads b3; or b5, b3 */
                kv_word_stage(&a, &b);
            }
            if (KV_LANES == 16) {
                kv_swap_quad((kv_ints *)&a, (kv_ints *)&b); /* R = b5; b3, b4 */
                if (dim > 32)
                    kv_word_stage(&a, &b);
            }
            v[i] = a, v[i + 1] = b;
        }
        if (dim > 4 * KV_LANES) {
            kv_word_stage(&v[0], &v[2]);
            kv_word_stage(&v[1], &v[3]);
        }
    } else {
        const uint32_t width = bits - 4;
        const uint16_t mask = (uint16_t)((1u << width) - 1);
        kv_uwords nibbles, above = {0};
        memcpy(&nibbles, low, sizeof nibbles);
        if (bits == 6) { /* a byte for the elements of a word */
            kv_half_bytes bytes;
            memcpy(&bytes, high, sizeof bytes);
            above = __builtin_convertvector(bytes, kv_uwords);
        }
        if (bits == 5) { /* half a byte */
            kv_few_bytes bytes;
            memcpy(&bytes, high, sizeof bytes);
            const kv_uints wide = __builtin_convertvector(bytes, kv_uints);
            above = (kv_uwords)(wide | wide << 12);
        }
#pragma GCC unroll 4
        for (uint32_t i = 0; i < 4; i++) { /* v[R + 2 * S]: R = b0, S = b1; l0, l1, l2 = b2, b3, b4 */
            const kv_uwords q = (nibbles >> (int)(4 * i) & 15) | (above >> (int)(width * i) & mask) << 4;
            v[i] = (kv_words)(q << (int)(16 - bits)) >> (int)(16 - bits);
        }
        kv_word_stage(&v[0], &v[1]), kv_word_stage(&v[2], &v[3]);
        kv_word_stage(&v[0], &v[2]), kv_word_stage(&v[1], &v[3]);
        kv_swap_word(&v[0], &v[2]), kv_swap_word(&v[1], &v[3]); /* S = b4; b1, b2, b3 */
        kv_swap_word(&v[0], &v[1]), kv_swap_word(&v[2], &v[3]); /* R = b3; b0, b1, b2 */
        kv_word_stage(&v[0], &v[2]), kv_word_stage(&v[1], &v[3]);
        kv_mix_words(&v[0], &v[1], 0), kv_mix_words(&v[2], &v[3], 0);
        if (KV_LANES >= 8) { /* R = b5, among quads b3; or b6, b3 */
            kv_swap_quad((kv_ints *)&v[0], (kv_ints *)&v[1]), kv_swap_quad((kv_ints *)&v[2], (kv_ints *)&v[3]);
            if (dim > 32)
                kv_word_stage(&v[0], &v[1]), kv_word_stage(&v[2], &v[3]);
        }
        if (KV_LANES == 16) { /* S = b6; b3, b4 */
            kv_swap_quad((kv_ints *)&v[0], (kv_ints *)&v[2]), kv_swap_quad((kv_ints *)&v[1], (kv_ints *)&v[3]);
            if (dim > 64)
                kv_word_stage(&v[0], &v[2]), kv_word_stage(&v[1], &v[3]);
        }
        if (KV_LANES == 8) { /* S = b4 comes before R = b5 */
            const kv_words between = v[1];
            v[1] = v[2], v[2] = between;
        }
    }
    memcpy(sums, v, sizeof v);
}

KV_LANES_INLINE void
kv_get_group(const uint8_t *low, const uint8_t *high, uint32_t elements, uint32_t bits, uint32_t dim, int16_t *sums)
{
    for (uint32_t first = 0; first < elements; first += 8 * KV_LANES)
        kv_get_words(low + kv_codec_low_bytes(first, bits), high + kv_codec_high_bytes(first, bits), bits, dim,
                     sums + first);
}

/* Rounds to the 8 significant bits of a bfloat16, ties to even: beside 1.5 * 2^16 times its own power of two, a number
 * has no more. Products and sums are exact but for the one that rounds, so it makes no difference what is fused. */
KV_LANES_INLINE kv_floats kv_to_8_bits(kv_floats x)
{
    const kv_floats large = (kv_floats)((kv_uints)x & 0x7F800000) * 98304.0f;
    return (x + large) - large;
}

/* The last stages, then the scale, the signs, and bfloat16. */
KV_LANES_INLINE void kv_finish_row(const int16_t *sums, float scale, uint32_t dim, char *row)
{
    const uint32_t words = 2 * KV_LANES, num_vectors = dim / words;
    const float factor = scale * (1.0f / 65536) / (float)dim; /* exact; for numbers in the upper halves of 32 bits */
    kv_words v[KV_CODEC_MAX_DIM / (2 * KV_LANES)];
    memcpy(v, sums, 2 * dim);
#pragma GCC unroll 8
    for (uint32_t h = 4; h < num_vectors; h *= 2)
#pragma GCC unroll 16
        for (uint32_t i = 0; i < num_vectors / 2; i++)
            kv_word_stage(&v[i / h * 2 * h + i % h], &v[i / h * 2 * h + i % h + h]);
#pragma GCC unroll 32
    for (uint32_t i = 0; i < num_vectors; i++) {
        const kv_uints pairs = (kv_uints)v[i];
        const kv_floats even = __builtin_convertvector((kv_ints)(pairs << 16), kv_floats) * factor;
        const kv_floats odd = __builtin_convertvector((kv_ints)(pairs & 0xFFFF0000), kv_floats) * factor;
        kv_uints flips;
        memcpy(&flips, kv_codec_flips + i * words % 128, sizeof flips);
        const kv_uints both = ((kv_uints)kv_to_8_bits(even) >> 16 | (kv_uints)kv_to_8_bits(odd)) ^ flips;
        memcpy(row + 2 * i * words, &both, sizeof both);
    }
}

KV_LANES_TARGET static inline void
kv_unpack_rows(const kv_plane *plane, kv_codec_parts parts, char *rows, uint32_t first, uint32_t count)
{
    const uint32_t dim = plane->row_bytes / 2, bits = plane->bits;
    uint8_t spare_low[KV_CODEC_GROUP * KV_CODEC_MAX_DIM], spare_high[KV_CODEC_GROUP * KV_CODEC_MAX_DIM / 4];
    int16_t sums[KV_CODEC_GROUP * KV_CODEC_MAX_DIM] __attribute__((aligned(64)));
    for (uint32_t done = 0; done < count; done += KV_CODEC_GROUP) {
        const uint64_t row = (uint64_t)first + done;
        const uint32_t now = count - done < KV_CODEC_GROUP ? count - done : KV_CODEC_GROUP, elements = now * dim;
        const uint8_t *low = parts.low + kv_codec_low_bytes(row * dim, bits);
        const uint8_t *high = parts.high + kv_codec_high_bytes(row * dim, bits);
        if (now < KV_CODEC_GROUP) { /* whole vectors are read: zeros behind the rows */
            memset(spare_low, 0, sizeof spare_low);
            memset(spare_high, 0, sizeof spare_high);
            low = memcpy(spare_low, low, kv_codec_low_bytes(elements, bits));
            high = memcpy(spare_high, high, kv_codec_high_bytes(elements, bits));
        }
        switch (bits) {
        case 4: kv_get_group(low, high, elements, 4, dim, sums); break;
        case 5: kv_get_group(low, high, elements, 5, dim, sums); break;
        case 6: kv_get_group(low, high, elements, 6, dim, sums); break;
        default: kv_get_group(low, high, elements, 8, dim, sums);
        }
        for (uint32_t i = 0; i < now; i++) {
            const uint32_t scale = kv_codec_load(parts.scales + 2 * (row + i));
            const float s = kv_codec_float(scale << 16);
            char *const target = rows + (row + i) * plane->step_bytes;
            if (scale < KV_CODEC_FAST_MIN || scale >= KV_CODEC_FAST_MAX) {
                kv_codec_unpack_rows(plane, parts, rows, (uint32_t)row + i, 1);
                continue;
            }
            switch (dim) {
            case 32: kv_finish_row(sums + i * dim, s, 32, target); break;
            case 64: kv_finish_row(sums + i * dim, s, 64, target); break;
            case 128: kv_finish_row(sums + i * dim, s, 128, target); break;
            default: kv_finish_row(sums + i * dim, s, 256, target);
            }
        }
    }
}

#undef KV_LANES
#undef KV_LANES_SET
#undef KV_LANES_TARGET
#undef KV_LANES_ROUNDED
#undef kv_floats
#undef kv_ints
#undef kv_uints
#undef kv_words
#undef kv_uwords
#undef kv_bytes
#undef kv_longs
#undef kv_few_bytes
#undef kv_half_bytes
#undef kv_swap_lane
#undef kv_swap_quad
#undef kv_swap_word
#undef kv_join_bytes
#undef kv_join_nibbles
#undef kv_float_stage
#undef kv_rotate_row
#undef kv_rotate_group
#undef kv_scale_group
#undef kv_put_group
#undef kv_larger
#undef kv_pack_rows
#undef kv_unpack_rows
#undef kv_word_stage
#undef kv_get_words
#undef kv_mix_words
#undef kv_get_group
#undef kv_finish_row
#undef kv_to_8_bits
