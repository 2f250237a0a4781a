"""The C core as Cython sees it: one `cdef extern` section per header of include/kvortex, nothing else."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "kvortex/driver.h" nogil:
    ctypedef unsigned long long kv_devptr
    const int KV_DRIVER_MIN_VERSION, KV_DRIVER_NUM_ROWS
    const int KV_CUDA_SUCCESS, KV_CUDA_INVALID_VALUE, KV_CUDA_OUT_OF_MEMORY, KV_CUDA_NOT_INITIALIZED
    const int KV_CUDA_DEINITIALIZED, KV_CUDA_NO_DEVICE, KV_CUDA_INVALID_DEVICE, KV_CUDA_INVALID_CONTEXT
    const int KV_CUDA_INVALID_HANDLE, KV_CUDA_NOT_READY, KV_CUDA_ILLEGAL_ADDRESS, KV_CUDA_NOT_SUPPORTED
    const int KV_CUDA_STREAM_CAPTURE_UNSUPPORTED, KV_CUDA_STREAM_CAPTURE_IMPLICIT
    const int KV_STREAM_NON_BLOCKING, KV_EVENT_DISABLE_TIMING, KV_HOST_ALLOC_PORTABLE, KV_HOST_REGISTER_PORTABLE
    const int KV_MEMORY_TYPE_HOST, KV_MEMORY_TYPE_DEVICE
    const int KV_CAPTURE_MODE_RELAXED, KV_CAPTURE_STATUS_NONE
    const int KV_SRC_ACCESS_ORDER_STREAM
    const int KV_POINTER_MEMORY_TYPE, KV_POINTER_DEVICE_ORDINAL, KV_POINTER_RANGE_START_ADDR, KV_POINTER_RANGE_SIZE
    const int KV_DEVICE_ATTRIBUTE_MAX_PITCH, KV_DEVICE_ATTRIBUTE_HOST_NUMA_ID
    const int KV_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, KV_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    const int KV_MEM_ALLOCATION_TYPE_PINNED, KV_MEM_LOCATION_TYPE_DEVICE, KV_MEM_ACCESS_READWRITE
    const int KV_MEM_GRANULARITY_MINIMUM
    const int KV_MEMPOOL_RELEASE_THRESHOLD, KV_MEMPOOL_RESERVED_CURRENT, KV_MEMPOOL_RESERVED_HIGH

    ctypedef struct kv_memcpy_2d:
        size_t source_x_bytes, source_y
        unsigned int source_memory_type
        const void *source_host
        kv_devptr source_device
        void *source_array
        size_t source_pitch
        size_t target_x_bytes, target_y
        unsigned int target_memory_type
        void *target_host
        kv_devptr target_device
        void *target_array
        size_t target_pitch
        size_t width_bytes, height

    ctypedef struct kv_mem_location:
        int type, id

    ctypedef struct kv_memcpy_attributes:
        int source_access_order
        kv_mem_location source_hint, target_hint
        unsigned int flags

    ctypedef struct kv_mem_pool_props:
        int allocation_type, handle_types
        kv_mem_location location
        void *security_attributes
        size_t max_bytes
        unsigned short usage

    ctypedef struct kv_mem_allocation_props:
        int type, handle_types
        kv_mem_location location
        void *security_attributes

    ctypedef struct kv_mem_access:
        kv_mem_location location
        int flags

    ctypedef struct kv_driver_row:
        const char *field
        const char *symbol
        int version
        size_t offset
        const char *parameters

    const kv_driver_row *kv_driver_rows

    ctypedef struct kv_driver:
        int (*init)(unsigned int flags) noexcept nogil
        int (*driver_get_version)(int *version) noexcept nogil
        int (*get_error_name)(int error, const char **name) noexcept nogil
        int (*get_error_string)(int error, const char **text) noexcept nogil
        int (*device_get_count)(int *count) noexcept nogil
        int (*device_get)(int *device, int ordinal) noexcept nogil
        int (*device_get_name)(char *name, int name_bytes, int device) noexcept nogil
        int (*device_get_attribute)(int *value, int attribute, int device) noexcept nogil
        int (*device_primary_ctx_retain)(void **context, int device) noexcept nogil
        int (*device_primary_ctx_release)(int device) noexcept nogil
        int (*ctx_push_current)(void *context) noexcept nogil
        int (*ctx_pop_current)(void **context) noexcept nogil
        int (*ctx_get_current)(void **context) noexcept nogil
        int (*ctx_set_current)(void *context) noexcept nogil
        int (*ctx_get_device)(int *device) noexcept nogil
        int (*ctx_synchronize)() noexcept nogil
        int (*thread_exchange_stream_capture_mode)(int *mode) noexcept nogil
        int (*stream_create)(void **stream, unsigned int flags) noexcept nogil
        int (*stream_create_with_priority)(void **stream, unsigned int flags, int priority) noexcept nogil
        int (*stream_destroy)(void *stream) noexcept nogil
        int (*stream_query)(void *stream) noexcept nogil
        int (*stream_synchronize)(void *stream) noexcept nogil
        int (*stream_wait_event)(void *stream, void *event, unsigned int flags) noexcept nogil
        int (*stream_is_capturing)(void *stream, int *status) noexcept nogil
        int (*stream_get_ctx)(void *stream, void **context) noexcept nogil
        int (*event_create)(void **event, unsigned int flags) noexcept nogil
        int (*event_destroy)(void *event) noexcept nogil
        int (*event_record)(void *event, void *stream) noexcept nogil
        int (*event_query)(void *event) noexcept nogil
        int (*event_synchronize)(void *event) noexcept nogil
        int (*mem_get_info)(size_t *free_bytes, size_t *total_bytes) noexcept nogil
        int (*mem_alloc)(kv_devptr *address, size_t bytes) noexcept nogil
        int (*mem_free)(kv_devptr address) noexcept nogil
        int (*mem_pool_create)(void **pool, const kv_mem_pool_props *props) noexcept nogil
        int (*mem_pool_destroy)(void *pool) noexcept nogil
        int (*mem_pool_set_attribute)(void *pool, int attribute, void *value) noexcept nogil
        int (*mem_pool_get_attribute)(void *pool, int attribute, void *value) noexcept nogil
        int (*mem_pool_trim_to)(void *pool, size_t keep_bytes) noexcept nogil
        int (*mem_alloc_from_pool_async)(kv_devptr *address, size_t nbytes, void *pool, void *stream) noexcept nogil
        int (*mem_free_async)(kv_devptr address, void *stream) noexcept nogil
        int (*mem_get_allocation_granularity)(size_t *nbytes, const kv_mem_allocation_props *props,
                                              int option) noexcept nogil
        int (*mem_address_reserve)(kv_devptr *address, size_t nbytes, size_t alignment, kv_devptr hint,
                                   unsigned long long flags) noexcept nogil
        int (*mem_address_free)(kv_devptr address, size_t nbytes) noexcept nogil
        int (*mem_create)(unsigned long long *handle, size_t nbytes, const kv_mem_allocation_props *props,
                          unsigned long long flags) noexcept nogil
        int (*mem_release)(unsigned long long handle) noexcept nogil
        int (*mem_map)(kv_devptr address, size_t nbytes, size_t offset, unsigned long long handle,
                       unsigned long long flags) noexcept nogil
        int (*mem_set_access)(kv_devptr address, size_t nbytes, const kv_mem_access *access,
                              size_t count) noexcept nogil
        int (*mem_unmap)(kv_devptr address, size_t nbytes) noexcept nogil
        int (*mem_host_alloc)(void **address, size_t bytes, unsigned int flags) noexcept nogil
        int (*mem_free_host)(void *address) noexcept nogil
        int (*mem_host_register)(void *address, size_t bytes, unsigned int flags) noexcept nogil
        int (*mem_host_unregister)(void *address) noexcept nogil
        int (*pointer_get_attribute)(void *value, int attribute, kv_devptr address) noexcept nogil
        int (*memcpy_dtoh_async)(void *target, kv_devptr source, size_t bytes, void *stream) noexcept nogil
        int (*memcpy_htod_async)(kv_devptr target, const void *source, size_t bytes, void *stream) noexcept nogil
        int (*memcpy_dtod_async)(kv_devptr target, kv_devptr source, size_t bytes, void *stream) noexcept nogil
        int (*memcpy_2d_async)(const kv_memcpy_2d *copy, void *stream) noexcept nogil
        int (*memcpy_batch_async)(kv_devptr *targets, kv_devptr *sources, size_t *sizes, size_t count,
                                  kv_memcpy_attributes *attributes, size_t *attribute_indices, size_t num_attributes,
                                  size_t *fail_index, void *stream) noexcept nogil
        int (*module_load_data)(void **module, const void *image) noexcept nogil
        int (*module_unload)(void *module) noexcept nogil
        int (*module_get_function)(void **function, void *module, const char *name) noexcept nogil
        int (*launch_kernel)(void *function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                             unsigned int block_x, unsigned int block_y, unsigned int block_z,
                             unsigned int shared_bytes, void *stream, void **parameters,
                             void **extra) noexcept nogil
        int (*memset_d8_async)(kv_devptr target, unsigned char value, size_t bytes, void *stream) noexcept nogil

    int kv_result_is_sticky(int code)
    int kv_result_at(int code, int row)
    int kv_result_code(int code)
    int kv_result_row(int code)
    const char *kv_result_call(int code)

    # Macros: the name of a row is one of these, and the compiler checks the arguments against the row's.
    int kv_call(const kv_driver *drv, int row, ...)
    int kv_answer(int code, int row)
    enum:
        init, driver_get_version, get_error_name, get_error_string, device_get_count, device_get, device_get_name,
        device_get_attribute, device_primary_ctx_retain, device_primary_ctx_release, ctx_push_current,
        ctx_pop_current, ctx_get_current, ctx_set_current, ctx_get_device, ctx_synchronize,
        thread_exchange_stream_capture_mode, stream_create, stream_create_with_priority, stream_destroy,
        stream_query, stream_synchronize, stream_wait_event, stream_is_capturing, stream_get_ctx, event_create,
        event_destroy, event_record, event_query, event_synchronize, mem_get_info, mem_alloc, mem_free,
        mem_pool_create, mem_pool_destroy, mem_pool_set_attribute, mem_pool_get_attribute, mem_pool_trim_to,
        mem_alloc_from_pool_async, mem_free_async, mem_get_allocation_granularity, mem_address_reserve,
        mem_address_free, mem_create, mem_release, mem_map, mem_set_access, mem_unmap, mem_host_alloc, mem_free_host,
        mem_host_register, mem_host_unregister, pointer_get_attribute, memcpy_dtoh_async, memcpy_htod_async,
        memcpy_dtod_async, memcpy_2d_async, memcpy_batch_async, module_load_data, module_unload, module_get_function,
        launch_kernel, memset_d8_async


# kvortex/table.h, entry.h, list.h, lru.h (index) --------------------------------------------------------------------
cdef extern from "kvortex/status.h" nogil:
    const uint32_t KV_NO_SLOT
    const uint8_t KV_RESERVE_NEW, KV_RESERVE_PRESENT, KV_RESERVE_PENDING, KV_RESERVE_FULL
    const uint8_t KV_COMMIT_READY, KV_COMMIT_DISCARDED
    void KV_ASSERT(bint condition)

cdef extern from "kvortex/entry.h" nogil:
    enum:
        KV_KEY_BYTES
    const uint32_t KV_ABSENT, KV_FREE, KV_WRITING, KV_READY
    const uint32_t KV_ADMITTED, KV_CLEAN, KV_OFFERED, KV_RAM_ONLY

    ctypedef struct kv_key:
        pass

    ctypedef struct kv_entry:
        uint32_t length, pins, mark, facts

    kv_key kv_key_load(const uint8_t *bytes)
    kv_key kv_entry_key(const kv_entry *entry)
    uint32_t kv_entry_state(const kv_entry *entry)
    bint kv_entry_is_discarded(const kv_entry *entry)
    uint32_t kv_entry_generation(const kv_entry *entry)
    void kv_entry_prefetch(const kv_entry *entries, uint32_t entry)
    void kv_entry_set_state(kv_entry *entry, uint32_t state)
    void kv_entry_set_discarded(kv_entry *entry)
    void kv_entry_begin(kv_entry *entry, kv_key key, uint32_t length, uint32_t facts)

cdef extern from "kvortex/list.h" nogil:
    void kv_list_init(kv_entry *entries, uint32_t sentinel)
    bint kv_list_is_empty(const kv_entry *entries, uint32_t sentinel)
    uint32_t kv_list_first(const kv_entry *entries, uint32_t sentinel)
    uint32_t kv_list_before(const kv_entry *entries, uint32_t entry)
    void kv_list_prefetch_neighbours(const kv_entry *entries, uint32_t entry)
    void kv_list_unlink(kv_entry *entries, uint32_t entry)
    void kv_list_push_first(kv_entry *entries, uint32_t sentinel, uint32_t entry)
    void kv_list_push_last(kv_entry *entries, uint32_t sentinel, uint32_t entry)

cdef extern from "kvortex/lru.h" nogil:
    ctypedef struct kv_lru:
        uint32_t recent, offered

    void kv_lru_init(kv_lru *lru, kv_entry *entries, uint32_t recent, uint32_t offered)
    uint32_t kv_lru_cold_list(const kv_lru *lru)
    uint32_t kv_lru_coldest(const kv_lru *lru)
    uint32_t kv_lru_coldest_recent(const kv_lru *lru)
    bint kv_lru_is_empty(const kv_lru *lru)
    void kv_lru_unlink(kv_lru *lru, uint32_t slot)
    void kv_lru_push(kv_lru *lru, uint32_t slot)
    void kv_lru_use(kv_lru *lru, uint32_t slot)
    void kv_lru_use_behind(kv_lru *lru, uint32_t hotter, uint32_t slot)
    void kv_lru_push_offered(kv_lru *lru, uint32_t slot)
    void kv_lru_push_coldest_recent(kv_lru *lru, uint32_t slot)
    void kv_lru_push_coldest(kv_lru *lru, uint32_t slot)
    void kv_lru_offer_again(kv_lru *lru)

cdef extern from "kvortex/table.h" nogil:
    ctypedef struct kv_table:
        pass

    size_t kv_table_bytes(uint32_t num_slots)
    void kv_table_init(kv_table *table, void *memory, const kv_entry *entries, uint32_t num_slots, const uint8_t *seed)
    uint64_t kv_table_hash(const kv_table *table, const kv_key *key)
    void kv_table_prefetch_home(const kv_table *table, uint64_t hash)
    void kv_table_prefetch(const kv_table *table, const uint8_t *keys, size_t n, uint64_t *hashes)
    bint kv_table_has_ready(const kv_table *table, const kv_key *key, uint64_t hash)
    uint32_t kv_table_find(const kv_table *table, const kv_key *key, uint64_t hash)
    void kv_table_insert(kv_table *table, uint64_t hash, uint32_t number)
    void kv_table_erase(kv_table *table, uint64_t hash, uint32_t number)
    void kv_table_clear(kv_table *table)
    uint32_t kv_table_probes(const kv_table *table, uint64_t hash, uint32_t number)


# kvortex/sha256.h, sha256_best.h (keys) ----------------------------------------------------------------------------
cdef extern from "kvortex/sha256.h" nogil:
    enum:
        KV_SHA256_BLOCK_BYTES, KV_SHA256_MAX_MESSAGES

    ctypedef void (*kv_sha256_fn)(uint8_t *messages, size_t num_messages, size_t num_blocks) noexcept nogil

    uint32_t kv_little_endian(uint32_t word)
    size_t kv_sha256_blocks(size_t bytes)
    void kv_sha256_pad(uint8_t *message, size_t bytes)
    void kv_sha256_portable(uint8_t *messages, size_t num_messages, size_t num_blocks) noexcept nogil

cdef extern from "kvortex/sha256_best.h" nogil:
    kv_sha256_fn kv_sha256_best()


# kvortex/pack.h, codec.h (codec, transfer) -----------------------------------------------------------------------
cdef extern from "kvortex/pack.h" nogil:
    enum:
        KV_PACK_VERSION, KV_PACK_UNIT_BYTES, KV_PACK_EXACT, KV_PACK_THREADS, KV_PACK_BLOCKS

    ctypedef struct kv_plane:
        uint64_t base, block_stride, offset
        uint32_t num_rows, row_bytes, step_bytes, bits

    ctypedef struct kv_pack:
        uint64_t planes, staging, block_bytes, flags_offset
        uint32_t num_planes, num_blocks, to_staging
        uint32_t block_ids[KV_PACK_BLOCKS]

    uint64_t kv_pack_align(uint64_t nbytes)
    uint64_t kv_plane_packed_bytes(const kv_plane *plane)
    bint kv_packed_is_refused(const char *packed, uint64_t flags_offset, uint32_t num_planes)

cdef extern from "kvortex/codec.h" nogil:
    ctypedef struct kv_codec_set:
        const char *name

    const kv_codec_set *kv_codec_set_at(uint32_t i)
    const kv_codec_set *kv_codec_best()
    void kv_pack_block(const kv_plane *planes, uint32_t num_planes, uint64_t flags_offset, uint64_t block, char *packed)
    void kv_pack_block_by(const kv_codec_set *which, const kv_plane *planes, uint32_t num_planes, uint64_t flags_offset,
                          uint64_t block, char *packed)
    void kv_unpack_block(const kv_plane *planes, uint32_t num_planes, uint64_t block, const char *packed)
    void kv_unpack_block_by(const kv_codec_set *which, const kv_plane *planes, uint32_t num_planes, uint64_t block,
                            const char *packed)


# kvortex/ecsq_format.h, ecsq.h (codec) ---------------------------------------------------------------------------
cdef extern from "kvortex/ecsq_format.h" nogil:
    enum:
        KV_ECSQ_VERSION, KV_ECSQ_LEVELS, KV_ECSQ_CLASSES, KV_ECSQ_SYMBOLS, KV_ECSQ_GROUP, KV_ECSQ_LANES, KV_ECSQ_SEGMENT
        KV_ECSQ_STATES_BYTES, KV_ECSQ_HEAD_BYTES
        KV_ECSQ_EXACT, KV_ECSQ_K, KV_ECSQ_V

    ctypedef struct kv_ecsq_plane:
        uint64_t first_byte
        uint32_t num_rows, row_bytes, step_bytes, num_tokens, num_heads, token_rows, head_rows, role

    ctypedef struct kv_ecsq_tables:
        uint32_t id

    ctypedef struct kv_ecsq_needs:
        uint64_t symbols, vectors, group

    ctypedef struct kv_ecsq:
        const kv_ecsq_plane *planes
        const uint32_t *segments
        const kv_ecsq_tables *tables
        uint64_t block_bytes
        kv_ecsq_needs needs
        uint32_t num_planes, num_segments, level, planes_crc, vector_numbers

    bint kv_ecsq_build_tables(const uint16_t (*frequencies)[256], uint32_t id, kv_ecsq_tables *tables)
    uint64_t kv_ecsq_plane_bytes(const kv_ecsq_plane *plane)
    uint64_t kv_ecsq_side_bytes(const kv_ecsq_plane *plane)
    kv_ecsq_needs kv_ecsq_needs_of(const kv_ecsq *ecsq)
    uint64_t kv_ecsq_scratch_bytes(const kv_ecsq *ecsq)
    uint64_t kv_ecsq_max_segment_bytes(const kv_ecsq *ecsq, uint32_t segment)
    uint64_t kv_ecsq_body_offset(const kv_ecsq *ecsq)
    uint64_t kv_ecsq_max_bytes(const kv_ecsq *ecsq)

cdef extern from "kvortex/ecsq.h" nogil:
    ctypedef struct kv_ecsq_set:
        const char *name

    const kv_ecsq_set *kv_ecsq_set_at(uint32_t i)
    uint64_t kv_ecsq_encode_segment_by(const kv_ecsq_set *which, const kv_ecsq *ecsq, uint32_t segment,
                                       const char *block, char *out, uint64_t room, void *scratch)
    bint kv_ecsq_decode_segment_by(const kv_ecsq_set *which, const kv_ecsq *ecsq, uint32_t segment, const char *bytes,
                                   uint64_t nbytes, char *block)
    void kv_ecsq_put_header(const kv_ecsq *ecsq, uint64_t nbytes, char *out)
    bint kv_ecsq_check(const kv_ecsq *ecsq, const char *record, uint64_t nbytes)
    uint64_t kv_ecsq_encode_by(const kv_ecsq_set *which, const kv_ecsq *ecsq, const char *block, char *out,
                               uint64_t room, void *scratch)
    bint kv_ecsq_decode_by(const kv_ecsq_set *which, const kv_ecsq *ecsq, const char *record, uint64_t nbytes,
                           char *block)
    uint64_t kv_ecsq_encode(const kv_ecsq *ecsq, const char *block, char *out, uint64_t room, void *scratch)
    bint kv_ecsq_decode(const kv_ecsq *ecsq, const char *record, uint64_t nbytes, char *block)


# kvortex/slots.h (memory), copy_plan.h (transfer) ------------------------------------------------------------------
cdef extern from "kvortex/slots.h" nogil:
    ctypedef struct kv_slots:
        char *base
        size_t stride_bytes, header_bytes, payload_bytes
        uint32_t num_slots, first_chunk_slots, chunk_slots

    char *kv_slots_payload(const kv_slots *slots, uint32_t slot)
    uint32_t kv_slots_chunk(const kv_slots *slots, uint32_t slot)
    uint32_t kv_slots_chunk_first(const kv_slots *slots, uint32_t chunk)
    uint32_t kv_slots_chunk_count(const kv_slots *slots, uint32_t chunk)


cdef extern from "kvortex/copy_plan.h" nogil:
    enum:
        KV_BATCH_COPIES

    ctypedef struct kv_group:
        uint64_t base, block_stride
        size_t slot_offset, row_bytes, device_pitch, slot_pitch
        uint32_t rows, strided

    ctypedef struct kv_copy:
        uint64_t device
        char *host
        size_t row_bytes, device_pitch, host_pitch
        uint32_t rows

    ctypedef struct kv_plan:
        const kv_group *groups
        uint32_t strided
        const int64_t *block_ids
        const kv_slots *slots
        const uint32_t *slot_ids
        size_t num_blocks, block

    bint kv_plan_is_begun(const kv_plan *plan)
    bint kv_plan_is_done(const kv_plan *plan)
    kv_plan kv_plan_of_blocks(const kv_group *groups, uint32_t num_groups, uint32_t strided, const int64_t *block_ids,
                              const kv_slots *slots, const uint32_t *slot_ids, size_t num_blocks)
    kv_plan kv_plan_of_addresses(const uint64_t *addresses, const uint32_t *sizes, const kv_slots *slots,
                                 const uint32_t *slot_ids, size_t num_blocks)
    bint kv_group_may_be_strided(const kv_group *group)
    size_t kv_plan_next(kv_plan *plan, kv_copy *copies, size_t capacity)


# kvortex/sync.h ----------------------------------------------------------------------------------------------------
cdef extern from "kvortex/sync.h" nogil:
    const uint64_t KV_NEVER_NS
    ctypedef struct kv_monitor:
        pass

    uint64_t kv_now_ns()
    uint64_t kv_deadline_ns(int64_t timeout_ms)
    void kv_nap_ns(uint64_t nanoseconds)
    int kv_monitor_init(kv_monitor *monitor)
    void kv_monitor_destroy(kv_monitor *monitor)
    void kv_monitor_lock(kv_monitor *monitor)
    void kv_monitor_unlock(kv_monitor *monitor)
    void kv_monitor_broadcast(kv_monitor *monitor)
    int kv_monitor_wait(kv_monitor *monitor, uint64_t deadline_ns)


# kvortex/touch.h (memory) ------------------------------------------------------------------------------------------
cdef extern from "kvortex/touch.h" nogil:
    ctypedef struct kv_touch:
        pass

    int kv_populate(char *address, size_t nbytes, uint64_t *left)
    int kv_touch_init(kv_touch *touch, char *base, size_t start, size_t end, uint64_t *left)
    void kv_touch_destroy(kv_touch *touch)
    void kv_touch_stop(kv_touch *touch)
    void *kv_touch_main(void *touch) noexcept
    int kv_touch_until(kv_touch *touch, size_t offset, bint alone)


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass

    ctypedef struct pthread_mutex_t:
        pass

    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_create(pthread_t *thread, const void *attributes, void *(*main)(void *) noexcept nogil, void *argument)
    int pthread_join(pthread_t thread, void **result)


# kvortex/histogram.h (stats) ---------------------------------------------------------------------------------------
cdef extern from "kvortex/histogram.h" nogil:
    ctypedef struct kv_histogram:
        uint64_t count

    void kv_histogram_add(kv_histogram *histogram, uint64_t value)
    uint64_t kv_histogram_percentile(const kv_histogram *histogram, double fraction)


# kvortex/sums.h, record.h (tiers) ----------------------------------------------------------------------------------
cdef extern from "kvortex/sums.h" nogil:
    ctypedef struct kv_sums:
        uint64_t xxh3, weighted

    int kv_has_vectors()
    kv_sums kv_sums_of(const uint8_t *data, size_t nbytes, int vectors)


cdef extern from "kvortex/record.h" nogil:
    enum:
        KV_RECORD_HEADER_BYTES, KV_RECORD_VERSION, KV_DIGEST_BYTES

    const int KV_RECORD_OK, KV_RECORD_MISSING, KV_RECORD_VERSION_DIFFERS, KV_RECORD_HEADER_DAMAGED
    const int KV_RECORD_NAMESPACE_DIFFERS, KV_RECORD_RANK_DIFFERS, KV_RECORD_CODEC_DIFFERS, KV_RECORD_TAG_DIFFERS
    const int KV_RECORD_KEY_DIFFERS, KV_RECORD_NAME_DIFFERS, KV_RECORD_LENGTH_DIFFERS, KV_RECORD_PAYLOAD_DAMAGED

    ctypedef struct kv_record_header:
        uint32_t codec, rank, group, stored_bytes, block_bytes
        const uint8_t *space "space"
        const uint8_t *tag "tag"
        const uint8_t *key "key"
        const uint8_t *name "name"
        uint64_t payload_xxh3, payload_weighted

    ctypedef struct kv_record:
        const uint8_t *space
        const uint8_t *tag
        const uint8_t *key
        const uint8_t *name
        uint32_t rank, group, codec, stored_bytes, block_bytes

    void kv_record_write(kv_record_header *header, const kv_record *record, int vectors)
    int kv_record_check_page(const kv_record_header *header, int vectors)
    int kv_record_check_store(const kv_record_header *header, const kv_record *expected, int vectors)
    int kv_record_check(const kv_record_header *header, const kv_record *expected, int vectors)


# kvortex/io_calls.h, io_queue.h, disk_io.h, disk_aio.h (tiers) --------------------------------------------------------
cdef extern from "kvortex/io_calls.h" nogil:
    enum:
        KV_IO_UNIT_BYTES

    ctypedef struct kv_io_calls:
        int (*open)(const char *path, int flags, unsigned mode) noexcept nogil
        int (*allocate)(int file, int64_t nbytes) noexcept nogil
        int (*resize)(int file, int64_t nbytes) noexcept nogil
        int (*direct_align)(int file) noexcept nogil
        int (*set_direct)(int file, int direct) noexcept nogil
        int (*sync)(int file) noexcept nogil
        int (*close)(int file) noexcept nogil
        int (*aio_setup)(unsigned depth, unsigned long *context) noexcept nogil
        int (*aio_destroy)(unsigned long context) noexcept nogil

    const kv_io_calls kv_io_system
    int kv_read_all(const kv_io_calls *calls, int file, void *target, size_t nbytes, int64_t offset)
    int kv_write_all(const kv_io_calls *calls, int file, const void *source, size_t nbytes, int64_t offset)


cdef extern from "kvortex/io_queue.h" nogil:
    const int KV_IO_PUT, KV_IO_GET, KV_IO_ERASE, KV_IO_SCAN, KV_IO_SYNC, KV_IO_NUM_VERBS
    const int KV_BLOCK_LATE, KV_BLOCK_DROPPED, KV_BLOCK_READ_ONLY, KV_BLOCK_NO_SPACE, KV_BLOCK_IO_ERROR
    const int KV_BLOCK_SHORT, KV_BLOCK_PENDING, KV_BLOCK_TOO_LARGE, KV_BLOCK_NUM_STATUSES, KV_IO_MAX_THREADS

    ctypedef struct kv_io_batch:
        uint64_t begun_ns, over_ns
        uint32_t num_blocks
        uint8_t *tag
        uint32_t *slots
        uint32_t *memory
        uint32_t *lengths
        uint32_t *groups
        uint8_t *keys
        uint8_t *names
        uint8_t *statuses

    ctypedef uint8_t (*kv_io_run)(void *owner, kv_io_batch *batch, uint32_t block, void *scratch) noexcept nogil

    ctypedef struct kv_io_queue:
        kv_monitor monitor
        uint32_t num_waiting, num_running, most_waiting
        int event_fd
        size_t scratch_bytes
        uint64_t (*counts)[24]

    kv_io_batch *kv_io_batch_new(uint8_t verb, uint32_t num_blocks, uint64_t deadline_ns)
    void kv_io_let_go(kv_io_batch *batch)
    int kv_io_queue_init(kv_io_queue *queue, uint32_t num_slots, uint32_t capacity, kv_io_run run, void *owner)
    ctypedef uint8_t (*kv_io_reap)(void *owner, kv_io_batch **batch, uint32_t *block) noexcept nogil
    int kv_io_start_reaper(kv_io_queue *queue, kv_io_reap reap, uint32_t max_running)
    uint32_t kv_io_start(kv_io_queue *queue, uint32_t num_threads)
    void kv_io_submit(kv_io_queue *queue, kv_io_batch *batch)
    int kv_io_wait(kv_io_queue *queue, kv_io_batch *batch, uint64_t until_ns)
    uint32_t kv_io_wait_idle(kv_io_queue *queue, uint64_t until_ns)
    int kv_io_stop(kv_io_queue *queue, uint64_t until_ns)
    void kv_io_queue_destroy(kv_io_queue *queue)


cdef extern from "kvortex/coder.h" nogil:
    ctypedef struct kv_coder:
        uint32_t codec, payload_bytes, coded_bytes
        size_t scratch_bytes
        uint32_t (*encode)(const kv_coder *coder, const void *payload, void *coded, void *scratch) noexcept nogil
        int (*decode)(const kv_coder *coder, const void *coded, uint32_t coded_bytes, void *payload,
                      void *scratch) noexcept nogil


cdef extern from "kvortex/ecsq_coder.h" nogil:
    ctypedef struct kv_ecsq_coder:
        kv_coder coder
        const kv_ecsq *ecsq
        const kv_plane *planes
        uint32_t num_planes
        uint64_t flags_offset

    size_t kv_ecsq_coder_block_bytes(const kv_ecsq_coder *own)
    uint32_t kv_ecsq_coder_encode(const kv_coder *coder, const void *payload, void *coded, void *scratch) noexcept
    int kv_ecsq_coder_decode(const kv_coder *coder, const void *coded, uint32_t coded_bytes, void *payload,
                             void *scratch) noexcept


cdef extern from "kvortex/disk_io.h" nogil:
    ctypedef struct kv_disk:
        const kv_io_calls *calls
        kv_slots memory
        const int *files
        uint32_t slots_per_segment, rank
        uint8_t *space
        uint64_t stride_bytes
        kv_coder *coder
        int vectors, read_only_error, buffered_error, last_error
        uint64_t bytes_written, bytes_read

    size_t kv_disk_scratch_bytes(const kv_disk *disk)
    uint8_t kv_disk_run(void *owner, kv_io_batch *batch, uint32_t block, void *scratch) noexcept


cdef extern from "kvortex/disk_aio.h" nogil:
    ctypedef struct kv_disk_aio:
        kv_disk *disk
        unsigned long context

    uint8_t kv_disk_aio_run(void *owner, kv_io_batch *batch, uint32_t block, void *scratch) noexcept
    uint8_t kv_disk_aio_reap(void *owner, kv_io_batch **batch, uint32_t *block) noexcept


cdef extern from "kvortex/dlpack.h" nogil:
    const int KV_DLPACK_CPU, KV_DLPACK_CUDA, KV_DLPACK_CUDA_HOST, KV_DLPACK_CUDA_MANAGED
    const int KV_DLPACK_UINT, KV_DLPACK_READ_ONLY, KV_DLPACK_IS_COPIED

    ctypedef struct kv_dlpack_tensor:
        void *data
        int32_t device_type, device_id, ndim
        uint8_t type_code, type_bits
        uint16_t type_lanes
        int64_t *shape
        int64_t *strides
        uint64_t byte_offset

    ctypedef struct kv_dlpack_managed:
        kv_dlpack_tensor tensor
        void *manager
        void (*deleter)(kv_dlpack_managed *) noexcept nogil

    ctypedef struct kv_dlpack_versioned:
        uint32_t major, minor
        void *manager
        void (*deleter)(kv_dlpack_versioned *) noexcept nogil
        uint64_t flags
        kv_dlpack_tensor tensor
