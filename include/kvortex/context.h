/* context.h: makes a device's context current for one call of the calling thread, and puts back what was there.
 *
 * Invariants
 *   - What enter has changed, leave puts back. Where the driver refuses that twice, `kv_left` remembers it, and every
 *     later enter of the thread, on whichever device, tries it again before anything else.
 *   - A context is popped again only while it is on top: what the thread's owner pushed over it is the owner's to pop.
 *   - A code that enter answers says which row failed (kv_call), so an error names no call that was never made.
 *
 * Costs: four driver calls a pair, and one look at a thread-local word.
 */
#ifndef KVORTEX_CONTEXT_H
#define KVORTEX_CONTEXT_H

#include "driver.h"

static _Thread_local struct {
    const kv_driver *drv; /* NULL: nothing was left behind */
    void *context;
    int num_contexts; /* pops that are still to come */
    int mode;         /* the capture mode to put back; -1: it was put back */
} kv_left;

/* Once more what `leave` could not do. 0 when all of it is done, or the owner's own context lies above. */
static inline kv_result kv_context_put_back(void)
{
    const kv_driver *drv = kv_left.drv;
    kv_result code;
    if (kv_left.mode >= 0) {
        if ((code = kv_call(drv, thread_exchange_stream_capture_mode, &kv_left.mode)))
            return code;
        kv_left.mode = -1;
    }
    while (kv_left.num_contexts) {
        void *top = NULL;
        if ((code = kv_call(drv, ctx_get_current, &top)))
            return code;
        if (top != kv_left.context)
            return 0;
        if ((code = kv_call(drv, ctx_pop_current, &top)))
            return code;
        kv_left.num_contexts--;
    }
    kv_left.drv = NULL;
    return 0;
}

/* Puts the mode back, if it is not -1, and pops the context. */
static inline void kv_context_leave(const kv_driver *drv, void *context, int mode)
{
    void *top;
    int owes_mode = mode >= 0 && drv->thread_exchange_stream_capture_mode(&mode) != 0;
    int owes_pop = drv->ctx_pop_current(&top) != 0;
    if (!owes_mode && !owes_pop)
        return;
    if (kv_left.drv != drv || kv_left.context != context) {
        kv_left.drv = drv;
        kv_left.context = context;
        kv_left.num_contexts = 0;
        kv_left.mode = -1;
    }
    kv_left.num_contexts += owes_pop;
    if (owes_mode && kv_left.mode < 0)
        kv_left.mode = mode;
    kv_context_put_back();
}

/* Makes the context current and the thread's capture mode RELAXED; *mode keeps what leave puts back. */
static inline kv_result kv_context_enter(const kv_driver *drv, void *context, int *mode)
{
    kv_result code = kv_left.drv ? kv_context_put_back() : 0;
    if (code || (code = kv_call(drv, ctx_push_current, context)))
        return code;
    *mode = KV_CAPTURE_MODE_RELAXED;
    if ((code = kv_call(drv, thread_exchange_stream_capture_mode, mode)))
        kv_context_leave(drv, context, -1);
    return code;
}

#endif
