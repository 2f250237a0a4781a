/* The table of known address ranges; see host_memory.h. */

#include "host_memory.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;
static kv_range *ranges;
static size_t num_ranges, capacity;
static size_t num_of_kind[KV_RANGE_NUM_KINDS];

/* Index of the first range that ends after `address`: the only one that can contain it. */
static size_t first_ending_after(uintptr_t address)
{
    size_t low = 0, high = num_ranges;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (ranges[middle].start + ranges[middle].bytes <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int make_room(size_t more)
{
    if (num_ranges + more <= capacity)
        return 1;
    size_t larger = capacity ? 2 * capacity : 64;
    kv_range *moved = realloc(ranges, larger * sizeof *ranges);
    if (!moved)
        return 0;
    ranges = moved;
    capacity = larger;
    return 1;
}

/* There is room. */
static void insert_at(size_t i, kv_range range)
{
    memmove(&ranges[i + 1], &ranges[i], (num_ranges++ - i) * sizeof *ranges);
    ranges[i] = range;
    num_of_kind[range.kind]++;
}

static void remove_at(size_t i, kv_range *range)
{
    *range = ranges[i];
    num_of_kind[range->kind]--;
    memmove(&ranges[i], &ranges[i + 1], (--num_ranges - i) * sizeof *ranges);
}

kv_result kv_ranges_add(kv_range range)
{
    kv_result code = KV_CUDA_SUCCESS;
    pthread_rwlock_wrlock(&lock);
    size_t i = first_ending_after(range.start);
    if (i < num_ranges && ranges[i].start < range.start + range.bytes) {
        code = ranges[i].kind == KV_RANGE_DEVICE ? KV_CUDA_INVALID_VALUE : KV_CUDA_HOST_MEMORY_ALREADY_REGISTERED;
        goto out;
    }
    if (make_room(1))
        insert_at(i, range);
    else
        code = KV_CUDA_OUT_OF_MEMORY;
out:
    pthread_rwlock_unlock(&lock);
    return code;
}

/* Joins range i with the one behind it, if both are closed parts of one address space. */
static void join_with_next(size_t i)
{
    kv_range joined;
    if (i + 1 >= num_ranges || ranges[i].kind != KV_RANGE_CLOSED || ranges[i + 1].kind != KV_RANGE_CLOSED ||
        !ranges[i].space || ranges[i].space != ranges[i + 1].space)
        return;
    remove_at(i + 1, &joined);
    ranges[i].bytes += joined.bytes;
}

kv_result kv_ranges_recast(uintptr_t start, size_t bytes, kv_range_kind from, kv_range_kind to)
{
    kv_result code = KV_CUDA_INVALID_VALUE;
    pthread_rwlock_wrlock(&lock);
    size_t i = first_ending_after(start);
    if (i == num_ranges || ranges[i].kind != from || ranges[i].start > start ||
        bytes > ranges[i].start + ranges[i].bytes - start)
        goto out;
    code = KV_CUDA_OUT_OF_MEMORY;
    if (!make_room(2))
        goto out;
    code = KV_CUDA_SUCCESS;
    kv_range whole, part;
    remove_at(i, &whole);
    size_t before = start - whole.start, after = whole.bytes - before - bytes;
    part = whole;
    part.start = start + bytes;
    part.bytes = after;
    if (after)
        insert_at(i, part);
    part.start = start;
    part.bytes = bytes;
    part.kind = to;
    insert_at(i, part);
    part = whole;
    part.bytes = before;
    if (before)
        insert_at(i++, part);
    join_with_next(i);
    if (i)
        join_with_next(i - 1);
out:
    pthread_rwlock_unlock(&lock);
    return code;
}

int kv_ranges_remove(uintptr_t start, kv_range_kind kind, kv_range *range)
{
    pthread_rwlock_wrlock(&lock);
    size_t i = first_ending_after(start);
    int found = i < num_ranges && ranges[i].start == start && ranges[i].kind == kind;
    if (found)
        remove_at(i, range);
    pthread_rwlock_unlock(&lock);
    return found;
}

int kv_ranges_remove_any(int ordinal, kv_range *range)
{
    int found = 0;
    pthread_rwlock_wrlock(&lock);
    for (size_t i = num_ranges; i-- > 0 && !found;)
        if ((found = ranges[i].ordinal == ordinal))
            remove_at(i, range);
    pthread_rwlock_unlock(&lock);
    return found;
}

size_t kv_ranges_count(kv_range_kind kind)
{
    pthread_rwlock_rdlock(&lock);
    size_t count = num_of_kind[kind];
    pthread_rwlock_unlock(&lock);
    return count;
}

void kv_ranges_lock(void)
{
    pthread_rwlock_rdlock(&lock);
}

void kv_ranges_unlock(void)
{
    pthread_rwlock_unlock(&lock);
}

kv_range_answer kv_ranges_find(uintptr_t start, size_t bytes, size_t *hint, kv_range *range)
{
    size_t i = *hint;
    if (i >= num_ranges || start < ranges[i].start || start >= ranges[i].start + ranges[i].bytes)
        *hint = i = first_ending_after(start);
    if (i == num_ranges || ranges[i].start >= start + bytes)
        return KV_RANGE_OUTSIDE;
    if (range)
        *range = ranges[i];
    if (start < ranges[i].start)
        return KV_RANGE_STRADDLES;
    if (ranges[i].kind == KV_RANGE_CLOSED)
        return KV_RANGE_IS_CLOSED;
    uintptr_t end = ranges[i].start + ranges[i].bytes;
    if (ranges[i].kind == KV_RANGE_MAPPED) /* mappings need not end where copies do */
        for (; bytes > end - start && i + 1 < num_ranges && ranges[i + 1].kind == KV_RANGE_MAPPED &&
               ranges[i + 1].space == ranges[i].space && ranges[i + 1].start == end;
             i++)
            end += ranges[i + 1].bytes;
    return bytes <= end - start ? KV_RANGE_INSIDE : KV_RANGE_STRADDLES;
}
