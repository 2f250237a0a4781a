/* host_state.h: what the parts of the host driver share. Private to them.
 *
 * Locks: the contexts' mutex (host_device.c) is held over the end of a context and so over all others, the mutexes of
 * host_pool.c and host_space.c over the lock of the ranges; apart from that no two locks of the host driver are ever
 * held together. */
#ifndef KVORTEX_HOST_STATE_H
#define KVORTEX_HOST_STATE_H

#include "host_stream.h"

/* One function per row of the table. */
#define KV_ROW_FUNCTION(field, symbol, version, parameters) kv_result kv_host_##field parameters;
KV_DRIVER_ROWS(KV_ROW_FUNCTION)
#undef KV_ROW_FUNCTION

enum { KV_HOST_MAX_PITCH = 0x7fffffff };

/* host_device.c */
typedef struct kv_host_device {
    _Atomic uint64_t context; /* handle while retained, else 0 */
    uint64_t generation;
    int num_retained;
    _Atomic int sticky; /* the code a dead device answers */
} kv_host_device;
extern kv_host_device kv_host_devices[KV_HOST_MAX_DEVICES];
extern _Atomic int kv_host_initialized, kv_host_num_devices;
extern _Atomic int kv_host_numa_node; /* what HOST_NUMA_ID answers; -1: none is nearer than another */
kv_host_device *kv_host_current_device(void); /* of the thread's current context; NULL without one */

/* host_driver.c */
kv_result kv_host_find_stream(void *handle, kv_stream **stream);
kv_result kv_host_find_own_stream(void *handle, kv_stream **stream);
/* Hands an operation to its stream, and waits for it if `synchronous`. Takes it over, also when it fails; NULL is an
 * answer of kv_op_new. */
kv_result kv_host_submit(kv_stream *stream, kv_op *op, int synchronous, uint64_t *ticket);
void kv_host_wait_for_device(int ordinal); /* for everything queued on it; ends early when it drops its work */
size_t kv_host_events_live(void);
void kv_host_reap(int ordinal); /* the end of a context: its work is dropped, its objects go with it */
extern _Atomic size_t kv_host_num_reaped;

/* host_pool.c */
void kv_host_pools_settle(int ordinal); /* after a wait: frees that are over count, thresholds are honoured */
size_t kv_host_pools_reap(int ordinal); /* the end of a context; how many objects were alive */
size_t kv_host_pools_live(void);

/* host_space.c */
size_t kv_host_spaces_reap(int ordinal);
size_t kv_host_spaces_live(void);
size_t kv_host_physical_live(void);

/* host_control.c: what is out of the ordinary. Zero in production, so that a call pays one relaxed load for it all. */
enum {
    KV_HOST_FORKED = 1,
    KV_HOST_COUNTING = 2,
    KV_HOST_FAILING = 4,
    KV_HOST_CAPTURING = 8,
    KV_HOST_DEAD = 16
};
extern _Atomic unsigned int kv_host_unusual;
void kv_host_set_unusual(unsigned int bits, int on);
kv_result kv_host_begin_unusual(int row, unsigned int bits);

/* Every row begins with this. */
#define KV_HOST_BEGIN(field) \
    do { \
        unsigned int bits_ = atomic_load_explicit(&kv_host_unusual, memory_order_relaxed); \
        kv_result code_ = bits_ ? kv_host_begin_unusual(KV_ROW_##field, bits_) : KV_CUDA_SUCCESS; \
        if (code_) \
            return code_; \
        if (KV_ROW_##field >= KV_ROW_device_get_count && \
            !atomic_load_explicit(&kv_host_initialized, memory_order_relaxed)) \
            return KV_CUDA_NOT_INITIALIZED; \
    } while (0)

/* Captures: before work goes to a stream (*captured: it went into a capture and is not to be executed), before a wait
 * for it, and whether its being the legacy stream drags in a capturing one (`spoil` invalidates that capture). */
int kv_host_capture_status(const kv_stream *stream);
kv_result kv_host_admit(kv_stream *stream, int *captured);
kv_result kv_host_refuse_wait(kv_stream *stream);
kv_result kv_host_end_capture(kv_stream *stream, size_t *num_captured);
int kv_host_is_implicit(const kv_stream *legacy, int spoil);

#endif
