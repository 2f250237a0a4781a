"""What a call changes on its thread, the context and the capture mode, is put back, whichever of the calls fails."""

import ctypes
import subprocess

import numpy as np
import pytest
from driver_calls import Calls

import kvortex
from kvortex.driver import _host
from kvortex.driver._device import driver_rows

pytestmark = pytest.mark.host

CODES = (1, 2, 700)
SYMBOLS = {row: symbol for row, symbol, *_ in driver_rows()}

# A thread's stack of contexts and its mode, with a countdown to failures of each of the calls.
FAKE_DRIVER = """
#include "kvortex/context.h"
enum { PUSH, POP, CURRENT, EXCHANGE };
int failures[4], depth, mode;
void *stack[64];
static int fails(int call) { return failures[call] > 0 && failures[call]-- > 0 ? 2 : 0; }
static int push(void *context) { return fails(PUSH) ? 2 : (stack[depth++] = context, 0); }
static int pop(void **context) { return fails(POP) ? 2 : (*context = stack[--depth], 0); }
static int current(void **context) { return fails(CURRENT) ? 2 : (*context = depth ? stack[depth - 1] : NULL, 0); }
static int exchange(int *other)
{
    if (fails(EXCHANGE))
        return 2;
    int before = mode;
    mode = *other;
    *other = before;
    return 0;
}
static const kv_driver driver = {.ctx_push_current = push, .ctx_pop_current = pop, .ctx_get_current = current,
                                 .thread_exchange_stream_capture_mode = exchange};
int enter(void *context, int *before) { return kv_context_enter(&driver, context, before); }
void leave(void *context, int before) { kv_context_leave(&driver, context, before); }
void owner_pushes(void *context) { stack[depth++] = context; }
void owner_pops(void) { depth--; }
int row_of_push(void) { return KV_ROW_ctx_push_current; }
int row_of_pop(void) { return KV_ROW_ctx_pop_current; }
int row_of(int code) { return kv_result_row(code); }
"""
PUSH, POP, CURRENT, EXCHANGE = range(4)
OURS, OTHER, OWNERS = 0x1000, 0x2000, 0x3000


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "fake.c").write_text(FAKE_DRIVER)
    library = tmp_path / "fake.so"
    include = kvortex.get_include()
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-std=gnu11", "-I", include, tmp_path / "fake.c", "-o", library], check=True
    )
    return Fake(ctypes.CDLL(str(library)))


class Fake:
    def __init__(self, library):
        self.library = library
        self.failures = (ctypes.c_int * 4).in_dll(library, "failures")

    @property
    def state(self):
        depth = ctypes.c_int.in_dll(self.library, "depth").value
        stack = (ctypes.c_void_p * 64).in_dll(self.library, "stack")
        return list(stack[:depth]), ctypes.c_int.in_dll(self.library, "mode").value

    def call(self, context=OURS, failing=None, times=0):
        """Enter and leave, with the next calls of one kind failing from the leave on; the code of enter."""
        before = ctypes.c_int(-7)
        code = self.library.enter(ctypes.c_void_p(context), ctypes.byref(before))
        if code == 0:
            assert self.state[0][-1] == context and self.state[1] == 2
            if failing is not None:
                self.failures[failing] = times
            self.library.leave(ctypes.c_void_p(context), before)
        return code


@pytest.mark.parametrize("failing", [POP, EXCHANGE])
@pytest.mark.parametrize("next_context", [OURS, OTHER])
def test_what_was_left_behind_is_put_back_by_the_next_call_on_whichever_device(fake, failing, next_context):
    for times in (1, 2):
        fake.call(OURS, failing, times)
        assert (fake.state == ([], 0)) == (times == 1), "one failure is tried again at once"
        assert fake.call(next_context) == 0
        assert fake.state == ([], 0)


def test_a_call_that_cannot_put_back_what_was_left_pushes_nothing_more(fake):
    fake.call(OURS, POP, 4)
    for _ in range(2):
        code = fake.call(OURS)
        assert code & 0xFFFF == 2 and fake.library.row_of(code) == fake.library.row_of_pop()
        assert fake.state == ([OURS], 0)
    assert fake.call(OURS) == 0 and fake.state == ([], 0)


def test_what_the_owner_of_the_thread_pushed_over_it_is_not_popped(fake):
    fake.call(OURS, POP, 2)
    fake.library.owner_pushes(ctypes.c_void_p(OWNERS))
    assert fake.call(OTHER) == 0 and fake.state == ([OURS, OWNERS], 0)
    fake.library.owner_pops()
    assert fake.call(OTHER) == 0 and fake.state == ([], 0)


