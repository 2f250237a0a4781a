/* What knows all the parts: the life of a context and the table. See host_driver.h. */

#include "host_memory.h"
#include "host_rows.h"

#include <stdlib.h>

static pthread_mutex_t contexts_mutex = PTHREAD_MUTEX_INITIALIZER; /* retain and release, the only long section */

/* The end of a context: its work is dropped, its objects go with it. Under contexts_mutex. */
static void reap(int ordinal)
{
    kv_streams_drop(ordinal, 1);
    kv_host_num_reaped += kv_host_streams_reap(ordinal);
    kv_host_num_reaped += kv_host_events_reap(ordinal);
    kv_host_num_reaped += kv_host_pools_reap(ordinal);
    kv_host_num_reaped += kv_host_spaces_reap(ordinal);
    for (kv_range range; kv_ranges_remove_any(ordinal, &range); kv_host_num_reaped++)
        if (range.kind != KV_RANGE_REGISTERED)
            free((void *)range.start);
    kv_streams_drop(ordinal, atomic_load(&kv_host_devices[ordinal].sticky) != 0);
}

kv_result kv_host_device_primary_ctx_retain(void **context, int ordinal)
{
    KV_HOST_BEGIN(device_primary_ctx_retain);
    if (!context)
        return KV_CUDA_INVALID_VALUE;
    if (!kv_host_is_device(ordinal))
        return KV_CUDA_INVALID_DEVICE;
    kv_host_device *dev = &kv_host_devices[ordinal];
    kv_result code = atomic_load(&dev->sticky);
    if (code)
        return code;
    pthread_mutex_lock(&contexts_mutex);
    if (dev->num_retained++ == 0)
        atomic_store(&dev->context, KV_HOST_CONTEXT_TAG | (++dev->generation & 0xffffffff) << 8 | (uint64_t)ordinal);
    *context = (void *)(uintptr_t)atomic_load(&dev->context);
    pthread_mutex_unlock(&contexts_mutex);
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_device_primary_ctx_release(int ordinal)
{
    KV_HOST_BEGIN(device_primary_ctx_release);
    if (!kv_host_is_device(ordinal))
        return KV_CUDA_INVALID_DEVICE;
    kv_result code = KV_CUDA_SUCCESS;
    pthread_mutex_lock(&contexts_mutex);
    if (kv_host_devices[ordinal].num_retained == 0)
        code = KV_CUDA_INVALID_CONTEXT;
    else if (--kv_host_devices[ordinal].num_retained == 0) {
        atomic_store(&kv_host_devices[ordinal].context, 0);
        reap(ordinal);
    }
    pthread_mutex_unlock(&contexts_mutex);
    return code;
}

const kv_driver *kv_host_driver(void)
{
    static const kv_driver table = {
#define ROW_FUNCTION(field, symbol, version, parameters) .field = kv_host_##field,
        KV_DRIVER_ROWS(ROW_FUNCTION)
#undef ROW_FUNCTION
    };
    return &table;
}
