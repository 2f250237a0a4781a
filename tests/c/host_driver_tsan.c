/* Threads, streams, events and copies of the host driver under the thread sanitizer.
 *
 * Eight threads on two devices. Each moves blocks through a chain of two streams of its own, pinned -> device on the
 * first, device -> pinned on the second, ordered by an event alone, and compares what arrives; between rounds streams,
 * events and memory are destroyed and made anew, and one device dies and comes back. In a second pass the device memory
 * comes from a pool of each device, too small for all threads at once. Prints one line, exits 1 on a difference. */

#include "../../kvortex/driver/host_driver.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NUM_THREADS = 8, NUM_ROUNDS = 6, NUM_BLOCKS = 40, NUM_PIECES = 8, PIECE_BYTES = 512 };
enum { BLOCK_BYTES = NUM_PIECES * PIECE_BYTES };

static const kv_driver *drv;
static _Atomic size_t num_compared, num_wrong;
static void *pools[2]; /* of each device, in the second pass */

static void must(kv_result code, const char *what)
{
    if (code) {
        fprintf(stderr, "%s answered %d\n", what, code);
        exit(1);
    }
}
#define MUST(call) must(drv->call, #call)

static void save_and_load(unsigned char *host, unsigned char *back, kv_devptr device, void *first, void *second,
                          void *event, unsigned char seed)
{
    kv_devptr targets[NUM_PIECES], sources[NUM_PIECES];
    size_t sizes[NUM_PIECES], failed, attribute_index = 0;
    kv_memcpy_attributes attributes = {.source_access_order = KV_SRC_ACCESS_ORDER_STREAM};
    memset(host, seed, BLOCK_BYTES);
    for (size_t i = 0; i < NUM_PIECES; i++) {
        targets[i] = device + i * PIECE_BYTES;
        sources[i] = (uintptr_t)host + i * PIECE_BYTES;
        sizes[i] = PIECE_BYTES;
    }
    MUST(memcpy_batch_async(targets, sources, sizes, NUM_PIECES, &attributes, &attribute_index, 1, &failed, first));
    MUST(event_record(event, first));
    MUST(stream_wait_event(second, event, 0));
    MUST(memcpy_2d_async(&(kv_memcpy_2d){.source_memory_type = KV_MEMORY_TYPE_DEVICE,
                                         .source_device = device,
                                         .source_pitch = PIECE_BYTES,
                                         .target_memory_type = KV_MEMORY_TYPE_HOST,
                                         .target_host = back,
                                         .target_pitch = PIECE_BYTES,
                                         .width_bytes = PIECE_BYTES,
                                         .height = NUM_PIECES},
                         second));
    MUST(event_record(event, second));
    if (seed % 2)
        MUST(event_synchronize(event));
    else
        for (kv_result code; (code = drv->event_query(event)) != KV_CUDA_SUCCESS;)
            if (code != KV_CUDA_NOT_READY)
                must(code, "event_query");
    num_compared++;
    num_wrong += memcmp(host, back, BLOCK_BYTES) != 0;
}

static void *work(void *argument)
{
    size_t number = (size_t)argument;
    void *context, *first, *second, *event, *host;
    int ordinal = (int)(number % 2), mode = KV_CAPTURE_MODE_RELAXED;
    unsigned char *back = aligned_alloc(4096, BLOCK_BYTES);
    for (size_t round = 0; round < NUM_ROUNDS; round++) {
        kv_devptr device;
        MUST(device_primary_ctx_retain(&context, ordinal));
        MUST(ctx_set_current(context));
        MUST(thread_exchange_stream_capture_mode(&mode));
        MUST(stream_create(&first, KV_STREAM_NON_BLOCKING));
        MUST(stream_create(&second, KV_STREAM_NON_BLOCKING));
        MUST(event_create(&event, KV_EVENT_DISABLE_TIMING));
        MUST(mem_alloc(&device, BLOCK_BYTES));
        MUST(mem_host_alloc(&host, BLOCK_BYTES, 0));
        MUST(mem_host_register(back, BLOCK_BYTES, 0));
        for (size_t i = 0; i < NUM_BLOCKS; i++) {
            kv_devptr pooled = 0;
            if (pools[ordinal]) /* refused when the others have all of it */
                (void)drv->mem_alloc_from_pool_async(&pooled, BLOCK_BYTES, pools[ordinal], first);
            save_and_load(host, back, pooled ? pooled : device, first, second, event,
                          (unsigned char)(number + round + i));
            if (pooled)
                MUST(mem_free_async(pooled, i % 2 ? first : second));
        }
        MUST(memset_d8_async(device, 0, BLOCK_BYTES, NULL));
        MUST(stream_destroy(first));
        MUST(mem_host_unregister(back));
        MUST(mem_free_host(host));
        MUST(mem_free(device));
        MUST(event_destroy(event));
        MUST(stream_destroy(second));
        MUST(ctx_set_current(NULL));
        MUST(device_primary_ctx_release(ordinal));
    }
    free(back);
    return NULL;
}

/* A device that dies while streams of it are busy wakes its waiters and drops its work. */
static void die(void)
{
    void *context, *stream;
    kv_devptr device;
    MUST(device_primary_ctx_retain(&context, 0));
    MUST(ctx_set_current(context));
    MUST(stream_create(&stream, KV_STREAM_NON_BLOCKING));
    MUST(mem_alloc(&device, BLOCK_BYTES));
    kv_host_control_hold();
    for (int i = 0; i < 100; i++)
        MUST(memset_d8_async(device, (unsigned char)i, BLOCK_BYTES, stream));
    kv_host_control_kill(0, KV_CUDA_ILLEGAL_ADDRESS);
    if (drv->stream_synchronize(stream) != KV_CUDA_ILLEGAL_ADDRESS)
        must(KV_CUDA_UNKNOWN, "stream_synchronize of a dead device");
    MUST(ctx_set_current(NULL));
    MUST(device_primary_ctx_release(0));
    kv_host_control_reset();
}

int main(void)
{
    pthread_t threads[NUM_THREADS];
    drv = kv_host_driver();
    MUST(init(0));
    for (int pass = 0; pass < 2; pass++) {
        void *contexts[2];
        kv_mem_pool_props props = {.allocation_type = KV_MEM_ALLOCATION_TYPE_PINNED, .max_bytes = 2 * BLOCK_BYTES};
        props.location.type = KV_MEM_LOCATION_TYPE_DEVICE;
        for (int i = 0; i < 2 && pass; i++) {
            props.location.id = i;
            MUST(device_primary_ctx_retain(&contexts[i], i));
            MUST(mem_pool_create(&pools[i], &props));
        }
        kv_host_control_set_delay_us(0, pass ? 30 : 0, 1);
        for (size_t i = 0; i < NUM_THREADS; i++)
            pthread_create(&threads[i], NULL, work, (void *)i);
        for (size_t i = 0; i < NUM_THREADS; i++)
            pthread_join(threads[i], NULL);
        for (int i = 0; i < 2 && pass; i++) {
            MUST(mem_pool_destroy(pools[i]));
            MUST(device_primary_ctx_release(i));
        }
        die();
    }
    kv_host_live live;
    kv_host_control_live(&live);
    size_t num_left = live.contexts + live.streams + live.events + live.device_allocations + live.host_allocations +
                      live.registrations + live.pools + live.pool_allocations;
    printf("host driver: %zu blocks compared, %zu wrong, %zu objects left\n", num_compared, num_wrong, num_left);
    return num_wrong || num_left;
}
