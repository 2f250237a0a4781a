/* Lookups without the lock, beside a writer, under ThreadSanitizer:
 *
 *   gcc -std=gnu11 -O1 -g -fsanitize=thread -Iinclude -pthread tests/c/index_tsan.c -o index_tsan && ./index_tsan
 *
 * One writer takes slots through FREE -> WRITING -> READY -> FREE with ever new keys, as the index does under its mutex.
 * Readers look for keys of two kinds, and must answer
 *   - yes for the resident keys, which are READY from beginning to end, whatever is written around them;
 *   - no for the aborted ones, which are written but never committed.
 * Then a writer changes the tenant of one entry as fast as it can, and the readers must never take the first half of
 * one key and the second half of the next for a key. Before all that, the table's search and its overflow counts are
 * held against brute force, with hashes that all collide.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvortex/list.h"
#include "kvortex/table.h"

enum { SLOTS = 96, RESIDENT = 48, READERS = 3 };
#ifdef __SANITIZE_THREAD__
enum { ROUNDS = 20000 };
#else
enum { ROUNDS = 1000000 };
#endif

static kv_entry entries[SLOTS];
static kv_table table;
static _Atomic uint64_t round_now; /* the writer's; relaxed, so that it orders nothing between the threads */
static _Atomic uint64_t seen_now;

static void require(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "index_tsan: %s\n", what);
        exit(1);
    }
}

static void make_table(void)
{
    static uint8_t seed[KV_KEY_BYTES] = {7, 1, 200, 31, 5, 77, 9, 80, 3, 2, 1, 90, 61, 17, 8, 4, 44, 45, 46, 47, 210};
    static _Alignas(64) uint8_t memory[1 << 16];
    require(kv_table_bytes(SLOTS) <= sizeof memory, "memory for the table");
    memset(memory, 0, sizeof memory);
    memset(entries, 0, sizeof entries);
    kv_table_init(&table, memory, entries, SLOTS, seed);
}

static kv_key make_key(uint64_t kind, uint64_t low, uint64_t high)
{
    return (kv_key){{kind, low, high, high}};
}

static void publish(uint32_t slot, kv_key key, int commit)
{
    kv_entry_begin(&entries[slot], key, 100, 0);
    kv_table_insert(&table, kv_table_hash(&table, &key), slot);
    if (commit)
        kv_entry_set_state(&entries[slot], KV_READY);
}

static void forget(uint32_t slot)
{
    const kv_key key = kv_entry_key(&entries[slot]);
    kv_table_erase(&table, kv_table_hash(&table, &key), slot);
    kv_entry_set_state(&entries[slot], KV_FREE);
}

static int has(kv_key key)
{
    return kv_table_has_ready(&table, &key, kv_table_hash(&table, &key));
}

static void *write_main(void *unused)
{
    (void)unused;
    for (uint64_t round = 0; round < ROUNDS; round++) {
        const uint32_t slot = RESIDENT + (uint32_t)(round * 7 % (SLOTS - RESIDENT));
        atomic_store_explicit(&round_now, round, memory_order_relaxed);
        if (kv_entry_state(&entries[slot]) != KV_FREE)
            forget(slot);
        const int commit = round % 3 != 0;
        publish(slot, make_key(commit ? 1 : 2, round, round), commit);
    }
    atomic_store_explicit(&round_now, ROUNDS, memory_order_relaxed);
    return NULL;
}

static void *read_main(void *argument)
{
    uint64_t number = (uint64_t)(uintptr_t)argument, seen = 0, now;
    uint64_t hashes[1];
    while ((now = atomic_load_explicit(&round_now, memory_order_relaxed)) < ROUNDS) {
        number = number * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        const uint64_t round = now + 2 - (number >> 60) % 4;
        const kv_key resident = make_key(0, number >> 33 & 31, number >> 33 & 31);
        kv_table_prefetch(&table, (const uint8_t *)&resident, 1, hashes);
        require(kv_table_has_ready(&table, &resident, hashes[0]), "a resident key was missed");
        require(!has(make_key(2, round, round)), "a key that was never committed was found");
        seen += has(make_key(1, round, round));
    }
    return (void *)(uintptr_t)seen;
}

static uint64_t run_threads(void *(*write)(void *), void *(*read)(void *), int num_readers)
{
    pthread_t readers[READERS], writer;
    uint64_t total = 0;
    atomic_store(&round_now, 0);
    for (int i = 0; i < num_readers; i++)
        require(pthread_create(&readers[i], NULL, read, (void *)(uintptr_t)(i + 1)) == 0, "pthread_create");
    require(pthread_create(&writer, NULL, write, NULL) == 0, "pthread_create");
    pthread_join(writer, NULL);
    for (int i = 0; i < num_readers; i++) {
        void *count;
        pthread_join(readers[i], &count);
        total += (uint64_t)(uintptr_t)count;
    }
    return total;
}

