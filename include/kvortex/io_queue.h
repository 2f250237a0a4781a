/* io_queue.h: batches of block I/O, done by threads that never take the GIL, each block with a status, each batch with a
 * deadline.
 *
 * A block goes from WAITING to RUNNING to OVER. Its status is final as soon as it is not PENDING: a block that its
 * deadline finds waiting is OVER and LATE; one that it finds running is LATE, and OVER only when its I/O has returned.
 *
 * Invariants
 *   - At most `capacity` blocks wait; what is beyond is DROPPED at once. Nobody who submits waits for room. What is to be
 *     forgotten is never dropped: erasing always has room.
 *   - Operations on one tier slot run one after another, in the order in which they were submitted.
 *   - The memory of a block belongs to its batch until the block is OVER: a read that is late cannot be called back.
 *   - A batch is freed by whoever is last to let go of it: its owner, or the queue when all its blocks are OVER.
 *   - Everything here is under the monitor's lock, which is never held over I/O.
 *   - Whoever waits for several queues at once names an eventfd, which is written to when a batch is over.
 *
 * Costs: about 1 us a block; a thread that looks for work passes over the blocks whose tier slot is in use.
 */
#ifndef KVORTEX_IO_QUEUE_H
#define KVORTEX_IO_QUEUE_H

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "status.h"
#include "sync.h"

enum { KV_IO_PUT = 0, KV_IO_GET = 1, KV_IO_ERASE = 2, KV_IO_SCAN = 3, KV_IO_SYNC = 4, KV_IO_NUM_VERBS = 5 };
enum { KV_IO_WAITING = 0, KV_IO_RUNNING = 1, KV_IO_OVER = 2 };

/* What a block is answered, beside what record.h says of its record. */
enum {
    KV_BLOCK_LATE = 16,      /* its deadline passed */
    KV_BLOCK_DROPPED = 17,   /* the queue was full, or the store is closed */
    KV_BLOCK_READ_ONLY = 18, /* the store takes no more blocks */
    KV_BLOCK_NO_SPACE = 19,  /* nor has it room for this one, which is how it finds out */
    KV_BLOCK_IO_ERROR = 20,
    KV_BLOCK_SHORT = 21, /* the file ends before the block does */
    KV_BLOCK_PENDING = 22,
    KV_BLOCK_TOO_LARGE = 23, /* coded, it does not fit into a slot */
    KV_BLOCK_NUM_STATUSES = 24
};

enum { KV_IO_KEY_BYTES = 32, KV_IO_MAX_THREADS = 64, KV_IO_PAGE_BYTES = 4096 };

typedef struct kv_io_batch {
    struct kv_io_batch *next; /* in the queue, while blocks wait */
    uint64_t deadline_ns, begun_ns, over_ns; /* over: 0 until all I/O has returned */
    uint32_t num_blocks, num_waiting, num_over, first_waiting;
    uint32_t references;
    uint8_t verb;
    uint8_t tag[KV_IO_KEY_BYTES];
    uint32_t *slots, *memory, *lengths, *groups; /* of the tier, of the pool; lengths and groups are a scan's answer */
    uint8_t *keys, *names;
    uint8_t *statuses, *stages;
} kv_io_batch;

/* Does one block without the lock -> its status. `scratch` is the thread's own, of `scratch_bytes`, in whole pages.
 * PENDING: the block is begun, and the reaper will be told when its I/O is over. */
typedef uint8_t (*kv_io_run)(void *owner, kv_io_batch *batch, uint32_t block, void *scratch);

/* Waits without the lock until one of the begun blocks is over -> which, and its status. */
typedef uint8_t (*kv_io_reap)(void *owner, kv_io_batch **batch, uint32_t *block);

typedef struct kv_io_queue {
    kv_monitor monitor;  /* broadcast when a batch is over, or the queue is empty */
    pthread_cond_t work; /* signalled when a block waits, or another block of its slot is over */
    kv_io_batch *first, *last;
    uint32_t capacity, num_waiting, num_running, most_waiting;
    uint32_t max_running, num_begun; /* begun: running, and no thread is at it */
    uint8_t *slot_in_use;
    kv_io_run run;
    void *owner;
    pthread_t threads[KV_IO_MAX_THREADS];
    void *scratch[KV_IO_MAX_THREADS]; /* of each; a thread takes one, and frees it at its end */
    size_t scratch_bytes;
    uint32_t num_threads, num_scratch_taken;
    kv_io_reap reap; /* NULL: there is no reaper */
    pthread_t reaper;
    pthread_cond_t begun; /* signalled when a block is begun, or nothing more will be */
    int stopping;
    int event_fd; /* -1: nobody wants to know */
    uint64_t counts[KV_IO_NUM_VERBS][KV_BLOCK_NUM_STATUSES];
} kv_io_queue;

