/* Where every row begins, and what rows that use a stream have in common. See host_gate.h. */

#include "host_gate.h"

#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t control_mutex = PTHREAD_MUTEX_INITIALIZER; /* counters, the armed failure, captures */
static uint64_t num_calls, num_row_calls[KV_DRIVER_NUM_ROWS];
static uint8_t call_ring[KV_HOST_CALL_RING];
static struct {
    uint64_t countdown;
    kv_result code;
    int sticky, row;
} failure;
static size_t num_capturing;

/* Calls that stand still, see kv_host_control_stop_calls. */
enum { MAX_STOPPED = 64 };
static uint8_t stopping_rows[KV_DRIVER_NUM_ROWS];
static struct { kv_host_stopped call; int goes; } stopped[MAX_STOPPED]; /* thread 0: free */
static pthread_cond_t stepped = PTHREAD_COND_INITIALIZER;

/* Capture ---------------------------------------------------------------------------------------------------------- */

int kv_host_capture_status(const kv_stream *stream)
{
    return atomic_load_explicit(&stream->capture_status, memory_order_relaxed);
}

static int is_any_capturing(void)
{
    return (atomic_load_explicit(&kv_host_unusual, memory_order_relaxed) & KV_HOST_CAPTURING) != 0;
}

/* A call that is unsafe beside a capture: refused to threads whose mode says that they care, and it spoils the capture
 * (cuThreadExchangeStreamCaptureMode documents which captures concern which threads). */
static kv_result refuse_if_capturing(void)
{
    kv_result code = KV_CUDA_SUCCESS;
    const int mode = kv_host_this_thread.capture_mode;
    pthread_mutex_lock(&control_mutex);
    kv_stream *stream;
    for (size_t i = 0; mode != KV_CAPTURE_MODE_RELAXED && (stream = kv_stream_at(i)); i++) {
        if (kv_host_capture_status(stream) == KV_CAPTURE_STATUS_NONE || stream->capture_mode == KV_CAPTURE_MODE_RELAXED)
            continue;
        int own = stream->capture_thread == &kv_host_this_thread;
        if (own || (mode == KV_CAPTURE_MODE_GLOBAL && stream->capture_mode == KV_CAPTURE_MODE_GLOBAL)) {
            atomic_store(&stream->capture_status, KV_CAPTURE_STATUS_INVALIDATED);
            code = KV_CUDA_STREAM_CAPTURE_UNSUPPORTED;
        }
    }
    pthread_mutex_unlock(&control_mutex);
    return code;
}

int kv_host_is_implicit(const kv_stream *legacy, int spoil)
{
    int found = 0;
    if (!is_any_capturing() || legacy != kv_stream_default(legacy->ordinal, 0))
        return 0;
    pthread_mutex_lock(&control_mutex);
    kv_stream *stream;
    for (size_t i = 0; (stream = kv_stream_at(i)); i++)
        if (stream != legacy && kv_host_capture_status(stream) != KV_CAPTURE_STATUS_NONE &&
            stream->ordinal == legacy->ordinal && !(stream->flags & KV_STREAM_NON_BLOCKING)) {
            found = 1;
            if (spoil)
                atomic_store(&stream->capture_status, KV_CAPTURE_STATUS_INVALIDATED);
        }
    pthread_mutex_unlock(&control_mutex);
    return found;
}

/* Before work goes to a stream. *captured: it went into a capture and is not to be executed. */
static kv_result admit(kv_stream *stream, int *captured)
{
    *captured = 0;
    if (!is_any_capturing())
        return KV_CUDA_SUCCESS;
    if (kv_host_is_implicit(stream, 1))
        return KV_CUDA_STREAM_CAPTURE_IMPLICIT;
    pthread_mutex_lock(&control_mutex);
    int status = kv_host_capture_status(stream);
    if (status == KV_CAPTURE_STATUS_ACTIVE) {
        stream->num_captured++;
        *captured = 1;
    }
    pthread_mutex_unlock(&control_mutex);
    return status == KV_CAPTURE_STATUS_INVALIDATED ? KV_CUDA_STREAM_CAPTURE_INVALIDATED : KV_CUDA_SUCCESS;
}

/* A stream that captures, or the legacy stream beside one, cannot be asked whether it has finished. */
kv_result kv_host_refuse_wait(kv_stream *stream)
{
    if (!is_any_capturing())
        return KV_CUDA_SUCCESS;
    if (kv_host_is_implicit(stream, 1))
        return KV_CUDA_STREAM_CAPTURE_IMPLICIT;
    kv_result code = KV_CUDA_SUCCESS;
    pthread_mutex_lock(&control_mutex);
    if (kv_host_capture_status(stream) != KV_CAPTURE_STATUS_NONE) {
        atomic_store(&stream->capture_status, KV_CAPTURE_STATUS_INVALIDATED);
        code = KV_CUDA_STREAM_CAPTURE_UNSUPPORTED;
    }
    pthread_mutex_unlock(&control_mutex);
    if (!code && stream == kv_stream_default(stream->ordinal, 0))
        code = refuse_if_capturing();
    return code;
}

