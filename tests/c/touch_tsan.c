/* Threads that touch memory ahead of one that uses it, under TSan: run by `make sanitize`. */

#include "kvortex/touch.h"

#include <stdio.h>
#include <string.h>

enum { NUM_THREADS = 8, NUM_ROUNDS = 6 };

#define REQUIRE(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1); \
        } \
    } while (0)

/* Uses the memory in chunks that are no multiples of a unit, and stops early in every other round. */
static void one_round(size_t start, size_t end, int num_threads, int stop_early)
{
    char *base = mmap(NULL, end, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    REQUIRE(base != MAP_FAILED);
    kv_touch touch;
    pthread_t threads[NUM_THREADS];
    uint64_t left = end - start;
    REQUIRE(kv_touch_init(&touch, base, start, end, &left) == 0);
    for (int i = 0; i < num_threads; i++)
        REQUIRE(pthread_create(&threads[i], NULL, kv_touch_main, &touch) == 0);
    const size_t chunk = (size_t)21 << 20;
    for (size_t offset = start; offset < end; offset += chunk) {
        const size_t last = offset + chunk < end ? offset + chunk : end;
        if (stop_early && offset > end / 2) {
            kv_touch_stop(&touch);
            REQUIRE(kv_touch_until(&touch, end, num_threads == 0) == -1);
            break;
        }
        REQUIRE(kv_touch_until(&touch, last, num_threads == 0) == 0);
        memset(base + offset, 1, last - offset); /* a page that is touched now would be a race, or zero again */
    }
    for (int i = 0; i < num_threads; i++)
        pthread_join(threads[i], NULL);
    REQUIRE(stop_early ? left < end - start : left == 0);
    kv_touch_destroy(&touch);
    munmap(base, end);
}

int main(void)
{
    for (int round = 0; round < NUM_ROUNDS; round++)
        one_round((size_t)round * 3000000 / 4096 * 4096, (size_t)150 << 20, round % 3 ? NUM_THREADS : 0, round & 1);
    return 0;
}
