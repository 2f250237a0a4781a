/* codec_rows.h: rows of a coded plane (pack.h) packed and unpacked one at a time, in portable C: the specification to
 * the letter (kvortex/codec/README.md), with which whatever is faster must agree. codec.h has what is faster.
 *
 * Invariants
 *   - No product is fused with the sum behind it (kv_codec_product), and denormal numbers are not flushed.
 *   - Nothing is allocated. Addresses need no alignment. Needs a little-endian processor.
 */
#ifndef KVORTEX_CODEC_ROWS_H
#define KVORTEX_CODEC_ROWS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "pack.h"

#ifdef __FAST_MATH__
#error "the codecs need IEEE arithmetic as it is written: no -ffast-math"
#endif

enum {
    KV_CODEC_MAX_DIM = KV_PACK_MAX_DIM,
    KV_CODEC_HUGE = 0x7180,      /* bits of 2^100 as a bfloat16: from here on a number cannot be packed */
    KV_CODEC_MIN_SCALE = 0x0380, /* 2^-120: no division by zero, and no quotient beyond float32 */
    KV_CODEC_NAN = 0x7FC0        /* the only NaN that is ever written */
};

/* Where the parts of a packed plane begin. */
typedef struct kv_codec_parts {
    uint8_t *low, *high, *scales;
} kv_codec_parts;

/* --- One row, in the words of the specification ---------------------------------------------------------------- */

/* What flips the signs of some elements, so that no vector is special to the butterfly: 128 bits, the highest of a byte
 * first, and again for the elements from 128 on. */
#define KV_CODEC_FLIP(byte)                                                                                      \
    (byte & 0x80) << 8, (byte & 0x40) << 9, (byte & 0x20) << 10, (byte & 0x10) << 11, (byte & 0x08) << 12,       \
        (byte & 0x04) << 13, (byte & 0x02) << 14, (byte & 0x01) << 15
static const uint16_t kv_codec_flips[128] = {
    KV_CODEC_FLIP(0x9e), KV_CODEC_FLIP(0x37), KV_CODEC_FLIP(0x79), KV_CODEC_FLIP(0xb9),
    KV_CODEC_FLIP(0x7f), KV_CODEC_FLIP(0x4a), KV_CODEC_FLIP(0x7c), KV_CODEC_FLIP(0x15),
    KV_CODEC_FLIP(0xf3), KV_CODEC_FLIP(0x9c), KV_CODEC_FLIP(0xc0), KV_CODEC_FLIP(0x60),
    KV_CODEC_FLIP(0x5c), KV_CODEC_FLIP(0xed), KV_CODEC_FLIP(0xc8), KV_CODEC_FLIP(0x34)};
#undef KV_CODEC_FLIP

/* Bytes of so many elements, whole rows of them, in the low and in the high part. */
static inline uint64_t kv_codec_low_bytes(uint64_t elements, uint32_t bits)
{
    return bits == 8 ? elements : elements / 2;
}

static inline uint64_t kv_codec_high_bytes(uint64_t elements, uint32_t bits)
{
    return elements * (bits & 3) / 8;
}

