"""The host driver's controls: late streams, failing calls, dead devices, captures; and that it leaks nothing."""

import ctypes
import os
import random
import subprocess
import sys
import threading

import pytest
from driver_calls import (
    CAPTURE_IMPLICIT,
    CAPTURE_INVALIDATED,
    CAPTURE_ISOLATION,
    CAPTURE_UNSUPPORTED,
    ILLEGAL_ADDRESS,
    INVALID_HANDLE,
    INVALID_VALUE,
    OUT_OF_MEMORY,
    Attributes,
    Calls,
)

from kvortex.driver import Device, DeviceBuffer, Event, Stream, _host
from kvortex.errors import DriverError

pytestmark = pytest.mark.host

PIECE = 256
RELAXED = 2


@pytest.fixture
def pinned(calls):
    """Device memory of 4 pieces and pinned memory of as many, filled with 1."""
    device, host = calls.alloc(4 * PIECE), calls.host_alloc(4 * PIECE)
    ctypes.memset(host, 1, 4 * PIECE)
    return device, host


def test_nothing_runs_while_the_gate_is_held(calls, stream, event, pinned):
    device, host = pinned
    calls.ok("memset_d8_async", device, 0, PIECE, stream.handle)
    stream.synchronize()
    _host.hold()
    calls.ok("memcpy_dtoh_async", host, device, PIECE, stream.handle)
    event.record(stream)
    assert not stream.query() and not event.query()
    assert ctypes.string_at(host, PIECE) == bytes([1]) * PIECE
    _host.release()
    event.synchronize()
    assert ctypes.string_at(host, PIECE) == bytes(PIECE)


def test_wait_holds_back_another_stream_until_the_event(calls, device, stream, event, pinned):
    """Each operation takes a while, and the other stream has many: without the wait the copy would overtake them."""
    source, host = pinned
    _host.set_delay_us(200, 400, 1)
    with Stream.create(device) as late:
        for last in (20, 40, 60):
            for value in range(last - 19, last + 1):
                calls.ok("memset_d8_async", source, value, PIECE, late.handle)
            event.record(late)
            stream.wait_event(event)
            calls.ok("memcpy_dtoh_async", host, source, PIECE, stream.handle)
            stream.synchronize()
            assert ctypes.string_at(host, PIECE) == bytes([last]) * PIECE


def test_earlier_wait_does_not_follow_a_later_record(calls, device, stream, event):
    """The event is recorded again on a stream that waits for the first waiter: following it would be a deadlock."""
    with Stream.create(device) as waiting, Event.create(device) as done:
        _host.hold()
        event.record(stream)
        waiting.wait_event(event)
        done.record(waiting)
        stream.wait_event(done)
        event.record(stream)
        _host.release()
        waiting.synchronize()
        event.synchronize()


def test_pieces_of_one_batch_have_no_order(calls, stream, pinned):
    """Overlapping pieces in one call are a mistake; the result must show it, sooner or later."""
    device, host = pinned
    for i in range(4):
        ctypes.memset(host + i * PIECE, i, PIECE)
    seen = set()
    for _ in range(100):
        targets, sources = [device] * 4, [host + i * PIECE for i in range(4)]
        assert calls.copy_batch(stream.handle, targets, sources, [PIECE] * 4)[0] == 0
        seen.add(calls.bytes_of(device, 1, stream.handle)[0])
    assert seen == {0, 1, 2, 3}


def test_batch_names_the_piece_that_is_wrong(calls, stream, pinned):
    device, host = pinned
    code, failed = calls.copy_batch(
        stream.handle, [device, device + PIECE], [host, host + 3 * PIECE + 1], [PIECE, PIECE]
    )
    assert (code, failed) == (INVALID_VALUE, 1)
    code, failed = calls.copy_batch(stream.handle, [device], [host], [PIECE])
    assert code == 0


