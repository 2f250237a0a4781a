/* Virtual memory: reserved address space, and physical allocations that are mapped into it.
 *
 * Address space is a mapping without access; an allocation gets its pages when access to it is set, where it is mapped.
 * Imitated is what KVortex does: whole allocations, mapped once at a time, read and written by their own device. */

#include "host_memory.h"
#include "host_rows.h"

#include <stdlib.h>
#include <sys/mman.h>

enum { GRANULARITY = 2 << 20, PAGE_BYTES = 4096 };
static const uint64_t PHYSICAL_TAG = 0x4dull << 48; /* 'M'; a handle is tag | number */

typedef struct space {
    struct space *next;
    uintptr_t start;
    size_t bytes, num_mapped;
    int ordinal;
} space;

typedef struct physical {
    struct physical *next;
    uint64_t handle;
    size_t bytes;
    int ordinal, is_released, is_accessible;
    space *home; /* where it is mapped, and at which address */
    uintptr_t start;
} physical;

static pthread_mutex_t spaces_mutex = PTHREAD_MUTEX_INITIALIZER; /* guards all of it */
static space *spaces;
static physical *allocations;
static uint64_t num_created;
static size_t created_bytes;

static int is_aligned(uint64_t value)
{
    return value % GRANULARITY == 0;
}

