/* table.h: key -> entry number, by open addressing over groups of 16 buckets.
 *
 * A bucket is one tag byte (0: empty, else 0x80 | 7 bits of the hash) and one entry number. The key's hash picks a
 * home group; when a group is full the next one is tried. One compare tests the 16 tags of a group.
 *
 * Invariants
 *   - `overflow[g]` counts the keys that passed group g because it was full when they came. A search ends at the
 *     first group with overflow 0, and erasing a key takes back its own counts. So there are no tombstones: nothing
 *     wears out, nothing is ever rehashed, and no verb pauses for it. Buckets are 4/3 of the slots, the load stays
 *     <= 75 %.
 *   - A key never moves while it is in the table. Hence a search that runs beside writers cannot miss a key that is
 *     there all the time, and a bucket needs no protection of its own: what it names is checked in the entry.
 *   - Writers hold the index's lock. kv_table_has_ready and kv_table_prefetch take none, never wait and never retry:
 *     all they read is atomic.
 *   - The hash is keyed with a seed per table, so that keys chosen by a caller (counters, one constant word) spread
 *     as well as digests do.
 *   - Nothing is allocated after kv_table_init.
 *
 * Costs: 5.25 bytes a bucket, 7 bytes a slot. A search that finds reads 1.05 groups on average in a freshly filled
 * table and 1.15 after any amount of churn; three cache lines.
 */
#ifndef KVORTEX_TABLE_H
#define KVORTEX_TABLE_H

#if defined(__SSE2__) && !defined(KV_TABLE_PORTABLE)
#include <emmintrin.h>
#endif

#include "entry.h"

enum { KV_GROUP_WIDTH = 16 };
enum { KV_TAG_EMPTY = 0, KV_TAG_FULL = 0x80 };

typedef struct kv_table {
    _Atomic uint64_t *tags;     /* two words, 16 tags, a group */
    _Atomic uint32_t *overflow; /* one a group */
    _Atomic uint32_t *numbers;  /* 16 a group */
    const kv_entry *entries;
    uint32_t num_groups;
    uint64_t seed[KV_KEY_WORDS];
} kv_table;

static inline uint32_t kv_table_groups_for(uint32_t num_slots)
{
    return (uint32_t)(((uint64_t)num_slots * 4 + 3 * KV_GROUP_WIDTH - 1) / (3 * KV_GROUP_WIDTH));
}

/* Bytes of memory that kv_table_init needs for so many slots. */
static inline size_t kv_table_bytes(uint32_t num_slots)
{
    const size_t per_group = KV_GROUP_WIDTH + sizeof(uint32_t) + KV_GROUP_WIDTH * sizeof(uint32_t);
    return kv_table_groups_for(num_slots) * per_group;
}

/* `memory` is 64-byte aligned, zeroed, and outlives the table; so do `entries`. */
static inline void kv_table_init(kv_table *table, void *memory, const kv_entry *entries, uint32_t num_slots,
                                 const uint8_t *seed)
{
    const size_t num_groups = kv_table_groups_for(num_slots);
    table->numbers = (_Atomic uint32_t *)memory;
    table->tags = (_Atomic uint64_t *)(table->numbers + num_groups * KV_GROUP_WIDTH);
    table->overflow = (_Atomic uint32_t *)(table->tags + num_groups * 2);
    table->entries = entries;
    table->num_groups = (uint32_t)num_groups;
    memcpy(table->seed, seed, sizeof table->seed);
}

/* --- Hash ------------------------------------------------------------------------------------------------------- */

