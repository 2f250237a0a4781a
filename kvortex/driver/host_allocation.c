/* Memory: the rows that allocate, register and describe it. */

#include "host_memory.h"
#include "host_rows.h"

#include <stdlib.h>
#include <unistd.h>

kv_result kv_host_mem_get_info(size_t *free_bytes, size_t *total_bytes)
{
    KV_HOST_BEGIN(mem_get_info);
    if (!kv_host_current_device())
        return KV_CUDA_INVALID_CONTEXT;
    if (!free_bytes || !total_bytes)
        return KV_CUDA_INVALID_VALUE;
    *free_bytes = (size_t)sysconf(_SC_AVPHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    *total_bytes = kv_host_physical_bytes();
    return KV_CUDA_SUCCESS;
}

static kv_result allocate(size_t bytes, size_t alignment, kv_range_kind kind, uintptr_t *address)
{
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    if (!bytes)
        return KV_CUDA_INVALID_VALUE;
    void *memory = NULL;
    if (bytes > kv_host_physical_bytes() || posix_memalign(&memory, alignment, bytes))
        return KV_CUDA_OUT_OF_MEMORY;
    kv_result code = kv_ranges_add((kv_range){(uintptr_t)memory, bytes, kind, (int)(dev - kv_host_devices), 0});
    if (code)
        free(memory);
    else
        *address = (uintptr_t)memory;
    return code;
}

/* Frees and unregistrations wait for what may still use the range, as CUDA does: for device memory everything queued on
 * that device, for host memory everything queued anywhere. */
static kv_result deallocate(uintptr_t address, kv_range_kind kind, kv_result unknown)
{
    kv_range range;
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    kv_host_wait_for_device(kind == KV_RANGE_DEVICE ? (int)(dev - kv_host_devices) : -1);
    if (!kv_ranges_remove(address, kind, &range))
        return unknown;
    if (kind != KV_RANGE_REGISTERED)
        free((void *)range.start);
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_mem_alloc(kv_devptr *address, size_t bytes)
{
    KV_HOST_BEGIN(mem_alloc);
    uintptr_t value = 0;
    if (!address)
        return KV_CUDA_INVALID_VALUE;
    kv_result code = allocate(bytes, 256, KV_RANGE_DEVICE, &value);
    if (!code)
        *address = value;
    return code;
}

kv_result kv_host_mem_free(kv_devptr address)
{
    KV_HOST_BEGIN(mem_free);
    return address ? deallocate((uintptr_t)address, KV_RANGE_DEVICE, KV_CUDA_INVALID_VALUE) : KV_CUDA_SUCCESS;
}

kv_result kv_host_mem_host_alloc(void **address, size_t bytes, unsigned int flags)
{
    KV_HOST_BEGIN(mem_host_alloc);
    uintptr_t value = 0;
    if (!address || flags > 7)
        return KV_CUDA_INVALID_VALUE;
    kv_result code = allocate(bytes, 4096, KV_RANGE_HOST, &value);
    if (!code)
        *address = (void *)value;
    return code;
}

kv_result kv_host_mem_free_host(void *address)
{
    KV_HOST_BEGIN(mem_free_host);
    return address ? deallocate((uintptr_t)address, KV_RANGE_HOST, KV_CUDA_INVALID_VALUE) : KV_CUDA_SUCCESS;
}

kv_result kv_host_mem_host_register(void *address, size_t bytes, unsigned int flags)
{
    KV_HOST_BEGIN(mem_host_register);
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    if ((uintptr_t)address < KV_HOST_LOWEST_ADDRESS || !bytes || bytes > UINTPTR_MAX - (uintptr_t)address || flags > 15)
        return KV_CUDA_INVALID_VALUE;
    return kv_ranges_add((kv_range){(uintptr_t)address, bytes, KV_RANGE_REGISTERED, (int)(dev - kv_host_devices), 0});
}

kv_result kv_host_mem_host_unregister(void *address)
{
    KV_HOST_BEGIN(mem_host_unregister);
    return deallocate((uintptr_t)address, KV_RANGE_REGISTERED, KV_CUDA_HOST_MEMORY_NOT_REGISTERED);
}

kv_result kv_host_pointer_get_attribute(void *value, int attribute, kv_devptr address)
{
    KV_HOST_BEGIN(pointer_get_attribute);
    kv_range range;
    size_t hint = 0;
    kv_ranges_lock();
    kv_range_answer answer = kv_ranges_find((uintptr_t)address, 1, &hint, &range);
    kv_ranges_unlock();
    if (!value || answer != KV_RANGE_INSIDE)
        return KV_CUDA_INVALID_VALUE;
    switch (attribute) {
    case KV_POINTER_MEMORY_TYPE:
        *(unsigned int *)value = range.kind == KV_RANGE_HOST || range.kind == KV_RANGE_REGISTERED
                                     ? KV_MEMORY_TYPE_HOST
                                     : KV_MEMORY_TYPE_DEVICE;
        return KV_CUDA_SUCCESS;
    case KV_POINTER_DEVICE_ORDINAL:
        *(int *)value = range.ordinal;
        return KV_CUDA_SUCCESS;
    case KV_POINTER_RANGE_START_ADDR:
        *(kv_devptr *)value = range.start;
        return KV_CUDA_SUCCESS;
    case KV_POINTER_RANGE_SIZE:
        *(size_t *)value = range.bytes;
        return KV_CUDA_SUCCESS;
    default:
        return KV_CUDA_INVALID_VALUE;
    }
}