static void *map_fixed(uintptr_t start, size_t bytes, int protection)
{
    return mmap((void *)start, bytes, protection, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

/* Under the mutex -------------------------------------------------------------------------------------------------- */

static space *space_around(uintptr_t start, size_t bytes)
{
    for (space *each = spaces; each; each = each->next)
        if (start >= each->start && bytes <= each->bytes && start - each->start <= each->bytes - bytes)
            return each;
    return NULL;
}

static int is_inside(const physical *mapped, uintptr_t start, size_t bytes)
{
    return mapped->home && mapped->start >= start && mapped->start - start < bytes &&
           mapped->bytes <= bytes - (mapped->start - start);
}

/* Is the range made of whole mappings, without a gap? */
static int is_mapped(uintptr_t start, size_t bytes)
{
    size_t covered = 0;
    for (physical *each = allocations; each; each = each->next)
        covered += is_inside(each, start, bytes) ? each->bytes : 0;
    return bytes && covered == bytes;
}

static void unlink_if_over(physical *over)
{
    if (!over->is_released || over->home)
        return;
    for (physical **link = &allocations; *link; link = &(*link)->next)
        if (*link == over) {
            *link = over->next;
            break;
        }
    created_bytes -= over->bytes;
    free(over);
}

/* The rows --------------------------------------------------------------------------------------------------------- */

static kv_result check_props(const kv_mem_allocation_props *props)
{
    if (!props || props->type != KV_MEM_ALLOCATION_TYPE_PINNED || props->handle_types ||
        props->location.type != KV_MEM_LOCATION_TYPE_DEVICE)
        return KV_CUDA_INVALID_VALUE;
    return kv_host_is_device(props->location.id) ? KV_CUDA_SUCCESS : KV_CUDA_INVALID_DEVICE;
}

kv_result kv_host_mem_get_allocation_granularity(size_t *bytes, const kv_mem_allocation_props *props, int option)
{
    KV_HOST_BEGIN(mem_get_allocation_granularity);
    if (!bytes || (option != KV_MEM_GRANULARITY_MINIMUM && option != KV_MEM_GRANULARITY_RECOMMENDED))
        return KV_CUDA_INVALID_VALUE;
    kv_result code = check_props(props);
    if (!code)
        *bytes = GRANULARITY;
    return code;
}

kv_result kv_host_mem_address_reserve(kv_devptr *address, size_t bytes, size_t alignment, kv_devptr hint,
                                      unsigned long long flags)
{
    KV_HOST_BEGIN(mem_address_reserve);
    (void)hint; /* as CUDA may, too */
    kv_host_device *dev = kv_host_current_device();
    if (!dev)
        return KV_CUDA_INVALID_CONTEXT;
    if (alignment < GRANULARITY)
        alignment = alignment & (alignment - 1) ? alignment : GRANULARITY;
    if (!address || !bytes || bytes % PAGE_BYTES || alignment & (alignment - 1) || flags)
        return KV_CUDA_INVALID_VALUE;
    space *made = malloc(sizeof *made);
    void *memory = bytes > SIZE_MAX - alignment ? MAP_FAILED
                                                : mmap(NULL, bytes + alignment, PROT_NONE,
                                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!made || memory == MAP_FAILED) {
        free(made);
        if (memory != MAP_FAILED)
            munmap(memory, bytes + alignment);
        return KV_CUDA_OUT_OF_MEMORY;
    }
    uintptr_t start = ((uintptr_t)memory + alignment - 1) / alignment * alignment, end = start + bytes;
    if (start > (uintptr_t)memory)
        munmap(memory, start - (uintptr_t)memory);
    munmap((void *)end, (uintptr_t)memory + bytes + alignment - end);
    *made = (space){.start = start, .bytes = bytes, .ordinal = (int)(dev - kv_host_devices)};
    kv_result code = kv_ranges_add((kv_range){start, bytes, KV_RANGE_CLOSED, made->ordinal, start});
    if (code) {
        munmap((void *)start, bytes);
        free(made);
        return code;
    }
    pthread_mutex_lock(&spaces_mutex);
    made->next = spaces;
    spaces = made;
    pthread_mutex_unlock(&spaces_mutex);
    *address = start;
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_mem_address_free(kv_devptr address, size_t bytes)
{
    KV_HOST_BEGIN(mem_address_free);
    space *freed = NULL;
    pthread_mutex_lock(&spaces_mutex);
    for (space **link = &spaces; *link; link = &(*link)->next)
        if ((*link)->start == address && (*link)->bytes == bytes && !(*link)->num_mapped) {
            freed = *link;
            *link = freed->next;
            break;
        }
    pthread_mutex_unlock(&spaces_mutex);
    if (!freed)
        return KV_CUDA_INVALID_VALUE;
    kv_range closed;
    kv_ranges_remove(freed->start, KV_RANGE_CLOSED, &closed);
    munmap((void *)freed->start, freed->bytes);
    free(freed);
    return KV_CUDA_SUCCESS;
}

kv_result kv_host_mem_create(unsigned long long *handle, size_t bytes, const kv_mem_allocation_props *props,
                             unsigned long long flags)
{
    KV_HOST_BEGIN(mem_create);
    kv_result code = check_props(props);
    if (code)
        return code;
    if (!handle || !bytes || !is_aligned(bytes) || flags)
        return KV_CUDA_INVALID_VALUE;
    size_t physical_bytes = kv_host_physical_bytes();
    physical *made = malloc(sizeof *made);
    pthread_mutex_lock(&spaces_mutex);
    if (!made || created_bytes > physical_bytes || bytes > physical_bytes - created_bytes)
        code = KV_CUDA_OUT_OF_MEMORY;
    else {
        *made = (physical){.next = allocations, .handle = PHYSICAL_TAG | ++num_created, .bytes = bytes};
        made->ordinal = props->location.id;
        allocations = made;
        created_bytes += bytes;
        *handle = made->handle;
    }
    pthread_mutex_unlock(&spaces_mutex);
    if (code)
        free(made);
    return code;
}

kv_result kv_host_mem_release(unsigned long long handle)
{
    KV_HOST_BEGIN(mem_release);
    kv_result code = KV_CUDA_INVALID_VALUE;
    pthread_mutex_lock(&spaces_mutex);
    for (physical *each = allocations; each; each = each->next)
        if (each->handle == handle && !each->is_released) {
            each->is_released = 1;
            unlink_if_over(each);
            code = KV_CUDA_SUCCESS;
            break;
        }
    pthread_mutex_unlock(&spaces_mutex);
    return code;
}

kv_result kv_host_mem_map(kv_devptr address, size_t bytes, size_t offset, unsigned long long handle,
                          unsigned long long flags)
{
    KV_HOST_BEGIN(mem_map);
    if (!is_aligned(address) || !is_aligned(bytes) || offset || flags)
        return KV_CUDA_INVALID_VALUE;
    pthread_mutex_lock(&spaces_mutex);
    physical *mapped = NULL;
    space *home = space_around((uintptr_t)address, bytes);
    for (physical *each = allocations; each && home; each = each->next) {
        if (each->handle == handle && !each->is_released && !each->home && each->bytes == bytes)
            mapped = each;
        if (each->home == home && each->start < address + bytes && address < each->start + each->bytes)
            home = NULL; /* something is there */
    }
    if (mapped && home) {
        mapped->home = home;
        mapped->start = (uintptr_t)address;
        home->num_mapped++;
    }
    pthread_mutex_unlock(&spaces_mutex);
    return mapped && home ? KV_CUDA_SUCCESS : KV_CUDA_INVALID_VALUE;
}

kv_result kv_host_mem_set_access(kv_devptr address, size_t bytes, const kv_mem_access *access, size_t count)
{
    KV_HOST_BEGIN(mem_set_access);
    if (!access || count != 1 || access->location.type != KV_MEM_LOCATION_TYPE_DEVICE)
        return KV_CUDA_INVALID_VALUE;
    if (access->flags != KV_MEM_ACCESS_READWRITE)
        return KV_CUDA_NOT_SUPPORTED;
    kv_result code = KV_CUDA_SUCCESS;
    pthread_mutex_lock(&spaces_mutex);
    if (!is_mapped((uintptr_t)address, bytes))
        code = KV_CUDA_INVALID_VALUE;
    for (physical *each = allocations; each && !code; each = each->next) {
        if (!is_inside(each, (uintptr_t)address, bytes) || each->is_accessible)
            continue;
        if (each->ordinal != access->location.id)
            code = KV_CUDA_NOT_SUPPORTED;
        else if (map_fixed(each->start, each->bytes, PROT_READ | PROT_WRITE) == MAP_FAILED)
            code = KV_CUDA_OUT_OF_MEMORY;
        else if (!(code = kv_ranges_recast(each->start, each->bytes, KV_RANGE_CLOSED, KV_RANGE_MAPPED)))
            each->is_accessible = 1;
    }
    pthread_mutex_unlock(&spaces_mutex);
    return code;
}

kv_result kv_host_mem_unmap(kv_devptr address, size_t bytes)
{
    KV_HOST_BEGIN(mem_unmap);
    kv_result code = KV_CUDA_SUCCESS;
    pthread_mutex_lock(&spaces_mutex);
    space *home = space_around((uintptr_t)address, bytes);
    int ordinal = home ? home->ordinal : -1;
    pthread_mutex_unlock(&spaces_mutex);
    if (!home)
        return KV_CUDA_INVALID_VALUE;
    kv_host_wait_for_device(ordinal);
    pthread_mutex_lock(&spaces_mutex);
    if (!is_mapped((uintptr_t)address, bytes))
        code = KV_CUDA_INVALID_VALUE;
    for (physical *next, *each = allocations; each && !code; each = next) {
        next = each->next;
        if (!is_inside(each, (uintptr_t)address, bytes))
            continue;
        if (each->is_accessible && (code = kv_ranges_recast(each->start, each->bytes, KV_RANGE_MAPPED, KV_RANGE_CLOSED)))
            break;
        map_fixed(each->start, each->bytes, PROT_NONE);
        each->home->num_mapped--;
        each->home = NULL;
        each->is_accessible = 0;
        unlink_if_over(each);
    }
    pthread_mutex_unlock(&spaces_mutex);
    return code;
}

/* For the other parts ---------------------------------------------------------------------------------------------- */

size_t kv_host_spaces_reap(int ordinal)
{
    size_t num_alive = 0;
    pthread_mutex_lock(&spaces_mutex);
    for (physical *next, *each = allocations; each; each = next) {
        next = each->next;
        if (each->home ? each->home->ordinal != ordinal : each->ordinal != ordinal)
            continue;
        num_alive++;
        if (each->is_accessible)
            kv_ranges_recast(each->start, each->bytes, KV_RANGE_MAPPED, KV_RANGE_CLOSED);
        each->home = NULL;
        each->is_released = 1;
        unlink_if_over(each);
    }
    for (space **link = &spaces; *link;) {
        space *each = *link;
        kv_range closed;
        if (each->ordinal != ordinal) {
            link = &each->next;
            continue;
        }
        num_alive++;
        *link = each->next;
        kv_ranges_remove(each->start, KV_RANGE_CLOSED, &closed);
        munmap((void *)each->start, each->bytes);
        free(each);
    }
    pthread_mutex_unlock(&spaces_mutex);
    return num_alive;
}

size_t kv_host_spaces_live(void)
{
    size_t count = 0;
    pthread_mutex_lock(&spaces_mutex);
    for (space *each = spaces; each; each = each->next)
        count++;
    pthread_mutex_unlock(&spaces_mutex);
    return count;
}

size_t kv_host_physical_live(void)
{
    size_t count = 0;
    pthread_mutex_lock(&spaces_mutex);
    for (physical *each = allocations; each; each = each->next)
        count++;
    pthread_mutex_unlock(&spaces_mutex);
    return count;
}
