/* The system calls of the disk tier with a fault in one of them: a kv_io_calls table for tests, driven through ctypes.
 *
 * faulty_plan says which call misbehaves (its row in the table, or -1 for any), from which count on (1 is the next), how
 * often, and how. faulty_open_gate lets go of the calls that hang. */

#include "kvortex/io_calls.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

enum { HOW_SHORT = 1000, HOW_NOTHING = 1001, HOW_LIE = 1002, HOW_HANG = 1003 }; /* below: an errno */
enum { OPEN, ALLOCATE, RESIZE, DIRECT_ALIGN, SET_DIRECT, READ, WRITE, SYNC, CLOSE, AIO_SETUP, AIO_SUBMIT, AIO_WAIT };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static long seen, hanging;
static int planned_call = -2, planned_how;
static long planned_nth, planned_count;
static int gate_is_open = 1;

/* How this call misbehaves, or 0. Under the lock. */
static int draw(int call)
{
    if (planned_call != -1 && planned_call != call)
        return 0;
    seen++;
    return seen >= planned_nth && seen < planned_nth + planned_count ? planned_how : 0;
}

/* The same; returns after the gate where it hangs. */
static int fate(int call)
{
    pthread_mutex_lock(&lock);
    int how = draw(call);
    if (how == HOW_HANG) {
        how = 0;
        hanging++;
        pthread_cond_broadcast(&changed);
        while (!gate_is_open)
            pthread_cond_wait(&changed, &lock);
        hanging--;
    }
    pthread_mutex_unlock(&lock);
    return how;
}

/* An errno where that is planned; any other way to misbehave leaves the call undone and lies about it. */
static int number(int how, int answer) { return how && how < HOW_SHORT ? -how : answer; }

static int faulty_open(const char *path, int flags, unsigned mode)
{
    const int how = fate(OPEN);
    return how && how < HOW_SHORT ? -how : kv_io_open(path, flags, mode);
}

static int faulty_allocate(int file, int64_t bytes)
{
    const int how = fate(ALLOCATE);
    return number(how, how ? 0 : kv_io_allocate(file, bytes));
}

static int faulty_resize(int file, int64_t bytes)
{
    const int how = fate(RESIZE);
    return number(how, how ? 0 : kv_io_resize(file, bytes));
}

static int faulty_direct_align(int file)
{
    const int how = fate(DIRECT_ALIGN);
    return number(how, how ? 0 : kv_io_direct_align(file));
}

static int faulty_set_direct(int file, int direct)
{
    const int how = fate(SET_DIRECT);
    return number(how, how ? 0 : kv_io_set_direct(file, direct));
}

static int64_t faulty_read(int file, void *target, size_t bytes, int64_t offset)
{
    const int how = fate(READ);
    if (how == HOW_SHORT)
        return kv_io_read(file, target, bytes / 2, offset);
    if (how == HOW_NOTHING || how == HOW_LIE)
        return how == HOW_LIE ? (int64_t)bytes : 0;
    return how ? -how : kv_io_read(file, target, bytes, offset);
}

static int64_t faulty_write(int file, const void *source, size_t bytes, int64_t offset)
{
    const int how = fate(WRITE);
    if (how == HOW_SHORT)
        return kv_io_write(file, source, bytes / 2, offset);
    if (how == HOW_NOTHING || how == HOW_LIE)
        return how == HOW_LIE ? (int64_t)bytes : 0;
    return how ? -how : kv_io_write(file, source, bytes, offset);
}

static int faulty_sync(int file)
{
    const int how = fate(SYNC);
    return number(how, how ? 0 : kv_io_sync(file));
}

/* The file is closed whatever is answered, as with close itself. */
static int faulty_close(int file)
{
    const int how = fate(CLOSE);
    const int answer = kv_io_close(file);
    return number(how, answer);
}

/* An asynchronous read or write misbehaves as one that is waited for, but that its event does; one that hangs is held
 * back from whoever waits for events, and no other is. */
typedef struct request {
    struct iocb *call;
    uint64_t data;
    int how;
    struct request *next;
} request;

static request *held;

static int faulty_aio_setup(unsigned depth, aio_context_t *context)
{
    const int how = fate(AIO_SETUP);
    return how && how < HOW_SHORT ? -how : kv_io_aio_setup(depth, context);
}

static int faulty_aio_submit(aio_context_t context, struct iocb *call)
{
    int how = fate(AIO_SUBMIT);
    if (how)
        return number(how, 0);
    request *made = malloc(sizeof *made);
    pthread_mutex_lock(&lock);
    how = draw(call->aio_lio_opcode == IOCB_CMD_PREAD ? READ : WRITE);
    pthread_mutex_unlock(&lock);
    *made = (request){call, call->aio_data, how, NULL};
    struct iocb altered = *call;
    altered.aio_data = (uintptr_t)made;
    altered.aio_nbytes = how == HOW_SHORT ? call->aio_nbytes / 2 : how && how != HOW_HANG ? 0 : call->aio_nbytes;
    const int answer = kv_io_aio_submit(context, &altered);
    if (answer != 1)
        free(made);
    return answer;
}

static int give(request *made, struct io_event *event)
{
    event->data = made->data;
    if (made->how == HOW_LIE || made->how == HOW_HANG)
        event->res = (int64_t)made->call->aio_nbytes;
    else if (made->how && made->how < HOW_SHORT)
        event->res = -made->how;
    free(made);
    return 1;
}

static int faulty_aio_wait(aio_context_t context, struct io_event *event)
{
    pthread_mutex_lock(&lock);
    const int how = planned_call == AIO_WAIT ? draw(AIO_WAIT) : 0;
    pthread_mutex_unlock(&lock);
    if (how)
        return number(how, 0);
    for (;;) {
        struct timespec pause = {0, 1000000};
        pthread_mutex_lock(&lock);
        request *made = gate_is_open ? held : NULL;
        if (made) {
            held = made->next;
            hanging--;
        }
        pthread_mutex_unlock(&lock);
        if (made)
            return give(made, event);
        if (syscall(SYS_io_getevents, context, 1L, 1L, event, &pause) != 1)
            continue;
        made = (void *)(uintptr_t)event->data;
        if (made->how != HOW_HANG)
            return give(made, event);
        pthread_mutex_lock(&lock);
        made->next = held;
        held = made;
        hanging++;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
}

const kv_io_calls faulty_calls = {
    faulty_open,  faulty_allocate, faulty_resize,    faulty_direct_align, faulty_set_direct, faulty_read,       faulty_write,
    faulty_sync,  faulty_close,    faulty_aio_setup, faulty_aio_submit,   faulty_aio_wait,   kv_io_aio_destroy};

void faulty_plan(int call, long nth, long count, int how);
long faulty_seen(void);
void faulty_wait_hanging(long count);
void faulty_open_gate(void);

void faulty_plan(int call, long nth, long count, int how)
{
    pthread_mutex_lock(&lock);
    planned_call = call, planned_nth = nth, planned_count = count, planned_how = how, seen = 0;
    gate_is_open = how != HOW_HANG;
    pthread_mutex_unlock(&lock);
}

long faulty_seen(void)
{
    pthread_mutex_lock(&lock);
    const long count = seen;
    pthread_mutex_unlock(&lock);
    return count;
}

void faulty_wait_hanging(long count)
{
    pthread_mutex_lock(&lock);
    while (hanging < count)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

void faulty_open_gate(void)
{
    pthread_mutex_lock(&lock);
    gate_is_open = 1;
    planned_call = -2;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}
