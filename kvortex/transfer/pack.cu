// The kernel that packs and unpacks; pack.h tells what it is told and how packed planes lie. The package carries it as
// PTX, made anew after a change of either by
//   { cat kvortex/transfer/pack.cu include/kvortex/pack.h | sha256sum | sed 's/^/\/\/ /'
//     nvcc -ptx -arch=compute_75 -O3 -fmad=false -I include -o - kvortex/transfer/pack.cu |
//         sed 's/^\.version .*/.version 6.3/; /^\/\//d'; } > kvortex/transfer/pack.ptx
// (the kernel uses nothing newer than the version named here, and older drivers refuse newer ones; the first line tells a
// test that the PTX is of these sources). Results are to be
// those of the CPU code, bit for bit: no -ftz=true, no -prec-div=false, no contraction that nobody wrote down.
//
// A thread has 32 elements of a row: chunk `lane` and chunk `lanes + lane`, of 16 each. So five stages of the butterfly
// stay in registers, those between lanes cost one shuffle an element each, and all accesses are of whole sectors.

#include "kvortex/pack.h"

#define ALL_LANES 0xFFFFFFFFu
#define CHUNK 16
#define BF16_NAN 0x7FC0u
#define LEAST_SCALE 0x03800000u /* the bits of 2^-120 */
#define LARGE 0x71000000u       /* of 2^99: if no sum is larger, no number was 2^100, whatever was rounded */

namespace
{

struct Rows { // of a plane, as one thread sees them
    uint32_t num_rows, dim;
    uint32_t lanes;          // threads to a row: dim / 32
    uint32_t lane;           // of this thread in its row
    uint32_t first, step;    // its row in the first round, and the rows of a round
    uint32_t warp_first;     // the first row of its warp: all of a warp leave a loop together
    uint8_t *row0;           // on the device
    uint64_t step_bytes;
    uint8_t *low, *high, *scales; // packed
};

// The signs of two elements each, for both chunks: bits of a constant, the most significant ones first.
__device__ void set_signs(uint32_t (&signs)[CHUNK], uint32_t chunk, uint32_t other)
{
#pragma unroll
    for (uint32_t pair = 0; pair < CHUNK; pair++) {
        const uint32_t index = pair < CHUNK / 2 ? chunk : other, shift = 2 * (pair % (CHUNK / 2));
        const uint64_t half = index & 4 ? 0xf39cc0605cedc834u : 0x9e3779b97f4a7c15u;
        const uint32_t bits = (uint32_t)(half >> (48 - 16 * (index & 3))) & 0xFFFF;
        signs[pair] = (bits << shift & 0x8000) | (bits << shift << 17 & 0x80000000);
        asm volatile("" : "+r"(signs[pair])); // else the compiler makes them anew for every row
    }
}

// Stages h = 1, 2, 4 .. dim / 2, in that order. The bits of the largest magnitude that this thread gets; NaN is above
// all others.
__device__ __forceinline__ uint32_t butterfly(float (&x)[2 * CHUNK], uint32_t lanes)
{
#pragma unroll
    for (uint32_t h = 1; h < CHUNK; h *= 2)
#pragma unroll
        for (uint32_t i = 0; i < 2 * CHUNK; i++)
            if (!(i & h)) {
                const float a = x[i], b = x[i + h];
                x[i] = a + b;
                x[i + h] = a - b;
            }
#pragma unroll 1
    for (uint32_t h = 1; h < lanes; h *= 2) {
        const float sign = threadIdx.x & h ? -1.0f : 1.0f;
#pragma unroll
        for (uint32_t i = 0; i < 2 * CHUNK; i++)
            x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(ALL_LANES, x[i], h)); // rounds once, as a + b and a - b do
    }
    uint32_t top = 0;
#pragma unroll
    for (uint32_t i = 0; i < CHUNK; i++) {
        const float a = x[i], b = x[i + CHUNK];
        x[i] = a + b;
        x[i + CHUNK] = a - b;
        top = max(top, __float_as_uint(fabsf(a) + fabsf(b))); // one of the two, without its sign
    }
    return top;
}

