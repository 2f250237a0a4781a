/* disk_aio.h: the blocks of disk_io.h by Linux AIO: threads begin them, and one thread, the reaper, ends them.
 *
 * Invariants
 *   - A request is used by one block, from before its submission until its event has been read.
 *   - What the kernel does not take, or does in part, is done at once by the thread that meets it, as disk_io.h does
 *     it: so refused direct I/O, short answers and interruptions end as they do there.
 *   - A thread that waits for an event waits for ever, as for a read: a disk that hangs keeps its memory.
 *
 * A disk with a coder has no AIO: its threads code, each a block.
 *
 * Costs: two system calls a block. A file that is not direct is read and written within the submission.
 */
#ifndef KVORTEX_DISK_AIO_H
#define KVORTEX_DISK_AIO_H

#include <stdatomic.h>

#include "disk_io.h"

typedef struct kv_disk_request {
    struct iocb call;
    kv_io_batch *batch;
    uint32_t block;
    _Atomic int is_used;
} kv_disk_request;

typedef struct kv_disk_aio {
    kv_disk *disk;
    aio_context_t context;
    kv_disk_request requests[KV_IO_MAX_THREADS]; /* no more blocks than that run */
} kv_disk_aio;

static inline kv_disk_request *kv_disk_take_request(kv_disk_aio *aio)
{
    for (uint32_t i = 0;; i = (i + 1) % KV_IO_MAX_THREADS)
        if (!atomic_exchange(&aio->requests[i].is_used, 1))
            return &aio->requests[i];
}

/* A kv_io_run, of a kv_disk_aio. */
static inline uint8_t kv_disk_aio_run(void *owner, kv_io_batch *batch, uint32_t block, void *scratch)
{
    kv_disk_aio *aio = owner;
    kv_disk *disk = aio->disk;
    if (batch->verb != KV_IO_PUT && batch->verb != KV_IO_GET)
        return kv_disk_run(disk, batch, block, scratch);
    const uint8_t status = kv_disk_prepare(disk, batch, block);
    if (status)
        return status;
    kv_disk_request *request = kv_disk_take_request(aio);
    request->batch = batch;
    request->block = block;
    request->call = (struct iocb){.aio_data = (uintptr_t)request,
                                  .aio_lio_opcode = batch->verb == KV_IO_PUT ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
                                  .aio_fildes = (uint32_t)disk->files[batch->slots[block] / disk->slots_per_segment],
                                  .aio_buf = (uintptr_t)kv_disk_header(disk, batch, block),
                                  .aio_nbytes = kv_disk_bytes(batch->lengths[block]),
                                  .aio_offset = kv_disk_offset(disk, batch->slots[block])};
    if (disk->calls->aio_submit(aio->context, &request->call) == 1)
        return KV_BLOCK_PENDING;
    request->is_used = 0;
    return kv_disk_conclude(disk, batch, block, kv_disk_move(disk, batch, block));
}

/* A kv_io_reap. */
static inline uint8_t kv_disk_aio_reap(void *owner, kv_io_batch **batch, uint32_t *block)
{
    kv_disk_aio *aio = owner;
    kv_disk *disk = aio->disk;
    struct io_event event;
    for (int answer; (answer = disk->calls->aio_wait(aio->context, &event)) != 1;)
        if (answer != -EINTR)
            kv_nap_ns(1000000); /* cannot be; and the memory of what is begun is the kernel's, so nobody may go on */
    kv_disk_request *request = (void *)(uintptr_t)event.data;
    *batch = request->batch;
    *block = request->block;
    request->is_used = 0;
    const int64_t answer = event.res;
    int error = 0;
    if (answer >= 0 || answer == -EINVAL || answer == -EOPNOTSUPP || answer == -EINTR || answer == -EAGAIN) {
        if (answer != (int64_t)kv_disk_bytes((*batch)->lengths[*block]))
            error = kv_disk_move(disk, *batch, *block);
    } else
        error = (int)answer;
    return kv_disk_conclude(disk, *batch, *block, error);
}

#endif
