/* Preloaded in front of libc: the n-th time that a module of KVortex asks for memory, a mapping, a mutex or a thread, it
 * is refused. Whoever else asks, Python above all, gets what it asks for. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

long refuse_in; /* 1: the next one; 0: none */

static int refused(const void *caller)
{
    Dl_info info;
    if (__atomic_load_n(&refuse_in, __ATOMIC_SEQ_CST) <= 0)
        return 0;
    if (!dladdr(caller, &info) || !info.dli_fname || !strstr(info.dli_fname, "/kvortex/"))
        return 0;
    return __atomic_fetch_sub(&refuse_in, 1, __ATOMIC_SEQ_CST) == 1;
}

#define CALLER __builtin_return_address(0)

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);

void *malloc(size_t bytes)
{
    return refused(CALLER) ? NULL : __libc_malloc(bytes);
}

void *calloc(size_t count, size_t bytes)
{
    return refused(CALLER) ? NULL : __libc_calloc(count, bytes);
}

void *realloc(void *memory, size_t bytes)
{
    return refused(CALLER) ? NULL : __libc_realloc(memory, bytes);
}

void *mmap(void *address, size_t bytes, int protection, int flags, int file, off_t offset)
{
    static void *(*real)(void *, size_t, int, int, int, off_t);
    if (refused(CALLER))
        return errno = ENOMEM, MAP_FAILED;
    if (!real)
        real = (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap");
    return real(address, bytes, protection, flags, file, offset);
}

void *mmap64(void *address, size_t bytes, int protection, int flags, int file, off_t offset)
    __attribute__((alias("mmap")));

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (refused(CALLER))
        return EAGAIN;
    if (!real)
        real = (int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))dlsym(RTLD_NEXT, "pthread_create");
    return real(thread, attributes, run, argument);
}

int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes)
{
    static int (*real)(pthread_mutex_t *, const pthread_mutexattr_t *);
    if (refused(CALLER))
        return ENOMEM;
    if (!real)
        real = (int (*)(pthread_mutex_t *, const pthread_mutexattr_t *))dlsym(RTLD_NEXT, "pthread_mutex_init");
    return real(mutex, attributes);
}
