/* host_gate.h: where every row begins, and what the rows that use a stream have in common. */
#ifndef KVORTEX_HOST_GATE_H
#define KVORTEX_HOST_GATE_H

#include "host_state.h"

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

/* Captures: before a wait for a stream, and whether its being the legacy stream drags in a capturing one (`spoil`
 * invalidates that capture). */
int kv_host_capture_status(const kv_stream *stream);
kv_result kv_host_refuse_wait(kv_stream *stream);
int kv_host_is_implicit(const kv_stream *legacy, int spoil);
kv_result kv_host_end_capture(kv_stream *stream, size_t *num_captured);
void kv_host_forget_captures(void);

/* A handle to its stream. 0 and 1 are the legacy default stream of the current context, 2 the per-thread one. */
kv_result kv_host_find_stream(void *handle, kv_stream **stream);
/* For submissions: there must be a current context, and the stream must belong to it. */
kv_result kv_host_find_own_stream(void *handle, kv_stream **stream);

static const uint64_t KV_HOST_CAPTURED_TICKET = ~0ull; /* of what was submitted to a capturing stream */
/* Hands an operation to its stream, and waits for it if `synchronous`. Takes it over, also when it fails; NULL is an
 * answer of kv_op_new. */
kv_result kv_host_submit(kv_stream *stream, kv_op *op, int synchronous, uint64_t *ticket);
/* Waits on the host; what a dead device answers, or success. */
kv_result kv_host_wait_for_ticket(uint64_t ticket, int ordinal);
/* For everything queued on a device, or with -1 on any; ends early where a device drops its work. */
void kv_host_wait_for_device(int ordinal);

#endif