// The lowest bytes of four words.
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// What is stored of eight numbers, given as bytes: those of the even elements, and those of the odd ones.
__device__ __forceinline__ uint32_t nibbles(uint32_t even, uint32_t odd)
{
    return (even & 0x0F0F0F0F) | (odd << 4 & 0xF0F0F0F0);
}

__device__ __forceinline__ uint32_t fifth_bits(uint32_t even, uint32_t odd)
{
    const uint32_t pairs = (even >> 4 & 0x01010101) | (odd >> 3 & 0x02020202); // a pair in a byte
    return pairs * 0x01041040 >> 24; // all four in the highest byte, then the lowest
}

__device__ __forceinline__ uint32_t top_bits(uint32_t even, uint32_t odd)
{
    const uint32_t pairs = (even >> 4 & 0x03030303) | (odd >> 2 & 0x0C0C0C0C); // four bits in a byte
    return __byte_perm(pairs | pairs >> 4, 0, 0x4420);
}

__device__ __forceinline__ void load_row(uint4 (&raw)[4], const Rows &rows, uint32_t row)
{
    const uint8_t *source = rows.row0 + min(row, rows.num_rows - 1) * rows.step_bytes + 2 * CHUNK * rows.lane;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++)
        raw[i] = *(const uint4 *)(source + (i / 2) * 2 * CHUNK * rows.lanes + 16 * (i % 2));
}

// Whether a row, all of it, has a number that cannot be packed.
__device__ __forceinline__ bool is_bad(const Rows &rows, uint32_t row)
{
    uint4 raw[4];
    uint32_t bad = 0;
    load_row(raw, rows, row);
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
        for (uint32_t j = 0; j < 4; j++)
            bad |= (words[j] & 0x7FFF) >= 0x7180 || (words[j] & 0x7FFFFFFF) >= 0x71800000;
    }
#pragma unroll 1
    for (uint32_t h = 1; h < rows.lanes; h *= 2)
        bad |= __shfl_xor_sync(ALL_LANES, bad, h);
    return bad;
}

// Zeros behind a part, up to where the next one begins.
__device__ __forceinline__ void fill_up(uint8_t *part, uint64_t bytes, uint32_t thread)
{
    if (thread < kv_pack_align(bytes) - bytes)
        part[bytes + thread] = 0;
}

// Pack this thread's part of all its rows. Whether one of them is bad.
__device__ __forceinline__ bool pack_rows(const Rows &rows, uint32_t bits)
{
    const float most = (float)((1 << (bits - 1)) - 1);
    bool any_bad = false;
    uint32_t signs[CHUNK];
    uint4 raw[4];
    set_signs(signs, rows.lane, rows.lanes + rows.lane);
    load_row(raw, rows, rows.first);
    for (uint32_t begin = 0; rows.warp_first + begin < rows.num_rows; begin += rows.step) {
        const uint32_t row = rows.first + begin;
        float x[2 * CHUNK];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                const uint32_t word = words[j] ^ signs[4 * i + j];
                x[8 * i + 2 * j] = __uint_as_float(word << 16);
                x[8 * i + 2 * j + 1] = __uint_as_float(word & 0xFFFF0000);
            }
        }
        if (rows.warp_first + begin + rows.step < rows.num_rows) // it is under way while this one is packed
            load_row(raw, rows, row + rows.step);
        uint32_t top = butterfly(x, rows.lanes);