static void check_readers_beside_a_writer(void)
{
    make_table();
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        kv_entry_set_state(&entries[slot], KV_FREE);
        if (slot < RESIDENT)
            publish(slot, make_key(0, slot, slot), 1);
    }
    const uint64_t seen = run_threads(write_main, read_main, READERS);
    printf("index_tsan: %d keys written, the readers saw %llu come\n", ROUNDS, (unsigned long long)seen);
}

/* The tenants of entries[0] are (1, 0, 0, 0) and (1, 1, 1, 1) by turns. */
static void *replace_main(void *unused)
{
    (void)unused;
    for (uint64_t round = 0; atomic_load_explicit(&seen_now, memory_order_relaxed) < ROUNDS; round++) {
        if (round % 3 != 0) /* else as an eviction does it, which spares the detour */
            kv_entry_set_state(&entries[0], KV_FREE);
        kv_entry_begin(&entries[0], make_key(1, round % 2, round % 2), 0, 0);
        kv_entry_set_state(&entries[0], KV_READY);
    }
    atomic_store_explicit(&round_now, ROUNDS, memory_order_relaxed);
    return NULL;
}

static void *tear_main(void *argument)
{
    const kv_key whole = make_key(1, 0, 0);
    const kv_key torn[2] = {make_key(1, 0, 1), make_key(1, 1, 0)};
    uint64_t seen = 0;
    (void)argument;
    while (atomic_load_explicit(&round_now, memory_order_relaxed) < ROUNDS) {
        for (int i = 0; i < 2; i++)
            require(!kv_entry_is_ready_with_key(&entries[0], &torn[i]), "halves of two keys passed for one");
        seen += (uint64_t)kv_entry_is_ready_with_key(&entries[0], &whole);
        atomic_store_explicit(&seen_now, seen, memory_order_relaxed);
    }
    return (void *)(uintptr_t)seen;
}

static void check_torn_keys(void)
{
    make_table();
    const uint64_t seen = run_threads(replace_main, tear_main, 1);
    printf("index_tsan: tenants of one entry seen whole %llu times\n", (unsigned long long)seen);
}

/* All keys under three hashes: groups fill, run over and wrap, and every count must return to zero. */
static void check_collisions(void)
{
    static const uint64_t hashes[3] = {0, UINT64_C(0xFFFFFFFF00000000), UINT64_C(0xFFFFFFFF0000007F)};
    int there[SLOTS] = {0};
    uint64_t random = 1;
    make_table();
    for (int step = 0; step < 20000; step++) {
        random = random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        const uint32_t slot = (uint32_t)(random >> 40) % SLOTS;
        const kv_key key = make_key(3, slot, step);
        if (there[slot]) {
            kv_table_erase(&table, hashes[slot % 3], slot);
        } else {
            kv_entry_begin(&entries[slot], key, 0, 0);
            kv_table_insert(&table, hashes[slot % 3], slot);
        }
        there[slot] = !there[slot];
        for (uint32_t other = 0; other < SLOTS; other++) {
            const kv_key sought = kv_entry_key(&entries[other]);
            const uint32_t found = kv_table_find(&table, &sought, hashes[other % 3]);
            require(found == (there[other] ? other : KV_NO_SLOT), "a collision hid a key, or kept one that was erased");
        }
    }
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        if (there[slot])
            kv_table_erase(&table, hashes[slot % 3], slot);
    for (uint32_t group = 0; group < table.num_groups; group++) {
        require(kv_table_overflow(&table, group) == 0, "an overflow count leaked");
        require(kv_table_match(&table, group, KV_TAG_EMPTY) == 0xFFFF, "an empty table has a tag");
    }
}

static void check_tags_against_bytes(void)
{
    uint64_t random = 99;
    for (int step = 0; step < 100000; step++) {
        uint64_t words[2];
        uint8_t bytes[16];
        for (int i = 0; i < 2; i++) {
            random = random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            words[i] = (random ^ random >> 29) & UINT64_C(0x8383838383838383); /* few values, so that many match */
        }
        memcpy(bytes, words, sizeof bytes);
        const uint8_t tag = (uint8_t)(step % 2 ? 0 : 0x80 | step / 2 % 4);
        uint32_t expected = 0;
        for (int i = 0; i < 16; i++)
            expected |= (uint32_t)(bytes[i] == tag) << i;
        require(kv_tags_equal(words[0], words[1], tag) == expected, "sixteen tags at once differ from one by one");
    }
}

int main(void)
{
    check_tags_against_bytes();
    check_collisions();
    check_readers_beside_a_writer();
    check_torn_keys();
    return 0;
}
