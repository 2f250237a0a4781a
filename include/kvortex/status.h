/* status.h: the answers of the index's verbs, and the slot number that means none.
 *
 * A full pool or a key already there is an answer, not an error, so it costs a byte and no exception.
 */
#ifndef KVORTEX_STATUS_H
#define KVORTEX_STATUS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define KV_NO_SLOT UINT32_C(0xFFFFFFFF)

/* reserve, per key */
enum {
    KV_RESERVE_NEW = 0,     /* a slot was given; the caller writes it, then commits or aborts */
    KV_RESERVE_PRESENT = 1, /* already READY with this length: nothing to write */
    KV_RESERVE_PENDING = 2, /* another writer has it, or readers still pin it with another length */
    KV_RESERVE_FULL = 3     /* no free slot, and nothing that may be evicted */
};

/* commit, per slot */
enum {
    KV_COMMIT_READY = 0,
    KV_COMMIT_DISCARDED = 1 /* forgotten while it was being written: the slot is free again */
};

/* Always on, NDEBUG or not: going on after a broken invariant serves wrong bytes, and the test costs under 1 ns. */
#define KV_ASSERT(condition) \
    ((condition) ? (void)0 : kv_assert_failed(#condition, __FILE__, __LINE__))

static __attribute__((noreturn, cold, noinline, unused)) void kv_assert_failed(const char *condition,
                                                                               const char *file, int line)
{
    fprintf(stderr, "kvortex: %s:%d: broken invariant: %s\n", file, line, condition);
    abort();
}

#endif
