// The gather kernel; gather.h tells what it is told. The package carries it as PTX, made anew after a change by
//   nvcc -ptx -arch=compute_75 -O3 -I include -o - kvortex/transfer/gather.cu |
//       sed 's/^\.version .*/.version 8.3/; s/^\.target .*/.target sm_70/; /^\/\//d' > kvortex/transfer/gather.ptx
// (the kernel uses nothing newer than the version and target named here, and older drivers refuse newer ones).

#include "kvortex/gather.h"

extern "C" __global__ void __launch_bounds__(KV_GATHER_THREADS) kv_gather_blocks(const kv_gather gather)
{
    const kv_gather_run *runs = (const kv_gather_run *)gather.runs;
    const uint64_t num_pieces = (uint64_t)gather.num_blocks * gather.num_runs;
    for (uint64_t piece = blockIdx.x; piece < num_pieces; piece += gridDim.x) {
        const uint32_t block = (uint32_t)(piece / gather.num_runs);
        const kv_gather_run run = runs[piece % gather.num_runs];
        const uint4 *source = (const uint4 *)(run.base + gather.block_ids[block] * run.block_stride);
        uint4 *target = (uint4 *)(gather.staging + block * gather.block_bytes + run.offset);
        if (!gather.to_staging) {
            uint4 *swapped = (uint4 *)source;
            source = target;
            target = swapped;
        }
        const uint64_t units = run.bytes / KV_GATHER_UNIT_BYTES, step = KV_GATHER_THREADS;
        uint64_t unit = threadIdx.x;
        for (; unit + 3 * step < units; unit += 4 * step) { // four loads in flight
            const uint4 a = source[unit], b = source[unit + step];
            const uint4 c = source[unit + 2 * step], d = source[unit + 3 * step];
            target[unit] = a;
            target[unit + step] = b;
            target[unit + 2 * step] = c;
            target[unit + 3 * step] = d;
        }
        for (; unit < units; unit += step)
            target[unit] = source[unit];
    }
}
