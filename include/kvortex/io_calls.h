/* io_calls.h: the system calls of the disk tier as a table of function pointers, so that tests can let any of them fail.
 *
 * Invariants
 *   - A call answers 0 or more, or a negative errno; it never touches errno's value for others.
 *   - kv_read_all and kv_write_all go on after short answers and interruptions; what they answer is final.
 *
 * Costs: one indirect call for each system call.
 */
#ifndef KVORTEX_IO_CALLS_H
#define KVORTEX_IO_CALLS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { KV_IO_UNIT_BYTES = 4096 }; /* every offset, length and address is a multiple: enough for O_DIRECT everywhere */

typedef struct kv_io_calls {
    int (*open)(const char *path, int flags, unsigned mode);
    int (*allocate)(int file, int64_t bytes); /* room for the whole file */
    int (*resize)(int file, int64_t bytes);
    int (*direct_align)(int file); /* bytes; 0: no direct I/O; -ENOSYS: the kernel doesn't tell */
    int (*set_direct)(int file, int direct);
    int64_t (*read)(int file, void *target, size_t bytes, int64_t offset);
    int64_t (*write)(int file, const void *source, size_t bytes, int64_t offset);
    int (*sync)(int file);
    int (*close)(int file);
    int (*aio_setup)(unsigned depth, aio_context_t *context);
    int (*aio_submit)(aio_context_t context, struct iocb *request); /* 1: it is begun */
    int (*aio_wait)(aio_context_t context, struct io_event *event); /* 1: this one is over */
    int (*aio_destroy)(aio_context_t context);
} kv_io_calls;

static inline int64_t kv_io_answer(int64_t answer) { return answer < 0 ? -errno : answer; }

static inline int kv_io_open(const char *path, int flags, unsigned mode)
{
    return (int)kv_io_answer(open(path, flags, mode));
}

static inline int kv_io_allocate(int file, int64_t bytes) { return (int)kv_io_answer(fallocate(file, 0, 0, bytes)); }
static inline int kv_io_resize(int file, int64_t bytes) { return (int)kv_io_answer(ftruncate(file, bytes)); }

/* The fields of struct statx by their place: headers older than Linux 6.1 lack these. */
static inline int kv_io_direct_align(int file)
{
    enum { DIOALIGN = 0x2000, MEMORY_AT = 152, OFFSET_AT = 156 };
    uint32_t mask, memory, offset;
    uint8_t facts[256] = {0};
    if (syscall(SYS_statx, file, "", AT_EMPTY_PATH, DIOALIGN, facts) != 0)
        return -errno;
    memcpy(&mask, facts, sizeof mask);
    memcpy(&memory, facts + MEMORY_AT, sizeof memory);
    memcpy(&offset, facts + OFFSET_AT, sizeof offset);
    if (!(mask & DIOALIGN))
        return -ENOSYS;
    return (int)(memory > offset ? memory : offset);
}

static inline int kv_io_set_direct(int file, int direct)
{
    const int flags = fcntl(file, F_GETFL);
    if (flags < 0)
        return -errno;
    return (int)kv_io_answer(fcntl(file, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT));
}

static inline int64_t kv_io_read(int file, void *target, size_t bytes, int64_t offset)
{
    return kv_io_answer(pread(file, target, bytes, offset));
}

static inline int64_t kv_io_write(int file, const void *source, size_t bytes, int64_t offset)
{
    return kv_io_answer(pwrite(file, source, bytes, offset));
}

static inline int kv_io_sync(int file) { return (int)kv_io_answer(fdatasync(file)); }
static inline int kv_io_close(int file) { return (int)kv_io_answer(close(file)); }

/* Linux AIO has no functions in libc. */
static inline int kv_io_aio_setup(unsigned depth, aio_context_t *context)
{
    *context = 0;
    return (int)kv_io_answer(syscall(SYS_io_setup, depth, context));
}

static inline int kv_io_aio_submit(aio_context_t context, struct iocb *request)
{
    return (int)kv_io_answer(syscall(SYS_io_submit, context, 1L, &request));
}

static inline int kv_io_aio_wait(aio_context_t context, struct io_event *event)
{
    return (int)kv_io_answer(syscall(SYS_io_getevents, context, 1L, 1L, event, NULL));
}

static inline int kv_io_aio_destroy(aio_context_t context)
{
    return (int)kv_io_answer(syscall(SYS_io_destroy, context));
}

static const kv_io_calls kv_io_system = {
    kv_io_open,  kv_io_allocate, kv_io_resize, kv_io_direct_align, kv_io_set_direct, kv_io_read,        kv_io_write,
    kv_io_sync,  kv_io_close,    kv_io_aio_setup, kv_io_aio_submit, kv_io_aio_wait, kv_io_aio_destroy};

/* How far a loop has come after an answer: direct I/O goes on at whole units only. -EIO: it does not come on. */
static inline int64_t kv_io_advance(int64_t done, int64_t answer, size_t bytes)
{
    int64_t next = done + answer;
    if (next < (int64_t)bytes)
        next -= next % KV_IO_UNIT_BYTES;
    return next > done ? next : -EIO;
}

/* 0, or a negative errno; -ENODATA where the file ends before. */
static inline int kv_read_all(const kv_io_calls *calls, int file, void *target, size_t bytes, int64_t offset)
{
    for (int64_t done = 0; done < (int64_t)bytes;) {
        const int64_t answer = calls->read(file, (char *)target + done, bytes - (size_t)done, offset + done);
        if (answer == -EINTR)
            continue;
        if (answer <= 0)
            return answer ? (int)answer : -ENODATA;
        done = kv_io_advance(done, answer, bytes);
        if (done < 0)
            return -ENODATA;
    }
    return 0;
}

static inline int kv_write_all(const kv_io_calls *calls, int file, const void *source, size_t bytes, int64_t offset)
{
    for (int64_t done = 0; done < (int64_t)bytes;) {
        const int64_t answer = calls->write(file, (const char *)source + done, bytes - (size_t)done, offset + done);
        if (answer == -EINTR)
            continue;
        if (answer < 0)
            return (int)answer;
        done = kv_io_advance(done, answer, bytes);
        if (done < 0)
            return (int)done;
    }
    return 0;
}

#endif