/* --- Batches ----------------------------------------------------------------------------------------------------- */

/* NULL: no memory. */
static inline kv_io_batch *kv_io_batch_new(uint8_t verb, uint32_t num_blocks, uint64_t deadline_ns)
{
    const size_t words = (size_t)num_blocks * sizeof(uint32_t), digests = (size_t)num_blocks * KV_IO_KEY_BYTES;
    kv_io_batch *batch = calloc(1, sizeof *batch + 4 * words + 2 * digests + 2 * (size_t)num_blocks);
    if (!batch)
        return NULL;
    batch->verb = verb;
    batch->num_blocks = num_blocks;
    batch->deadline_ns = deadline_ns;
    batch->begun_ns = kv_now_ns();
    batch->references = 1;
    batch->slots = (uint32_t *)(batch + 1);
    batch->memory = batch->slots + num_blocks;
    batch->lengths = batch->memory + num_blocks;
    batch->groups = batch->lengths + num_blocks;
    batch->keys = (uint8_t *)(batch->groups + num_blocks);
    batch->names = batch->keys + digests;
    batch->statuses = batch->names + digests;
    batch->stages = batch->statuses + num_blocks;
    memset(batch->statuses, KV_BLOCK_PENDING, num_blocks);
    return batch;
}

static inline void kv_io_let_go(kv_io_batch *batch)
{
    if (--batch->references == 0)
        free(batch);
}

static inline int kv_io_batch_is_over(const kv_io_batch *batch) { return batch->num_over == batch->num_blocks; }

static inline void kv_io_answer_block(kv_io_queue *queue, kv_io_batch *batch, uint32_t block, uint8_t status)
{
    if (batch->statuses[block] != KV_BLOCK_PENDING)
        return;
    batch->statuses[block] = status;
    queue->counts[batch->verb][status]++;
}

/* The block's memory and tier slot are its caller's again. */
static inline void kv_io_end_block(kv_io_queue *queue, kv_io_batch *batch, uint32_t block)
{
    const uint64_t one = 1;
    batch->stages[block] = KV_IO_OVER;
    batch->num_over++;
    if (kv_io_batch_is_over(batch))
        batch->over_ns = kv_now_ns();
    if (kv_io_batch_is_over(batch) && queue->event_fd >= 0 && write(queue->event_fd, &one, sizeof one) < 0) {
        /* full: whoever sleeps has been woken already */
    }
    if (kv_io_batch_is_over(batch) || queue->num_waiting + queue->num_running == 0)
        kv_monitor_broadcast(&queue->monitor);
}

static inline void kv_io_unlink(kv_io_queue *queue, kv_io_batch *before, kv_io_batch *batch)
{
    *(before ? &before->next : &queue->first) = batch->next;
    if (queue->last == batch)
        queue->last = before;
    batch->next = NULL;
}

/* Answers the blocks of a batch that still wait; the batch leaves the queue. It may be freed. */
static inline void kv_io_give_up(kv_io_queue *queue, kv_io_batch *before, kv_io_batch *batch, uint8_t status)
{
    kv_io_unlink(queue, before, batch);
    for (uint32_t block = batch->first_waiting; block < batch->num_blocks; block++)
        if (batch->stages[block] == KV_IO_WAITING) {
            batch->num_waiting--;
            queue->num_waiting--;
            kv_io_answer_block(queue, batch, block, status);
            kv_io_end_block(queue, batch, block);
        }
    if (kv_io_batch_is_over(batch))
        kv_io_let_go(batch);
}

/* Batches whose deadline has passed make room. */
static inline void kv_io_expire_waiting(kv_io_queue *queue, uint64_t now_ns)
{
    kv_io_batch *before = NULL;
    for (kv_io_batch *batch = queue->first, *next; batch; batch = next) {
        next = batch->next;
        if (batch->deadline_ns <= now_ns)
            kv_io_give_up(queue, before, batch, KV_BLOCK_LATE);
        else
            before = batch;
    }
}

/* What its deadline finds unfinished is LATE. For who holds a reference. */
static inline void kv_io_expire(kv_io_queue *queue, kv_io_batch *batch, uint64_t now_ns)
{
    if (now_ns < batch->deadline_ns || kv_io_batch_is_over(batch))
        return;
    if (batch->num_waiting)
        kv_io_expire_waiting(queue, now_ns);
    for (uint32_t block = 0; block < batch->num_blocks; block++)
        if (batch->stages[block] == KV_IO_RUNNING)
            kv_io_answer_block(queue, batch, block, KV_BLOCK_LATE);
}

/* --- Threads ----------------------------------------------------------------------------------------------------- */