@pytest.mark.parametrize(("order", "found"), [(1, 7), (2, 1), (3, 1)])
def test_batch_reads_in_stream_order_only_if_that_is_asked_for(calls, stream, pinned, order, found):
    """CUDA's other orders (during the call, any) allow an early read; here it always comes."""
    device, host = pinned
    calls.ok("memcpy_htod_async", device, host, 4 * PIECE, stream.handle)
    stream.synchronize()
    _host.hold()
    calls.ok("memset_d8_async", device, 7, 2 * PIECE, stream.handle)
    targets, sources = [device + 2 * PIECE, device + 3 * PIECE], [device, device + PIECE]
    attributes = Attributes(source_access_order=order)
    assert calls.copy_batch(stream.handle, targets, sources, [PIECE] * 2, attributes)[0] == 0
    _host.release()
    stream.synchronize()
    assert calls.bytes_of(device + 2 * PIECE, 2 * PIECE, stream.handle) == bytes([found]) * 2 * PIECE


def test_memory_that_no_driver_call_gave_serves_as_device_memory(calls, stream, pinned):
    _, host = pinned
    foreign = ctypes.create_string_buffer(4 * PIECE)
    calls.ok("memcpy_htod_async", ctypes.addressof(foreign), host, 4 * PIECE, stream.handle)
    stream.synchronize()
    assert foreign.raw == bytes([1]) * 4 * PIECE


def test_work_on_a_stream_of_another_device_is_refused(calls, pinned):
    device, host = pinned
    with Device.open("host:1") as other, Stream.create(other) as stream, Event.create(other) as event:
        assert calls.memcpy_htod_async(device, host, PIECE, stream.handle) == INVALID_HANDLE
        assert calls.memset_d8_async(device, 0, PIECE, stream.handle) == INVALID_HANDLE
        assert calls.event_record(event.handle, None) == INVALID_HANDLE


def test_event_of_another_device_can_be_waited_for(device, stream):
    with Device.open("host:1") as other, Stream.create(other) as theirs, Event.create(other) as event:
        _host.hold()
        event.record(theirs)
        stream.wait_event(event)
        assert not stream.query()
        _host.release()
        stream.synchronize()
        assert event.query()


def test_nth_call_fails_once_without_doing_its_work(calls, stream, pinned):
    device, host = pinned
    calls.ok("memset_d8_async", device, 0, PIECE, stream.handle)
    _host.fail_call(2, ILLEGAL_ADDRESS, field="memcpy_htod_async")
    calls.ok("memcpy_htod_async", device + PIECE, host, PIECE, stream.handle)
    assert _host.fail_pending()
    assert calls.memcpy_htod_async(device, host, PIECE, stream.handle) == ILLEGAL_ADDRESS
    assert not _host.fail_pending()
    assert calls.bytes_of(device, PIECE, stream.handle) == bytes(PIECE)
    calls.ok("memcpy_htod_async", device, host, PIECE, stream.handle)


def test_sticky_failure_kills_the_device(calls, stream, event):
    _host.fail_call(1, ILLEGAL_ADDRESS, sticky=True, field="event_record")
    with pytest.raises(DriverError):
        event.record(stream)
    for use in (stream.query, stream.synchronize, event.query, event.synchronize):
        with pytest.raises(DriverError) as caught:
            use()
        assert caught.value.code == ILLEGAL_ADDRESS


def test_calls_are_counted_in_order(calls, stream):
    _host.count_calls()
    stream.query()
    assert _host.call_names() == [
        "ctx_push_current",
        "thread_exchange_stream_capture_mode",
        "stream_query",
        "thread_exchange_stream_capture_mode",
        "ctx_pop_current",
    ]
    assert _host.num_calls() == 5 and _host.num_calls("stream_query") == 1
    _host.count_calls(False)
    stream.query()
    assert _host.num_calls() == 5
    with pytest.raises(ValueError, match="no_such_row"):
        _host.num_calls("no_such_row")