#pragma unroll 1
        for (uint32_t h = 1; h < rows.lanes; h *= 2)
            top = max(top, __shfl_xor_sync(ALL_LANES, top, h));
        uint32_t scale = (__float_as_uint(__fdiv_rn(__uint_as_float(top), most)) + 0xFFFF) & 0xFFFF0000; // rounded up
        scale = max(scale, LEAST_SCALE);
        float inverse = __frcp_rn(__uint_as_float(scale));
        if (__any_sync(ALL_LANES, top >= LARGE) && is_bad(rows, row)) {
            any_bad = true;
            scale = BF16_NAN << 16;
            inverse = 0.0f; // it may have been infinite
#pragma unroll
            for (uint32_t i = 0; i < 2 * CHUNK; i++)
                x[i] = 0.0f;
        }
        if (row >= rows.num_rows)
            continue;
        // 1.5 * 2^23 leaves no place for fractions, so the lowest bits are the number's. No clip: the scale is at least
        // top / most less one part in 2^24, so a product is, before it is rounded, at most `most` and three such parts.
        uint32_t q[2 * CHUNK];
#pragma unroll
        for (uint32_t i = 0; i < 2 * CHUNK; i++)
            q[i] = __float_as_uint(__fadd_rn(__fmul_rn(x[i], inverse), 12582912.0f));
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            const uint32_t chunk = row * (rows.dim / CHUNK) + c * rows.lanes + rows.lane, *p = q + CHUNK * c;
            const uint32_t even[2] = {low_bytes(p[0], p[2], p[4], p[6]), low_bytes(p[8], p[10], p[12], p[14])};
            const uint32_t odd[2] = {low_bytes(p[1], p[3], p[5], p[7]), low_bytes(p[9], p[11], p[13], p[15])};
            if (bits == 8) {
                ((uint4 *)rows.low)[chunk] =
                    make_uint4(__byte_perm(even[0], odd[0], 0x5140), __byte_perm(even[0], odd[0], 0x7362),
                               __byte_perm(even[1], odd[1], 0x5140), __byte_perm(even[1], odd[1], 0x7362));
            } else {
                ((uint2 *)rows.low)[chunk] = make_uint2(nibbles(even[0], odd[0]), nibbles(even[1], odd[1]));
                if (bits == 5)
                    ((uint16_t *)rows.high)[chunk] = fifth_bits(even[0], odd[0]) | fifth_bits(even[1], odd[1]) << 8;
                if (bits == 6)
                    ((uint32_t *)rows.high)[chunk] = top_bits(even[0], odd[0]) | top_bits(even[1], odd[1]) << 16;
            }
        }
        if (rows.lane == 0)
            ((uint16_t *)rows.scales)[row] = (uint16_t)(scale >> 16);
    }
    return any_bad;
}

struct Packed { // what a thread has of a packed row
    uint4 low[2];
    uint32_t high[2], scale;
};

__device__ __forceinline__ void load_packed(Packed &packed, const Rows &rows, uint32_t row, uint32_t bits)
{
    row = min(row, rows.num_rows - 1);
    packed.scale = ((const uint16_t *)rows.scales)[row];
#pragma unroll
    for (uint32_t c = 0; c < 2; c++) {
        const uint32_t chunk = row * (rows.dim / CHUNK) + c * rows.lanes + rows.lane;
        if (bits == 8) {
            packed.low[c] = ((const uint4 *)rows.low)[chunk];
        } else {
            const uint2 low = ((const uint2 *)rows.low)[chunk];
            packed.low[c].x = low.x;
            packed.low[c].y = low.y;
        }
        if (bits == 5)
            packed.high[c] = ((const uint16_t *)rows.high)[chunk];
        if (bits == 6)
            packed.high[c] = ((const uint32_t *)rows.high)[chunk];
    }
}