/* The first waiting block whose tier slot nobody uses; 0: there is none. */
static inline int kv_io_take(kv_io_queue *queue, kv_io_batch **taken, uint32_t *taken_block)
{
    kv_io_batch *before = NULL;
    if (queue->num_running >= queue->max_running)
        return 0;
    for (kv_io_batch *batch = queue->first; batch; before = batch, batch = batch->next)
        for (uint32_t block = batch->first_waiting; block < batch->num_blocks; block++) {
            if (batch->stages[block] != KV_IO_WAITING || queue->slot_in_use[batch->slots[block]])
                continue;
            queue->slot_in_use[batch->slots[block]] = 1;
            batch->stages[block] = KV_IO_RUNNING;
            while (batch->first_waiting < batch->num_blocks && batch->stages[batch->first_waiting] != KV_IO_WAITING)
                batch->first_waiting++;
            if (--batch->num_waiting == 0)
                kv_io_unlink(queue, before, batch);
            queue->num_waiting--;
            queue->num_running++;
            *taken = batch;
            *taken_block = block;
            return 1;
        }
    return 0;
}

/* The I/O of a block has returned. */
static inline void kv_io_finish(kv_io_queue *queue, kv_io_batch *batch, uint32_t block, uint8_t status)
{
    kv_io_answer_block(queue, batch, block, kv_now_ns() < batch->deadline_ns ? status : KV_BLOCK_LATE);
    queue->slot_in_use[batch->slots[block]] = 0;
    queue->num_running--;
    if (queue->num_waiting)
        pthread_cond_signal(&queue->work);
    if (queue->stopping)
        pthread_cond_signal(&queue->begun);
    kv_io_end_block(queue, batch, block);
    if (kv_io_batch_is_over(batch))
        kv_io_let_go(batch);
}

static inline void *kv_io_main(void *argument)
{
    kv_io_queue *queue = argument;
    kv_io_batch *batch;
    uint32_t block;
    kv_monitor_lock(&queue->monitor);
    void *scratch = queue->scratch[queue->num_scratch_taken++];
    for (;;) {
        kv_io_expire_waiting(queue, kv_now_ns());
        if (!kv_io_take(queue, &batch, &block)) {
            if (queue->stopping)
                break;
            pthread_cond_wait(&queue->work, &queue->monitor.mutex);
            continue;
        }
        kv_monitor_unlock(&queue->monitor);
        const uint8_t status = queue->run(queue->owner, batch, block, scratch);
        kv_monitor_lock(&queue->monitor);
        if (status == KV_BLOCK_PENDING) {
            queue->num_begun++;
            pthread_cond_signal(&queue->begun);
        } else
            kv_io_finish(queue, batch, block, status);
    }
    kv_monitor_unlock(&queue->monitor);
    free(scratch);
    return NULL;
}

/* One thread ends what others begin. It may be told of a block before that is counted as begun. */
static inline void *kv_io_reap_main(void *argument)
{
    kv_io_queue *queue = argument;
    kv_io_batch *batch;
    uint32_t block;
    kv_monitor_lock(&queue->monitor);
    for (;;) {
        while (queue->num_begun == 0 && !(queue->stopping && queue->num_running == 0))
            pthread_cond_wait(&queue->begun, &queue->monitor.mutex);
        if (queue->num_begun == 0)
            break;
        kv_monitor_unlock(&queue->monitor);
        const uint8_t status = queue->reap(queue->owner, &batch, &block);
        kv_monitor_lock(&queue->monitor);
        queue->num_begun--;
        kv_io_finish(queue, batch, block, status);
    }
    kv_monitor_unlock(&queue->monitor);
    return NULL;
}

/* --- The queue --------------------------------------------------------------------------------------------------- */

/* 0, or an errno; then there is nothing to destroy. */
static inline int kv_io_queue_init(kv_io_queue *queue, uint32_t num_slots, uint32_t capacity, kv_io_run run, void *owner)
{
    memset(queue, 0, sizeof *queue);
    queue->capacity = capacity;
    queue->event_fd = -1;
    queue->max_running = UINT32_MAX;
    queue->scratch_bytes = KV_IO_PAGE_BYTES;
    queue->run = run;
    queue->owner = owner;
    queue->slot_in_use = calloc(num_slots, 1);
    if (!queue->slot_in_use)
        return ENOMEM;
    int error = kv_monitor_init(&queue->monitor);
    if (!error && (error = pthread_cond_init(&queue->work, NULL)))
        kv_monitor_destroy(&queue->monitor);
    if (!error && (error = pthread_cond_init(&queue->begun, NULL))) {
        pthread_cond_destroy(&queue->work);
        kv_monitor_destroy(&queue->monitor);
    }
    if (error)
        free(queue->slot_in_use);
    return error;
}