def test_dead_device_answers_its_code_and_drops_its_work(calls, device, stream, event, pinned):
    memory, host = pinned
    ready = Event.create(device)
    _host.hold()
    calls.ok("memcpy_dtoh_async", host, memory, PIECE, stream.handle)
    event.record(stream)
    _host.kill(0, ILLEGAL_ADDRESS)
    assert calls.event_query(event.handle) == ILLEGAL_ADDRESS
    assert calls.event_query(ready.handle) == ILLEGAL_ADDRESS
    assert calls.stream_synchronize(stream.handle) == ILLEGAL_ADDRESS
    assert calls.mem_alloc(ctypes.byref(ctypes.c_uint64()), 64) == ILLEGAL_ADDRESS
    assert calls.mem_host_unregister(host) == ILLEGAL_ADDRESS
    _host.reset()
    assert ctypes.string_at(host, PIECE) == bytes([1]) * PIECE


def test_death_wakes_those_who_wait(calls, stream, event):
    _host.hold()
    event.record(stream)
    answers = []
    waiters = [
        threading.Thread(target=lambda row=row, handle=handle: answers.append(getattr(calls, row)(handle)))
        for row, handle in [("event_synchronize", event.handle), ("stream_synchronize", stream.handle)]
    ]
    for waiter in waiters:
        waiter.start()
    _host.kill(0, ILLEGAL_ADDRESS)
    for waiter in waiters:
        waiter.join(30)
    assert answers == [ILLEGAL_ADDRESS] * 2


def test_death_of_one_device_leaves_the_other_alone(device):
    with DeviceBuffer(64, "host:1") as buffer:
        _host.kill(0, ILLEGAL_ADDRESS)
        buffer.fill(3)
        target = bytearray(64)
        buffer.copy_to(target)
        assert target == bytes([3]) * 64


def test_last_release_of_the_context_takes_its_objects_along():
    with Device.open("host:1") as device:
        before = _host.live_objects()
        objects = [Stream.create(device), Event.create(device), DeviceBuffer(64, device)]
        assert len(objects) == 3
    after = _host.live_objects()
    assert after["reaped"] - before["reaped"] == 4  # the buffer has a stream of its own
    assert after["contexts"] == before["contexts"] - 1
    with Device.open("host:1") as device:
        assert Calls(device).stream_query(objects[0].handle) == INVALID_HANDLE


def test_end_of_a_context_does_not_wait_for_other_devices(device, stream):
    with Stream.create(device) as destroyed:
        _host.hold()
        Event.create(device).record(stream)
        Event.create(device).record(destroyed)
    with DeviceBuffer(64, "host:1") as buffer:
        assert buffer.address
    _host.release()
    stream.synchronize()


def test_closing_returns_every_object(device):
    before = _host.live_objects()
    for _ in range(3):
        with Stream.create(device) as stream, Event.create(device) as event, DeviceBuffer(1 << 16, device) as buffer:
            event.record(stream)
            buffer.fill(1, stream=stream)
    stream = Stream.create(device)
    del stream
    assert _host.live_objects() == before


def test_destroyed_stream_still_does_what_was_submitted(calls, device, event, pinned):
    memory, host = pinned
    stream = Stream.create(device)
    _host.hold()
    calls.ok("memset_d8_async", memory, 9, PIECE, stream.handle)
    calls.ok("memcpy_dtoh_async", host, memory, PIECE, stream.handle)
    event.record(stream)
    stream.close()
    _host.release()
    event.synchronize()
    assert ctypes.string_at(host, PIECE) == bytes([9]) * PIECE


def test_free_waits_for_the_work_that_uses_the_memory(calls, stream):
    host = calls.host_alloc(1 << 16)
    memory = calls.alloc(1 << 16)
    _host.set_delay_us(1000, 3000, 2)
    for _ in range(5):
        calls.ok("memcpy_dtoh_async", host, memory, 1 << 16, stream.handle)
    calls.ok("mem_free", memory)
    assert stream.query()


def blocking_stream(calls):
    return calls.out("stream_create", ctypes.c_void_p, 0)