def test_a_context_that_cannot_be_entered_leaves_nothing(fake):
    for failing in (PUSH, EXCHANGE):
        fake.failures[failing] = 1
        code = fake.call()
        assert code & 0xFFFF == 2 and (fake.library.row_of(code) == fake.library.row_of_push()) == (failing == PUSH)
        assert fake.state == ([], 0)


@pytest.mark.parametrize("row", ["ctx_push_current", "ctx_pop_current", "thread_exchange_stream_capture_mode"])
@pytest.mark.parametrize("code", CODES)
def test_many_faults_leave_the_thread_as_it_was(device, stream, row, code):
    calls, buffer, data = Calls(device), kvortex.DeviceBuffer(64, device), np.zeros(64, np.uint8)
    before = calls.out("ctx_get_current", ctypes.c_void_p), mode_of(calls)
    for n in range(40):
        _host.fail_call(1 + n % 3, code, field=row)
        try:
            buffer.copy_from(data, stream=stream)
        except kvortex.DriverError as error:
            assert error.call == SYMBOLS[row]
        _host.fail_call(0, 0)
    buffer.copy_from(data, stream=stream)
    assert (calls.out("ctx_get_current", ctypes.c_void_p), mode_of(calls)) == before


def mode_of(calls):
    mode = ctypes.c_int(0)
    calls.ok("thread_exchange_stream_capture_mode", ctypes.byref(mode))
    now = mode.value
    calls.ok("thread_exchange_stream_capture_mode", ctypes.byref(mode))
    return now


def actions(device, stream):
    """Calls that end at their first failing driver call, or do without it."""
    buffer, other = kvortex.DeviceBuffer(64, device), kvortex.DeviceBuffer(64, device)
    event, data = kvortex.Event.create(device), np.zeros(64, np.uint8)
    pool = kvortex.DevicePool(1 << 20, device)
    return {
        "Device.open": lambda: kvortex.Device.open("host").close(),
        "Device.description": lambda: device.description,
        "Stream.create": lambda: kvortex.Stream.create(device).close(),
        "Stream.borrow": lambda: kvortex.Stream.borrow(device, stream.handle),
        "Stream.synchronize": stream.synchronize,
        "Stream.query": stream.query,
        "Stream.wait_event": lambda: stream.wait_event(event),
        "Event.create": lambda: kvortex.Event.create(device).close(),
        "Event.record": lambda: event.record(stream),
        "Event.synchronize": event.synchronize,
        "Event.query": event.query,
        "DeviceBuffer": lambda: kvortex.DeviceBuffer(64, device).close(),
        "copy_from": lambda: buffer.copy_from(data),
        "copy_to": lambda: buffer.copy_to(data),
        "copy_to device memory": lambda: buffer.copy_to(other),
        "copy_from device memory": lambda: buffer.copy_from(other, stream=stream),
        "fill": lambda: buffer.fill(1),
        "DevicePool": lambda: kvortex.DevicePool(1 << 20, device).close(),
        "DevicePool.alloc": lambda: pool.alloc(64, stream).close(),
        "DevicePool.arena": lambda: pool.arena(1 << 20).close(),
        "DevicePool.usage": pool.usage,
        "TransferQueue": lambda: kvortex.TransferQueue(device, "D2H", max_jobs=2).close(),
        "PinnedPool": lambda: kvortex.PinnedPool(4096, 4096, device).close(),
        "PinnedPool of the driver": lambda: kvortex.PinnedPool(4096, 4096, device, driver_allocated=True).close(),
    }


@pytest.mark.parametrize("name", [
    "Device.open", "Device.description", "Stream.create", "Stream.borrow", "Stream.synchronize", "Stream.query",
    "Stream.wait_event", "Event.create", "Event.record", "Event.synchronize", "Event.query", "DeviceBuffer",
    "copy_from", "copy_to", "copy_to device memory", "copy_from device memory", "fill", "DevicePool",
    "DevicePool.alloc", "DevicePool.arena", "DevicePool.usage", "TransferQueue", "PinnedPool",
    "PinnedPool of the driver",
])  # fmt: skip
def test_an_error_names_the_call_that_failed(device, stream, host, name):
    struck = 0
    for n in range(1, 60):
        call = actions(device, stream)[name]
        host.count_calls()
        host.fail_call(n, 999)
        try:
            call()
        except kvortex.DriverError as error:
            assert error.code == 999
            assert error.call == SYMBOLS[host.call_names()[n - 1]], f"call {n} of {name}"
            struck += 1
        reached = not host.fail_pending()
        host.reset()
        if not reached:
            break
    assert struck
