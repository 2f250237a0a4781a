/* Memory pools: stream-ordered allocation and free, a limit, a release threshold.
 *
 * A pool is a list of blocks, each a mapping of its own: in use, freed (its free is queued on a stream), or idle. A
 * block is handed out again only when that cannot show: when it is idle, to the stream that its free is queued on, or,
 * where the limit leaves no other way, to a stream that is first made to wait for the free. Blocks are not divided, so a
 * smaller allocation takes a larger block only at the limit. What is freed closes to copies at once; its bytes stay
 * until the stream gets there. */

#include "host_memory.h"
#include "host_rows.h"

#include <stdlib.h>
#include <sys/mman.h>

enum { MAX_POOLS = 256, PAGE_BYTES = 4096 };
static const uint64_t POOL_TAG = 0x50ull << 48; /* 'P'; a handle is tag | generation | slot */

typedef enum block_state { IN_USE, FREED, IDLE } block_state;

typedef struct block {
    struct block *next;
    uintptr_t start;
    size_t bytes, asked_bytes; /* whole pages, and what was asked for last */
    block_state state;
    const kv_stream *stream; /* FREED: where, and the ticket that stands for it; a slot's successors come after it */
    uint64_t ticket;
} block;

typedef struct pool {
    uint64_t handle; /* 0: none lives here, or it was destroyed and waits for the end of its blocks */
    uint64_t generation;
    int ordinal;
    size_t max_bytes;
    uint64_t threshold, reserved, reserved_high, used, used_high;
    block *blocks;
} pool;

static pool pools[MAX_POOLS];
static pthread_mutex_t pools_mutex = PTHREAD_MUTEX_INITIALIZER; /* guards them all */
static _Atomic size_t num_pools_used; /* slots below it were ever used */

/* Under the mutex -------------------------------------------------------------------------------------------------- */

static pool *pool_of(void *handle)
{
    pool *found = &pools[(uintptr_t)handle & (MAX_POOLS - 1)];
    return handle && found->handle == (uintptr_t)handle ? found : NULL;
}

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static void give_back(pool *owner, block *given)
{
    kv_range range;
    if (!kv_ranges_remove(given->start, KV_RANGE_CLOSED, &range))
        kv_ranges_remove(given->start, KV_RANGE_POOLED, &range); /* the end of its context */
    munmap((void *)given->start, given->bytes);
    owner->reserved -= given->bytes;
    free(given);
}

/* Gives idle blocks back while at least `keep` bytes stay reserved. */
static void trim(pool *owner, uint64_t keep)
{
    for (block **link = &owner->blocks; *link;) {
        block *each = *link;
        if (each->state == IDLE && owner->reserved - each->bytes >= keep) {
            *link = each->next;
            give_back(owner, each);
        } else
            link = &each->next;
    }
}

/* Sees which frees are over. */
static void settle(pool *owner)
{
    for (block *each = owner->blocks; each; each = each->next)
        if (each->state == FREED && kv_ticket_done(each->ticket)) {
            each->state = IDLE;
            owner->used -= each->bytes;
        }
    if (!owner->handle)
        trim(owner, 0);
}

/* A block that may be handed out to the stream, `exact`ly of that size or the smallest that is large enough; with
 * `foreign` also one whose free is queued on another stream. */
static block *find_block(pool *owner, size_t bytes, const kv_stream *stream, int exact, int foreign)
{
    block *best = NULL;
    for (block *each = owner->blocks; each; each = each->next)
        if ((each->state == IDLE || (each->state == FREED && (foreign || each->stream == stream))) &&
            (exact ? each->bytes == bytes : each->bytes >= bytes) && (!best || each->bytes < best->bytes))
            best = each;
    return best;
}

static block *new_block(pool *owner, size_t bytes)
{
    block *made = malloc(sizeof *made);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!made || memory == MAP_FAILED) {
        free(made);
        if (memory != MAP_FAILED)
            munmap(memory, bytes);
        return NULL;
    }
    *made = (block){.next = owner->blocks, .start = (uintptr_t)memory, .bytes = bytes, .state = IDLE};
    owner->blocks = made;
    owner->reserved += bytes;
    owner->reserved_high = larger(owner->reserved_high, owner->reserved);
    return made;
}

