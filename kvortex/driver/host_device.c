/* The process, its devices and the thread's contexts: the rows. */

#include "host_rows.h"

#include <stdio.h>

enum { DRIVER_VERSION = 12080 };

/* Process and devices ---------------------------------------------------------------------------------------------- */

static void forked(void)
{
    kv_host_set_unusual(KV_HOST_FORKED, 1);
}

static void initialize_once(void)
{
    kv_streams_init();
    pthread_atfork(NULL, NULL, forked);
    atomic_store(&kv_host_initialized, 1);
}

kv_result kv_host_init(unsigned int flags)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    KV_HOST_BEGIN(init);
    if (flags)
        return KV_CUDA_INVALID_VALUE;
    pthread_once(&once, initialize_once);
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_driver_get_version(int *version)
{
    KV_HOST_BEGIN(driver_get_version);
    if (!version)
        return KV_CUDA_INVALID_VALUE;
    *version = DRIVER_VERSION;
    return KV_CUDA_SUCCESS;
}

static const struct {
    kv_result code;
    const char *name, *text;
} error_names[] = {
    {KV_CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {KV_CUDA_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {KV_CUDA_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {KV_CUDA_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {KV_CUDA_DEINITIALIZED, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {KV_CUDA_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no device is detected"},
    {KV_CUDA_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {KV_CUDA_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {KV_CUDA_ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {KV_CUDA_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {KV_CUDA_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {KV_CUDA_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {KV_CUDA_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {KV_CUDA_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {KV_CUDA_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {KV_CUDA_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {KV_CUDA_NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {KV_CUDA_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {KV_CUDA_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {KV_CUDA_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {KV_CUDA_STREAM_CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {KV_CUDA_STREAM_CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {KV_CUDA_CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {KV_CUDA_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static kv_result error_name(kv_result error, const char **name, const char **text)
{
    const char *unused;
    *(name ? name : &unused) = NULL;
    *(text ? text : &unused) = NULL;
    for (size_t i = 0; i < sizeof error_names / sizeof *error_names; i++)
        if (error_names[i].code == error) {
            *(name ? name : &unused) = error_names[i].name;
            *(text ? text : &unused) = error_names[i].text;
            return KV_CUDA_SUCCESS;
        }
    return KV_CUDA_INVALID_VALUE;
}

kv_result kv_host_get_error_name(kv_result error, const char **name)
{
    return name ? error_name(error, name, NULL) : KV_CUDA_INVALID_VALUE;
}

kv_result kv_host_get_error_string(kv_result error, const char **text)
{
    return text ? error_name(error, NULL, text) : KV_CUDA_INVALID_VALUE;
}

kv_result kv_host_device_get_count(int *count)
{
    KV_HOST_BEGIN(device_get_count);
    if (!count)
        return KV_CUDA_INVALID_VALUE;
    *count = atomic_load(&kv_host_num_devices);
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_device_get(int *dev, int ordinal)
{
    KV_HOST_BEGIN(device_get);
    if (!dev)
        return KV_CUDA_INVALID_VALUE;
    if (!kv_host_is_device(ordinal))
        return KV_CUDA_INVALID_DEVICE;
    *dev = ordinal;
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_device_get_name(char *name, int name_bytes, int dev)
{
    KV_HOST_BEGIN(device_get_name);
    if (!kv_host_is_device(dev))
        return KV_CUDA_INVALID_DEVICE;
    if (!name || name_bytes < 1)
        return KV_CUDA_INVALID_VALUE;
    snprintf(name, (size_t)name_bytes, "KVortex host device %d", dev);
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_device_get_attribute(int *value, int attribute, int dev)
{
    KV_HOST_BEGIN(device_get_attribute);
    if (!kv_host_is_device(dev))
        return KV_CUDA_INVALID_DEVICE;
    if (!value)
        return KV_CUDA_INVALID_VALUE;
    switch (attribute) {
    case KV_DEVICE_ATTRIBUTE_MAX_PITCH:
        *value = KV_HOST_MAX_PITCH;
        return KV_CUDA_SUCCESS;
    case KV_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
    case KV_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
        *value = 1;
        return KV_CUDA_SUCCESS;
    case KV_DEVICE_ATTRIBUTE_HOST_NUMA_ID:
        *value = atomic_load(&kv_host_numa_node);
        return KV_CUDA_SUCCESS;
    default:
        return KV_CUDA_INVALID_VALUE;
    }
}

/* The thread's contexts -------------------------------------------------------------------------------------------- */

kv_result kv_host_ctx_push_current(void *context)
{
    KV_HOST_BEGIN(ctx_push_current);
    kv_host_thread *self = &kv_host_this_thread;
    if (!kv_host_device_of((uintptr_t)context))
        return KV_CUDA_INVALID_CONTEXT;
    if (self->num_contexts == KV_HOST_MAX_CONTEXT_DEPTH)
        return KV_CUDA_OUT_OF_MEMORY;
    self->contexts[self->num_contexts++] = (uintptr_t)context;
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_ctx_pop_current(void **context)
{
    KV_HOST_BEGIN(ctx_pop_current);
    kv_host_thread *self = &kv_host_this_thread;
    if (!self->num_contexts)
        return KV_CUDA_INVALID_CONTEXT;
    uint64_t top = self->contexts[--self->num_contexts];
    if (context)
        *context = (void *)(uintptr_t)top;
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_ctx_get_current(void **context)
{
    KV_HOST_BEGIN(ctx_get_current);
    if (!context)
        return KV_CUDA_INVALID_VALUE;
    const kv_host_thread *self = &kv_host_this_thread;
    *context = self->num_contexts ? (void *)(uintptr_t)self->contexts[self->num_contexts - 1] : NULL;
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_ctx_set_current(void *context)
{
    KV_HOST_BEGIN(ctx_set_current);
    kv_host_thread *self = &kv_host_this_thread;
    if (context && !kv_host_device_of((uintptr_t)context))
        return KV_CUDA_INVALID_CONTEXT;
    if (self->num_contexts)
        self->num_contexts--;
    if (context)
        self->contexts[self->num_contexts++] = (uintptr_t)context;
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_ctx_get_device(int *ordinal)
{
    KV_HOST_BEGIN(ctx_get_device);
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    if (!ordinal)
        return KV_CUDA_INVALID_VALUE;
    *ordinal = (int)(dev - kv_host_devices);
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_thread_exchange_stream_capture_mode(int *mode)
{
    KV_HOST_BEGIN(thread_exchange_stream_capture_mode);
    kv_host_thread *self = &kv_host_this_thread;
    if (!mode || *mode < KV_CAPTURE_MODE_GLOBAL || *mode > KV_CAPTURE_MODE_RELAXED)
        return KV_CUDA_INVALID_VALUE;
    int before = self->capture_mode;
    self->capture_mode = *mode;
    *mode = before;
    return KV_CUDA_SUCCESS;
}