// The numbers of a row as bytes without a sign, each 2^(bits - 1) too large: words of four even or four odd elements.
__device__ __forceinline__ void spread(uint32_t (&words)[8], const Packed &packed, uint32_t bits)
{
    if (bits == 8) {
#pragma unroll
        for (uint32_t c = 0; c < 2; c++) {
            const uint4 low = packed.low[c];
            words[4 * c] = __byte_perm(low.x, low.y, 0x6420);
            words[4 * c + 1] = __byte_perm(low.x, low.y, 0x7531);
            words[4 * c + 2] = __byte_perm(low.z, low.w, 0x6420);
            words[4 * c + 3] = __byte_perm(low.z, low.w, 0x7531);
        }
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t low = i & 1 ? packed.low[i / 2].y : packed.low[i / 2].x;
            words[2 * i] = low & 0x0F0F0F0F;
            words[2 * i + 1] = low >> 4 & 0x0F0F0F0F;
        }
        if (bits == 5) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) { // eight bits, to a pair in a byte
                uint32_t pairs = packed.high[i / 2] >> 8 * (i & 1) & 0xFF;
                pairs = (pairs | pairs << 12) & 0x000F000F;
                pairs = (pairs | pairs << 6) & 0x03030303;
                words[2 * i] |= pairs << 4 & 0x10101010;
                words[2 * i + 1] |= pairs << 3 & 0x10101010;
            }
        } else if (bits == 6) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) { // sixteen bits, to four in a byte
                uint32_t pairs = __byte_perm(packed.high[i / 2], 0, i & 1 ? 0x4342 : 0x4140);
                pairs = (pairs | pairs << 4) & 0x0F0F0F0F;
                words[2 * i] |= pairs << 4 & 0x30303030;
                words[2 * i + 1] |= pairs << 2 & 0x30303030;
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < 8; i++)
        words[i] ^= 0x01010101u << (bits - 1);
}

// The butterfly of a row's numbers times their scale. A sum of 256 numbers times a scale of 8 significant bits has no
// more than 24, so float32 would round none of them: the sums are made of integers, two in a word, and the scale comes
// last, with 1 / dim in it. A word's lower half is of an element, its upper half of the one four further on.
__device__ __forceinline__ void rotate_numbers(float (&x)[2 * CHUNK], const uint32_t (&words)[8], const Rows &rows,
                                               uint32_t bits, float scale)
{
    const float unit = __fmul_rn(scale, 1.0f / (float)rows.dim), offset = __fmul_rn(unit, -8421376.0f); // 2^23 + 2^15
    uint32_t v[CHUNK];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        v[4 * i] = words[2 * i] & 0x00FF00FF;
        v[4 * i + 1] = words[2 * i + 1] & 0x00FF00FF;
        v[4 * i + 2] = words[2 * i] >> 8 & 0x00FF00FF;
        v[4 * i + 3] = words[2 * i + 1] >> 8 & 0x00FF00FF;
    }
#pragma unroll
    for (uint32_t h = 1; h < CHUNK / 2; h *= 2)
#pragma unroll
        for (uint32_t i = 0; i < CHUNK; i++)
            if (!(i & h)) {
                const uint32_t a = v[i], b = v[i + h];
                v[i] = a + b;
                v[i + h] = a - b;
            }
#pragma unroll 1
    for (uint32_t h = 1; h < rows.lanes; h *= 2) {
        const uint32_t sign = threadIdx.x & h ? -1 : 1;
#pragma unroll
        for (uint32_t i = 0; i < CHUNK; i++)
            v[i] = v[i] * sign + __shfl_xor_sync(ALL_LANES, v[i], h);
    }
    if (rows.lane == 0) { // what each number was too large by is in the sum of all alone, so far of a quarter of them
        v[0] -= (rows.dim << (bits - 3)) * 0x00010001;
        v[CHUNK / 2] -= (rows.dim << (bits - 3)) * 0x00010001;
    }
#pragma unroll
    for (uint32_t i = 0; i < CHUNK; i++) {
        const uint32_t j = i % (CHUNK / 2), a = v[j], b = v[j + CHUNK / 2];
        const uint32_t both = (i < CHUNK / 2 ? a + b : a - b) + 0x80008000; // no signs, so no borrow
        const float low = __fmaf_rn(__uint_as_float(__byte_perm(both, 0x4B000000, 0x7410)), unit, offset);
        const float high = __fmaf_rn(__uint_as_float(__byte_perm(both, 0x4B000000, 0x7432)), unit, offset);
        x[i / 4 * 8 + i % 4] = low + high;
        x[i / 4 * 8 + i % 4 + 4] = low - high;
    }
}

