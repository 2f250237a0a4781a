/* sha256_best.h: the fastest SHA-256 that this processor has: the SHA instructions of x86-64, or else portable C.
 *
 * Vectors hold four 32-bit words, named here from the lowest lane up. The instructions keep the eight words a .. h of
 * the state in two of them, `feba` and `hgdc`; one sha256rnds2 does two rounds.
 *
 * Costs: on a Xeon of 2021 at 3.5 GHz a block takes 48 ns with SHA instructions, 44 ns where two messages are hashed side
 * by side, and 255 ns in portable C. (bench/bench_keys.py)
 */
#ifndef KVORTEX_SHA256_BEST_H
#define KVORTEX_SHA256_BEST_H

#include "sha256.h"

#ifdef __x86_64__

#include <cpuid.h>
#include <immintrin.h>

#define KV_SHA256_TARGET __attribute__((target("sha,sse4.1,ssse3")))

KV_SHA256_TARGET static inline __m128i kv_sha256_swap_bytes(__m128i words)
{
    return _mm_shuffle_epi8(words, _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
}

/* sigma0 of the message schedule: rotations by 7 and 18, a shift by 3. Not sha256msg1: on Intel's cores that one waits
 * for the unit that does the rounds, while these have room beside it (one chain 5 % faster, two 12 %). */
KV_SHA256_TARGET static inline __m128i kv_sha256_sigma0(__m128i x)
{
    const __m128i by_7 = _mm_xor_si128(_mm_srli_epi32(x, 7), _mm_slli_epi32(x, 25));
    const __m128i by_18 = _mm_xor_si128(_mm_srli_epi32(x, 18), _mm_slli_epi32(x, 14));
    return _mm_xor_si128(_mm_xor_si128(by_7, by_18), _mm_srli_epi32(x, 3));
}

KV_SHA256_TARGET static inline void kv_sha256_compress_x86(__m128i *feba, __m128i *hgdc, const uint8_t *block)
{
    __m128i w[4], state0 = *feba, state1 = *hgdc;
    for (int i = 0; i < 4; i++)
        w[i] = kv_sha256_swap_bytes(_mm_loadu_si128((const __m128i *)block + i));
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) { /* four rounds; w[i % 4] are their words */
        const __m128i terms = _mm_add_epi32(w[i % 4], _mm_loadu_si128((const __m128i *)kv_sha256_constants + i));
        state1 = _mm_sha256rnds2_epu32(state1, state0, terms); /* two rounds on, feba becomes the next hgdc */
        state0 = _mm_sha256rnds2_epu32(state0, state1, _mm_shuffle_epi32(terms, 0x0E));
        if (i < 12) { /* the words of four rounds further on: w[t] = w[t-16] + s0(w[t-15]) + w[t-7] + s1(w[t-2]) */
            const __m128i back_15 = _mm_alignr_epi8(w[(i + 1) % 4], w[i % 4], 4);
            const __m128i back_7 = _mm_alignr_epi8(w[(i + 3) % 4], w[(i + 2) % 4], 4);
            const __m128i sum = _mm_add_epi32(_mm_add_epi32(w[i % 4], kv_sha256_sigma0(back_15)), back_7);
            w[i % 4] = _mm_sha256msg2_epu32(sum, w[(i + 3) % 4]);
        }
    }
    *feba = _mm_add_epi32(*feba, state0);
    *hgdc = _mm_add_epi32(*hgdc, state1);
}

/* A chain waits for its own last round, so a second message beside it comes almost for free where the units allow. */
KV_SHA256_TARGET static inline __attribute__((always_inline)) void
kv_sha256_side_by_side(uint8_t *messages, size_t num_messages, size_t num_blocks)
{
    const uint32_t *const initial = kv_sha256_initial;
    const size_t step = num_blocks * KV_SHA256_BLOCK_BYTES;
    __m128i feba[KV_SHA256_MAX_MESSAGES], hgdc[KV_SHA256_MAX_MESSAGES];
    for (size_t i = 0; i < num_messages; i++) {
        feba[i] = _mm_setr_epi32((int)initial[5], (int)initial[4], (int)initial[1], (int)initial[0]);
        hgdc[i] = _mm_setr_epi32((int)initial[7], (int)initial[6], (int)initial[3], (int)initial[2]);
    }
    for (size_t block = 0; block < num_blocks; block++)
        for (size_t i = 0; i < num_messages; i++)
            kv_sha256_compress_x86(&feba[i], &hgdc[i], messages + i * step + block * KV_SHA256_BLOCK_BYTES);
    for (size_t i = 0; i < num_messages; i++) {
        const __m128i badc = _mm_unpackhi_epi64(feba[i], hgdc[i]), fehg = _mm_unpacklo_epi64(feba[i], hgdc[i]);
        __m128i *digest = (__m128i *)(messages + i * step);
        _mm_storeu_si128(digest, kv_sha256_swap_bytes(_mm_shuffle_epi32(badc, 0xB1)));
        _mm_storeu_si128(digest + 1, kv_sha256_swap_bytes(_mm_shuffle_epi32(fehg, 0xB1)));
    }
}

KV_SHA256_TARGET static inline void kv_sha256_x86(uint8_t *messages, size_t num_messages, size_t num_blocks)
{
    if (num_messages == 2) /* constants, so that either loop is unrolled and the state stays in registers */
        kv_sha256_side_by_side(messages, 2, num_blocks);
    else
        kv_sha256_side_by_side(messages, 1, num_blocks);
}

static inline kv_sha256_fn kv_sha256_best(void)
{
    enum { LEAF_1_ECX_SSSE3 = 1 << 9, LEAF_1_ECX_SSE41 = 1 << 19, LEAF_7_EBX_SHA = 1 << 29 };
    const unsigned int vectors = LEAF_1_ECX_SSSE3 | LEAF_1_ECX_SSE41;
    unsigned int eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & vectors) != vectors)
        return kv_sha256_portable;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (ebx & LEAF_7_EBX_SHA) == 0)
        return kv_sha256_portable;
    return kv_sha256_x86;
}

#else

static inline kv_sha256_fn kv_sha256_best(void)
{
    return kv_sha256_portable;
}

#endif

#endif