static block *take_block(pool *owner, size_t bytes, const kv_stream *stream)
{
    block *taken;
    settle(owner);
    if (bytes > owner->max_bytes)
        return NULL;
    if ((taken = find_block(owner, bytes, stream, 1, 0)))
        return taken;
    if (owner->reserved > owner->max_bytes - bytes) /* the limit: one block of several that are idle */
        for (block *idle; owner->reserved > owner->max_bytes - bytes && (idle = find_block(owner, 0, NULL, 0, 0));) {
            for (block **link = &owner->blocks; *link; link = &(*link)->next)
                if (*link == idle) {
                    *link = idle->next;
                    break;
                }
            give_back(owner, idle);
        }
    if (owner->reserved <= owner->max_bytes - bytes && (taken = new_block(owner, bytes)))
        return taken;
    if ((taken = find_block(owner, bytes, stream, 0, 0)))
        return taken;
    return find_block(owner, bytes, stream, 0, 1);
}

static block *block_at(uintptr_t start, pool **owner)
{
    for (size_t i = 0; i < num_pools_used; i++)
        for (block *each = pools[i].blocks; each; each = each->next)
            if (each->start == start) {
                *owner = &pools[i];
                return each;
            }
    return NULL;
}

/* The rows --------------------------------------------------------------------------------------------------------- */

kv_result kv_host_mem_pool_create(void **handle, const kv_mem_pool_props *props)
{
    KV_HOST_BEGIN(mem_pool_create);
    if (!handle || !props || props->allocation_type != KV_MEM_ALLOCATION_TYPE_PINNED || props->handle_types ||
        props->location.type != KV_MEM_LOCATION_TYPE_DEVICE)
        return KV_CUDA_INVALID_VALUE;
    int ordinal = props->location.id;
    if (!kv_host_is_device(ordinal))
        return KV_CUDA_INVALID_DEVICE;
    if (!atomic_load(&kv_host_devices[ordinal].context)) /* which takes its pools along */
        return KV_CUDA_INVALID_CONTEXT;
    pool *made = NULL;
    pthread_mutex_lock(&pools_mutex);
    for (size_t i = 0; i < MAX_POOLS && !made; i++)
        if (!pools[i].handle && !pools[i].blocks)
            made = &pools[i];
    if (made) {
        uint64_t generation = made->generation + 1;
        *made = (pool){.generation = generation, .ordinal = ordinal};
        made->max_bytes = props->max_bytes ? props->max_bytes : kv_host_physical_bytes();
        made->handle = POOL_TAG | (generation & 0xffffffff) << 8 | (uint64_t)(made - pools);
        *handle = (void *)(uintptr_t)made->handle;
        if ((size_t)(made - pools) >= num_pools_used)
            num_pools_used = (size_t)(made - pools) + 1;
    }
    pthread_mutex_unlock(&pools_mutex);
    return made ? KV_CUDA_SUCCESS : KV_CUDA_OUT_OF_MEMORY;
}

kv_result kv_host_mem_pool_destroy(void *handle)
{
    KV_HOST_BEGIN(mem_pool_destroy);
    pthread_mutex_lock(&pools_mutex);
    pool *owner = pool_of(handle);
    if (owner) {
        owner->handle = 0;
        settle(owner);
    }
    pthread_mutex_unlock(&pools_mutex);
    return owner ? KV_CUDA_SUCCESS : KV_CUDA_INVALID_VALUE;
}

static uint64_t *attribute_of(pool *owner, int attribute)
{
    switch (attribute) {
    case KV_MEMPOOL_RELEASE_THRESHOLD:
        return &owner->threshold;
    case KV_MEMPOOL_RESERVED_CURRENT:
        return &owner->reserved;
    case KV_MEMPOOL_RESERVED_HIGH:
        return &owner->reserved_high;
    case KV_MEMPOOL_USED_CURRENT:
        return &owner->used;
    case KV_MEMPOOL_USED_HIGH:
        return &owner->used_high;
    default:
        return NULL;
    }
}