static inline float kv_codec_float(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static inline uint32_t kv_codec_bits(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

/* A product that is rounded: compilers fuse `x * y + z` unless something stands between. */
static inline float kv_codec_product(float x, float y)
{
    float product = x * y;
#if defined(__x86_64__)
    __asm__("" : "+x"(product));
#elif defined(__aarch64__)
    __asm__("" : "+w"(product));
#else
    __asm__("" : "+m"(product));
#endif
    return product;
}

static inline uint16_t kv_codec_load(const void *address)
{
    uint16_t bits;
    memcpy(&bits, address, sizeof bits);
    return bits;
}

static inline void kv_codec_store(void *address, uint32_t bits)
{
    const uint16_t word = (uint16_t)bits;
    memcpy(address, &word, sizeof word);
}

static inline void kv_codec_butterfly(float *y, uint32_t dim)
{
    for (uint32_t h = 1; h < dim; h *= 2)
        for (uint32_t i = 0; i < dim; i++)
            if ((i & h) == 0) {
                const float a = y[i], b = y[i + h];
                y[i] = a + b;
                y[i + h] = a - b;
            }
}

/* The scale, as a bfloat16, of a vector whose largest magnitude is `largest`: largest / m, rounded up. */
static inline uint32_t kv_codec_scale(float largest, uint32_t bits)
{
    const uint32_t up = (kv_codec_bits(largest / (float)((1 << (bits - 1)) - 1)) + 0xFFFF) >> 16;
    return up < KV_CODEC_MIN_SCALE ? KV_CODEC_MIN_SCALE : up;
}

/* To the nearest integer, ties to even, for magnitudes below 2^22. */
static inline int32_t kv_codec_round(float y)
{
    return (int32_t)(kv_codec_bits(y + 12582912.0f) - kv_codec_bits(12582912.0f));
}

/* Puts the lowest `bits` of q[0 .. dim) where the row has them. */
static inline void kv_codec_put(const int8_t *q, uint32_t dim, uint32_t bits, uint8_t *low, uint8_t *high)
{
    if (bits == 8) {
        memcpy(low, q, dim);
        return;
    }
    for (uint32_t i = 0; i < dim / 2; i++)
        low[i] = (uint8_t)((q[2 * i] & 15) | (q[2 * i + 1] & 15) << 4);
    const uint32_t width = bits - 4, count = width == 0 ? 0 : 8 / width; /* bits an element, elements a byte */
    for (uint32_t i = 0; i < dim * width / 8; i++) {
        uint32_t byte = 0;
        for (uint32_t j = 0; j < count; j++)
            byte |= ((uint32_t)q[i * count + j] >> 4 & (width == 1 ? 1 : 3)) << (j * width);
        high[i] = (uint8_t)byte;
    }
}

static inline int32_t kv_codec_get(uint32_t element, uint32_t bits, const uint8_t *low, const uint8_t *high)
{
    if (bits == 8)
        return (int8_t)low[element];
    uint32_t q = low[element / 2] >> (element % 2 * 4) & 15;
    if (bits == 5)
        q |= (uint32_t)(high[element / 8] >> (element % 8) & 1) << 4;
    if (bits == 6)
        q |= (uint32_t)(high[element / 4] >> (element % 4 * 2) & 3) << 4;
    return (int32_t)(q ^ 1u << (bits - 1)) - (1 << (bits - 1));
}

/* Packs one row; 1 if it has a number that cannot be packed.
 *
 * |q| <= m: with a = max |y|, and e the largest relative error of a rounding (2^-24), s >= fl(a / m) >= a / m * (1 - e)
 * and r <= 1 / s * (1 + e), so |fl(y * r)| <= m * (1 + e)^2 / (1 - e) < m + 1/2. A larger s makes it smaller still. */
static inline uint32_t
kv_codec_pack_row(const char *row, uint32_t dim, uint32_t bits, uint8_t *low, uint8_t *high, uint8_t *scale)
{
    float y[KV_CODEC_MAX_DIM], largest = 0;
    int8_t q[KV_CODEC_MAX_DIM];
    for (uint32_t i = 0; i < dim; i++) {
        const uint32_t x = kv_codec_load(row + 2 * i);
        if ((x & 0x7FFF) >= KV_CODEC_HUGE) {
            memset(q, 0, dim);
            kv_codec_put(q, dim, bits, low, high);
            kv_codec_store(scale, KV_CODEC_NAN);
            return 1;
        }
        y[i] = kv_codec_float((x ^ kv_codec_flips[i % 128]) << 16);
    }
    kv_codec_butterfly(y, dim);
    for (uint32_t i = 0; i < dim; i++) {
        const float magnitude = y[i] < 0 ? -y[i] : y[i];
        largest = magnitude > largest ? magnitude : largest;
    }
    const uint32_t s = kv_codec_scale(largest, bits);
    const float r = 1.0f / kv_codec_float(s << 16);
    for (uint32_t i = 0; i < dim; i++)
        q[i] = (int8_t)kv_codec_round(kv_codec_product(y[i], r));
    kv_codec_put(q, dim, bits, low, high);
    kv_codec_store(scale, s);
    return 0;
}

static inline void kv_codec_unpack_row(const uint8_t *low, const uint8_t *high, const uint8_t *scale, uint32_t bits,
                                       uint32_t dim, char *row)
{
    const float s = kv_codec_float((uint32_t)kv_codec_load(scale) << 16);
    float z[KV_CODEC_MAX_DIM];
    for (uint32_t i = 0; i < dim; i++)
        z[i] = kv_codec_product((float)kv_codec_get(i, bits, low, high), s);
    kv_codec_butterfly(z, dim);
    for (uint32_t i = 0; i < dim; i++) {
        const uint32_t w = kv_codec_bits(z[i] * (1.0f / (float)dim)) ^ (uint32_t)kv_codec_flips[i % 128] << 16;
        const int is_nan = (w & 0x7FFFFFFF) > 0x7F800000;
        kv_codec_store(row + 2 * i, is_nan ? KV_CODEC_NAN : (w + 0x7FFF + (w >> 16 & 1)) >> 16);
    }
}

/* --- Rows of a plane --------------------------------------------------------------------------------------------- */

static inline kv_codec_parts kv_codec_parts_of(const kv_plane *plane, const char *packed)
{
    uint8_t *const low = (uint8_t *)(uintptr_t)packed, *const high = low + kv_plane_low_bytes(plane);
    return (kv_codec_parts){low, high, high + kv_plane_high_bytes(plane)};
}

/* Packs or unpacks the rows first .. first + count, one after the other. */
static inline uint32_t
kv_codec_pack_rows(const kv_plane *plane, const char *rows, kv_codec_parts parts, uint32_t first, uint32_t count)
{
    const uint32_t dim = plane->row_bytes / 2, bits = plane->bits;
    uint32_t flag = 0;
    for (uint64_t row = first; row < (uint64_t)first + count; row++)
        flag |= kv_codec_pack_row(rows + row * plane->step_bytes, dim, bits,
                                  parts.low + kv_codec_low_bytes(row * dim, bits),
                                  parts.high + kv_codec_high_bytes(row * dim, bits), parts.scales + 2 * row);
    return flag;
}

static inline void
kv_codec_unpack_rows(const kv_plane *plane, kv_codec_parts parts, char *rows, uint32_t first, uint32_t count)
{
    const uint32_t dim = plane->row_bytes / 2, bits = plane->bits;
    for (uint64_t row = first; row < (uint64_t)first + count; row++)
        kv_codec_unpack_row(parts.low + kv_codec_low_bytes(row * dim, bits),
                            parts.high + kv_codec_high_bytes(row * dim, bits), parts.scales + 2 * row, bits, dim,
                            rows + row * plane->step_bytes);
}

#endif
