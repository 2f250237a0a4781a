/* Copies, fills and the one kernel: the rows that put work on a stream. */

#include "host_memory.h"
#include "host_rows.h"
#include "kvortex/pack.h"

#include <stdlib.h>
#include <string.h>

/* Copies ----------------------------------------------------------------------------------------------------------- */

enum { SIDE_DEVICE, SIDE_HOST };

/* Are these bytes one side of a legal copy? *pageable is set for host memory that CUDA has to stage. Under the lock of
 * the ranges. */
static kv_result check_side(const void *start, size_t bytes, int side, size_t *hint, int *pageable)
{
    if ((uintptr_t)start < KV_HOST_LOWEST_ADDRESS || bytes > UINTPTR_MAX - (uintptr_t)start)
        return KV_CUDA_INVALID_VALUE;
    switch (kv_ranges_find((uintptr_t)start, bytes, hint, NULL)) {
    case KV_RANGE_IS_CLOSED:
    case KV_RANGE_STRADDLES:
        return KV_CUDA_INVALID_VALUE;
    case KV_RANGE_OUTSIDE: /* on the device side it serves as device memory */
        *pageable |= side == SIDE_HOST;
        return KV_CUDA_SUCCESS;
    default:
        return KV_CUDA_SUCCESS;
    }
}

static kv_result copy(const void *target, int target_side, const void *source, int source_side, size_t bytes,
                      void *stream_handle)
{
    kv_stream *stream;
    kv_result code = kv_host_find_own_stream(stream_handle, &stream);
    if (code || !bytes)
        return code;
    int pageable = 0;
    size_t target_hint = 0, source_hint = 0;
    kv_ranges_lock();
    if (!(code = check_side(target, bytes, target_side, &target_hint, &pageable)))
        code = check_side(source, bytes, source_side, &source_hint, &pageable);
    kv_ranges_unlock();
    if (code)
        return code;
    kv_op *op = kv_op_new(KV_OP_COPY, 1);
    if (op)
        op->pieces[0] = (kv_piece){(char *)target, source, bytes};
    return kv_host_submit(stream, op, pageable, NULL);
}

static const void *pointer(kv_devptr address)
{
    return (const void *)(uintptr_t)address;
}

kv_result kv_host_memcpy_dtoh_async(void *target, kv_devptr source, size_t bytes, void *stream)
{
    KV_HOST_BEGIN(memcpy_dtoh_async);
    return copy(target, SIDE_HOST, pointer(source), SIDE_DEVICE, bytes, stream);
}

kv_result kv_host_memcpy_htod_async(kv_devptr target, const void *source, size_t bytes, void *stream)
{
    KV_HOST_BEGIN(memcpy_htod_async);
    return copy(pointer(target), SIDE_DEVICE, source, SIDE_HOST, bytes, stream);
}

kv_result kv_host_memcpy_dtod_async(kv_devptr target, kv_devptr source, size_t bytes, void *stream)
{
    KV_HOST_BEGIN(memcpy_dtod_async);
    return copy(pointer(target), SIDE_DEVICE, pointer(source), SIDE_DEVICE, bytes, stream);
}

/* One side of a 2D copy: where its first row starts, and that first to last row lie in one allocation. */
static kv_result check_side_2d(const kv_memcpy_2d *copy, unsigned int type, const void *host, kv_devptr dev, size_t x,
                               size_t y, size_t pitch, const char **start, int *pageable)
{
    if (type == KV_MEMORY_TYPE_HOST)
        *start = host;
    else if (type == KV_MEMORY_TYPE_DEVICE || type == KV_MEMORY_TYPE_UNIFIED)
        *start = pointer(dev);
    else
        return KV_CUDA_INVALID_VALUE;
    if (pitch > (size_t)KV_HOST_MAX_PITCH || pitch < copy->width_bytes + x ||
        (uintptr_t)*start < KV_HOST_LOWEST_ADDRESS)
        return KV_CUDA_INVALID_VALUE;
    size_t bytes, skipped, hint = 0;
    if (__builtin_mul_overflow(copy->height - 1, pitch, &bytes) ||
        __builtin_add_overflow(bytes, copy->width_bytes, &bytes) || __builtin_mul_overflow(y, pitch, &skipped) ||
        __builtin_add_overflow(skipped, x, &skipped) || skipped > UINTPTR_MAX - (uintptr_t)*start)
        return KV_CUDA_INVALID_VALUE;
    *start += skipped;
    return check_side(*start, bytes, type == KV_MEMORY_TYPE_HOST ? SIDE_HOST : SIDE_DEVICE, &hint, pageable);
}