kv_result kv_host_mem_pool_get_attribute(void *handle, int attribute, void *value)
{
    KV_HOST_BEGIN(mem_pool_get_attribute);
    kv_result code = KV_CUDA_INVALID_VALUE;
    pthread_mutex_lock(&pools_mutex);
    pool *owner = pool_of(handle);
    if (owner && value && attribute_of(owner, attribute)) {
        settle(owner);
        *(uint64_t *)value = *attribute_of(owner, attribute);
        code = KV_CUDA_SUCCESS;
    }
    pthread_mutex_unlock(&pools_mutex);
    return code;
}

/* The threshold takes any value, a high-water mark 0 alone, which lowers it to what there is now. */
kv_result kv_host_mem_pool_set_attribute(void *handle, int attribute, void *value)
{
    KV_HOST_BEGIN(mem_pool_set_attribute);
    kv_result code = KV_CUDA_INVALID_VALUE;
    pthread_mutex_lock(&pools_mutex);
    pool *owner = pool_of(handle);
    int is_mark = attribute == KV_MEMPOOL_RESERVED_HIGH || attribute == KV_MEMPOOL_USED_HIGH;
    if (owner && value && attribute == KV_MEMPOOL_RELEASE_THRESHOLD) {
        owner->threshold = *(uint64_t *)value;
        code = KV_CUDA_SUCCESS;
    } else if (owner && value && is_mark && !*(uint64_t *)value) {
        settle(owner);
        *attribute_of(owner, attribute) = *attribute_of(owner, attribute - 1);
        code = KV_CUDA_SUCCESS;
    }
    pthread_mutex_unlock(&pools_mutex);
    return code;
}

kv_result kv_host_mem_pool_trim_to(void *handle, size_t keep_bytes)
{
    KV_HOST_BEGIN(mem_pool_trim_to);
    pthread_mutex_lock(&pools_mutex);
    pool *owner = pool_of(handle);
    if (owner) {
        settle(owner);
        trim(owner, keep_bytes);
    }
    pthread_mutex_unlock(&pools_mutex);
    return owner ? KV_CUDA_SUCCESS : KV_CUDA_INVALID_VALUE;
}

/* Graphs that own memory are not imitated: a capturing stream is refused. */
static kv_result find_free_stream(void *handle, kv_stream **stream)
{
    kv_result code = kv_host_find_own_stream(handle, stream);
    if (!code && kv_host_capture_status(*stream) != KV_CAPTURE_STATUS_NONE)
        code = KV_CUDA_STREAM_CAPTURE_UNSUPPORTED;
    return code;
}