@pytest.mark.parametrize(
    "unsafe",
    [
        lambda calls, event: calls.mem_alloc(ctypes.byref(ctypes.c_uint64()), 64),
        lambda calls, event: calls.mem_host_alloc(ctypes.byref(ctypes.c_void_p()), 64, 0),
        lambda calls, event: calls.event_query(event),
        lambda calls, event: calls.event_synchronize(event),
        lambda calls, event: calls.stream_synchronize(None),
    ],
)
def test_unsafe_call_beside_a_global_capture_spoils_it(calls, device, stream, event, unsafe):
    with Stream.create(device) as capturing:
        assert _host.begin_capture(capturing.handle) == 0
        assert unsafe(calls, event.handle) == CAPTURE_UNSUPPORTED
        status = ctypes.c_int()
        calls.ok("stream_is_capturing", capturing.handle, ctypes.byref(status))
        assert status.value == 2
        assert _host.end_capture(capturing.handle)[0] == CAPTURE_INVALIDATED


def test_unsafe_call_in_relaxed_mode_leaves_the_capture_alone(calls, device, event):
    mode = ctypes.c_int(RELAXED)
    with Stream.create(device) as capturing:
        assert _host.begin_capture(capturing.handle) == 0
        calls.ok("thread_exchange_stream_capture_mode", ctypes.byref(mode))
        calls.ok("event_query", event.handle)
        calls.ok("mem_free", calls.alloc(64))
        calls.ok("thread_exchange_stream_capture_mode", ctypes.byref(mode))
        assert _host.end_capture(capturing.handle) == (0, 0)


def test_work_on_a_capturing_stream_is_captured_not_executed(calls, device, stream, event, pinned):
    memory, host = pinned
    with Stream.create(device) as capturing:
        assert _host.begin_capture(capturing.handle) == 0
        calls.ok("memcpy_dtoh_async", host, memory, PIECE, capturing.handle)
        calls.ok("event_record", event.handle, capturing.handle)
        assert calls.stream_wait_event(stream.handle, event.handle, 0) == CAPTURE_ISOLATION
        assert _host.end_capture(capturing.handle) == (0, 2)
    assert ctypes.string_at(host, PIECE) == bytes([1]) * PIECE


def test_legacy_stream_beside_a_blocking_capture_is_implicit(calls, device, event):
    capturing = blocking_stream(calls)
    assert _host.begin_capture(capturing) == 0
    status = ctypes.c_int()
    assert calls.stream_is_capturing(None, ctypes.byref(status)) == CAPTURE_IMPLICIT
    with pytest.raises(ValueError, match="legacy default stream while a blocking stream captures"):
        event.record(0)
    assert _host.end_capture(capturing) == (0, 0)
    assert _host.begin_capture(capturing) == 0
    assert calls.event_record(event.handle, None) == CAPTURE_IMPLICIT
    assert _host.end_capture(capturing)[0] == CAPTURE_INVALIDATED
    calls.ok("stream_destroy", capturing)


def test_capture_ends_with_its_stream(device, event):
    stream = Stream.create(device)
    assert _host.begin_capture(stream.handle) == 0
    stream.close()
    with Stream.create(device) as successor:
        event.record(successor)
        event.synchronize()


@pytest.fixture
def pool(calls):
    """A pool of two pages that keeps what it has."""
    made = calls.pool(2 * 4096)
    calls.ok("mem_pool_set_attribute", made, 4, ctypes.byref(ctypes.c_uint64(1 << 40)))
    yield made
    calls.mem_pool_destroy(made)


def test_freed_memory_is_not_reused_by_another_stream_before_the_free_is_over(calls, device, stream, pool):
    with Stream.create(device) as other:
        first = calls.pool_alloc(pool, 4096, stream.handle)
        _host.hold()
        calls.ok("mem_free_async", first, stream.handle)
        second = calls.pool_alloc(pool, 4096, other.handle)
        assert second != first
        assert calls.pool_bytes(pool, 7) == 2 * 4096  # the free is still to come
        _host.release()
        stream.synchronize()
        assert calls.pool_bytes(pool, 7) == 4096
        assert calls.pool_alloc(pool, 4096, other.handle) == first


def test_freed_memory_is_reused_by_its_own_stream_at_once(calls, stream, pool):
    first = calls.pool_alloc(pool, 4096, stream.handle)
    _host.hold()
    calls.ok("mem_free_async", first, stream.handle)
    assert calls.pool_alloc(pool, 4000, stream.handle) == first


