/* driver.h: the CUDA driver entry points KVortex uses, as a table of function pointers.
 *
 * Two fillers exist: the cuda loader asks cuGetProcAddress for each row at the version named here (legacy-stream
 * variants), and the host driver (kvortex/driver/host_*.c) implements the same rows over host memory.
 * Everything above calls through the table and never holds the GIL while it does.
 *
 * Invariants
 *   - A row is declared once, below, with the CUDA version whose signature it has. Asking the driver for exactly that
 *     version is what lets one binary serve CUDA 12.8 and 13: cuMemcpyBatchAsync changed its signature in 13, and a
 *     13 driver still hands out the 12.8 one when asked for 12080.
 *   - No row is NULL after loading: a driver without one of them is too old and is refused as a whole.
 *   - Types are ours, so no CUDA header is needed to build; tests compare them with a real cuda.h.
 *
 * Costs: one indirect call more than linking libcuda (about 1 ns).
 */
#ifndef KVORTEX_DRIVER_H
#define KVORTEX_DRIVER_H

#include <stddef.h>
#include <stdint.h>

typedef int kv_result;                /* CUresult */
typedef unsigned long long kv_devptr; /* CUdeviceptr */

/* The driver version below which loading is refused: the first with cuMemcpyBatchAsync. */
#define KV_DRIVER_MIN_VERSION 12080

enum { /* CUresult, the ones KVortex tells apart or the host driver answers */
    KV_CUDA_SUCCESS = 0,
    KV_CUDA_INVALID_VALUE = 1,
    KV_CUDA_OUT_OF_MEMORY = 2,
    KV_CUDA_NOT_INITIALIZED = 3,
    KV_CUDA_DEINITIALIZED = 4,
    KV_CUDA_NO_DEVICE = 100,
    KV_CUDA_INVALID_DEVICE = 101,
    KV_CUDA_INVALID_CONTEXT = 201,
    KV_CUDA_ECC_UNCORRECTABLE = 214,
    KV_CUDA_INVALID_HANDLE = 400,
    KV_CUDA_NOT_FOUND = 500,
    KV_CUDA_NOT_READY = 600,
    KV_CUDA_ILLEGAL_ADDRESS = 700,
    KV_CUDA_HOST_MEMORY_ALREADY_REGISTERED = 712,
    KV_CUDA_HOST_MEMORY_NOT_REGISTERED = 713,
    KV_CUDA_LAUNCH_FAILED = 719,
    KV_CUDA_NOT_PERMITTED = 800,
    KV_CUDA_NOT_SUPPORTED = 801,
    KV_CUDA_STREAM_CAPTURE_UNSUPPORTED = 900,
    KV_CUDA_STREAM_CAPTURE_INVALIDATED = 901,
    KV_CUDA_STREAM_CAPTURE_ISOLATION = 905,
    KV_CUDA_STREAM_CAPTURE_IMPLICIT = 906,
    KV_CUDA_CAPTURED_EVENT = 907,
    KV_CUDA_UNKNOWN = 999
};

enum { KV_STREAM_NON_BLOCKING = 1 };         /* CU_STREAM_NON_BLOCKING */
enum { KV_EVENT_DISABLE_TIMING = 2 };        /* CU_EVENT_DISABLE_TIMING */
enum { KV_HOST_ALLOC_PORTABLE = 1 };         /* CU_MEMHOSTALLOC_PORTABLE */
enum { KV_HOST_REGISTER_PORTABLE = 1 };      /* CU_MEMHOSTREGISTER_PORTABLE */
enum { KV_MEMORY_TYPE_HOST = 1, KV_MEMORY_TYPE_DEVICE = 2, KV_MEMORY_TYPE_ARRAY = 3, KV_MEMORY_TYPE_UNIFIED = 4 };
enum { KV_CAPTURE_MODE_GLOBAL = 0, KV_CAPTURE_MODE_THREAD_LOCAL = 1, KV_CAPTURE_MODE_RELAXED = 2 };
enum { KV_CAPTURE_STATUS_NONE = 0, KV_CAPTURE_STATUS_ACTIVE = 1, KV_CAPTURE_STATUS_INVALIDATED = 2 };
enum { KV_SRC_ACCESS_ORDER_STREAM = 1 };     /* never ANY: it may read before the caller's work is done */
enum {                                       /* CUpointer_attribute */
    KV_POINTER_MEMORY_TYPE = 2,              /* unsigned int */
    KV_POINTER_DEVICE_ORDINAL = 9,           /* int */
    KV_POINTER_RANGE_START_ADDR = 11,        /* kv_devptr */
    KV_POINTER_RANGE_SIZE = 12               /* size_t */
};
enum { /* CUdevice_attribute */
    KV_DEVICE_ATTRIBUTE_MAX_PITCH = 11,
    KV_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
    KV_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED = 115,
    KV_DEVICE_ATTRIBUTE_HOST_NUMA_ID = 134
};
enum { KV_MEM_ALLOCATION_TYPE_PINNED = 1 }; /* CUmemAllocationType: that of device memory, too */
enum { KV_MEM_LOCATION_TYPE_DEVICE = 1 };   /* CUmemLocationType */
enum { KV_MEM_ACCESS_READWRITE = 3 };       /* CUmemAccess_flags */
enum { KV_MEM_GRANULARITY_MINIMUM = 0, KV_MEM_GRANULARITY_RECOMMENDED = 1 };
enum {                                      /* CUmemPool_attribute; values are uint64_t */
    KV_MEMPOOL_RELEASE_THRESHOLD = 4,
    KV_MEMPOOL_RESERVED_CURRENT = 5,
    KV_MEMPOOL_RESERVED_HIGH = 6,
    KV_MEMPOOL_USED_CURRENT = 7,
    KV_MEMPOOL_USED_HIGH = 8
};

