/* Streams and events: the rows. The workers behind them are in host_stream.c. */

#include "host_rows.h"

#include <stdlib.h>

enum { MAX_EVENTS = 1 << 16 };
static const uint64_t EVENT_TAG = 0x45ull << 48; /* 'E'; a handle is tag | generation | slot */

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

/* Streams ---------------------------------------------------------------------------------------------------------- */

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
    code = kv_host_wait_for_ticket(kv_stream_last_ticket(stream), stream->ordinal);
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
    if ((ticket == KV_HOST_CAPTURED_TICKET) != (kv_host_capture_status(stream) == KV_CAPTURE_STATUS_ACTIVE))
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
    if (ticket == KV_HOST_CAPTURED_TICKET)
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
    if (ticket == KV_HOST_CAPTURED_TICKET)
        return KV_CUDA_CAPTURED_EVENT;
    code = kv_host_wait_for_ticket(ticket, asked->ordinal);
    kv_host_pools_settle(asked->ordinal);
    return code;
}

/* For the end of a context and the controls ------------------------------------------------------------------------ */

size_t kv_host_events_live(void)
{
    pthread_mutex_lock(&events_mutex);
    size_t count = num_events_live;
    pthread_mutex_unlock(&events_mutex);
    return count;
}

size_t kv_host_streams_reap(int ordinal)
{
    size_t num_alive = 0;
    kv_stream *stream;
    for (size_t i = 0; (stream = kv_stream_at(i)); i++) {
        uint64_t handle = atomic_load_explicit(&stream->handle, memory_order_acquire);
        if (stream->ordinal != ordinal)
            continue;
        num_alive += (size_t)close_stream(handle);
        kv_stream_drain(stream);
    }
    return num_alive;
}

size_t kv_host_events_reap(int ordinal)
{
    size_t num_alive = 0;
    pthread_mutex_lock(&events_mutex);
    size_t num_events = num_events_used;
    pthread_mutex_unlock(&events_mutex);
    for (size_t i = 0; i < num_events; i++) {
        uint64_t handle = atomic_load_explicit(&events[i].handle, memory_order_acquire);
        if (handle && events[i].ordinal == ordinal)
            num_alive += (size_t)event_close((void *)(uintptr_t)handle);
    }
    return num_alive;
}
