"""What a call changes on its thread, the context and the capture mode, is put back, whichever of the calls fails."""

import ctypes
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from driver_calls import Calls

import kvortex
from kvortex.driver import _host
from kvortex.driver._device import driver_rows

pytestmark = pytest.mark.host

OUT_OF_MEMORY = 2
CODES = (1, OUT_OF_MEMORY, 700)
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


ACTIONS = {
    "Device.open": lambda parts: kvortex.Device.open("host"),
    "Device.description": lambda parts: parts.device.description,
    "Device.cuda_version": lambda parts: parts.device.cuda_version,
    "Stream.create": lambda parts: kvortex.Stream.create(parts.device),
    "Stream.borrow": lambda parts: kvortex.Stream.borrow(parts.device, parts.stream.handle),
    "Stream.synchronize": lambda parts: parts.stream.synchronize(),
    "Stream.query": lambda parts: parts.stream.query(),
    "Stream.wait_event": lambda parts: parts.stream.wait_event(parts.event),
    "Event.create": lambda parts: kvortex.Event.create(parts.device),
    "Event.record": lambda parts: parts.event.record(parts.stream),
    "Event.synchronize": lambda parts: parts.event.synchronize(),
    "Event.query": lambda parts: parts.event.query(),
    "DeviceBuffer": lambda parts: kvortex.DeviceBuffer(64, parts.device),
    "copy_from": lambda parts: parts.buffer.copy_from(parts.data),
    "copy_to": lambda parts: parts.buffer.copy_to(parts.data),
    "copy_to device memory": lambda parts: parts.buffer.copy_to(parts.other),
    "copy_from device memory": lambda parts: parts.buffer.copy_from(parts.other, stream=parts.stream),
    "fill": lambda parts: parts.buffer.fill(1),
    "DevicePool": lambda parts: kvortex.DevicePool(1 << 20, parts.device),
    "DevicePool.alloc": lambda parts: parts.pool.alloc(64, parts.stream),
    "DevicePool.arena": lambda parts: parts.pool.arena(1 << 20),
    "DevicePool.usage": lambda parts: parts.pool.usage(),
    "DevicePool.trim": lambda parts: parts.pool.trim(),
    "DeviceArena.grow": lambda parts: parts.pool.arena(1 << 20).grow(64),
    "PooledBuffer on other streams": lambda parts: use_on_other_streams(parts),
    "TransferQueue": lambda parts: kvortex.TransferQueue(parts.device, "D2H", max_jobs=2),
    "PinnedPool": lambda parts: kvortex.PinnedPool(4096, 4096, parts.device),
    "PinnedPool of two chunks": lambda parts: register_in_the_background(parts),
    "PinnedPool of the driver": lambda parts: kvortex.PinnedPool(4096, 4096, parts.device, driver_allocated=True),
}


@pytest.fixture
def parts(device, stream):
    with (
        kvortex.DeviceBuffer(64, device) as buffer,
        kvortex.DeviceBuffer(64, device) as other,
        kvortex.DevicePool(64 << 20, device) as pool,
        kvortex.Event.create(device) as event,
        kvortex.Stream.create(device) as other_stream,
    ):
        data = np.zeros(64, np.uint8)
        yield SimpleNamespace(
            device=device,
            stream=stream,
            other_stream=other_stream,
            buffer=buffer,
            other=other,
            pool=pool,
            event=event,
            data=data,
        )


def use_on_other_streams(parts):
    _host.set_delay_us(1000, 1000)  # so that the memory is not there yet, and another stream waits for it
    try:
        buffer = parts.pool.alloc(64, parts.stream)
        buffer.fill(1, stream=parts.other_stream)
        buffer.free(parts.stream)
    finally:
        _host.set_delay_us(0, 0)


def register_in_the_background(parts):
    with kvortex.PinnedPool(8192, 4096, parts.device, first_chunk_bytes=4096, chunk_bytes=4096) as pool:
        pool.wait_ready()


@pytest.mark.parametrize("part", ["driver", "memory"])
def test_nobody_types_the_name_of_a_call(part):
    for path in (Path(kvortex.__file__).parent / part).glob("*.pyx"):
        assert re.findall(r'\bb"cu[A-Z]\w+', path.read_text()) == [], path


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("code", [1, OUT_OF_MEMORY, 400, 600])
def test_an_error_names_the_call_that_failed(parts, host, name, code):
    for n in range(1, 60):  # a wait may ask more often than that
        host.count_calls()
        host.fail_call(n, code)
        made = None
        try:
            made = ACTIONS[name](parts)
        except ValueError:  # what these rows answer tells about the argument; the same code of another row does not
            assert host.call_names()[n - 1] in {"stream_is_capturing", "stream_get_ctx", "device_get_attribute"}
        except (kvortex.DriverError, kvortex.PoolExhausted) as error:
            failed = SYMBOLS[host.call_names()[n - 1]]
            assert failed in (error.call if isinstance(error, kvortex.DriverError) else str(error)), f"call {n}"
            assert isinstance(error, kvortex.DriverError) or code == OUT_OF_MEMORY
        reached = not host.fail_pending()
        host.fail_call(0, 0)
        if hasattr(made, "close"):
            made.close()
        if not reached:
            break
    assert n > 1