typedef struct kv_memcpy_2d { /* CUDA_MEMCPY2D */
    size_t source_x_bytes, source_y;
    unsigned int source_memory_type;
    const void *source_host;
    kv_devptr source_device;
    void *source_array;
    size_t source_pitch;
    size_t target_x_bytes, target_y;
    unsigned int target_memory_type;
    void *target_host;
    kv_devptr target_device;
    void *target_array;
    size_t target_pitch;
    size_t width_bytes, height;
} kv_memcpy_2d;

typedef struct kv_mem_location { /* CUmemLocation */
    int type, id;
} kv_mem_location;

typedef struct kv_memcpy_attributes { /* CUmemcpyAttributes */
    int source_access_order;
    kv_mem_location source_hint, target_hint;
    unsigned int flags;
} kv_memcpy_attributes;

typedef struct kv_mem_pool_props { /* CUmemPoolProps; what is not named here must be 0 */
    int allocation_type, handle_types;
    kv_mem_location location;
    void *security_attributes;
    size_t max_bytes; /* 0: as much as there is */
    unsigned short usage;
    unsigned char reserved[54];
} kv_mem_pool_props;

typedef struct kv_mem_allocation_props { /* CUmemAllocationProp; the same */
    int type, handle_types;
    kv_mem_location location;
    void *security_attributes;
    unsigned char flags[8];
} kv_mem_allocation_props;

typedef struct kv_mem_access { /* CUmemAccessDesc */
    kv_mem_location location;
    int flags;
} kv_mem_access;

