/* sha256.h: SHA-256 (FIPS 180-4) of messages that are padded already, in portable C; sha256_best.h has what is faster.
 *
 * Invariants
 *   - A message is padded once, by kv_sha256_pad; as long as its length stays, only the bytes that change are written
 *     again before the next digest.
 *   - A digest takes the place of its message's first 32 bytes, which is where a chain of hashes wants it.
 *   - Every kv_sha256_fn gives the same digests.
 *   - Nothing is allocated, and a padded message needs no alignment.
 *
 * Costs: a message of n bytes has (n + 9 + 63) / 64 blocks.
 */
#ifndef KVORTEX_SHA256_H
#define KVORTEX_SHA256_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { KV_SHA256_BYTES = 32, KV_SHA256_BLOCK_BYTES = 64, KV_SHA256_MAX_MESSAGES = 2 };

/* Replaces the first 32 bytes of each message by its digest. The messages, 1 .. KV_SHA256_MAX_MESSAGES of them, lie one
 * behind the other and have `num_blocks` blocks each. */
typedef void (*kv_sha256_fn)(uint8_t *messages, size_t num_messages, size_t num_blocks);

static inline uint32_t kv_load_be32(const uint8_t *source)
{
    return (uint32_t)source[0] << 24 | (uint32_t)source[1] << 16 | (uint32_t)source[2] << 8 | source[3];
}

static inline void kv_store_be32(uint8_t *target, uint32_t word)
{
    for (int i = 0; i < 4; i++)
        target[i] = (uint8_t)(word >> (24 - 8 * i));
}

/* The word whose bytes in memory, lowest first, are those of `word`. */
static inline uint32_t kv_little_endian(uint32_t word)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return word;
#else
    return __builtin_bswap32(word);
#endif
}

/* Blocks of a message of so many bytes with its padding: a bit, zeros, and the length in 8 bytes. */
static inline size_t kv_sha256_blocks(size_t bytes)
{
    return (bytes + 9 + KV_SHA256_BLOCK_BYTES - 1) / KV_SHA256_BLOCK_BYTES;
}

/* Writes the padding behind the `bytes` of a message. */
static inline void kv_sha256_pad(uint8_t *message, size_t bytes)
{
    const size_t padded_bytes = kv_sha256_blocks(bytes) * KV_SHA256_BLOCK_BYTES;
    const uint64_t bits = (uint64_t)bytes * 8;
    message[bytes] = 0x80;
    memset(message + bytes + 1, 0, padded_bytes - bytes - 1);
    kv_store_be32(message + padded_bytes - 8, (uint32_t)(bits >> 32));
    kv_store_be32(message + padded_bytes - 4, (uint32_t)bits);
}

static const uint32_t kv_sha256_initial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                              0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

static const uint32_t kv_sha256_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

/* --- Portable ---------------------------------------------------------------------------------------------------- */

static inline uint32_t kv_rotate_right(uint32_t word, int count)
{
    return word >> count | word << (32 - count);
}

static inline void kv_sha256_compress(uint32_t state[8], const uint8_t *block)
{
    uint32_t w[64];
    for (int i = 0; i < 16; i++)
        w[i] = kv_load_be32(block + 4 * i);
    for (int i = 16; i < 64; i++) {
        const uint32_t s0 = kv_rotate_right(w[i - 15], 7) ^ kv_rotate_right(w[i - 15], 18) ^ w[i - 15] >> 3;
        const uint32_t s1 = kv_rotate_right(w[i - 2], 17) ^ kv_rotate_right(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; i++) {
        const uint32_t s1 = kv_rotate_right(e, 6) ^ kv_rotate_right(e, 11) ^ kv_rotate_right(e, 25);
        const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kv_sha256_constants[i] + w[i];
        const uint32_t s0 = kv_rotate_right(a, 2) ^ kv_rotate_right(a, 13) ^ kv_rotate_right(a, 22);
        const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1;
        d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

static inline void kv_sha256_portable(uint8_t *messages, size_t num_messages, size_t num_blocks)
{
    for (; num_messages > 0; num_messages--, messages += num_blocks * KV_SHA256_BLOCK_BYTES) {
        uint32_t state[8];
        memcpy(state, kv_sha256_initial, sizeof state);
        for (size_t block = 0; block < num_blocks; block++)
            kv_sha256_compress(state, messages + block * KV_SHA256_BLOCK_BYTES);
        for (int i = 0; i < 8; i++)
            kv_store_be32(messages + 4 * i, state[i]);
    }
}

#endif