def test_at_the_limit_a_stream_waits_for_the_free_of_another(calls, device, stream, pool):
    """The order of the streams decides what is read, although the second stream has nothing else to do."""
    host = calls.host_alloc(2 * 4096)
    with Stream.create(device) as other:
        first = calls.pool_alloc(pool, 2 * 4096, stream.handle)
        calls.ok("memset_d8_async", first, 1, 2 * 4096, stream.handle)
        _host.set_delay_us(5000, 5000)
        calls.ok("memcpy_dtoh_async", host, first, 2 * 4096, stream.handle)
        calls.ok("mem_free_async", first, stream.handle)
        assert calls.pool_alloc(pool, 2 * 4096, other.handle) == first
        calls.ok("memset_d8_async", first, 2, 2 * 4096, other.handle)
        other.synchronize()
        assert ctypes.string_at(host, 2 * 4096) == bytes([1]) * 2 * 4096


def test_memory_freed_to_a_pool_is_refused_at_once(calls, stream, pool, pinned):
    memory, host = pinned
    freed = calls.pool_alloc(pool, PIECE, stream.handle)
    calls.ok("mem_free_async", freed, stream.handle)
    for use in (
        lambda: calls.memcpy_htod_async(freed, host, PIECE, stream.handle),
        lambda: calls.memcpy_dtod_async(memory, freed, PIECE, stream.handle),
        lambda: calls.memset_d8_async(freed, 0, PIECE, stream.handle),
        lambda: calls.pointer_get_attribute(ctypes.byref(ctypes.c_uint()), 2, freed),
        lambda: calls.mem_free(freed),
        lambda: calls.copy_batch(stream.handle, [freed], [host], [PIECE])[0],
    ):
        assert use() == INVALID_VALUE


def test_pool_gives_idle_memory_back_for_another_size(calls, stream, pool):
    for size in (4096, 2 * 4096, 4096):
        calls.ok("mem_free_async", calls.pool_alloc(pool, size, stream.handle), stream.handle)
        stream.synchronize()
        assert calls.pool_bytes(pool, 5) == size
    answer = ctypes.c_uint64()
    assert calls.mem_alloc_from_pool_async(ctypes.byref(answer), 3 * 4096, pool, stream.handle) == OUT_OF_MEMORY


def test_capturing_stream_allocates_nothing(calls, device, pool):
    with Stream.create(device) as capturing:
        memory = calls.pool_alloc(pool, PIECE, capturing.handle)
        assert _host.begin_capture(capturing.handle) == 0
        answer = ctypes.c_uint64()
        code = calls.mem_alloc_from_pool_async(ctypes.byref(answer), PIECE, pool, capturing.handle)
        assert code == calls.mem_free_async(memory, capturing.handle) == CAPTURE_UNSUPPORTED
        assert calls.ctx_synchronize() == CAPTURE_UNSUPPORTED
        assert _host.end_capture(capturing.handle)[0] == CAPTURE_INVALIDATED