/* X(field, symbol, version, parameters) */
#define KV_DRIVER_ROWS(X) \
    X(init, cuInit, 2000, (unsigned int flags)) \
    X(driver_get_version, cuDriverGetVersion, 2020, (int *version)) \
    X(get_error_name, cuGetErrorName, 6000, (kv_result error, const char **name)) \
    X(get_error_string, cuGetErrorString, 6000, (kv_result error, const char **text)) \
    X(device_get_count, cuDeviceGetCount, 2000, (int *count)) \
    X(device_get, cuDeviceGet, 2000, (int *device, int ordinal)) \
    X(device_get_name, cuDeviceGetName, 2000, (char *name, int name_bytes, int device)) \
    X(device_get_attribute, cuDeviceGetAttribute, 2000, (int *value, int attribute, int device)) \
    X(device_primary_ctx_retain, cuDevicePrimaryCtxRetain, 7000, (void **context, int device)) \
    X(device_primary_ctx_release, cuDevicePrimaryCtxRelease, 11000, (int device)) \
    X(ctx_push_current, cuCtxPushCurrent, 4000, (void *context)) \
    X(ctx_pop_current, cuCtxPopCurrent, 4000, (void **context)) \
    X(ctx_get_current, cuCtxGetCurrent, 4000, (void **context)) \
    X(ctx_set_current, cuCtxSetCurrent, 4000, (void *context)) \
    X(ctx_get_device, cuCtxGetDevice, 2000, (int *device)) \
    X(ctx_synchronize, cuCtxSynchronize, 2000, (void)) \
    X(thread_exchange_stream_capture_mode, cuThreadExchangeStreamCaptureMode, 10010, (int *mode)) \
    X(stream_create, cuStreamCreate, 2000, (void **stream, unsigned int flags)) \
    X(stream_create_with_priority, cuStreamCreateWithPriority, 5050, \
      (void **stream, unsigned int flags, int priority)) \
    X(stream_destroy, cuStreamDestroy, 4000, (void *stream)) \
    X(stream_query, cuStreamQuery, 2000, (void *stream)) \
    X(stream_synchronize, cuStreamSynchronize, 2000, (void *stream)) \
    X(stream_wait_event, cuStreamWaitEvent, 3020, (void *stream, void *event, unsigned int flags)) \
    X(stream_is_capturing, cuStreamIsCapturing, 10000, (void *stream, int *status)) \
    X(stream_get_ctx, cuStreamGetCtx, 9020, (void *stream, void **context)) \
    X(event_create, cuEventCreate, 2000, (void **event, unsigned int flags)) \
    X(event_destroy, cuEventDestroy, 4000, (void *event)) \
    X(event_record, cuEventRecord, 2000, (void *event, void *stream)) \
    X(event_query, cuEventQuery, 2000, (void *event)) \
    X(event_synchronize, cuEventSynchronize, 2000, (void *event)) \
    X(mem_get_info, cuMemGetInfo, 3020, (size_t *free_bytes, size_t *total_bytes)) \
    X(mem_alloc, cuMemAlloc, 3020, (kv_devptr *address, size_t bytes)) \
    X(mem_free, cuMemFree, 3020, (kv_devptr address)) \
    X(mem_pool_create, cuMemPoolCreate, 11020, (void **pool, const kv_mem_pool_props *props)) \
    X(mem_pool_destroy, cuMemPoolDestroy, 11020, (void *pool)) \
    X(mem_pool_set_attribute, cuMemPoolSetAttribute, 11020, (void *pool, int attribute, void *value)) \
    X(mem_pool_get_attribute, cuMemPoolGetAttribute, 11020, (void *pool, int attribute, void *value)) \
    X(mem_pool_trim_to, cuMemPoolTrimTo, 11020, (void *pool, size_t keep_bytes)) \
    X(mem_alloc_from_pool_async, cuMemAllocFromPoolAsync, 11020, \
      (kv_devptr *address, size_t bytes, void *pool, void *stream)) \
    X(mem_free_async, cuMemFreeAsync, 11020, (kv_devptr address, void *stream)) \
    X(mem_get_allocation_granularity, cuMemGetAllocationGranularity, 10020, \
      (size_t *bytes, const kv_mem_allocation_props *props, int option)) \
    X(mem_address_reserve, cuMemAddressReserve, 10020, \
      (kv_devptr *address, size_t bytes, size_t alignment, kv_devptr hint, unsigned long long flags)) \
    X(mem_address_free, cuMemAddressFree, 10020, (kv_devptr address, size_t bytes)) \
    X(mem_create, cuMemCreate, 10020, \
      (unsigned long long *handle, size_t bytes, const kv_mem_allocation_props *props, unsigned long long flags)) \
    X(mem_release, cuMemRelease, 10020, (unsigned long long handle)) \
    X(mem_map, cuMemMap, 10020, \
      (kv_devptr address, size_t bytes, size_t offset, unsigned long long handle, unsigned long long flags)) \
    X(mem_set_access, cuMemSetAccess, 10020, \
      (kv_devptr address, size_t bytes, const kv_mem_access *access, size_t count)) \
    X(mem_unmap, cuMemUnmap, 10020, (kv_devptr address, size_t bytes)) \
    X(mem_host_alloc, cuMemHostAlloc, 2020, (void **address, size_t bytes, unsigned int flags)) \
    X(mem_free_host, cuMemFreeHost, 2000, (void *address)) \
    X(mem_host_register, cuMemHostRegister, 6050, (void *address, size_t bytes, unsigned int flags)) \
    X(mem_host_unregister, cuMemHostUnregister, 4000, (void *address)) \
    X(pointer_get_attribute, cuPointerGetAttribute, 4000, (void *value, int attribute, kv_devptr address)) \
    X(memcpy_dtoh_async, cuMemcpyDtoHAsync, 3020, (void *target, kv_devptr source, size_t bytes, void *stream)) \
    X(memcpy_htod_async, cuMemcpyHtoDAsync, 3020, (kv_devptr target, const void *source, size_t bytes, void *stream)) \
    X(memcpy_dtod_async, cuMemcpyDtoDAsync, 3020, (kv_devptr target, kv_devptr source, size_t bytes, void *stream)) \
    X(memcpy_2d_async, cuMemcpy2DAsync, 3020, (const kv_memcpy_2d *copy, void *stream)) \
    X(memcpy_batch_async, cuMemcpyBatchAsync, 12080, \
      (kv_devptr *targets, kv_devptr *sources, size_t *sizes, size_t count, kv_memcpy_attributes *attributes, \
       size_t *attribute_indices, size_t num_attributes, size_t *fail_index, void *stream)) \
    X(module_load_data, cuModuleLoadData, 2000, (void **module, const void *image)) \
    X(module_unload, cuModuleUnload, 2000, (void *module)) \
    X(module_get_function, cuModuleGetFunction, 2000, (void **function, void *module, const char *name)) \
    X(launch_kernel, cuLaunchKernel, 4000, \
      (void *function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x, \
       unsigned int block_y, unsigned int block_z, unsigned int shared_bytes, void *stream, void **parameters, \
       void **extra)) \
    X(memset_d8_async, cuMemsetD8Async, 3020, (kv_devptr target, unsigned char value, size_t bytes, void *stream))