/* To be called before kv_io_start where `run` answers PENDING, for at most `max_running` blocks. 0, or an errno. */
static inline int kv_io_start_reaper(kv_io_queue *queue, kv_io_reap reap, uint32_t max_running)
{
    queue->reap = reap;
    queue->max_running = max_running;
    const int error = pthread_create(&queue->reaper, NULL, kv_io_reap_main, queue);
    if (error)
        queue->reap = NULL;
    return error;
}

/* How many threads run now, each with scratch memory; fewer than asked for if the system gives no more. */
static inline uint32_t kv_io_start(kv_io_queue *queue, uint32_t num_threads)
{
    kv_monitor_lock(&queue->monitor);
    for (uint32_t thread; (thread = queue->num_threads) < num_threads; queue->num_threads++) {
        if (posix_memalign(&queue->scratch[thread], KV_IO_PAGE_BYTES, queue->scratch_bytes))
            break;
        if (pthread_create(&queue->threads[thread], NULL, kv_io_main, queue)) {
            free(queue->scratch[thread]);
            break;
        }
    }
    kv_monitor_unlock(&queue->monitor);
    return queue->num_threads;
}

/* Takes a batch; its owner keeps one reference. */
static inline void kv_io_submit(kv_io_queue *queue, kv_io_batch *batch)
{
    kv_monitor_lock(&queue->monitor);
    kv_io_expire_waiting(queue, kv_now_ns());
    uint32_t room = queue->num_waiting < queue->capacity ? queue->capacity - queue->num_waiting : 0;
    if (room > batch->num_blocks || batch->verb == KV_IO_ERASE || batch->verb == KV_IO_SYNC)
        room = batch->num_blocks;
    if (queue->stopping)
        room = 0;
    batch->num_waiting = room;
    queue->num_waiting += room;
    if (queue->num_waiting > queue->most_waiting)
        queue->most_waiting = queue->num_waiting;
    for (uint32_t block = room; block < batch->num_blocks; block++) {
        kv_io_answer_block(queue, batch, block, KV_BLOCK_DROPPED);
        kv_io_end_block(queue, batch, block);
    }
    if (room) {
        batch->references++;
        *(queue->last ? &queue->last->next : &queue->first) = batch;
        queue->last = batch;
        for (uint32_t block = 0; block < room && block < queue->num_threads; block++)
            pthread_cond_signal(&queue->work);
    }
    kv_monitor_unlock(&queue->monitor);
}

/* Waits until every block has a status, or the time. 1: all I/O of the batch is over too. */
static inline int kv_io_wait(kv_io_queue *queue, kv_io_batch *batch, uint64_t until_ns)
{
    kv_monitor_lock(&queue->monitor);
    const uint64_t end = until_ns < batch->deadline_ns ? until_ns : batch->deadline_ns;
    while (!kv_io_batch_is_over(batch) && kv_now_ns() < end)
        kv_monitor_wait(&queue->monitor, end);
    kv_io_expire(queue, batch, kv_now_ns());
    const int is_over = kv_io_batch_is_over(batch);
    kv_monitor_unlock(&queue->monitor);
    return is_over;
}

/* How many blocks wait or run when nothing more does, or at the time. */
static inline uint32_t kv_io_wait_idle(kv_io_queue *queue, uint64_t until_ns)
{
    kv_monitor_lock(&queue->monitor);
    while (queue->num_waiting + queue->num_running && kv_now_ns() < until_ns)
        kv_monitor_wait(&queue->monitor, until_ns);
    const uint32_t left = queue->num_waiting + queue->num_running;
    kv_monitor_unlock(&queue->monitor);
    return left;
}

/* Drops what waits and ends the threads. 0: one is still in its I/O at the time, and the queue must stay for ever. */
static inline int kv_io_stop(kv_io_queue *queue, uint64_t until_ns)
{
    kv_monitor_lock(&queue->monitor);
    queue->stopping = 1;
    while (queue->first)
        kv_io_give_up(queue, NULL, queue->first, KV_BLOCK_DROPPED);
    pthread_cond_broadcast(&queue->work);
    pthread_cond_signal(&queue->begun);
    while (queue->num_running && kv_now_ns() < until_ns)
        kv_monitor_wait(&queue->monitor, until_ns);
    const uint32_t left = queue->num_running; /* a thread without I/O ends by itself, at once */
    kv_monitor_unlock(&queue->monitor);
    for (uint32_t thread = 0; thread < queue->num_threads; thread++)
        left ? pthread_detach(queue->threads[thread]) : pthread_join(queue->threads[thread], NULL);
    if (queue->reap)
        left ? pthread_detach(queue->reaper) : pthread_join(queue->reaper, NULL);
    queue->num_threads = 0;
    return left == 0;
}

static inline void kv_io_queue_destroy(kv_io_queue *queue)
{
    free(queue->slot_in_use);
    pthread_cond_destroy(&queue->work);
    pthread_cond_destroy(&queue->begun);
    kv_monitor_destroy(&queue->monitor);
}

#endif
