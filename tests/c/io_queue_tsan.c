/* Batches of several threads, some of them late or dropped, on the I/O threads of one queue, under TSan: run by
 * `make sanitize`. What a block touches is not atomic, so two operations on one slot at once would be a race. */

#include "kvortex/io_queue.h"

#include <stdio.h>

enum { NUM_SUBMITTERS = 4, NUM_IO_THREADS = 4, NUM_SLOTS = 8, NUM_BATCHES = 400, BATCH_BLOCKS = 6 };

#define REQUIRE(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1); \
        } \
    } while (0)

static kv_io_queue queue;
static int slots[NUM_SLOTS];

/* Blocks that are begun, for the reaper. */
static struct {
    kv_io_batch *batch;
    uint32_t block;
} begun[NUM_IO_THREADS];
static uint32_t num_begun;
static pthread_mutex_t begun_lock = PTHREAD_MUTEX_INITIALIZER;
static int has_reaper;

static uint8_t run(void *owner, kv_io_batch *batch, uint32_t block, void *page)
{
    (void)owner;
    slots[batch->slots[block]]++;
    batch->lengths[block] = 1; /* a block's own, as its memory is */
    memset(page, (int)block, 4096);
    if (batch->slots[block] == 3)
        kv_nap_ns(200000);
    if (!has_reaper || batch->slots[block] % 2)
        return 0;
    pthread_mutex_lock(&begun_lock);
    begun[num_begun].batch = batch;
    begun[num_begun++].block = block;
    pthread_mutex_unlock(&begun_lock);
    return KV_BLOCK_PENDING;
}

static uint8_t reap(void *owner, kv_io_batch **batch, uint32_t *block)
{
    (void)owner;
    pthread_mutex_lock(&begun_lock);
    REQUIRE(num_begun > 0 && num_begun <= NUM_IO_THREADS);
    *batch = begun[--num_begun].batch;
    *block = begun[num_begun].block;
    pthread_mutex_unlock(&begun_lock);
    slots[(*batch)->slots[*block]]++;
    (*batch)->lengths[*block] = 1;
    return 0;
}

static void *submit(void *argument)
{
    unsigned random = (unsigned)(uintptr_t)argument;
    for (int i = 0; i < NUM_BATCHES; i++) {
        const uint64_t now = kv_now_ns();
        const uint64_t deadline = i % 3 ? now + 10000000000u : now + rand_r(&random) % 300000;
        kv_io_batch *batch = kv_io_batch_new((uint8_t)(i % 2), BATCH_BLOCKS, deadline);
        REQUIRE(batch);
        for (uint32_t block = 0; block < BATCH_BLOCKS; block++)
            batch->slots[block] = (uint32_t)rand_r(&random) % NUM_SLOTS;
        kv_io_submit(&queue, batch);
        if (i % 4) {
            int is_over = kv_io_wait(&queue, batch, KV_NEVER_NS);
            for (uint32_t block = 0; block < BATCH_BLOCKS; block++)
                REQUIRE(batch->statuses[block] != KV_BLOCK_PENDING);
            while (!is_over)
                is_over = kv_io_wait(&queue, batch, 0);
            for (uint32_t block = 0; block < BATCH_BLOCKS; block++)
                batch->lengths[block] = 2; /* its caller's again */
        }
        kv_monitor_lock(&queue.monitor);
        kv_io_let_go(batch);
        kv_monitor_unlock(&queue.monitor);
    }
    return NULL;
}

static void use_queue(void)
{
    pthread_t threads[NUM_SUBMITTERS];
    REQUIRE(kv_io_queue_init(&queue, NUM_SLOTS, 16, run, NULL) == 0);
    if (has_reaper)
        REQUIRE(kv_io_start_reaper(&queue, reap, NUM_IO_THREADS) == 0);
    REQUIRE(kv_io_start(&queue, NUM_IO_THREADS) == NUM_IO_THREADS);
    for (uintptr_t i = 0; i < NUM_SUBMITTERS; i++)
        REQUIRE(pthread_create(&threads[i], NULL, submit, (void *)(i + 1)) == 0);
    for (int i = 0; i < NUM_SUBMITTERS; i++)
        pthread_join(threads[i], NULL);
    REQUIRE(kv_io_wait_idle(&queue, KV_NEVER_NS) == 0);
    uint64_t answered = 0;
    for (int verb = 0; verb < KV_IO_NUM_VERBS; verb++)
        for (int status = 0; status < KV_BLOCK_NUM_STATUSES; status++)
            answered += queue.counts[verb][status];
    REQUIRE(answered == (uint64_t)NUM_SUBMITTERS * NUM_BATCHES * BATCH_BLOCKS);
    REQUIRE(kv_io_stop(&queue, KV_NEVER_NS) == 1);
    kv_io_queue_destroy(&queue);
}

int main(void)
{
    use_queue();
    has_reaper = 1;
    use_queue();
    return 0;
}
