/* The controls that know all the parts; those of failing calls, captures and dead devices are in host_gate.c. */

#include "host_memory.h"
#include "host_rows.h"

kv_result kv_host_control_set_num_devices(int count)
{
    if (count < 1 || count > KV_HOST_MAX_DEVICES)
        return KV_CUDA_INVALID_VALUE;
    for (int i = 0; i < KV_HOST_MAX_DEVICES; i++)
        if (atomic_load(&kv_host_devices[i].context))
            return KV_CUDA_INVALID_VALUE;
    atomic_store(&kv_host_num_devices, count);
    return KV_CUDA_SUCCESS;
}

void kv_host_control_set_numa_node(int node)
{
    atomic_store(&kv_host_numa_node, node);
}

void kv_host_control_set_delay_us(uint32_t low, uint32_t high, uint64_t seed)
{
    kv_streams_delay_us(low, high, seed);
}

void kv_host_control_hold(void)
{
    kv_streams_hold(1);
}

void kv_host_control_release(void)
{
    kv_streams_hold(0);
}

void kv_host_control_live(kv_host_live *live)
{
    *live = (kv_host_live){.reaped = atomic_load(&kv_host_num_reaped)};
    for (int i = 0; i < KV_HOST_MAX_DEVICES; i++)
        live->contexts += atomic_load(&kv_host_devices[i].context) != 0;
    live->streams = kv_streams_live();
    live->events = kv_host_events_live();
    live->device_allocations = kv_ranges_count(KV_RANGE_DEVICE);
    live->host_allocations = kv_ranges_count(KV_RANGE_HOST);
    live->registrations = kv_ranges_count(KV_RANGE_REGISTERED);
    live->pools = kv_host_pools_live();
    live->pool_allocations = kv_ranges_count(KV_RANGE_POOLED);
    live->reservations = kv_host_spaces_live();
    live->physical_allocations = kv_host_physical_live();
}

void kv_host_control_reset(void)
{
    kv_host_control_stop_calls(NULL);
    kv_host_control_fail_call(0, KV_CUDA_SUCCESS, 0, -1);
    kv_host_control_count_calls(0);
    kv_host_control_release();
    kv_host_control_set_delay_us(0, 0, 0);
    kv_host_control_set_numa_node(-1);
    kv_host_forget_captures();
    kv_stream *stream;
    for (size_t i = 0; (stream = kv_stream_at(i)); i++)
        kv_stream_drain(stream);
    for (int i = 0; i < KV_HOST_MAX_DEVICES; i++)
        if (atomic_exchange(&kv_host_devices[i].sticky, KV_CUDA_SUCCESS))
            kv_streams_drop(i, 0);
    kv_host_set_unusual(KV_HOST_CAPTURING | KV_HOST_DEAD, 0);
    atomic_store(&kv_host_num_reaped, 0);
}

void kv_host_control_stop(void)
{
    if (!atomic_load(&kv_host_initialized) || atomic_load(&kv_host_unusual) & KV_HOST_FORKED)
        return;
    for (int i = 0; i < KV_HOST_MAX_DEVICES; i++)
        kv_host_control_kill(i, KV_CUDA_DEINITIALIZED);
    kv_stream *stream;
    for (size_t i = 0; (stream = kv_stream_at(i)); i++)
        kv_stream_drain(stream);
}