// The same in float32, stage by stage, for scales that whoever packs does not write: infinities, NaN and what is lost
// below 2^-126 then come out as they do on a CPU.
__device__ __forceinline__ void rotate_floats(float (&x)[2 * CHUNK], const uint32_t (&words)[8], const Rows &rows,
                                              uint32_t bits, float scale, const uint32_t (&signs)[CHUNK])
{
    const float bias = 8388608.0f + (float)(1 << (bits - 1)), share = 1.0f / (float)rows.dim;
#pragma unroll
    for (uint32_t i = 0; i < 2 * CHUNK; i++) {
        const uint32_t bytes = __byte_perm(words[i / 8 * 2 + i % 2], 0x4B000000, 0x7440 + i % 8 / 2);
        x[i] = __fmul_rn(__fsub_rn(__uint_as_float(bytes), bias), scale);
    }
    butterfly(x, rows.lanes);
#pragma unroll
    for (uint32_t i = 0; i < 2 * CHUNK; i++) {
        x[i] = __fmul_rn(x[i], share);
        if (x[i] != x[i]) // one NaN for all, so that its sign comes out 0
            x[i] = __uint_as_float(BF16_NAN << 16 ^ (signs[i / 2] << (i & 1 ? 0 : 16) & 0x80000000));
    }
}

__device__ __forceinline__ void unpack_rows(const Rows &rows, uint32_t bits)
{
    uint32_t signs[CHUNK];
    Packed next;
    set_signs(signs, rows.lane, rows.lanes + rows.lane);
    load_packed(next, rows, rows.first, bits);
    for (uint32_t begin = 0; rows.warp_first + begin < rows.num_rows; begin += rows.step) {
        const uint32_t row = rows.first + begin, scale = next.scale << 16;
        uint32_t words[8];
        float x[2 * CHUNK];
        spread(words, next, bits);
        if (rows.warp_first + begin + rows.step < rows.num_rows)
            load_packed(next, rows, row + rows.step, bits);
        if (__any_sync(ALL_LANES, scale - LEAST_SCALE >= LARGE - LEAST_SCALE))
            rotate_floats(x, words, rows, bits, __uint_as_float(scale), signs);
        else
            rotate_numbers(x, words, rows, bits, __uint_as_float(scale));
        if (row >= rows.num_rows)
            continue;
        uint8_t *target = rows.row0 + row * rows.step_bytes + 2 * CHUNK * rows.lane;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t words[4];
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                const uint32_t a = __float_as_uint(x[8 * i + 2 * j]), b = __float_as_uint(x[8 * i + 2 * j + 1]);
                words[j] = __byte_perm(a + 0x7FFF + (a >> 16 & 1), b + 0x7FFF + (b >> 16 & 1), 0x7632)
                           ^ signs[4 * i + j];
            }
            *(uint4 *)(target + (i / 2) * 2 * CHUNK * rows.lanes + 16 * (i % 2)) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// Whether `bad` holds in one of the threads of a team; each waits for the others.
__device__ __forceinline__ bool team_any(bool bad, uint32_t team, uint32_t threads)
{
    uint32_t any;
    asm volatile("{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %1, 0;\n\tbarrier.red.or.pred q, %2, %3, p;\n\t"
                 "selp.u32 %0, 1, 0, q;\n\t}"
                 : "=r"(any)
                 : "r"((uint32_t)bad), "r"(team), "r"(threads)
                 : "memory");
    return any;
}

__device__ void copy_rows(const kv_plane &plane, uint8_t *row0, uint8_t *packed, bool to_staging, uint32_t thread,
                          uint32_t threads)
{
    const uint32_t row_units = plane.row_bytes / KV_PACK_UNIT_BYTES, units = plane.num_rows * row_units;
#pragma unroll 4
    for (uint32_t unit = thread; unit < units; unit += threads) {
        uint4 *rows = (uint4 *)(row0 + (uint64_t)(unit / row_units) * plane.step_bytes) + unit % row_units;
        if (to_staging)
            ((uint4 *)packed)[unit] = *rows;
        else
            *rows = ((const uint4 *)packed)[unit];
    }
}

// The threads of a block are split into teams. A team takes whole planes, and says by itself whether one is bad.
// A large team waits for its slowest thread once a plane, which costs three quarters of a round; many small ones may
// leave most of them without a plane at the end. The number of threads that makes the least of both.
__device__ uint32_t team_threads(const kv_plane &plane, uint32_t units)
{
    const uint32_t bytes = plane.num_rows * plane.row_bytes, planes = (units + gridDim.x - 1) / gridDim.x;
    uint32_t best = KV_PACK_THREADS, least = 0xFFFFFFFF;
#pragma unroll
    for (uint32_t teams = 1; teams <= KV_PACK_THREADS / 32; teams *= 2) {
        const uint32_t threads = KV_PACK_THREADS / teams, round = 4 * CHUNK * threads;
        const uint32_t cost = (planes + teams - 1) / teams * (4 * ((bytes + round - 1) / round) + 3);
        if (cost <= least) {
            least = cost;
            best = threads;
        }
    }
    return best;
}

} // namespace