def test_address_space_is_refused_wherever_nothing_is_mapped(calls, stream, pinned):
    memory, host = pinned
    unit = calls.granularity()
    address = calls.out("mem_address_reserve", ctypes.c_uint64, 4 * unit, 0, 0, 0)
    handles = [calls.physical(unit) for _ in range(2)]
    for index, handle in zip((1, 2), handles, strict=True):
        calls.ok("mem_map", address + index * unit, unit, 0, handle, 0)
    assert calls.memset_d8_async(address + unit, 1, PIECE, stream.handle) == INVALID_VALUE  # no access yet
    assert calls.set_access(address + unit, 2 * unit) == 0
    calls.ok("memset_d8_async", address + unit, 1, 2 * unit, stream.handle)
    for start in (address, address + unit - PIECE, address + 3 * unit - PIECE, address + 3 * unit):
        assert calls.memcpy_htod_async(start, host, 2 * PIECE, stream.handle) == INVALID_VALUE
        assert calls.copy_2d(stream.handle, memory, PIECE, start, 2 * PIECE, PIECE, 2) == INVALID_VALUE
    assert calls.mem_address_free(address, 4 * unit) == INVALID_VALUE
    assert calls.mem_unmap(address + unit, unit + unit // 2) == INVALID_VALUE
    calls.ok("mem_unmap", address + unit, 2 * unit)
    assert calls.memset_d8_async(address + unit, 1, PIECE, stream.handle) == INVALID_VALUE
    for handle in handles:
        calls.ok("mem_release", handle)
        assert calls.mem_release(handle) == INVALID_VALUE
    calls.ok("mem_address_free", address, 4 * unit)


def test_copies_across_two_address_spaces_are_refused(calls, stream):
    """They may lie side by side, and are two all the same."""
    unit = calls.granularity()
    spaces = [calls.out("mem_address_reserve", ctypes.c_uint64, unit, 0, 0, 0) for _ in range(4)]
    for address in spaces:
        calls.ok("mem_map", address, unit, 0, calls.physical(unit), 0)
        assert calls.set_access(address, unit) == 0
        assert calls.memset_d8_async(address, 1, unit + 1, stream.handle) == INVALID_VALUE
    low, high = sorted(spaces)[:2]
    assert calls.copy_2d(stream.handle, spaces[2], PIECE, low, high - low, PIECE, 2) == INVALID_VALUE


def test_unmapping_waits_for_the_work_that_uses_the_memory(calls, stream):
    unit, host = calls.granularity(), calls.host_alloc(1 << 16)
    address = calls.out("mem_address_reserve", ctypes.c_uint64, unit, 0, 0, 0)
    calls.ok("mem_map", address, unit, 0, calls.physical(unit), 0)
    assert calls.set_access(address, unit) == 0
    _host.set_delay_us(1000, 3000, 2)
    for _ in range(5):
        calls.ok("memcpy_dtoh_async", host, address, 1 << 16, stream.handle)
    calls.ok("mem_unmap", address, unit)
    assert stream.query()


def test_the_end_of_a_context_takes_pools_and_address_space_along():
    before = _host.live_objects()
    with Device.open("host:0") as device, Stream.create(device) as stream:
        calls = Calls(device)
        context = calls.out("device_primary_ctx_retain", ctypes.c_void_p, 0)
        calls.ok("ctx_push_current", context)
        pool, unit = calls.pool(), calls.granularity()
        for _ in range(3):
            calls.ok("mem_free_async", calls.pool_alloc(pool, PIECE, stream.handle), stream.handle)
        assert calls.pool_alloc(pool, PIECE, stream.handle)
        address = calls.out("mem_address_reserve", ctypes.c_uint64, 2 * unit, 0, 0, 0)
        calls.ok("mem_map", address, unit, 0, calls.physical(unit), 0)
        assert calls.set_access(address, unit) == 0
        assert calls.physical(unit)
        calls.ok("ctx_pop_current", ctypes.byref(ctypes.c_void_p()))
        calls.ok("device_primary_ctx_release", 0)
    after = _host.live_objects()
    assert after.pop("reaped") - before.pop("reaped") == 5  # pool, allocation, address space, two of physical memory
    assert after == before


def test_interpreter_exits_with_work_in_flight():
    program = """
import numpy as np
from kvortex.driver import DeviceBuffer, Stream, _host
buffer = DeviceBuffer(1 << 20, "host")
stream = Stream.create(buffer.device)
_host.set_delay_us(1000, 2000)
for _ in range(1000):
    buffer.fill(1, stream=stream)
_host.hold()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30, env=os.environ)


def test_many_threads_share_a_device(device, seed):
    """Each thread moves blocks through its own stream and buffer; every byte comes back."""
    _host.set_delay_us(0, 20, seed)
    wrong = []

    def work(number):
        rng = random.Random(seed + number)
        with DeviceBuffer(4096, device) as buffer, Stream.create(device) as stream:
            for _ in range(50):
                content, target = rng.randbytes(4096), bytearray(4096)
                buffer.copy_from(content, stream=stream)
                buffer.copy_to(target, stream=stream)
                stream.synchronize()
                wrong.extend([number] if target != content else [])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
