/* sync.h: a mutex with its condition variable, and the monotonic clock.
 *
 * Invariants
 *   - A monitor guards memory loops only: it is never held over a driver call, I/O or the GIL.
 *   - Deadlines are CLOCK_MONOTONIC nanoseconds, so a stepped wall clock ends no wait early.
 *
 * Costs: lock and unlock about 20 ns uncontended; kv_now_ns about 25 ns.
 */
#ifndef KVORTEX_SYNC_H
#define KVORTEX_SYNC_H

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <time.h>

#define KV_NEVER_NS UINT64_MAX

typedef struct kv_monitor {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} kv_monitor;

static inline uint64_t kv_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The deadline `timeout_ms` from now; a negative timeout never ends, nor does one of more than 100 years. */
static inline uint64_t kv_deadline_ns(int64_t timeout_ms)
{
    if (timeout_ms < 0 || timeout_ms > INT64_C(3200000000000))
        return KV_NEVER_NS;
    return kv_now_ns() + (uint64_t)timeout_ms * 1000000u;
}

static inline void kv_nap_ns(uint64_t nanoseconds)
{
    struct timespec nap = {(time_t)(nanoseconds / 1000000000u), (long)(nanoseconds % 1000000000u)};
    nanosleep(&nap, NULL);
}

static inline int kv_monitor_init(kv_monitor *monitor)
{
    pthread_condattr_t attributes;
    int error = pthread_condattr_init(&attributes);
    if (error)
        return error;
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    error = pthread_cond_init(&monitor->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    if (error)
        return error;
    error = pthread_mutex_init(&monitor->mutex, NULL);
    if (error)
        pthread_cond_destroy(&monitor->changed);
    return error;
}

static inline void kv_monitor_destroy(kv_monitor *monitor)
{
    pthread_mutex_destroy(&monitor->mutex);
    pthread_cond_destroy(&monitor->changed);
}

static inline void kv_monitor_lock(kv_monitor *monitor) { pthread_mutex_lock(&monitor->mutex); }
static inline void kv_monitor_unlock(kv_monitor *monitor) { pthread_mutex_unlock(&monitor->mutex); }
static inline void kv_monitor_broadcast(kv_monitor *monitor) { pthread_cond_broadcast(&monitor->changed); }

/* Waits for a broadcast until the deadline; the caller holds the lock and checks its own condition again. */
static inline int kv_monitor_wait(kv_monitor *monitor, uint64_t deadline_ns)
{
    if (deadline_ns == KV_NEVER_NS)
        return pthread_cond_wait(&monitor->changed, &monitor->mutex);
    struct timespec until = {(time_t)(deadline_ns / 1000000000u), (long)(deadline_ns % 1000000000u)};
    return pthread_cond_timedwait(&monitor->changed, &monitor->mutex, &until);
}

#endif
