/* Streams, events, memory and copies: the rows of the driver table that do the work, and the table. See host_driver.h.
 *
 * The parts: host_device.c (devices and contexts), host_stream.c (the workers), host_memory.c (known address ranges),
 * host_pool.c (memory pools), host_space.c (reserved address space), host_control.c (captures, failures, dead devices),
 * host_state.h (what they share). */

#include "host_memory.h"
#include "host_state.h"
#include "kvortex/gather.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_EVENTS = 1 << 16, LOWEST_ADDRESS = 4096 };
static const uint64_t EVENT_TAG = 0x45ull << 48; /* 'E'; a handle is tag | generation | slot */
static const uint64_t CAPTURED_TICKET = ~0ull;   /* recorded in a capturing stream */

typedef struct event {
    _Atomic uint64_t handle, ticket; /* ticket 0: never recorded, and so complete */
    int ordinal;
    uint64_t generation;
    struct event *next_free;
} event;
static event events[MAX_EVENTS];
static pthread_mutex_t events_mutex = PTHREAD_MUTEX_INITIALIZER;
static event *free_events;
static size_t num_events_used, num_events_live;
_Atomic size_t kv_host_num_reaped;

/* Streams ---------------------------------------------------------------------------------------------------------- */

/* A handle to its stream. 0 and 1 are the legacy default stream of the current context, 2 the per-thread one. */
kv_result kv_host_find_stream(void *handle, kv_stream **stream)
{
    if ((uintptr_t)handle <= 2) {
        kv_host_device *dev = kv_host_current_device();
        if (!dev)
            return KV_CUDA_INVALID_CONTEXT;
        *stream = kv_stream_default((int)(dev - kv_host_devices), (uintptr_t)handle == 2);
    } else if (!(*stream = kv_stream_of((uintptr_t)handle)))
        return KV_CUDA_INVALID_HANDLE;
    return atomic_load(&kv_host_devices[(*stream)->ordinal].sticky);
}

/* For submissions: there must be a current context, and the stream must belong to it. */
kv_result kv_host_find_own_stream(void *handle, kv_stream **stream)
{
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    kv_result code = kv_host_find_stream(handle, stream);
    return code ? code : (*stream)->ordinal == dev - kv_host_devices ? KV_CUDA_SUCCESS : KV_CUDA_INVALID_HANDLE;
}

/* Waits on the host; what a dead device answers, or success. */
static kv_result wait_ticket(uint64_t ticket, int ordinal)
{
    kv_ticket_wait(ticket, ordinal);
    return atomic_load(&kv_host_devices[ordinal].sticky);
}

kv_result kv_host_submit(kv_stream *stream, kv_op *op, int synchronous, uint64_t *ticket)
{
    int captured;
    if (!op)
        return KV_CUDA_OUT_OF_MEMORY;
    kv_result code = kv_host_admit(stream, &captured);
    if (code || captured) {
        free(op);
        if (ticket)
            *ticket = CAPTURED_TICKET;
        return code;
    }
    uint64_t own_ticket;
    code = kv_stream_push(stream, op, &own_ticket);
    if (ticket)
        *ticket = own_ticket;
    return code || !synchronous ? code : wait_ticket(own_ticket, stream->ordinal);
}

