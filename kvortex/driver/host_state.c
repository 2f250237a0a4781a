/* The state that all parts of the host driver look at. See host_state.h. */

#include "host_state.h"

#include <unistd.h>

kv_host_device kv_host_devices[KV_HOST_MAX_DEVICES];
_Atomic int kv_host_initialized;
_Atomic int kv_host_num_devices = 2;
_Atomic int kv_host_numa_node = -1;
_Atomic size_t kv_host_num_reaped;
_Thread_local kv_host_thread kv_host_this_thread;
_Atomic unsigned int kv_host_unusual;

int kv_host_is_device(int ordinal)
{
    return ordinal >= 0 && ordinal < atomic_load(&kv_host_num_devices);
}

size_t kv_host_physical_bytes(void)
{
    return (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
}

kv_host_device *kv_host_device_of(uint64_t context)
{
    size_t i = context & 0xff;
    if (context >> 48 != KV_HOST_CONTEXT_TAG >> 48 || i >= KV_HOST_MAX_DEVICES)
        return NULL;
    return atomic_load(&kv_host_devices[i].context) == context ? &kv_host_devices[i] : NULL;
}

kv_host_device *kv_host_current_device(void)
{
    const kv_host_thread *self = &kv_host_this_thread;
    return self->num_contexts ? kv_host_device_of(self->contexts[self->num_contexts - 1]) : NULL;
}

void kv_host_set_unusual(unsigned int bits, int on)
{
    if (on)
        atomic_fetch_or(&kv_host_unusual, bits);
    else
        atomic_fetch_and(&kv_host_unusual, ~bits);
}
