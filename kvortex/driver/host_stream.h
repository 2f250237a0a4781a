/* host_stream.h: the host driver's streams: FIFO queues, each with a worker thread of its own.
 *
 * Invariants
 *   - Operations of a stream complete in order and are counted: operation s (1, 2, ...) is complete when `completed`
 *     has reached s. Counts never start again, also when a slot serves a new stream, so a *ticket* (slot, count) means
 *     one operation for ever and can be tested with one load. An event is the ticket of its last record.
 *   - Slots are static and never freed; a handle names slot and generation, so a destroyed one is recognised.
 *   - A device that is dead, or whose context is being destroyed, *drops* its work: operations complete without being
 *     run, and nobody waits for them any longer.
 *   - No lock is held while an operation runs. The order of locks is: a stream's mutex, then nothing.
 */
#ifndef KVORTEX_HOST_STREAM_H
#define KVORTEX_HOST_STREAM_H

#include "host_driver.h"

#include <pthread.h>
#include <stdatomic.h>

enum { KV_HOST_MAX_STREAMS = 4096 };

typedef struct kv_piece {
    char *target;
    const char *source;
    size_t bytes;
} kv_piece;

typedef enum kv_op_kind { KV_OP_MARK, KV_OP_WAIT, KV_OP_COPY, KV_OP_FILL, KV_OP_PACK } kv_op_kind;

typedef struct kv_op {
    struct kv_op *next;
    kv_op_kind kind;
    unsigned char value;                     /* FILL */
    uint64_t ticket;                         /* WAIT: what for */
    size_t rows, target_pitch, source_pitch; /* COPY: of every piece; one row is a plain copy */
    size_t count;
    kv_piece pieces[]; /* PACK: a kv_pack */
} kv_op;

typedef struct kv_stream {
    _Atomic uint64_t handle; /* 0: no stream lives here. Written last on creation, first on destruction. */
    _Atomic int ordinal;     /* kept after destruction, until the slot is used again */
    unsigned int flags;      /* of stream_create */
    uint64_t generation;
    struct kv_stream *next_free;

    pthread_mutex_t mutex; /* guards everything up to `completed` */
    pthread_cond_t arrived, progressed;
    kv_op *head, *tail;
    uint64_t enqueued;
    int num_waiters, has_worker, closing;
    uint64_t random; /* the worker's own */
    _Atomic uint64_t completed;

    _Atomic int capture_status; /* the rest under the control mutex of host_gate.c */
    int capture_mode;
    const void *capture_thread;
    size_t num_captured;
} kv_stream;

/* Creation and handles. The first 2 * KV_HOST_MAX_DEVICES slots are the default streams (legacy, per thread). */
void kv_streams_init(void);
kv_stream *kv_stream_open(int ordinal, unsigned int flags); /* NULL: all slots in use */
int kv_stream_close(uint64_t handle);                       /* what is queued still runs; 0: no such stream */
kv_stream *kv_stream_of(uint64_t handle);                   /* NULL: no such stream */
kv_stream *kv_stream_default(int ordinal, int per_thread);
kv_stream *kv_stream_at(size_t slot); /* any slot ever used, NULL past the last; for loops over all of them */
size_t kv_streams_live(void);

kv_op *kv_op_new(kv_op_kind kind, size_t count); /* NULL: out of memory */
/* Takes the operation over; *ticket (may be NULL) is its ticket. OUT_OF_MEMORY when no thread can be started. */
kv_result kv_stream_push(kv_stream *stream, kv_op *op, uint64_t *ticket);

int kv_ticket_done(uint64_t ticket);
uint64_t kv_stream_last_ticket(kv_stream *stream);
/* Ends early when its device, or the device of that ordinal unless it is -1, drops its work. */
void kv_ticket_wait(uint64_t ticket, int ordinal);
void kv_stream_drain(kv_stream *stream); /* does not: afterwards nothing of what was queued is running */

/* Dropping, the gate and delays. */
void kv_streams_drop(int ordinal, int dropping); /* wakes everyone who waits */
void kv_streams_hold(int held);
void kv_streams_delay_us(uint32_t low, uint32_t high, uint64_t seed);

#endif