kv_result kv_host_stream_create(void **stream, unsigned int flags)
{
    KV_HOST_BEGIN(stream_create);
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    if (!stream || flags & ~(unsigned int)KV_STREAM_NON_BLOCKING)
        return KV_CUDA_INVALID_VALUE;
    kv_stream *created = kv_stream_open((int)(dev - kv_host_devices), flags);
    if (!created)
        return KV_CUDA_OUT_OF_MEMORY;
    *stream = (void *)(uintptr_t)atomic_load(&created->handle);
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_stream_create_with_priority(void **stream, unsigned int flags, int priority)
{
    KV_HOST_BEGIN(stream_create_with_priority);
    (void)priority; /* any number will do, as with CUDA, which clamps it */
    return kv_host_stream_create(stream, flags);
}

/* A capture ends with its stream. */
static int close_stream(uint64_t handle)
{
    size_t num_captured;
    kv_stream *stream = kv_stream_of(handle);
    if (stream && kv_host_capture_status(stream) != KV_CAPTURE_STATUS_NONE)
        kv_host_end_capture(stream, &num_captured);
    return kv_stream_close(handle);
}

kv_result kv_host_stream_destroy(void *stream)
{
    KV_HOST_BEGIN(stream_destroy);
    return close_stream((uintptr_t)stream) ? KV_CUDA_SUCCESS : KV_CUDA_INVALID_HANDLE;
}

kv_result kv_host_stream_query(void *handle)
{
    KV_HOST_BEGIN(stream_query);
    kv_stream *stream;
    kv_result code = kv_host_find_stream(handle, &stream);
    if (code || (code = kv_host_refuse_wait(stream)))
        return code;
    return kv_ticket_done(kv_stream_last_ticket(stream)) ? KV_CUDA_SUCCESS : KV_CUDA_NOT_READY;
}

kv_result kv_host_stream_synchronize(void *handle)
{
    KV_HOST_BEGIN(stream_synchronize);
    kv_stream *stream;
    kv_result code = kv_host_find_stream(handle, &stream);
    if (code || (code = kv_host_refuse_wait(stream)))
        return code;
    code = wait_ticket(kv_stream_last_ticket(stream), stream->ordinal);
    kv_host_pools_settle(stream->ordinal);
    return code;
}

kv_result kv_host_stream_is_capturing(void *handle, int *status)
{
    KV_HOST_BEGIN(stream_is_capturing);
    kv_stream *stream;
    kv_result code = kv_host_find_stream(handle, &stream);
    if (code)
        return code;
    if (!status)
        return KV_CUDA_INVALID_VALUE;
    if (kv_host_is_implicit(stream, 0))
        return KV_CUDA_STREAM_CAPTURE_IMPLICIT;
    *status = kv_host_capture_status(stream);
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_stream_get_ctx(void *handle, void **context)
{
    KV_HOST_BEGIN(stream_get_ctx);
    kv_stream *stream;
    kv_result code = kv_host_find_stream(handle, &stream);
    if (code)
        return code;
    if (!context)
        return KV_CUDA_INVALID_VALUE;
    *context = (void *)(uintptr_t)atomic_load(&kv_host_devices[stream->ordinal].context);
    return KV_CUDA_SUCCESS;
}

/* Events ----------------------------------------------------------------------------------------------------------- */

static event *event_of(void *handle)
{
    size_t slot = (uintptr_t)handle & (MAX_EVENTS - 1);
    if ((uintptr_t)handle >> 48 != EVENT_TAG >> 48)
        return NULL;
    return atomic_load_explicit(&events[slot].handle, memory_order_acquire) == (uintptr_t)handle ? &events[slot] : NULL;
}

static kv_result find_event(void *handle, event **found)
{
    if (!(*found = event_of(handle)))
        return KV_CUDA_INVALID_HANDLE;
    return atomic_load(&kv_host_devices[(*found)->ordinal].sticky);
}

kv_result kv_host_event_create(void **handle, unsigned int flags)
{
    KV_HOST_BEGIN(event_create);
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    if (!handle || flags > 7)
        return KV_CUDA_INVALID_VALUE;
    pthread_mutex_lock(&events_mutex);
    event *created = free_events;
    if (created)
        free_events = created->next_free;
    else if (num_events_used < MAX_EVENTS)
        created = &events[num_events_used++];
    if (created) {
        num_events_live++;
        created->ordinal = (int)(dev - kv_host_devices);
        atomic_store(&created->ticket, 0);
        uint64_t generation = ++created->generation & 0xffffffff;
        uint64_t value = EVENT_TAG | generation << 16 | (uint64_t)(created - events);
        atomic_store_explicit(&created->handle, value, memory_order_release);
        *handle = (void *)(uintptr_t)value;
    }
    pthread_mutex_unlock(&events_mutex);
    return created ? KV_CUDA_SUCCESS : KV_CUDA_OUT_OF_MEMORY;
}

static int event_close(void *handle)
{
    pthread_mutex_lock(&events_mutex);
    event *closed = event_of(handle);
    if (closed) {
        atomic_store(&closed->handle, 0);
        closed->next_free = free_events;
        free_events = closed;
        num_events_live--;
    }
    pthread_mutex_unlock(&events_mutex);
    return closed != NULL;
}

size_t kv_host_events_live(void)
{
    pthread_mutex_lock(&events_mutex);
    size_t count = num_events_live;
    pthread_mutex_unlock(&events_mutex);
    return count;
}

kv_result kv_host_event_destroy(void *handle)
{
    KV_HOST_BEGIN(event_destroy);
    return event_close(handle) ? KV_CUDA_SUCCESS : KV_CUDA_INVALID_HANDLE;
}

kv_result kv_host_event_record(void *handle, void *stream_handle)
{
    KV_HOST_BEGIN(event_record);
    kv_stream *stream;
    event *recorded;
    kv_result code = kv_host_find_own_stream(stream_handle, &stream);
    if (code || (code = find_event(handle, &recorded)))
        return code;
    if (recorded->ordinal != stream->ordinal)
        return KV_CUDA_INVALID_HANDLE;
    uint64_t ticket;
    if (!(code = kv_host_submit(stream, kv_op_new(KV_OP_MARK, 0), 0, &ticket)))
        atomic_store_explicit(&recorded->ticket, ticket, memory_order_release);
    return code;
}

/* What the event stands for at this moment: later records do not change a wait that was submitted before. */
static kv_result ticket_now(void *handle, event **found, uint64_t *ticket)
{
    kv_result code = find_event(handle, found);
    if (!code)
        *ticket = atomic_load_explicit(&(*found)->ticket, memory_order_acquire);
    return code;
}

kv_result kv_host_stream_wait_event(void *stream_handle, void *handle, unsigned int flags)
{
    KV_HOST_BEGIN(stream_wait_event);
    if (!kv_host_current_device())
        return KV_CUDA_INVALID_CONTEXT;
    if (flags)
        return KV_CUDA_INVALID_VALUE;
    kv_stream *stream;
    event *awaited;
    uint64_t ticket;
    kv_result code = kv_host_find_stream(stream_handle, &stream);
    if (code || (code = ticket_now(handle, &awaited, &ticket)))
        return code;
    if ((ticket == CAPTURED_TICKET) != (kv_host_capture_status(stream) == KV_CAPTURE_STATUS_ACTIVE))
        return KV_CUDA_STREAM_CAPTURE_ISOLATION;
    kv_op *op = kv_op_new(KV_OP_WAIT, 0);
    if (op)
        op->ticket = ticket;
    return kv_host_submit(stream, op, 0, NULL);
}

kv_result kv_host_event_query(void *handle)
{
    KV_HOST_BEGIN(event_query);
    event *asked;
    uint64_t ticket;
    kv_result code = ticket_now(handle, &asked, &ticket);
    if (code)
        return code;
    if (ticket == CAPTURED_TICKET)
        return KV_CUDA_CAPTURED_EVENT;
    return kv_ticket_done(ticket) ? KV_CUDA_SUCCESS : KV_CUDA_NOT_READY;
}

kv_result kv_host_event_synchronize(void *handle)
{
    KV_HOST_BEGIN(event_synchronize);
    event *asked;
    uint64_t ticket;
    kv_result code = ticket_now(handle, &asked, &ticket);
    if (code)
        return code;
    if (ticket == CAPTURED_TICKET)
        return KV_CUDA_CAPTURED_EVENT;
    code = wait_ticket(ticket, asked->ordinal);
    kv_host_pools_settle(asked->ordinal);
    return code;
}

/* Memory ----------------------------------------------------------------------------------------------------------- */

/* Frees and unregistrations wait for what may still use the range, as CUDA does: for device memory everything queued on
 * that device, for host memory everything queued anywhere. */
static void wait_for_streams(kv_range_kind kind, int ordinal)
{
    kv_stream *stream;
    for (size_t i = 0; (stream = kv_stream_at(i)); i++)
        if (kind != KV_RANGE_DEVICE || stream->ordinal == ordinal)
            kv_ticket_wait(kv_stream_last_ticket(stream), -1);
}

void kv_host_wait_for_device(int ordinal)
{
    wait_for_streams(KV_RANGE_DEVICE, ordinal);
}

/* Refused beside any capture of the context, whatever the thread's mode, and spoils it: the stream is part of it. */
kv_result kv_host_ctx_synchronize(void)
{
    KV_HOST_BEGIN(ctx_synchronize);
    kv_stream *stream;
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    int ordinal = (int)(dev - kv_host_devices), is_capturing = 0;
    for (size_t i = 0; (stream = kv_stream_at(i)); i++)
        if (stream->ordinal == ordinal && kv_host_capture_status(stream) != KV_CAPTURE_STATUS_NONE) {
            atomic_store(&stream->capture_status, KV_CAPTURE_STATUS_INVALIDATED);
            is_capturing = 1;
        }
    if (is_capturing)
        return KV_CUDA_STREAM_CAPTURE_UNSUPPORTED;
    kv_host_wait_for_device(ordinal);
    kv_host_pools_settle(ordinal);
    return atomic_load(&dev->sticky);
}

kv_result kv_host_mem_get_info(size_t *free_bytes, size_t *total_bytes)
{
    KV_HOST_BEGIN(mem_get_info);
    if (!kv_host_current_device())
        return KV_CUDA_INVALID_CONTEXT;
    if (!free_bytes || !total_bytes)
        return KV_CUDA_INVALID_VALUE;
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    *free_bytes = (size_t)sysconf(_SC_AVPHYS_PAGES) * page_bytes;
    *total_bytes = (size_t)sysconf(_SC_PHYS_PAGES) * page_bytes;
    return KV_CUDA_SUCCESS;
}

static kv_result allocate(size_t bytes, size_t alignment, kv_range_kind kind, uintptr_t *address)
{
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    if (!bytes)
        return KV_CUDA_INVALID_VALUE;
    size_t physical_bytes = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    void *memory = NULL;
    if (bytes > physical_bytes || posix_memalign(&memory, alignment, bytes))
        return KV_CUDA_OUT_OF_MEMORY;
    kv_result code = kv_ranges_add((kv_range){(uintptr_t)memory, bytes, kind, (int)(dev - kv_host_devices), 0});
    if (code)
        free(memory);
    else
        *address = (uintptr_t)memory;
    return code;
}

static kv_result deallocate(uintptr_t address, kv_range_kind kind, kv_result unknown)
{
    kv_range range;
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    wait_for_streams(kind, (int)(dev - kv_host_devices));
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
    if ((uintptr_t)address < LOWEST_ADDRESS || !bytes || bytes > UINTPTR_MAX - (uintptr_t)address || flags > 15)
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

/* Copies ----------------------------------------------------------------------------------------------------------- */

enum { SIDE_DEVICE, SIDE_HOST };

/* Are these bytes one side of a legal copy? *pageable is set for host memory that CUDA has to stage. Under the lock of
 * the ranges. */
static kv_result check_side(const void *start, size_t bytes, int side, size_t *hint, int *pageable)
{
    if ((uintptr_t)start < LOWEST_ADDRESS || bytes > UINTPTR_MAX - (uintptr_t)start)
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
    if (pitch > (size_t)KV_HOST_MAX_PITCH || pitch < copy->width_bytes + x || (uintptr_t)*start < LOWEST_ADDRESS)
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

static const char GATHER_NAME[] = "kv_gather_blocks";
static const char gather_module, gather_function; /* their addresses are the handles */

kv_result kv_host_module_load_data(void **module, const void *image)
{
    KV_HOST_BEGIN(module_load_data);
    if (!kv_host_current_device())
        return KV_CUDA_INVALID_CONTEXT;
    if (!module || !image || !strstr(image, GATHER_NAME))
        return KV_CUDA_INVALID_VALUE;
    *module = (void *)&gather_module;
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_module_unload(void *module)
{
    KV_HOST_BEGIN(module_unload);
    return module == &gather_module ? KV_CUDA_SUCCESS : KV_CUDA_INVALID_HANDLE;
}

kv_result kv_host_module_get_function(void **function, void *module, const char *name)
{
    KV_HOST_BEGIN(module_get_function);
    if (module != &gather_module)
        return KV_CUDA_INVALID_HANDLE;
    if (!function || !name || strcmp(name, GATHER_NAME))
        return name ? KV_CUDA_NOT_FOUND : KV_CUDA_INVALID_VALUE;
    *function = (void *)&gather_function;
    return KV_CUDA_SUCCESS;
}

/* A gather is a copy of many pieces, which have no order among themselves here either. */
kv_result kv_host_launch_kernel(void *function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                                unsigned int block_x, unsigned int block_y, unsigned int block_z,
                                unsigned int shared_bytes, void *stream_handle, void **parameters, void **extra)
{
    KV_HOST_BEGIN(launch_kernel);
    kv_stream *stream;
    kv_result code = kv_host_find_own_stream(stream_handle, &stream);
    if (code)
        return code;
    if (function != &gather_function)
        return KV_CUDA_INVALID_HANDLE;
    if (!grid_x || grid_y != 1 || grid_z != 1 || block_x != KV_GATHER_THREADS || block_y != 1 || block_z != 1 ||
        shared_bytes || !parameters || extra)
        return KV_CUDA_INVALID_VALUE;
    const kv_gather *gather = parameters[0];
    const kv_gather_run *runs = pointer(gather->runs);
    kv_op *op = kv_op_new(KV_OP_COPY, (size_t)gather->num_blocks * gather->num_runs);
    for (size_t i = 0; op && i < op->count; i++) {
        const kv_gather_run *run = &runs[i % gather->num_runs];
        const size_t block = i / gather->num_runs;
        const char *piece = pointer(run->base + gather->block_ids[block] * run->block_stride);
        const char *staged = pointer(gather->staging + block * gather->block_bytes + run->offset);
        op->pieces[i] = (kv_piece){(char *)(gather->to_staging ? staged : piece),
                                   gather->to_staging ? piece : staged, run->bytes};
    }
    return kv_host_submit(stream, op, 0, NULL);
}

/* The end of a context, and the table ------------------------------------------------------------------------------ */

/* The end of a context: its work is dropped, its objects go with it. Under contexts_mutex. */
void kv_host_reap(int ordinal)
{
    kv_stream *stream;
    pthread_mutex_lock(&events_mutex);
    size_t num_events = num_events_used;
    pthread_mutex_unlock(&events_mutex);
    kv_streams_drop(ordinal, 1);
    for (size_t i = 0; (stream = kv_stream_at(i)); i++) {
        uint64_t handle = atomic_load_explicit(&stream->handle, memory_order_acquire);
        if (stream->ordinal != ordinal)
            continue;
        kv_host_num_reaped += close_stream(handle);
        kv_stream_drain(stream);
    }
    for (size_t i = 0; i < num_events; i++) {
        uint64_t handle = atomic_load_explicit(&events[i].handle, memory_order_acquire);
        if (handle && events[i].ordinal == ordinal)
            kv_host_num_reaped += event_close((void *)(uintptr_t)handle);
    }
    kv_host_num_reaped += kv_host_pools_reap(ordinal) + kv_host_spaces_reap(ordinal);
    for (kv_range range; kv_ranges_remove_any(ordinal, &range); kv_host_num_reaped++)
        if (range.kind != KV_RANGE_REGISTERED)
            free((void *)range.start);
    kv_streams_drop(ordinal, atomic_load(&kv_host_devices[ordinal].sticky) != 0);
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