static inline uint64_t kv_fold_multiply(uint64_t a, uint64_t b)
{
    __extension__ typedef unsigned __int128 wide;
    const wide product = (wide)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t kv_table_hash(const kv_table *table, const kv_key *key)
{
    const uint64_t *word = key->words, *seed = table->seed;
    const uint64_t mixed = kv_fold_multiply(word[0] ^ seed[0], word[1] ^ seed[1]) +
                           kv_fold_multiply(word[2] ^ seed[2], word[3] ^ seed[3]);
    return kv_fold_multiply(mixed ^ seed[0], UINT64_C(0x9E3779B97F4A7C15));
}

static inline uint32_t kv_table_home(const kv_table *table, uint64_t hash)
{
    return (uint32_t)(((hash >> 32) * table->num_groups) >> 32); /* scales to the number of groups, no power of two */
}

static inline uint32_t kv_table_next(const kv_table *table, uint32_t group)
{
    return group + 1 == table->num_groups ? 0 : group + 1;
}

static inline uint8_t kv_table_tag(uint64_t hash)
{
    return (uint8_t)(KV_TAG_FULL | (hash & 0x7F));
}

/* --- Sixteen tags at once --------------------------------------------------------------------------------------- */

#if defined(__SSE2__) && !defined(KV_TABLE_PORTABLE)
static inline uint32_t kv_tags_equal(uint64_t low, uint64_t high, uint8_t tag)
{
    const __m128i tags = _mm_set_epi64x((long long)high, (long long)low);
    return (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(tags, _mm_set1_epi8((char)tag)));
}
#else
/* Bit i is set if byte i of the word equals the tag: exact, no borrow runs into the next byte. */
static inline uint32_t kv_tags_equal_word(uint64_t word, uint8_t tag)
{
    const uint64_t low_bits = UINT64_C(0x7F7F7F7F7F7F7F7F);
    const uint64_t difference = word ^ (UINT64_C(0x0101010101010101) * tag);
    const uint64_t zero_bytes = ~(((difference & low_bits) + low_bits) | difference | low_bits); /* 0x80 or 0 each */
    return (uint32_t)(((zero_bytes >> 7) * UINT64_C(0x0102040810204080)) >> 56);
}

static inline uint32_t kv_tags_equal(uint64_t low, uint64_t high, uint8_t tag)
{
    return kv_tags_equal_word(low, tag) | kv_tags_equal_word(high, tag) << 8;
}
#endif

static inline uint32_t kv_table_match(const kv_table *table, uint32_t group, uint8_t tag)
{
    return kv_tags_equal(atomic_load_explicit(&table->tags[2 * (size_t)group], memory_order_acquire),
                         atomic_load_explicit(&table->tags[2 * (size_t)group + 1], memory_order_acquire), tag);
}

static inline uint32_t kv_table_number(const kv_table *table, uint32_t group, uint32_t lane)
{
    return atomic_load_explicit(&table->numbers[(size_t)group * KV_GROUP_WIDTH + lane], memory_order_relaxed);
}

static inline uint32_t kv_table_overflow(const kv_table *table, uint32_t group)
{
    return atomic_load_explicit(&table->overflow[group], memory_order_relaxed);
}

/* --- Without the lock ------------------------------------------------------------------------------------------- */

/* True if the key was READY at one moment during the call; false if it was not at one moment during it. */
static inline int kv_table_has_ready(const kv_table *table, const kv_key *key, uint64_t hash)
{
    uint32_t group = kv_table_home(table, hash);
    for (uint32_t i = 0; i < table->num_groups; i++, group = kv_table_next(table, group)) {
        uint32_t match = kv_table_match(table, group, kv_table_tag(hash));
        for (; match != 0; match &= match - 1) {
            const uint32_t number = kv_table_number(table, group, (uint32_t)__builtin_ctz(match));
            if (kv_entry_is_ready_with_key(&table->entries[number], key))
                return 1;
        }
        if (kv_table_overflow(table, group) == 0)
            return 0;
    }
    return 0;
}

/* Asks memory for the cache lines of the group that a search begins with. */
KV_PREFETCH_INLINE void kv_table_prefetch_home(const kv_table *table, uint64_t hash)
{
    const size_t group = kv_table_home(table, hash);
    __builtin_prefetch((const void *)&table->tags[2 * group]);
    __builtin_prefetch((const void *)&table->numbers[group * KV_GROUP_WIDTH]);
}

/* Hashes `n` keys and asks memory for the cache lines that looking them up will touch: a batch then waits for memory
 * once, not three times a key. */
static inline void kv_table_prefetch(const kv_table *table, const uint8_t *keys, size_t n, uint64_t *hashes)
{
    for (size_t i = 0; i < n; i++) {
        const kv_key key = kv_key_load(keys + i * KV_KEY_BYTES);
        hashes[i] = kv_table_hash(table, &key);
        kv_table_prefetch_home(table, hashes[i]);
    }
    for (size_t i = 0; i < n; i++) {
        const uint32_t group = kv_table_home(table, hashes[i]);
        const uint32_t match = kv_table_match(table, group, kv_table_tag(hashes[i]));
        if (match != 0)
            kv_entry_prefetch(table->entries, kv_table_number(table, group, (uint32_t)__builtin_ctz(match)));
    }
}

/* --- Under the lock --------------------------------------------------------------------------------------------- */

/* The entry that has the key, in whatever state, or KV_NO_SLOT. */
static inline uint32_t kv_table_find(const kv_table *table, const kv_key *key, uint64_t hash)
{
    uint32_t group = kv_table_home(table, hash);
    for (uint32_t i = 0; i < table->num_groups; i++, group = kv_table_next(table, group)) {
        uint32_t match = kv_table_match(table, group, kv_table_tag(hash));
        for (; match != 0; match &= match - 1) {
            const uint32_t number = kv_table_number(table, group, (uint32_t)__builtin_ctz(match));
            if (kv_entry_has_key(&table->entries[number], key))
                return number;
        }
        if (kv_table_overflow(table, group) == 0)
            return KV_NO_SLOT;
    }
    return KV_NO_SLOT;
}

static inline void kv_table_set_tag(kv_table *table, uint32_t group, uint32_t lane, uint8_t tag)
{
    _Atomic uint64_t *word = &table->tags[2 * (size_t)group + lane / 8];
    const uint32_t shift = lane % 8 * 8;
    const uint64_t others = atomic_load_explicit(word, memory_order_relaxed) & ~(UINT64_C(0xFF) << shift);
    atomic_store_explicit(word, others | (uint64_t)tag << shift, memory_order_release);
}

static inline void kv_table_add_overflow(kv_table *table, uint32_t group, int32_t change)
{
    const uint32_t value = kv_table_overflow(table, group) + (uint32_t)change;
    atomic_store_explicit(&table->overflow[group], value, memory_order_relaxed);
}

/* The key must not be in the table. There is always room: buckets outnumber entries. */
static inline void kv_table_insert(kv_table *table, uint64_t hash, uint32_t number)
{
    uint32_t group = kv_table_home(table, hash), empty;
    while ((empty = kv_table_match(table, group, KV_TAG_EMPTY)) == 0) {
        kv_table_add_overflow(table, group, 1);
        group = kv_table_next(table, group);
    }
    const uint32_t lane = (uint32_t)__builtin_ctz(empty);
    atomic_store_explicit(&table->numbers[(size_t)group * KV_GROUP_WIDTH + lane], number, memory_order_relaxed);
    kv_table_set_tag(table, group, lane, kv_table_tag(hash));
}

/* The entry must be in the table, under this hash. */
static inline void kv_table_erase(kv_table *table, uint64_t hash, uint32_t number)
{
    uint32_t group = kv_table_home(table, hash);
    for (uint32_t i = 0; i < table->num_groups; i++, group = kv_table_next(table, group)) {
        uint32_t match = kv_table_match(table, group, kv_table_tag(hash));
        for (; match != 0; match &= match - 1) {
            const uint32_t lane = (uint32_t)__builtin_ctz(match);
            if (kv_table_number(table, group, lane) == number) {
                kv_table_set_tag(table, group, lane, KV_TAG_EMPTY);
                return;
            }
        }
        KV_ASSERT(kv_table_overflow(table, group) > 0);
        kv_table_add_overflow(table, group, -1);
    }
    KV_ASSERT(!"an entry that is erased is in the table");
}

/* Empties every bucket. O(buckets). */
static inline void kv_table_clear(kv_table *table)
{
    for (size_t group = 0; group < table->num_groups; group++) {
        atomic_store_explicit(&table->tags[2 * group], 0, memory_order_release);
        atomic_store_explicit(&table->tags[2 * group + 1], 0, memory_order_release);
        atomic_store_explicit(&table->overflow[group], 0, memory_order_relaxed);
    }
}

/* Groups that a search for this entry reads. For tests and diagnosis. */
static inline uint32_t kv_table_probes(const kv_table *table, uint64_t hash, uint32_t number)
{
    uint32_t group = kv_table_home(table, hash);
    for (uint32_t probes = 1; probes <= table->num_groups; probes++, group = kv_table_next(table, group))
        for (uint32_t match = kv_table_match(table, group, kv_table_tag(hash)); match != 0; match &= match - 1)
            if (kv_table_number(table, group, (uint32_t)__builtin_ctz(match)) == number)
                return probes;
    return 0;
}

#endif