typedef struct kv_driver {
#define KV_DRIVER_FIELD(field, symbol, version, parameters) kv_result(*field) parameters;
    KV_DRIVER_ROWS(KV_DRIVER_FIELD)
#undef KV_DRIVER_FIELD
} kv_driver;

/* One row as the loader and the tests see it. */
typedef struct kv_driver_row {
    const char *field, *symbol;
    int version;
    size_t offset; /* of the function pointer inside kv_driver */
    const char *parameters;
} kv_driver_row;

#define KV_DRIVER_ROW_INFO(field, symbol, version, parameters) \
    {#field, #symbol, version, offsetof(kv_driver, field), #parameters},
static const kv_driver_row kv_driver_rows[] = {KV_DRIVER_ROWS(KV_DRIVER_ROW_INFO)};
#undef KV_DRIVER_ROW_INFO
#define KV_DRIVER_ROW_NUMBER(field, symbol, version, parameters) KV_ROW_##field,
enum { KV_DRIVER_ROWS(KV_DRIVER_ROW_NUMBER) };
#undef KV_DRIVER_ROW_NUMBER
enum { KV_DRIVER_NUM_ROWS = sizeof(kv_driver_rows) / sizeof(kv_driver_rows[0]) };

/* A code may carry the row that answered it, above its own 16 bits. An error then names that call, and the code equals
 * none of those above: the failure of a preparation is no answer of the call that it prepares.
 *
 *   code = kv_call(drv, event_query, event);                        calls a row of the table; a failure carries the row
 *   if (code == kv_answer(KV_CUDA_NOT_READY, event_query)) ...      exactly this answer of exactly this row */
static inline kv_result kv_result_at(kv_result code, int row)
{
    return code && !(code >> 16) ? code | (row + 1) << 16 : code; /* 0 stays 0, and a row that is named stays named */
}
static inline kv_result kv_result_code(kv_result code) { return code & 0xFFFF; }
static inline int kv_result_row(kv_result code) { return (code >> 16) - 1; } /* -1: it carries none */
static inline const char *kv_result_call(kv_result code) /* its symbol */
{
    return code >> 16 ? kv_driver_rows[kv_result_row(code)].symbol : "the driver";
}
#define kv_call(drv, field, ...) kv_result_at((drv)->field(__VA_ARGS__), KV_ROW_##field)
#define kv_answer(code, field) kv_result_at(code, KV_ROW_##field)

/* True for errors after which the context is lost and every later call fails too (the driver calls them sticky). */
static inline int kv_result_is_sticky(kv_result code)
{
    code = kv_result_code(code);
    switch (code) {
    case KV_CUDA_DEINITIALIZED:
    case KV_CUDA_ECC_UNCORRECTABLE:
    case KV_CUDA_INVALID_CONTEXT:
        return 1;
    default: /* 700-720 are faults of work on the device, except the answers about host memory (711-713) and peers */
        return code == KV_CUDA_ILLEGAL_ADDRESS || code == 702 || code == 709 || (code >= 714 && code <= 719) ||
               code == KV_CUDA_UNKNOWN;
    }
}

#endif
