/* Streams and tickets of the host driver; see host_stream.h. */

#include "host_stream.h"
#include "kvortex/codec.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { NUM_DEFAULT = 2 * KV_HOST_MAX_DEVICES, SLOT_BITS = 12 };
static const uint64_t STREAM_TAG = 0x53ull << 48; /* 'S'; a handle is tag | generation | slot */

static kv_stream streams[KV_HOST_MAX_STREAMS];
static _Atomic size_t num_used; /* slots below it are initialised */

static pthread_mutex_t slots_mutex = PTHREAD_MUTEX_INITIALIZER; /* free list and num_live */
static kv_stream *free_slots;
static size_t num_live;

static pthread_mutex_t gate_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_opened = PTHREAD_COND_INITIALIZER;
static _Atomic int held, dropping[KV_HOST_MAX_DEVICES];
static _Atomic uint64_t delay_us; /* low << 32 | high */
static _Atomic uint64_t delay_seed;

/* Slots ------------------------------------------------------------------------------------------------------------ */

static void slot_init(kv_stream *stream)
{
    pthread_mutex_init(&stream->mutex, NULL);
    pthread_cond_init(&stream->arrived, NULL);
    pthread_cond_init(&stream->progressed, NULL);
}

static size_t slot_of(const kv_stream *stream)
{
    return (size_t)(stream - streams);
}

static void publish(kv_stream *stream, int ordinal, unsigned int flags)
{
    stream->ordinal = ordinal;
    stream->flags = flags;
    stream->closing = 0;
    stream->random = (slot_of(stream) + 1) * 0x9e3779b97f4a7c15ull;
    uint64_t handle = STREAM_TAG | (++stream->generation & 0xffffffff) << SLOT_BITS | slot_of(stream);
    atomic_store_explicit(&stream->handle, handle, memory_order_release);
}

void kv_streams_init(void)
{
    for (size_t i = 0; i < NUM_DEFAULT; i++) {
        slot_init(&streams[i]);
        publish(&streams[i], (int)(i / 2), 0);
    }
    atomic_store(&num_used, NUM_DEFAULT);
}

kv_stream *kv_stream_open(int ordinal, unsigned int flags)
{
    pthread_mutex_lock(&slots_mutex);
    kv_stream *stream = free_slots;
    if (stream) {
        free_slots = stream->next_free;
    } else if (num_used < KV_HOST_MAX_STREAMS) {
        stream = &streams[num_used];
        slot_init(stream);
        num_used++;
    }
    if (stream) {
        num_live++;
        publish(stream, ordinal, flags);
    }
    pthread_mutex_unlock(&slots_mutex);
    return stream;
}

static void slot_free(kv_stream *stream)
{
    pthread_mutex_lock(&slots_mutex);
    stream->next_free = free_slots;
    free_slots = stream;
    pthread_mutex_unlock(&slots_mutex);
}

int kv_stream_close(uint64_t handle)
{
    kv_stream *stream = kv_stream_of(handle);
    if (!stream || slot_of(stream) < NUM_DEFAULT || !atomic_compare_exchange_strong(&stream->handle, &handle, 0))
        return 0;
    pthread_mutex_lock(&slots_mutex);
    num_live--;
    pthread_mutex_unlock(&slots_mutex);
    pthread_mutex_lock(&stream->mutex);
    int has_worker = stream->has_worker;
    stream->closing = 1;
    pthread_cond_signal(&stream->arrived);
    pthread_mutex_unlock(&stream->mutex);
    if (!has_worker)
        slot_free(stream); /* otherwise the worker frees it when the queue is empty */
    return 1;
}

kv_stream *kv_stream_of(uint64_t handle)
{
    size_t slot = handle & ((1u << SLOT_BITS) - 1);
    if (handle >> 48 != STREAM_TAG >> 48 || slot >= num_used)
        return NULL;
    kv_stream *stream = &streams[slot];
    return atomic_load_explicit(&stream->handle, memory_order_acquire) == handle ? stream : NULL;
}

kv_stream *kv_stream_default(int ordinal, int per_thread)
{
    return &streams[2 * ordinal + !!per_thread];
}

kv_stream *kv_stream_at(size_t slot)
{
    return slot < num_used ? &streams[slot] : NULL;
}

