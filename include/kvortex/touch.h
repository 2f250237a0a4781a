/* touch.h: memory given its pages by many threads, in order, ahead of one that uses it.
 *
 * Bytes [start, end) behind `base` are touched in units that threads take one after the other; a unit is a multiple of
 * the huge page and begins at a multiple of its size, so that no huge page is wanted by two threads.
 *
 * Invariants
 *   - Everything below `prefix` units is touched.
 *   - Units are populated with MADV_POPULATE_WRITE, one call instead of a fault a page, which changes no content.
 *     Kernels before 5.14 do not know it: there the pages are stored to. Where memory is short, as under a cgroup's
 *     limit, the process is killed either way: whoever starts a team asks before (kvortex/memory/limits.py).
 *   - After a failure or kv_touch_stop no further unit is begun; threads end within one unit.
 *   - `left` counts down as memory is touched, a step before the step is: who adds it to what is in use counts no byte
 *     twice, and misses one step a thread at the most.
 *
 * Costs: 5-10 ms a unit of never used memory; one lock and one byte a unit.
 */
#ifndef KVORTEX_TOUCH_H
#define KVORTEX_TOUCH_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "kvortex/sync.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define KV_TOUCH_UNIT_BYTES ((size_t)16 << 20)
#define KV_TOUCH_STEP_BYTES ((size_t)2 << 20)
enum { KV_TOUCH_PAGE_BYTES = 4096 };

typedef struct kv_touch {
    char *base;
    size_t start, end;
    kv_monitor monitor; /* guards what follows; broadcast when a unit is done and at the end */
    size_t next;        /* unit that is taken next */
    size_t prefix;      /* units below are done */
    unsigned char *done;
    uint64_t *left; /* bytes that are not touched yet, for others to read; outlives the threads. Or NULL */
    int failed, stopping;
} kv_touch;

static inline int kv_populate_step(char *address, size_t bytes)
{
    if (madvise(address, bytes, MADV_POPULATE_WRITE) == 0)
        return 0;
    if (errno != EINVAL)
        return -1;
    for (size_t offset = 0; offset < bytes; offset += KV_TOUCH_PAGE_BYTES)
        ((volatile char *)address)[offset] = 0;
    return 0;
}

/* Gives a range its pages. -1: memory is short. */
static inline int kv_populate(char *address, size_t bytes, uint64_t *left)
{
    for (size_t offset = 0, step; offset < bytes; offset += step) {
        step = bytes - offset < KV_TOUCH_STEP_BYTES ? bytes - offset : KV_TOUCH_STEP_BYTES;
        if (left)
            __atomic_fetch_sub(left, step, __ATOMIC_RELAXED);
        if (kv_populate_step(address + offset, step))
            return -1;
    }
    return 0;
}

static inline size_t kv_touch_num_units(const kv_touch *touch)
{
    return (touch->end + KV_TOUCH_UNIT_BYTES - 1) / KV_TOUCH_UNIT_BYTES;
}

/* -1: no memory. */
static inline int kv_touch_init(kv_touch *touch, char *base, size_t start, size_t end, uint64_t *left)
{
    *touch = (kv_touch){.base = base, .start = start, .end = end, .left = left};
    touch->next = touch->prefix = start / KV_TOUCH_UNIT_BYTES;
    touch->done = calloc(kv_touch_num_units(touch) + 1, 1);
    if (!touch->done)
        return -1;
    if (kv_monitor_init(&touch->monitor)) {
        free(touch->done);
        touch->done = NULL;
        return -1;
    }
    return 0;
}

/* No thread is inside any more. */
static inline void kv_touch_destroy(kv_touch *touch)
{
    if (!touch->done)
        return;
    kv_monitor_destroy(&touch->monitor);
    free(touch->done);
    touch->done = NULL;
}

static inline void kv_touch_stop(kv_touch *touch)
{
    kv_monitor_lock(&touch->monitor);
    touch->stopping = 1;
    kv_monitor_broadcast(&touch->monitor);
    kv_monitor_unlock(&touch->monitor);
}

/* Takes the next unit and touches it. 0: there is none, or it is over. */
static inline int kv_touch_step(kv_touch *touch)
{
    kv_monitor_lock(&touch->monitor);
    size_t unit = touch->next;
    int taken = unit < kv_touch_num_units(touch) && !touch->failed && !touch->stopping;
    touch->next += taken;
    kv_monitor_unlock(&touch->monitor);
    if (!taken)
        return 0;
    size_t first = unit * KV_TOUCH_UNIT_BYTES, last = first + KV_TOUCH_UNIT_BYTES;
    first = first < touch->start ? touch->start : first;
    last = last > touch->end ? touch->end : last;
    int code = kv_populate(touch->base + first, last - first, touch->left);
    kv_monitor_lock(&touch->monitor);
    touch->failed |= code != 0;
    touch->done[unit] = 1;
    while (touch->done[touch->prefix])
        touch->prefix++; /* the byte behind the last unit stays 0 */
    kv_monitor_broadcast(&touch->monitor);
    kv_monitor_unlock(&touch->monitor);
    return 1;
}

/* A thread that only touches. */
static inline void *kv_touch_main(void *touch)
{
    while (kv_touch_step((kv_touch *)touch))
        ;
    return NULL;
}

/* Returns when everything below `offset` is touched. -1: memory is short, or it was stopped. `alone`: no other thread
 * touches, so the caller does; beside others it would only be late, busy with a unit that is wanted much later. */
static inline int kv_touch_until(kv_touch *touch, size_t offset, int alone)
{
    for (;;) {
        kv_monitor_lock(&touch->monitor);
        int over = touch->failed || touch->stopping;
        int touched = touch->prefix * KV_TOUCH_UNIT_BYTES >= offset || touch->prefix == kv_touch_num_units(touch);
        if (!over && !touched && !alone)
            kv_monitor_wait(&touch->monitor, KV_NEVER_NS);
        kv_monitor_unlock(&touch->monitor);
        if (over || touched)
            return over ? -1 : 0;
        if (alone)
            kv_touch_step(touch);
    }
}

#endif
