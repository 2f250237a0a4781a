/* What is out of the ordinary: counted and failing calls, captures, dead devices; and the controls that cause it. */

#include "host_memory.h"
#include "host_state.h"

#include <string.h>

_Atomic unsigned int kv_host_unusual;

static pthread_mutex_t control_mutex = PTHREAD_MUTEX_INITIALIZER; /* counters, the armed failure, captures */
static uint64_t num_calls, num_row_calls[KV_DRIVER_NUM_ROWS];
static uint8_t call_ring[KV_HOST_CALL_RING];
static struct {
    uint64_t countdown;
    kv_result code;
    int sticky, row;
} failure;
static size_t num_capturing;
static _Thread_local int capture_mode; /* GLOBAL, as in CUDA */

/* Capture ---------------------------------------------------------------------------------------------------------- */

kv_result kv_host_thread_exchange_stream_capture_mode(int *mode)
{
    KV_HOST_BEGIN(thread_exchange_stream_capture_mode);
    if (!mode || *mode < KV_CAPTURE_MODE_GLOBAL || *mode > KV_CAPTURE_MODE_RELAXED)
        return KV_CUDA_INVALID_VALUE;
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return KV_CUDA_SUCCESS;
}

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
    pthread_mutex_lock(&control_mutex);
    kv_stream *stream;
    for (size_t i = 0; capture_mode != KV_CAPTURE_MODE_RELAXED && (stream = kv_stream_at(i)); i++) {
        if (kv_host_capture_status(stream) == KV_CAPTURE_STATUS_NONE || stream->capture_mode == KV_CAPTURE_MODE_RELAXED)
            continue;
        int own = stream->capture_thread == &capture_mode;
        if (own || (capture_mode == KV_CAPTURE_MODE_GLOBAL && stream->capture_mode == KV_CAPTURE_MODE_GLOBAL)) {
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

kv_result kv_host_admit(kv_stream *stream, int *captured)
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

/* Where every row begins ------------------------------------------------------------------------------------------- */

void kv_host_set_unusual(unsigned int bits, int on)
{
    if (on)
        atomic_fetch_or(&kv_host_unusual, bits);
    else
        atomic_fetch_and(&kv_host_unusual, ~bits);
}

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

kv_result kv_host_begin_unusual(int row, unsigned int bits)
{
    if (bits & KV_HOST_FORKED)
        return KV_CUDA_NOT_INITIALIZED;
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

/* Controls --------------------------------------------------------------------------------------------------------- */

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
        stream->capture_thread = &capture_mode;
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
    kv_host_control_fail_call(0, KV_CUDA_SUCCESS, 0, -1);
    kv_host_control_count_calls(0);
    kv_host_control_release();
    kv_host_control_set_delay_us(0, 0, 0);
    kv_host_control_set_numa_node(-1);
    kv_stream *stream;
    pthread_mutex_lock(&control_mutex);
    for (size_t i = 0; (stream = kv_stream_at(i)); i++)
        atomic_store(&stream->capture_status, KV_CAPTURE_STATUS_NONE);
    num_capturing = 0;
    pthread_mutex_unlock(&control_mutex);
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