size_t kv_streams_live(void)
{
    pthread_mutex_lock(&slots_mutex);
    size_t count = num_live;
    pthread_mutex_unlock(&slots_mutex);
    return count;
}

/* The worker ------------------------------------------------------------------------------------------------------- */

static uint64_t next_random(kv_stream *stream) /* xorshift64 */
{
    uint64_t x = stream->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return stream->random = x;
}

static void copy_piece(const kv_op *op, const kv_piece *piece)
{
    if (op->rows == 1 || (op->source_pitch == piece->bytes && op->target_pitch == piece->bytes)) {
        memcpy(piece->target, piece->source, piece->bytes * op->rows);
        return;
    }
    for (size_t row = 0; row < op->rows; row++)
        memcpy(piece->target + row * op->target_pitch, piece->source + row * op->source_pitch, piece->bytes);
}

/* The one kernel there is. */
static void pack(const kv_pack *told)
{
    const kv_plane *planes = (const kv_plane *)told->planes;
    for (uint32_t i = 0; i < told->num_blocks; i++) {
        char *packed = (char *)told->staging + i * told->block_bytes;
        if (told->to_staging)
            kv_pack_block(planes, told->num_planes, told->flags_offset, told->block_ids[i], packed);
        else
            kv_unpack_block(planes, told->num_planes, told->block_ids[i], packed);
    }
}

static void run(kv_stream *stream, kv_op *op)
{
    switch (op->kind) {
    case KV_OP_MARK:
        break;
    case KV_OP_WAIT:
        kv_ticket_wait(op->ticket, stream->ordinal);
        break;
    case KV_OP_FILL:
        memset(op->pieces[0].target, op->value, op->pieces[0].bytes);
        break;
    case KV_OP_PACK:
        pack((const kv_pack *)op->pieces);
        break;
    case KV_OP_COPY: /* drawn without replacement: nobody may count on an order inside a batch */
        for (size_t left = op->count; left > 0; left--) {
            size_t i = left > 1 ? next_random(stream) % left : 0;
            copy_piece(op, &op->pieces[i]);
            op->pieces[i] = op->pieces[left - 1];
        }
        break;
    }
}

/* Sleeps and waits as the controls say; false if the operation is to be dropped. */
static int pass_gate(kv_stream *stream)
{
    uint64_t delay = atomic_load_explicit(&delay_us, memory_order_relaxed);
    if (delay) {
        uint64_t low = delay >> 32, high = delay & 0xffffffff;
        uint64_t us = low + (next_random(stream) ^ atomic_load(&delay_seed)) % (high - low + 1);
        nanosleep(&(struct timespec){(time_t)(us / 1000000), (long)(us % 1000000) * 1000}, NULL);
    }
    if (atomic_load(&held)) {
        pthread_mutex_lock(&gate_mutex);
        while (atomic_load(&held) && !atomic_load(&dropping[stream->ordinal]))
            pthread_cond_wait(&gate_opened, &gate_mutex);
        pthread_mutex_unlock(&gate_mutex);
    }
    return !atomic_load(&dropping[stream->ordinal]);
}

static void *worker(void *argument)
{
    kv_stream *stream = argument;
    pthread_mutex_lock(&stream->mutex);
    for (;;) {
        while (!stream->head && !stream->closing)
            pthread_cond_wait(&stream->arrived, &stream->mutex);
        kv_op *op = stream->head;
        if (!op)
            break;
        if (!(stream->head = op->next))
            stream->tail = NULL;
        pthread_mutex_unlock(&stream->mutex);
        if (pass_gate(stream))
            run(stream, op);
        free(op);
        pthread_mutex_lock(&stream->mutex);
        atomic_fetch_add_explicit(&stream->completed, 1, memory_order_release);
        if (stream->num_waiters)
            pthread_cond_broadcast(&stream->progressed);
    }
    stream->has_worker = 0;
    pthread_mutex_unlock(&stream->mutex);
    slot_free(stream);
    return NULL;
}

static int start_worker(kv_stream *stream)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads of the application */
    int error = pthread_create(&thread, NULL, worker, stream);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error)
        pthread_detach(thread);
    return !error;
}

/* Submission and waiting ------------------------------------------------------------------------------------------- */

kv_op *kv_op_new(kv_op_kind kind, size_t count)
{
    kv_op *op = malloc(sizeof *op + count * sizeof *op->pieces);
    if (op) {
        op->next = NULL;
        op->kind = kind;
        op->rows = 1;
        op->count = count;
    }
    return op;
}

