"""The host driver, and the controls with which tests make it late or broken.

Everything here acts on the whole process. `reset` puts all of it back; no other thread may be inside the driver then.
"""

import atexit

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from kvortex._c cimport KV_DRIVER_NUM_ROWS, kv_driver, kv_driver_rows
from kvortex.errors import ConfigError


cdef extern from "host_driver.h" nogil:
    const int KV_HOST_MAX_DEVICES, KV_HOST_CALL_RING

    ctypedef struct kv_host_live:
        size_t contexts, streams, events, device_allocations, host_allocations, registrations, reaped
        size_t pools, pool_allocations, reservations, physical_allocations

    const kv_driver *kv_host_driver()
    int kv_host_control_set_num_devices(int count)
    void kv_host_control_set_numa_node(int node)
    void kv_host_control_set_delay_us(uint32_t low, uint32_t high, uint64_t seed)
    void kv_host_control_hold()
    void kv_host_control_release()
    void kv_host_control_fail_call(uint64_t n, int code, int sticky, int row)
    int kv_host_control_fail_pending()
    ctypedef struct kv_host_stopped:
        long thread
        int row
    void kv_host_control_stop_calls(const uint8_t *rows)
    size_t kv_host_control_stopped(kv_host_stopped *calls, size_t capacity)
    int kv_host_control_step(long thread)
    void kv_host_control_count_calls(int enabled)
    uint64_t kv_host_control_num_calls(int row)
    size_t kv_host_control_last_calls(uint8_t *rows)
    void kv_host_control_kill(int ordinal, int code)
    int kv_host_control_begin_capture(void *stream, int mode)
    int kv_host_control_end_capture(void *stream, size_t *num_captured)
    void kv_host_control_live(kv_host_live *live)
    void kv_host_control_reset()
    void kv_host_control_stop()


cdef const kv_driver *host_table() noexcept nogil:
    return kv_host_driver()


# Work in flight must not write into memory that the interpreter is about to take down.
@atexit.register
def _stop():
    with nogil:
        kv_host_control_stop()


cdef int row_number(object field) except -2:
    if field is None:
        return -1
    for i in range(KV_DRIVER_NUM_ROWS):
        if kv_driver_rows[i].field.decode() == field:
            return i
    raise ValueError(f"field must be a row of the driver table, got {field!r}; see kvortex/driver.h")


cdef int require_ordinal(int ordinal) except -1:
    if not 0 <= ordinal < KV_HOST_MAX_DEVICES:
        raise ValueError(f"ordinal must be 0..{KV_HOST_MAX_DEVICES - 1}, got {ordinal}")
    return 0


def set_num_devices(int count):
    """Set how many host devices there are (2 at start), while none of them is open."""
    if kv_host_control_set_num_devices(count):
        raise ConfigError(
            f"the number of host devices must be 1..{KV_HOST_MAX_DEVICES} and can change only while none is open, "
            f"got {count}; close every Device first"
        )


def set_numa_node(int node):
    """Set what `Device.numa_node` of a host device answers; -1, as at start, is None."""
    kv_host_control_set_numa_node(node)


def set_delay_us(uint32_t low, uint32_t high, uint64_t seed=0):
    """Let every operation of every stream first sleep `low` to `high` microseconds; ``(0, 0)`` ends it."""
    kv_host_control_set_delay_us(low, high, seed)


def hold():
    """Close the gate in front of every stream operation, until `release`.

    Whatever waits for work blocks meanwhile: synchronize, frees, copies of unregistered host memory.
    """
    kv_host_control_hold()


def release():
    """Open the gate that `hold` closed."""
    with nogil:
        kv_host_control_release()


def fail_call(uint64_t n, int code, bint sticky=False, field=None):
    """Let the n-th driver call from now (1 is the next) answer `code` without doing its work.

    Parameters
    ----------
    n : int
        Which call; 0 disarms.
    code : int
        The `CUresult` to answer.
    sticky : bool
        The device of the calling thread's context is dead from then on.
    field : str, optional
        Count only calls of this row of the table, e.g. ``"event_query"``.
    """
    kv_host_control_fail_call(n, code, sticky, row_number(field))


def fail_pending():
    """Tell whether the failure that `fail_call` armed is still to come."""
    return bool(kv_host_control_fail_pending())


def stop_calls(*fields):
    """Let each call of these rows stop before it does anything, until `step`; without fields all of them go on."""
    cdef uint8_t[256] rows
    memset(rows, 0, sizeof(rows))
    for field in fields:
        rows[row_number(field)] = 1
    kv_host_control_stop_calls(rows if fields else NULL)


def stopped():
    """Return {native thread id: field} of the calls that stand still now."""
    cdef kv_host_stopped[64] calls
    cdef size_t count = kv_host_control_stopped(calls, 64)
    return {calls[i].thread: kv_driver_rows[calls[i].row].field.decode() for i in range(count)}


def step(long thread):
    """Let the call of this thread go on that stands still."""
    if kv_host_control_step(thread):
        raise ValueError(f"no call of thread {thread} stands still")


def count_calls(bint enabled=True):
    """Count driver calls from zero, or stop counting. Off at start, because it costs a lock per call."""
    kv_host_control_count_calls(enabled)


def num_calls(field=None):
    """Return how many calls were counted, of one row or of all."""
    return kv_host_control_num_calls(row_number(field))


def call_names():
    """Return the fields of the last calls counted, oldest first; at most 4096 of them."""
    cdef uint8_t rows[4096]
    assert KV_HOST_CALL_RING == sizeof(rows)
    cdef size_t count = kv_host_control_last_calls(rows)
    return [kv_driver_rows[rows[i]].field.decode() for i in range(count)]


def kill(int ordinal, int code):
    """Let every call on that device answer `code` from now on, and drop its queued work."""
    require_ordinal(ordinal)
    with nogil:
        kv_host_control_kill(ordinal, code)


def begin_capture(size_t stream, int mode=0):
    """Let the stream capture, as ``cuStreamBeginCapture`` does; mode 0 is GLOBAL. Returns the `CUresult`."""
    return kv_host_control_begin_capture(<void *>stream, mode)


def end_capture(size_t stream):
    """End the capture; return the `CUresult` and how many operations went into it instead of being executed."""
    cdef size_t num_captured = 0
    code = kv_host_control_end_capture(<void *>stream, &num_captured)
    return code, num_captured


def live_objects():
    """Count what lives: contexts, streams, events, allocations, registrations, pools, reserved address space.

    ``reaped`` counts the objects that were still alive when the last holder released their context, since `reset`.
    """
    cdef kv_host_live live
    with nogil:
        kv_host_control_live(&live)
    return live


def reset():
    """End gate, delay, failure, counting, captures, and revive dead devices; objects stay, queued work is finished."""
    with nogil:
        kv_host_control_reset()