kv_result kv_host_memcpy_2d_async(const kv_memcpy_2d *copy, void *stream_handle)
{
    KV_HOST_BEGIN(memcpy_2d_async);
    kv_stream *stream;
    kv_result code = kv_host_find_own_stream(stream_handle, &stream);
    if (code)
        return code;
    if (!copy)
        return KV_CUDA_INVALID_VALUE;
    if (!copy->width_bytes || !copy->height)
        return KV_CUDA_SUCCESS;
    int pageable = 0;
    const char *source, *target;
    kv_ranges_lock();
    code = check_side_2d(copy, copy->source_memory_type, copy->source_host, copy->source_device, copy->source_x_bytes,
                         copy->source_y, copy->source_pitch, &source, &pageable);
    if (!code)
        code = check_side_2d(copy, copy->target_memory_type, copy->target_host, copy->target_device,
                             copy->target_x_bytes, copy->target_y, copy->target_pitch, &target, &pageable);
    kv_ranges_unlock();
    if (code)
        return code;
    kv_op *op = kv_op_new(KV_OP_COPY, 1);
    if (op) {
        op->rows = copy->height;
        op->target_pitch = copy->target_pitch;
        op->source_pitch = copy->source_pitch;
        op->pieces[0] = (kv_piece){(char *)target, source, copy->width_bytes};
    }
    return kv_host_submit(stream, op, pageable, NULL);
}

/* Any order but that of the stream lets the source be read during the call already, so here it always is. */
static int reads_early(const kv_memcpy_attributes *attributes, size_t num_attributes)
{
    for (size_t i = 0; i < num_attributes; i++)
        if (attributes[i].source_access_order != KV_SRC_ACCESS_ORDER_STREAM)
            return 1;
    return 0;
}

/* `op` with a copy of what its pieces would read behind them. Frees `op`; NULL: out of memory. */
static kv_op *read_now(kv_op *op)
{
    size_t bytes = 0;
    for (size_t i = 0; i < op->count; i++)
        bytes += op->pieces[i].bytes;
    kv_op *early = kv_op_new(KV_OP_COPY, op->count + bytes / sizeof *op->pieces + 1);
    if (early) {
        char *data = (char *)(early->pieces + op->count);
        early->count = op->count;
        for (size_t i = 0; i < op->count; i++) {
            early->pieces[i] = (kv_piece){op->pieces[i].target, data, op->pieces[i].bytes};
            memcpy(data, op->pieces[i].source, op->pieces[i].bytes);
            data += op->pieces[i].bytes;
        }
    }
    free(op);
    return early;
}

static int are_attributes_legal(const kv_memcpy_attributes *attributes, const size_t *indices, size_t num_attributes,
                                size_t count)
{
    if (!attributes || !indices || !num_attributes || num_attributes > count || indices[0] != 0)
        return 0;
    for (size_t i = 0; i < num_attributes; i++)
        if (attributes[i].source_access_order < KV_SRC_ACCESS_ORDER_STREAM || attributes[i].source_access_order > 3 ||
            (i && indices[i] <= indices[i - 1]) || indices[i] >= count)
            return 0;
    return 1;
}