kv_result kv_host_mem_alloc_from_pool_async(kv_devptr *address, size_t bytes, void *handle, void *stream_handle)
{
    KV_HOST_BEGIN(mem_alloc_from_pool_async);
    kv_stream *stream;
    kv_result code = find_free_stream(stream_handle, &stream);
    if (code)
        return code;
    if (!address || !bytes)
        return KV_CUDA_INVALID_VALUE;
    if (bytes > kv_host_physical_bytes())
        return KV_CUDA_OUT_OF_MEMORY;
    kv_range closed;
    kv_op *op = kv_op_new(KV_OP_WAIT, 0);
    block_state before = IDLE;
    block *taken = NULL;
    pthread_mutex_lock(&pools_mutex);
    pool *owner = pool_of(handle);
    if (!owner || owner->ordinal != stream->ordinal)
        code = KV_CUDA_INVALID_VALUE;
    else if (!op || !(taken = take_block(owner, (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES, stream)))
        code = KV_CUDA_OUT_OF_MEMORY;
    if (taken) {
        before = taken->state;
        op->ticket = before == FREED && taken->stream != stream ? taken->ticket : 0;
        owner->used += before == IDLE ? taken->bytes : 0;
        owner->used_high = larger(owner->used_high, owner->used);
        taken->state = IN_USE;
        taken->asked_bytes = bytes;
        kv_ranges_remove(taken->start, KV_RANGE_CLOSED, &closed);
        code = kv_ranges_add((kv_range){taken->start, bytes, KV_RANGE_POOLED, owner->ordinal, 0});
    }
    pthread_mutex_unlock(&pools_mutex);
    if (code || !op->ticket)
        free(op);
    else
        code = kv_host_submit(stream, op, 0, NULL);
    if (!code) {
        *address = taken->start;
        return KV_CUDA_SUCCESS;
    }
    if (taken) { /* as if nothing had happened */
        pthread_mutex_lock(&pools_mutex);
        kv_ranges_recast(taken->start, bytes, KV_RANGE_POOLED, KV_RANGE_CLOSED);
        owner->used -= before == IDLE ? taken->bytes : 0;
        taken->state = before;
        pthread_mutex_unlock(&pools_mutex);
    }
    return code;
}

kv_result kv_host_mem_free_async(kv_devptr address, void *stream_handle)
{
    KV_HOST_BEGIN(mem_free_async);
    kv_stream *stream;
    kv_result code = find_free_stream(stream_handle, &stream);
    if (code)
        return code;
    pool *owner = NULL;
    pthread_mutex_lock(&pools_mutex);
    block *freed = block_at((uintptr_t)address, &owner);
    if (!freed || freed->state != IN_USE ||
        kv_ranges_recast(freed->start, freed->asked_bytes, KV_RANGE_POOLED, KV_RANGE_CLOSED))
        freed = NULL; /* not ours, or freed before */
    pthread_mutex_unlock(&pools_mutex);
    if (!freed)
        return KV_CUDA_INVALID_VALUE;
    uint64_t ticket;
    code = kv_host_submit(stream, kv_op_new(KV_OP_MARK, 0), 0, &ticket);
    pthread_mutex_lock(&pools_mutex);
    if (code) {
        kv_ranges_recast(freed->start, freed->asked_bytes, KV_RANGE_CLOSED, KV_RANGE_POOLED);
        pthread_mutex_unlock(&pools_mutex);
        return code;
    }
    freed->stream = stream;
    freed->ticket = ticket;
    freed->state = FREED;
    if (!owner->handle)
        settle(owner);
    pthread_mutex_unlock(&pools_mutex);
    return KV_CUDA_SUCCESS;
}

/* For the other parts ---------------------------------------------------------------------------------------------- */

void kv_host_pools_settle(int ordinal)
{
    if (!num_pools_used)
        return;
    pthread_mutex_lock(&pools_mutex);
    for (size_t i = 0; i < num_pools_used; i++)
        if (pools[i].ordinal == ordinal) {
            settle(&pools[i]);
            if (pools[i].reserved > pools[i].threshold)
                trim(&pools[i], pools[i].threshold);
        }
    pthread_mutex_unlock(&pools_mutex);
}

size_t kv_host_pools_reap(int ordinal)
{
    size_t num_alive = 0;
    pthread_mutex_lock(&pools_mutex);
    for (size_t i = 0; i < num_pools_used; i++) {
        pool *owner = &pools[i];
        if (owner->ordinal != ordinal)
            continue;
        num_alive += owner->handle != 0;
        owner->handle = 0;
        for (block *each; (each = owner->blocks);) {
            num_alive += each->state == IN_USE;
            owner->blocks = each->next;
            give_back(owner, each);
        }
    }
    pthread_mutex_unlock(&pools_mutex);
    return num_alive;
}

size_t kv_host_pools_live(void)
{
    size_t count = 0;
    pthread_mutex_lock(&pools_mutex);
    for (size_t i = 0; i < num_pools_used; i++)
        count += pools[i].handle != 0;
    pthread_mutex_unlock(&pools_mutex);
    return count;
}