extern "C" __global__ void __launch_bounds__(KV_PACK_THREADS) kv_pack_blocks(const kv_pack pack)
{
    const kv_plane *planes = (const kv_plane *)pack.planes;
    const uint32_t units = pack.num_blocks * pack.num_planes, threads = team_threads(*planes, units);
    const uint32_t team = threadIdx.x / threads, thread = threadIdx.x % threads;
    const uint32_t step = gridDim.x * (KV_PACK_THREADS / threads); // of all teams
    for (uint32_t unit = team * gridDim.x + blockIdx.x; unit < units; unit += step) {
        const uint32_t block = unit / pack.num_planes, index = unit % pack.num_planes;
        const kv_plane plane = planes[index];
        uint8_t *target = (uint8_t *)(pack.staging + block * pack.block_bytes);
        uint8_t *row0 = (uint8_t *)(plane.base + pack.block_ids[block] * plane.block_stride);
        uint8_t *packed = target + plane.offset;
        bool bad = false;
        if (plane.bits == KV_PACK_EXACT) {
            copy_rows(plane, row0, packed, pack.to_staging, thread, threads);
        } else {
            Rows rows;
            rows.row0 = row0;
            rows.step_bytes = plane.step_bytes;
            rows.num_rows = plane.num_rows;
            rows.dim = plane.row_bytes / 2;
            rows.lanes = rows.dim / (2 * CHUNK);
            rows.lane = thread % rows.lanes;
            rows.first = thread / rows.lanes;
            rows.warp_first = (thread & ~31u) / rows.lanes;
            rows.step = threads / rows.lanes;
            rows.low = packed;
            rows.high = packed + kv_plane_low_bytes(&plane);
            rows.scales = rows.high + kv_plane_high_bytes(&plane);
            if (pack.to_staging) {
                bad = pack_rows(rows, plane.bits);
                fill_up(rows.high, (uint64_t)rows.num_rows * rows.dim * (plane.bits & 3) / 8, thread); // 8 or 4: none
                fill_up(rows.scales, 2 * (uint64_t)rows.num_rows, thread);
            } else {
                unpack_rows(rows, plane.bits);
            }
        }
        if (pack.to_staging && pack.flags_offset) { // blocks without flags have something else there
            uint32_t *flags = (uint32_t *)(target + pack.flags_offset);
            bad = team_any(bad, team, threads);
            if (thread == 0)
                flags[index] = bad;
            if (index == pack.num_planes - 1)
                fill_up((uint8_t *)flags, 4 * (uint64_t)pack.num_planes, thread);
        }
    }
}
