/* cuda_on_cpu.h: what pack.cu needs of CUDA, on a CPU. A thread of a block is a coroutine; where the threads of a warp or
 * of a team exchange something, each waits until all have come. Blocks run one after the other.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include "kvortex/pack.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

static const int THREADS = KV_PACK_THREADS, STACK_BYTES = 64 << 10;

struct uint2 { uint32_t x, y; } __attribute__((aligned(8)));
struct uint4 { uint32_t x, y, z, w; } __attribute__((aligned(16)));
static struct { uint32_t x; } threadIdx, blockIdx, gridDim;

static uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
static uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }

static uint32_t __float_as_uint(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static float __uint_as_float(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static float device_nan(float number) { return number == number ? number : __uint_as_float(0x7FFFFFFF); }
static float __fadd_rn(float a, float b) { return device_nan(a + b); }
static float __fsub_rn(float a, float b) { return device_nan(a - b); }
static float __fmul_rn(float a, float b) { return device_nan(a * b); }
static float __fdiv_rn(float a, float b) { return device_nan(a / b); }
static float __frcp_rn(float a) { return device_nan(1.0f / a); }
static float __fmaf_rn(float a, float b, float c) { return device_nan(fmaf(a, b, c)); }

static uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector)
{
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++)
        result |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}

struct Meeting {
    uint32_t here, number, any, next_any, values[KV_PACK_THREADS], next[KV_PACK_THREADS];
};

static Meeting warps[KV_PACK_THREADS / 32], teams[KV_PACK_THREADS / 32];
static ucontext_t main_context, contexts[KV_PACK_THREADS];
static char stacks[KV_PACK_THREADS][STACK_BYTES];
static bool ended[KV_PACK_THREADS];
static const kv_pack *told;

static void meet(Meeting *meeting, uint32_t threads, uint32_t place, uint32_t value)
{
    const uint32_t number = meeting->number, self = threadIdx.x;
    meeting->next[place] = value;
    meeting->next_any |= value;
    if (++meeting->here == threads) {
        memcpy(meeting->values, meeting->next, threads * sizeof meeting->values[0]);
        meeting->any = meeting->next_any;
        meeting->here = meeting->next_any = 0;
        meeting->number++;
    }
    while (meeting->number == number) {
        swapcontext(&contexts[self], &main_context);
        threadIdx.x = self;
    }
}

static uint32_t __shfl_xor_sync(uint32_t, uint32_t value, uint32_t mask)
{
    Meeting *warp = &warps[threadIdx.x / 32];
    meet(warp, 32, threadIdx.x % 32, value);
    return warp->values[threadIdx.x % 32 ^ mask];
}

static float __shfl_xor_sync(uint32_t all, float value, uint32_t mask)
{
    return __uint_as_float(__shfl_xor_sync(all, __float_as_uint(value), mask));
}

static bool __any_sync(uint32_t, bool value)
{
    meet(&warps[threadIdx.x / 32], 32, threadIdx.x % 32, value);
    return warps[threadIdx.x / 32].any;
}

static uint32_t team_meets(bool value, uint32_t team, uint32_t threads)
{
    meet(&teams[team], threads, threadIdx.x % threads, value);
    return teams[team].any;
}

extern "C" void kv_pack_blocks(const kv_pack pack);

static void thread_main()
{
    const uint32_t self = threadIdx.x;
    kv_pack_blocks(*told);
    ended[self] = true;
}

extern "C" void launch(const kv_pack *pack, uint32_t blocks)
{
    told = pack;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        for (int i = 0; i < THREADS; i++) {
            ended[i] = false;
            getcontext(&contexts[i]);
            contexts[i].uc_stack.ss_sp = stacks[i];
            contexts[i].uc_stack.ss_size = STACK_BYTES;
            contexts[i].uc_link = &main_context;
            makecontext(&contexts[i], thread_main, 0);
        }
        for (int left = THREADS; left;) {
            left = 0;
            for (int i = 0; i < THREADS; i++)
                if (!ended[i]) {
                    threadIdx.x = i;
                    swapcontext(&main_context, &contexts[i]);
                    left += !ended[i];
                }
        }
    }
}
