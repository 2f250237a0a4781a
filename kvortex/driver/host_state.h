/* host_state.h: what every part of the host driver looks at: its devices, the contexts of the thread, what is unusual.
 *
 * The host driver's own headers, each of which knows only those before it:
 *   host_driver.h   what the outside sees: the table and the controls
 *   host_memory.h   known address ranges
 *   host_stream.h   streams: queues, worker threads, tickets
 *   host_state.h    this file
 *   host_gate.h     where every row begins: failures, captures, dead devices; finding a stream and handing work to it
 *   host_rows.h     the rows (host_device.c, host_event.c, host_allocation.c, host_copy.c, host_pool.c, host_space.c)
 * On top, known to none of them: host_table.c (the table, the life of a context) and host_control.c.
 *
 * Locks: the contexts' mutex (host_table.c) is held over the end of a context and so over all others, the mutexes of
 * host_pool.c and host_space.c over the lock of the ranges; apart from that no two locks of the host driver are ever
 * held together. */
#ifndef KVORTEX_HOST_STATE_H
#define KVORTEX_HOST_STATE_H

#include "host_stream.h"

enum { KV_HOST_MAX_PITCH = 0x7fffffff, KV_HOST_LOWEST_ADDRESS = 4096, KV_HOST_MAX_CONTEXT_DEPTH = 32 };
static const uint64_t KV_HOST_CONTEXT_TAG = 0x43ull << 48; /* 'C'; a handle is tag | generation | ordinal */

typedef struct kv_host_device {
    _Atomic uint64_t context; /* handle while retained, else 0 */
    uint64_t generation;
    int num_retained;
    _Atomic int sticky; /* the code a dead device answers */
} kv_host_device;
extern kv_host_device kv_host_devices[KV_HOST_MAX_DEVICES];
extern _Atomic int kv_host_initialized, kv_host_num_devices;
extern _Atomic int kv_host_numa_node; /* what HOST_NUMA_ID answers; -1: none is nearer than another */
extern _Atomic size_t kv_host_num_reaped;
int kv_host_is_device(int ordinal);
size_t kv_host_physical_bytes(void); /* of the machine */

typedef struct kv_host_thread {
    uint64_t contexts[KV_HOST_MAX_CONTEXT_DEPTH];
    int num_contexts;
    int capture_mode; /* GLOBAL, as in CUDA */
} kv_host_thread;
extern _Thread_local kv_host_thread kv_host_this_thread;
kv_host_device *kv_host_device_of(uint64_t context);
kv_host_device *kv_host_current_device(void); /* of the thread's current context; NULL without one */

/* What is out of the ordinary. Zero in production, so that a call pays one relaxed load for it all. */
enum {
    KV_HOST_FORKED = 1,
    KV_HOST_COUNTING = 2,
    KV_HOST_FAILING = 4,
    KV_HOST_CAPTURING = 8,
    KV_HOST_DEAD = 16,
    KV_HOST_STEPPING = 32
};
extern _Atomic unsigned int kv_host_unusual;
void kv_host_set_unusual(unsigned int bits, int on);

#endif
