/* disk_io.h: one block of a batch, between a slot of the pinned pool and a slot of a segment.
 *
 * Slot s lies in segment s / slots_per_segment, behind the segment's page. Header and payload are contiguous in either,
 * so a block is one write, or one read that verifies everything. With a coder, the scratch memory of the thread has the
 * record: its page and what the coder makes of the block. A read is of the whole slot, as the length of the record is not
 * known before.
 *
 * Invariants
 *   - A read answers OK only for the record that was asked for, whole; what else lies there is the block's status.
 *   - Direct I/O that a file refuses goes on buffered for that file, and says so.
 *   - No space, or a file system that became read-only, makes the store read-only: reads and erasing go on.
 *   - Only the header page of a pinned slot is written by a put; the payload is others' to read meanwhile.
 *
 * Costs: one system call a block, and the sums.
 */
#ifndef KVORTEX_DISK_IO_H
#define KVORTEX_DISK_IO_H

#include "io_calls.h" /* first: it asks the C library for all that Linux has */

#include "coder.h"
#include "io_queue.h"
#include "record.h"
#include "slots.h"

typedef struct kv_disk {
    const kv_io_calls *calls;
    kv_slots memory; /* of the pinned pool */
    const int *files;
    uint32_t slots_per_segment;
    uint64_t stride_bytes;  /* of a slot of a segment */
    const kv_coder *coder;  /* NULL: blocks are written as they are */
    uint8_t space[KV_DIGEST_BYTES];
    uint32_t rank;
    int vectors;
    _Atomic int read_only_error; /* the errno that made it so; 0: it takes blocks */
    _Atomic int buffered_error;  /* the errno of the first direct I/O that was refused */
    _Atomic int last_error;
    _Atomic uint64_t bytes_written, bytes_read;
} kv_disk;

static inline int64_t kv_disk_offset(const kv_disk *disk, uint32_t slot)
{
    return KV_IO_UNIT_BYTES + (int64_t)(slot % disk->slots_per_segment) * (int64_t)disk->stride_bytes;
}

static inline uint8_t kv_disk_status(kv_disk *disk, int error, int is_write)
{
    disk->last_error = -error;
    if (error == -ENODATA)
        return KV_BLOCK_SHORT;
    if (is_write && (error == -ENOSPC || error == -EDQUOT || error == -EROFS || error == -EFBIG)) {
        disk->read_only_error = -error;
        return KV_BLOCK_NO_SPACE;
    }
    return KV_BLOCK_IO_ERROR;
}

/* Reads or writes at a slot, once more without O_DIRECT where the file refuses that. 0, or a negative errno. */
static inline int kv_disk_transfer(kv_disk *disk, uint32_t slot, void *memory, size_t bytes, int is_write)
{
    const int file = disk->files[slot / disk->slots_per_segment];
    const int64_t offset = kv_disk_offset(disk, slot);
    for (int is_again = 0;; is_again = 1) {
        const int error = is_write ? kv_write_all(disk->calls, file, memory, bytes, offset)
                                   : kv_read_all(disk->calls, file, memory, bytes, offset);
        if ((error != -EINVAL && error != -EOPNOTSUPP) || is_again)
            return error;
        if (disk->calls->set_direct(file, 0) < 0)
            return error;
        disk->buffered_error = -error;
    }
}

static inline kv_record kv_disk_record(const kv_disk *disk, const kv_io_batch *batch, uint32_t block)
{
    const size_t at = (size_t)block * KV_DIGEST_BYTES;
    return (kv_record){.space = disk->space,
                       .tag = batch->tag,
                       .key = batch->keys + at,
                       .name = batch->names + at,
                       .rank = disk->rank,
                       .group = batch->groups[block],
                       .codec = disk->coder ? disk->coder->codec : 0,
                       .stored_bytes = disk->coder ? disk->coder->coded_bytes : batch->lengths[block],
                       .block_bytes = batch->lengths[block]};
}

/* Whole units: header, payload, and what lies behind the payload in its slot. */
static inline size_t kv_disk_bytes(uint32_t length)
{
    const size_t unit = KV_IO_UNIT_BYTES;
    return KV_RECORD_HEADER_BYTES + (length + unit - 1) / unit * unit;
}

static inline kv_record_header *kv_disk_header(const kv_disk *disk, const kv_io_batch *batch, uint32_t block)
{
    return (void *)(kv_slots_payload(&disk->memory, batch->memory[block]) - KV_RECORD_HEADER_BYTES);
}

/* What a put or a get does in memory before the block is moved. */
static inline uint8_t kv_disk_prepare(kv_disk *disk, kv_io_batch *batch, uint32_t block)
{
    kv_record_header *header = kv_disk_header(disk, batch, block);
    const kv_record record = kv_disk_record(disk, batch, block);
    if (batch->verb == KV_IO_GET)
        header->magic = 0; /* a record that an earlier read left here is not this one */
    else if (disk->read_only_error)
        return KV_BLOCK_READ_ONLY;
    else
        kv_record_write(header, &record, disk->vectors);
    return KV_RECORD_OK;
}

/* 0, or a negative errno. */
static inline int kv_disk_move(kv_disk *disk, kv_io_batch *batch, uint32_t block)
{
    return kv_disk_transfer(disk, batch->slots[block], kv_disk_header(disk, batch, block),
                            kv_disk_bytes(batch->lengths[block]), batch->verb == KV_IO_PUT);
}

