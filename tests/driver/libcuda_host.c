/* A libcuda.so.1 over the host driver, so that the way through cuda-python can be run on a machine without a GPU.
 *
 * It has one door, as cuda-python 12 and later use it: cuGetProcAddress. The environment makes it worse:
 *   KV_FAKE_VERSION   what cuDriverGetVersion answers
 *   KV_FAKE_DEVICES   0: cuInit answers NO_DEVICE; -1: it succeeds, and there are none
 *   KV_FAKE_MISSING   a symbol that this driver does not have
 *   KV_FAKE_LOG       file to which each request for a legacy-stream variant is appended as "symbol version" */

#include "../../kvortex/driver/host_driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LEGACY_STREAM = 1, FIRST_OTHER_BATCH_COPY = 13000 };

static int setting(const char *name, int otherwise)
{
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

static kv_result fake_init(unsigned int flags)
{
    return setting("KV_FAKE_DEVICES", 1) == 0 ? KV_CUDA_NO_DEVICE : kv_host_driver()->init(flags);
}

static kv_result fake_driver_get_version(int *version)
{
    *version = setting("KV_FAKE_VERSION", KV_DRIVER_MIN_VERSION);
    return KV_CUDA_SUCCESS;
}

static kv_result fake_device_get_count(int *count)
{
    *count = 0;
    return setting("KV_FAKE_DEVICES", 1) < 0 ? KV_CUDA_SUCCESS : kv_host_driver()->device_get_count(count);
}

static void *function_of(const char *symbol, int version)
{
    const char *missing = getenv("KV_FAKE_MISSING");
    if (missing && !strcmp(symbol, missing))
        return NULL;
    if (!strcmp(symbol, "cuInit"))
        return (void *)fake_init;
    if (!strcmp(symbol, "cuDriverGetVersion"))
        return (void *)fake_driver_get_version;
    if (!strcmp(symbol, "cuDeviceGetCount"))
        return (void *)fake_device_get_count;
    for (int i = 0; i < KV_DRIVER_NUM_ROWS; i++) {
        const kv_driver_row *row = &kv_driver_rows[i];
        if (strcmp(symbol, row->symbol) || version < row->version ||
            (!strcmp(symbol, "cuMemcpyBatchAsync") && version >= FIRST_OTHER_BATCH_COPY))
            continue;
        return *(void **)((char *)kv_host_driver() + row->offset);
    }
    return NULL;
}

__attribute__((visibility("default"))) kv_result cuGetProcAddress_v2(const char *symbol, void **function, int version,
                                                                     uint64_t flags, int *status)
{
    const char *path = getenv("KV_FAKE_LOG");
    if (path && flags == LEGACY_STREAM) {
        FILE *log = fopen(path, "a");
        fprintf(log, "%s %d\n", symbol, version);
        fclose(log);
    }
    if (!strcmp(symbol, "cuGetProcAddress"))
        *function = (void *)cuGetProcAddress_v2;
    else
        *function = function_of(symbol, version);
    if (status)
        *status = *function ? 0 : 1;
    return *function ? KV_CUDA_SUCCESS : KV_CUDA_NOT_FOUND;
}