kv_result kv_host_end_capture(kv_stream *stream, size_t *num_captured)
{
    kv_result code = KV_CUDA_SUCCESS;
    pthread_mutex_lock(&control_mutex);
    *num_captured = stream->num_captured;
    int status = atomic_exchange(&stream->capture_status, KV_CAPTURE_STATUS_NONE);
    if (status == KV_CAPTURE_STATUS_NONE)
        code = KV_CUDA_INVALID_VALUE;
    else {
        if (--num_capturing == 0)
            kv_host_set_unusual(KV_HOST_CAPTURING, 0);
        code = status == KV_CAPTURE_STATUS_INVALIDATED ? KV_CUDA_STREAM_CAPTURE_INVALIDATED : KV_CUDA_SUCCESS;
    }
    pthread_mutex_unlock(&control_mutex);
    return code;
}

void kv_host_forget_captures(void)
{
    kv_stream *stream;
    pthread_mutex_lock(&control_mutex);
    for (size_t i = 0; (stream = kv_stream_at(i)); i++)
        atomic_store(&stream->capture_status, KV_CAPTURE_STATUS_NONE);
    num_capturing = 0;
    pthread_mutex_unlock(&control_mutex);
}

/* Where every row begins ------------------------------------------------------------------------------------------- */

static int is_unsafe_in_capture(int row)
{
    switch (row) {
    case KV_ROW_mem_alloc:
    case KV_ROW_mem_free:
    case KV_ROW_mem_pool_trim_to:
    case KV_ROW_mem_create:
    case KV_ROW_mem_map:
    case KV_ROW_mem_set_access:
    case KV_ROW_mem_unmap:
    case KV_ROW_mem_host_alloc:
    case KV_ROW_mem_free_host:
    case KV_ROW_mem_host_register:
    case KV_ROW_mem_host_unregister:
    case KV_ROW_event_query:
    case KV_ROW_event_synchronize:
        return 1;
    default:
        return 0;
    }
}

/* Rows about the process, devices and the thread's contexts go on working when a device is dead. */
static int needs_live_device(int row)
{
    return row >= KV_ROW_stream_create;
}

/* Stands still until somebody steps this thread. The mutex is held. */
static void stand_still(int row)
{
    size_t i = 0;
    while (i < MAX_STOPPED && stopped[i].call.thread)
        i++;
    if (i == MAX_STOPPED)
        return;
    stopped[i].call = (kv_host_stopped){syscall(SYS_gettid), row};
    stopped[i].goes = 0;
    while (!stopped[i].goes && stopping_rows[row])
        pthread_cond_wait(&stepped, &control_mutex);
    stopped[i].call.thread = 0;
}

kv_result kv_host_begin_unusual(int row, unsigned int bits)
{
    if (bits & KV_HOST_FORKED)
        return KV_CUDA_NOT_INITIALIZED;
    if (bits & KV_HOST_STEPPING) {
        pthread_mutex_lock(&control_mutex);
        if (stopping_rows[row])
            stand_still(row);
        pthread_mutex_unlock(&control_mutex);
        bits = atomic_load(&kv_host_unusual);
    }
    kv_result code = KV_CUDA_SUCCESS;
    kv_host_device *dev = kv_host_current_device();
    if (bits & (KV_HOST_COUNTING | KV_HOST_FAILING)) {
        int kill = 0;
        pthread_mutex_lock(&control_mutex);
        if (bits & KV_HOST_COUNTING) {
            call_ring[num_calls++ % KV_HOST_CALL_RING] = (uint8_t)row;
            num_row_calls[row]++;
        }
        if (failure.countdown && (failure.row < 0 || failure.row == row) && --failure.countdown == 0) {
            code = failure.code;
            kill = failure.sticky;
            kv_host_set_unusual(KV_HOST_FAILING, 0);
        }
        pthread_mutex_unlock(&control_mutex);
        if (kill)
            kv_host_control_kill(dev ? (int)(dev - kv_host_devices) : 0, code);
        if (code)
            return code;
    }
    if (bits & KV_HOST_DEAD && dev && needs_live_device(row) && (code = atomic_load(&dev->sticky)))
        return code;
    if (bits & KV_HOST_CAPTURING && is_unsafe_in_capture(row))
        return refuse_if_capturing();
    return KV_CUDA_SUCCESS;
}

/* Streams: finding, submitting, waiting ---------------------------------------------------------------------------- */

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

kv_result kv_host_find_own_stream(void *handle, kv_stream **stream)
{
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    kv_result code = kv_host_find_stream(handle, stream);
    return code ? code : (*stream)->ordinal == dev - kv_host_devices ? KV_CUDA_SUCCESS : KV_CUDA_INVALID_HANDLE;
}

kv_result kv_host_wait_for_ticket(uint64_t ticket, int ordinal)
{
    kv_ticket_wait(ticket, ordinal);
    return atomic_load(&kv_host_devices[ordinal].sticky);
}