kv_result kv_host_memcpy_batch_async(kv_devptr *targets, kv_devptr *sources, size_t *sizes, size_t count,
                                         kv_memcpy_attributes *attributes, size_t *attribute_indices,
                                         size_t num_attributes, size_t *fail_index, void *stream_handle)
{
    KV_HOST_BEGIN(memcpy_batch_async);
    if (fail_index)
        *fail_index = SIZE_MAX;
    if ((uintptr_t)stream_handle <= 2)
        return KV_CUDA_INVALID_VALUE;
    kv_stream *stream;
    kv_result code = kv_host_find_own_stream(stream_handle, &stream);
    if (code)
        return code;
    if (!targets || !sources || !sizes || !count || !fail_index ||
        !are_attributes_legal(attributes, attribute_indices, num_attributes, count))
        return KV_CUDA_INVALID_VALUE;
    kv_op *op = kv_op_new(KV_OP_COPY, count);
    if (!op)
        return KV_CUDA_OUT_OF_MEMORY;
    size_t target_hint = 0, source_hint = 0;
    int pageable = 0; /* unified addressing tells the sides apart, so unknown memory is foreign here, never staged */
    kv_ranges_lock();
    for (size_t i = 0; i < count && !code; i++) {
        const void *target = pointer(targets[i]), *source = pointer(sources[i]);
        if (!sizes[i] || (code = check_side(target, sizes[i], SIDE_DEVICE, &target_hint, &pageable)) ||
            (code = check_side(source, sizes[i], SIDE_DEVICE, &source_hint, &pageable))) {
            *fail_index = i;
            code = KV_CUDA_INVALID_VALUE;
        }
        op->pieces[i] = (kv_piece){(char *)target, source, sizes[i]};
    }
    kv_ranges_unlock();
    if (code) {
        free(op);
        return code;
    }
    if (reads_early(attributes, num_attributes))
        op = read_now(op);
    return kv_host_submit(stream, op, pageable, NULL);
}

kv_result kv_host_memset_d8_async(kv_devptr target, unsigned char value, size_t bytes, void *stream_handle)
{
    KV_HOST_BEGIN(memset_d8_async);
    kv_stream *stream;
    kv_result code = kv_host_find_own_stream(stream_handle, &stream);
    if (code || !bytes)
        return code;
    size_t hint = 0;
    int pageable = 0;
    kv_ranges_lock();
    code = check_side(pointer(target), bytes, SIDE_DEVICE, &hint, &pageable);
    kv_ranges_unlock();
    if (code)
        return code;
    kv_op *op = kv_op_new(KV_OP_FILL, 1);
    if (op) {
        op->value = value;
        op->pieces[0] = (kv_piece){(char *)pointer(target), NULL, bytes};
    }
    return kv_host_submit(stream, op, 0, NULL);
}

/* Kernels: the one there is, named as in its PTX ------------------------------------------------------------------- */

static const char PACK_NAME[] = "kv_pack_blocks";
static const char pack_module, pack_function; /* their addresses are the handles */

kv_result kv_host_module_load_data(void **module, const void *image)
{
    KV_HOST_BEGIN(module_load_data);
    if (!kv_host_current_device())
        return KV_CUDA_INVALID_CONTEXT;
    if (!module || !image || !strstr(image, PACK_NAME))
        return KV_CUDA_INVALID_VALUE;
    *module = (void *)&pack_module;
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_module_unload(void *module)
{
    KV_HOST_BEGIN(module_unload);
    return module == &pack_module ? KV_CUDA_SUCCESS : KV_CUDA_INVALID_HANDLE;
}

kv_result kv_host_module_get_function(void **function, void *module, const char *name)
{
    KV_HOST_BEGIN(module_get_function);
    if (module != &pack_module)
        return KV_CUDA_INVALID_HANDLE;
    if (!function || !name || strcmp(name, PACK_NAME))
        return name ? KV_CUDA_NOT_FOUND : KV_CUDA_INVALID_VALUE;
    *function = (void *)&pack_function;
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_launch_kernel(void *function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                                unsigned int block_x, unsigned int block_y, unsigned int block_z,
                                unsigned int shared_bytes, void *stream_handle, void **parameters, void **extra)
{
    KV_HOST_BEGIN(launch_kernel);
    kv_stream *stream;
    kv_result code = kv_host_find_own_stream(stream_handle, &stream);
    if (code)
        return code;
    if (function != &pack_function)
        return KV_CUDA_INVALID_HANDLE;
    if (!grid_x || grid_y != 1 || grid_z != 1 || block_x != KV_PACK_THREADS || block_y != 1 || block_z != 1 ||
        shared_bytes || !parameters || extra)
        return KV_CUDA_INVALID_VALUE;
    const size_t pieces = (sizeof(kv_pack) + sizeof(kv_piece) - 1) / sizeof(kv_piece);
    kv_op *op = kv_op_new(KV_OP_PACK, pieces);
    if (op)
        memcpy(op->pieces, parameters[0], sizeof(kv_pack)); /* taken by value, as a GPU takes it */
    return kv_host_submit(stream, op, 0, NULL);
}
