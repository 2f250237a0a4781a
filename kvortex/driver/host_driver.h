/* host_driver.h: the driver table over host memory, and the controls that tests use to make it late or broken.
 *
 * Invariants
 *   - What CUDA refuses, it refuses, with CUDA's code: a range across two allocations or two registrations, a pitch
 *     above 2^31-1, no current context, a dead handle, a stream of another device, unsafe calls during a capture.
 *   - One deliberate difference: a range wholly outside every known allocation is taken for memory of this process
 *     that serves as "device" memory (tensors of a CPU runtime) and is accepted. What it must not do is straddle.
 *   - Streams are FIFO worker threads, started at their first work. Copies run on them, never in the caller, so a
 *     forgotten wait shows. An asynchronous copy that touches unregistered host memory is waited for inside the call.
 *   - Copies of one batch call run in a random order.
 *   - Memory freed to a pool, and reserved address space without access, is refused to copies at once. Of virtual
 *     memory only what KVortex does is imitated: whole allocations, mapped once, read and written by their own device.
 *   - In a forked child every call answers NOT_INITIALIZED and touches no lock.
 *
 * Costs: a call checks the controls with one relaxed load. A submission is one malloc, one stream mutex and one or two
 * read locks of the range table; a record or a query costs no allocation of its own.
 *
 * Thread safety: everything here may be called from any thread, except kv_host_control_set_num_devices and
 * kv_host_control_reset, which expect that no other thread is inside the driver.
 */
#ifndef KVORTEX_HOST_DRIVER_H
#define KVORTEX_HOST_DRIVER_H

#include "kvortex/driver.h"

enum { KV_HOST_MAX_DEVICES = 16, KV_HOST_CALL_RING = 4096 };

/* The table. Static: it outlives everything. */
const kv_driver *kv_host_driver(void);

/* Controls. ------------------------------------------------------------------------------------------------------- */

/* 1 .. KV_HOST_MAX_DEVICES; INVALID_VALUE outside of it or while any context is retained. The default is 2. */
kv_result kv_host_control_set_num_devices(int count);
void kv_host_control_set_numa_node(int node); /* -1: none, as at start */

/* Every operation of every stream first sleeps a random time of low .. high microseconds; 0, 0 ends it. */
void kv_host_control_set_delay_us(uint32_t low, uint32_t high, uint64_t seed);

/* A gate in front of every operation of every stream. Calls that wait for work (synchronize, frees, pageable copies)
 * block while it is held. */
void kv_host_control_hold(void);
void kv_host_control_release(void);

/* The n-th call from now (1 is the next), or the n-th call of `row` unless that is -1, answers `code` without doing its
 * work. If `sticky`, the device of the calling thread's context is dead from then on. n = 0 disarms. */
void kv_host_control_fail_call(uint64_t n, kv_result code, int sticky, int row);
/* True until the armed failure has happened. */
int kv_host_control_fail_pending(void);

/* Calls of rows whose byte in `rows` (one for each row) is not 0 stop before they do anything, each until it is stepped;
 * NULL lets all go on, and no call stops from then on. */
void kv_host_control_stop_calls(const uint8_t *rows);
/* The calls that stand still now, as thread (gettid) and row; at most `capacity` are filled in. Returns how many. */
typedef struct kv_host_stopped { long thread; int row; } kv_host_stopped;
size_t kv_host_control_stopped(kv_host_stopped *calls, size_t capacity);
int kv_host_control_step(long thread); /* lets that thread's call go on; 0 if it stood still */

/* Counting is off by default. Turning it on starts from zero. */
void kv_host_control_count_calls(int enabled);
uint64_t kv_host_control_num_calls(int row); /* of one row, or of all with -1 */
/* Row numbers of the last calls, oldest first; at most KV_HOST_CALL_RING of them. Returns how many. */
size_t kv_host_control_last_calls(uint8_t *rows);

/* From now on every call on that device answers `code`; its queued work is dropped. */
void kv_host_control_kill(int ordinal, kv_result code);

/* What cuStreamBeginCapture and cuStreamEndCapture do to the calls of others. What is submitted to a capturing stream
 * is counted and not executed; *num_captured tells how much that was. */
kv_result kv_host_control_begin_capture(void *stream, int mode);
kv_result kv_host_control_end_capture(void *stream, size_t *num_captured);

typedef struct kv_host_live {
    size_t contexts, streams, events, device_allocations, host_allocations, registrations;
    size_t pools, pool_allocations, reservations, physical_allocations;
    size_t reaped; /* objects that were still alive when their context was destroyed, since the last reset */
} kv_host_live;
void kv_host_control_live(kv_host_live *live);

/* No gate, delay, failure, capture, count or dead device any more. Objects stay. */
void kv_host_control_reset(void);

/* For the end of the process: every device dies with DEINITIALIZED, and what is running has ended on return. */
void kv_host_control_stop(void);

#endif