kv_result kv_host_submit(kv_stream *stream, kv_op *op, int synchronous, uint64_t *ticket)
{
    int captured;
    if (!op)
        return KV_CUDA_OUT_OF_MEMORY;
    kv_result code = admit(stream, &captured);
    if (code || captured) {
        free(op);
        if (ticket)
            *ticket = KV_HOST_CAPTURED_TICKET;
        return code;
    }
    uint64_t own_ticket;
    code = kv_stream_push(stream, op, &own_ticket);
    if (ticket)
        *ticket = own_ticket;
    return code || !synchronous ? code : kv_host_wait_for_ticket(own_ticket, stream->ordinal);
}

void kv_host_wait_for_device(int ordinal)
{
    kv_stream *stream;
    for (size_t i = 0; (stream = kv_stream_at(i)); i++)
        if (ordinal < 0 || stream->ordinal == ordinal)
            kv_ticket_wait(kv_stream_last_ticket(stream), -1);
}

/* Controls --------------------------------------------------------------------------------------------------------- */

void kv_host_control_fail_call(uint64_t n, kv_result code, int sticky, int row)
{
    pthread_mutex_lock(&control_mutex);
    failure.countdown = n;
    failure.code = code;
    failure.sticky = sticky;
    failure.row = row;
    kv_host_set_unusual(KV_HOST_FAILING, n != 0);
    pthread_mutex_unlock(&control_mutex);
}

int kv_host_control_fail_pending(void)
{
    return (atomic_load(&kv_host_unusual) & KV_HOST_FAILING) != 0;
}

void kv_host_control_stop_calls(const uint8_t *rows)
{
    pthread_mutex_lock(&control_mutex);
    if (rows)
        memcpy(stopping_rows, rows, sizeof stopping_rows);
    else
        memset(stopping_rows, 0, sizeof stopping_rows);
    kv_host_set_unusual(KV_HOST_STEPPING, rows != NULL);
    pthread_cond_broadcast(&stepped);
    pthread_mutex_unlock(&control_mutex);
}

size_t kv_host_control_stopped(kv_host_stopped *calls, size_t capacity)
{
    size_t count = 0;
    pthread_mutex_lock(&control_mutex);
    for (size_t i = 0; i < MAX_STOPPED && count < capacity; i++)
        if (stopped[i].call.thread && !stopped[i].goes)
            calls[count++] = stopped[i].call;
    pthread_mutex_unlock(&control_mutex);
    return count;
}

int kv_host_control_step(long thread)
{
    int found = 0;
    pthread_mutex_lock(&control_mutex);
    for (size_t i = 0; i < MAX_STOPPED && !found; i++)
        if (stopped[i].call.thread == thread && !stopped[i].goes)
            found = stopped[i].goes = 1;
    pthread_cond_broadcast(&stepped);
    pthread_mutex_unlock(&control_mutex);
    return !found;
}

void kv_host_control_count_calls(int enabled)
{
    pthread_mutex_lock(&control_mutex);
    if (enabled) {
        num_calls = 0;
        memset(num_row_calls, 0, sizeof num_row_calls);
    }
    kv_host_set_unusual(KV_HOST_COUNTING, enabled);
    pthread_mutex_unlock(&control_mutex);
}

uint64_t kv_host_control_num_calls(int row)
{
    pthread_mutex_lock(&control_mutex);
    uint64_t count = row < 0 ? num_calls : num_row_calls[row];
    pthread_mutex_unlock(&control_mutex);
    return count;
}

size_t kv_host_control_last_calls(uint8_t *rows)
{
    pthread_mutex_lock(&control_mutex);
    size_t count = num_calls < KV_HOST_CALL_RING ? num_calls : KV_HOST_CALL_RING;
    for (size_t i = 0; i < count; i++)
        rows[i] = call_ring[(num_calls - count + i) % KV_HOST_CALL_RING];
    pthread_mutex_unlock(&control_mutex);
    return count;
}

void kv_host_control_kill(int ordinal, kv_result code)
{
    atomic_store(&kv_host_devices[ordinal].sticky, code);
    kv_host_set_unusual(KV_HOST_DEAD, 1);
    kv_streams_drop(ordinal, 1);
}

kv_result kv_host_control_begin_capture(void *handle, int mode)
{
    kv_stream *stream;
    kv_result code = kv_host_find_stream(handle, &stream);
    if (code)
        return code;
    if (stream == kv_stream_default(stream->ordinal, 0))
        return KV_CUDA_STREAM_CAPTURE_UNSUPPORTED;
    pthread_mutex_lock(&control_mutex);
    if (kv_host_capture_status(stream) != KV_CAPTURE_STATUS_NONE)
        code = KV_CUDA_INVALID_VALUE;
    else {
        stream->capture_mode = mode;
        stream->capture_thread = &kv_host_this_thread;
        stream->num_captured = 0;
        atomic_store(&stream->capture_status, KV_CAPTURE_STATUS_ACTIVE);
        num_capturing++;
        kv_host_set_unusual(KV_HOST_CAPTURING, 1);
    }
    pthread_mutex_unlock(&control_mutex);
    return code;
}

kv_result kv_host_control_end_capture(void *handle, size_t *num_captured)
{
    kv_stream *stream;
    kv_result code = kv_host_find_stream(handle, &stream);
    return code ? code : kv_host_end_capture(stream, num_captured);
}