/* And what follows, after a move that answered so. */
static inline uint8_t kv_disk_conclude(kv_disk *disk, kv_io_batch *batch, uint32_t block, int error)
{
    const int is_write = batch->verb == KV_IO_PUT;
    const kv_record record = kv_disk_record(disk, batch, block);
    if (error)
        return kv_disk_status(disk, error, is_write);
    *(is_write ? &disk->bytes_written : &disk->bytes_read) += kv_disk_bytes(record.stored_bytes);
    if (is_write)
        return KV_RECORD_OK;
    return (uint8_t)kv_record_check(kv_disk_header(disk, batch, block), &record, disk->vectors);
}

static inline uint8_t kv_disk_erase(kv_disk *disk, kv_io_batch *batch, uint32_t block, void *page)
{
    memset(page, 0, KV_RECORD_HEADER_BYTES);
    const int error = kv_disk_transfer(disk, batch->slots[block], page, KV_RECORD_HEADER_BYTES, 1);
    return error ? kv_disk_status(disk, error, 1) : KV_RECORD_OK;
}

/* Of each thread: a record, then what the coder needs. */
static inline size_t kv_disk_scratch_bytes(const kv_disk *disk)
{
    return disk->coder ? disk->stride_bytes + disk->coder->scratch_bytes : KV_RECORD_HEADER_BYTES;
}

static inline uint8_t kv_disk_put_coded(kv_disk *disk, kv_io_batch *batch, uint32_t block, void *scratch)
{
    kv_record_header *header = scratch;
    kv_record record = kv_disk_record(disk, batch, block);
    if (disk->read_only_error)
        return KV_BLOCK_READ_ONLY;
    record.stored_bytes = kv_coder_encode(disk->coder, kv_disk_header(disk, batch, block) + 1, record.block_bytes,
                                          header + 1, (char *)scratch + disk->stride_bytes);
    if (record.stored_bytes == 0)
        return KV_BLOCK_TOO_LARGE;
    kv_record_write(header, &record, disk->vectors);
    const size_t bytes = kv_disk_bytes(record.stored_bytes);
    memset((char *)(header + 1) + record.stored_bytes, 0, bytes - KV_RECORD_HEADER_BYTES - record.stored_bytes);
    const int error = kv_disk_transfer(disk, batch->slots[block], scratch, bytes, 1);
    if (error)
        return kv_disk_status(disk, error, 1);
    disk->bytes_written += bytes;
    return KV_RECORD_OK;
}

static inline uint8_t kv_disk_get_coded(kv_disk *disk, kv_io_batch *batch, uint32_t block, void *scratch)
{
    kv_record_header *header = scratch;
    const kv_record record = kv_disk_record(disk, batch, block);
    header->magic = 0; /* a record that an earlier read left here is not this one */
    const int error = kv_disk_transfer(disk, batch->slots[block], scratch, disk->stride_bytes, 0);
    if (error)
        return kv_disk_status(disk, error, 0);
    disk->bytes_read += disk->stride_bytes;
    const int status = kv_record_check(header, &record, disk->vectors);
    if (status)
        return (uint8_t)status;
    const int is_decoded = kv_coder_decode(disk->coder, header + 1, header->stored_bytes,
                                           kv_disk_header(disk, batch, block) + 1, record.block_bytes,
                                           (char *)scratch + disk->stride_bytes);
    return is_decoded ? KV_RECORD_OK : KV_RECORD_PAYLOAD_DAMAGED;
}

/* What record the slot's header announces; its payload is verified when it is read. */
static inline uint8_t kv_disk_scan(kv_disk *disk, kv_io_batch *batch, uint32_t block, void *page)
{
    const kv_record record = kv_disk_record(disk, batch, block);
    kv_record_header *header = page;
    header->magic = 0; /* as above */
    const int error = kv_disk_transfer(disk, batch->slots[block], page, KV_RECORD_HEADER_BYTES, 0);
    if (error)
        return kv_disk_status(disk, error, 0);
    const int status = kv_record_check_store(header, &record, disk->vectors);
    if (status)
        return (uint8_t)status;
    const uint32_t length = header->block_bytes, stored = header->stored_bytes;
    if (disk->coder ? stored == 0 || stored > disk->coder->coded_bytes : stored != length)
        return KV_RECORD_LENGTH_DIFFERS;
    if (length == 0 || length > disk->memory.payload_bytes)
        return KV_RECORD_LENGTH_DIFFERS;
    memcpy(batch->keys + (size_t)block * KV_DIGEST_BYTES, header->key, KV_DIGEST_BYTES);
    batch->lengths[block] = length;
    batch->groups[block] = header->group;
    return KV_RECORD_OK;
}

/* Of the segment that the slot lies in. */
static inline uint8_t kv_disk_sync(kv_disk *disk, kv_io_batch *batch, uint32_t block)
{
    const int error = disk->calls->sync(disk->files[batch->slots[block] / disk->slots_per_segment]);
    return error ? kv_disk_status(disk, error, 1) : KV_RECORD_OK;
}

static inline uint8_t kv_disk_run(void *owner, kv_io_batch *batch, uint32_t block, void *scratch)
{
    kv_disk *disk = owner;
    uint8_t status;
    switch (batch->verb) {
    case KV_IO_PUT:
    case KV_IO_GET:
        if (disk->coder)
            return batch->verb == KV_IO_PUT ? kv_disk_put_coded(disk, batch, block, scratch)
                                            : kv_disk_get_coded(disk, batch, block, scratch);
        status = kv_disk_prepare(disk, batch, block);
        return status ? status : kv_disk_conclude(disk, batch, block, kv_disk_move(disk, batch, block));
    case KV_IO_ERASE:
        return kv_disk_erase(disk, batch, block, scratch);
    case KV_IO_SCAN:
        return kv_disk_scan(disk, batch, block, scratch);
    default:
        return kv_disk_sync(disk, batch, block);
    }
}

#endif