static uint64_t ticket_of(const kv_stream *stream, uint64_t count)
{
    return (uint64_t)slot_of(stream) << (64 - SLOT_BITS) | count;
}

static kv_stream *ticket_stream(uint64_t ticket, uint64_t *count)
{
    *count = ticket & (~0ull >> SLOT_BITS);
    return &streams[ticket >> (64 - SLOT_BITS)];
}

kv_result kv_stream_push(kv_stream *stream, kv_op *op, uint64_t *ticket)
{
    pthread_mutex_lock(&stream->mutex);
    kv_result code = KV_CUDA_SUCCESS;
    if (stream->closing)
        code = KV_CUDA_INVALID_HANDLE;
    else if (!stream->has_worker && !(stream->has_worker = start_worker(stream)))
        code = KV_CUDA_OUT_OF_MEMORY;
    if (code) {
        pthread_mutex_unlock(&stream->mutex);
        free(op);
        return code;
    }
    if (stream->tail)
        stream->tail->next = op;
    else
        stream->head = op;
    stream->tail = op;
    stream->enqueued++;
    if (ticket)
        *ticket = ticket_of(stream, stream->enqueued);
    if (stream->head == op) /* the worker looks for more before it sleeps */
        pthread_cond_signal(&stream->arrived);
    pthread_mutex_unlock(&stream->mutex);
    return KV_CUDA_SUCCESS;
}

uint64_t kv_stream_last_ticket(kv_stream *stream)
{
    pthread_mutex_lock(&stream->mutex);
    uint64_t ticket = ticket_of(stream, stream->enqueued);
    pthread_mutex_unlock(&stream->mutex);
    return ticket;
}

int kv_ticket_done(uint64_t ticket)
{
    uint64_t count;
    kv_stream *stream = ticket_stream(ticket, &count);
    return atomic_load_explicit(&stream->completed, memory_order_acquire) >= count;
}

/* Without `give_up` only completion ends the wait. */
static void wait_for(kv_stream *stream, uint64_t count, int give_up, int ordinal)
{
    if (atomic_load_explicit(&stream->completed, memory_order_acquire) >= count)
        return;
    pthread_mutex_lock(&stream->mutex);
    stream->num_waiters++;
    while (atomic_load_explicit(&stream->completed, memory_order_acquire) < count &&
           !(give_up &&
             (atomic_load(&dropping[stream->ordinal]) || (ordinal >= 0 && atomic_load(&dropping[ordinal])))))
        pthread_cond_wait(&stream->progressed, &stream->mutex);
    stream->num_waiters--;
    pthread_mutex_unlock(&stream->mutex);
}

void kv_ticket_wait(uint64_t ticket, int ordinal)
{
    uint64_t count;
    kv_stream *stream = ticket_stream(ticket, &count);
    wait_for(stream, count, 1, ordinal);
}

void kv_stream_drain(kv_stream *stream)
{
    uint64_t count;
    ticket_stream(kv_stream_last_ticket(stream), &count);
    wait_for(stream, count, 0, -1);
}

/* Controls --------------------------------------------------------------------------------------------------------- */

void kv_streams_drop(int ordinal, int drop)
{
    atomic_store(&dropping[ordinal], drop);
    pthread_mutex_lock(&gate_mutex);
    pthread_cond_broadcast(&gate_opened);
    pthread_mutex_unlock(&gate_mutex);
    for (size_t i = 0; i < num_used; i++) { /* under each mutex, so that nobody is between his test and his wait */
        pthread_mutex_lock(&streams[i].mutex);
        pthread_cond_broadcast(&streams[i].progressed);
        pthread_mutex_unlock(&streams[i].mutex);
    }
}

void kv_streams_hold(int hold)
{
    pthread_mutex_lock(&gate_mutex);
    atomic_store(&held, hold);
    pthread_cond_broadcast(&gate_opened);
    pthread_mutex_unlock(&gate_mutex);
}

void kv_streams_delay_us(uint32_t low, uint32_t high, uint64_t seed)
{
    atomic_store(&delay_seed, seed * 0x2545f4914f6cdd1dull);
    atomic_store(&delay_us, (uint64_t)low << 32 | (high < low ? low : high));
}
