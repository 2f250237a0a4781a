"""The contract of a driver table, row by row. It holds for CUDA and for the host driver."""

import ctypes
import random
from importlib import resources

import pytest
from driver_calls import (
    ALREADY_REGISTERED,
    CAPTURE_INVALIDATED,
    CAPTURE_UNSUPPORTED,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_VALUE,
    KIND,
    NOT_FOUND,
    NOT_REGISTERED,
    OUT_OF_MEMORY,
    AllocationProps,
    Attributes,
    Location,
    PoolProps,
    begin_capture,
    end_capture,
)

from kvortex.driver import Stream, _host

PIECE = 512


def pattern(nbytes, seed):
    return random.Random(seed).randbytes(nbytes)


def pinned_bytes(calls, content):
    address = calls.host_alloc(len(content))
    ctypes.memmove(address, content, len(content))
    return address


def test_bytes_survive_the_way_to_the_device_and_back(calls, stream, seed):
    content = pattern(1 << 20, seed)
    host, device = pinned_bytes(calls, content), calls.alloc(1 << 20)
    calls.ok("memcpy_htod_async", device, host, 1 << 20, stream.handle)
    assert calls.bytes_of(device, 1 << 20, stream.handle) == content


def test_copies_of_one_stream_run_in_order(calls, stream, seed):
    first, second = calls.alloc(PIECE), calls.alloc(PIECE)
    for step in range(20):
        content = pattern(PIECE, seed + step)
        host = pinned_bytes(calls, content)
        calls.ok("memcpy_htod_async", first, host, PIECE, stream.handle)
        calls.ok("memcpy_dtod_async", second, first, PIECE, stream.handle)
        calls.ok("memset_d8_async", first, 0, PIECE, stream.handle)
        assert calls.bytes_of(second, PIECE, stream.handle) == content
        assert calls.bytes_of(first, PIECE, stream.handle) == bytes(PIECE)


def test_pageable_source_may_be_overwritten_after_the_call(calls, stream, seed):
    content = pattern(PIECE, seed)
    source, device = ctypes.create_string_buffer(content, PIECE), calls.alloc(PIECE)
    calls.ok("memcpy_htod_async", device, source, PIECE, stream.handle)
    ctypes.memset(source, 0, PIECE)
    assert calls.bytes_of(device, PIECE, stream.handle) == content


def test_pageable_target_is_filled_when_the_call_returns(calls, stream, seed):
    content = pattern(PIECE, seed)
    device, target = calls.alloc(PIECE), ctypes.create_string_buffer(PIECE)
    calls.ok("memcpy_htod_async", device, pinned_bytes(calls, content), PIECE, stream.handle)
    calls.ok("memcpy_dtoh_async", target, device, PIECE, stream.handle)
    assert target.raw == content


def test_strided_copy_moves_each_row_and_nothing_between(calls, stream, seed):
    rows, source_pitch, target_pitch = 7, 3 * PIECE, PIECE
    content = pattern(rows * source_pitch, seed)
    source, target = calls.alloc(rows * source_pitch), calls.alloc(rows * target_pitch)
    calls.ok("memcpy_htod_async", source, pinned_bytes(calls, content), len(content), stream.handle)
    assert calls.copy_2d(stream.handle, source, source_pitch, target, target_pitch, PIECE, rows) == 0
    expected = b"".join(content[row * source_pitch :][:PIECE] for row in range(rows))
    assert calls.bytes_of(target, rows * target_pitch, stream.handle) == expected
    calls.ok("memset_d8_async", source, 0, len(content), stream.handle)
    assert calls.copy_2d(stream.handle, target, target_pitch, source, source_pitch, PIECE, rows) == 0
    expected = b"".join(content[row * source_pitch :][:PIECE] + bytes(2 * PIECE) for row in range(rows))
    assert calls.bytes_of(source, len(content), stream.handle) == expected


def test_batch_copy_moves_every_piece(calls, stream, seed):
    n = 300
    content = pattern(n * PIECE, seed)
    source, target = calls.alloc(n * PIECE), calls.alloc(n * PIECE)
    order = random.Random(seed).sample(range(n), n)
    calls.ok("memcpy_htod_async", source, pinned_bytes(calls, content), len(content), stream.handle)
    targets, sources = [target + i * PIECE for i in range(n)], [source + i * PIECE for i in order]
    assert calls.copy_batch(stream.handle, targets, sources, [PIECE] * n)[0] == 0
    expected = b"".join(content[i * PIECE :][:PIECE] for i in order)
    assert calls.bytes_of(target, n * PIECE, stream.handle) == expected


@pytest.mark.parametrize("n", [1, 40])
def test_batch_copy_moves_pageable_memory(calls, stream, seed, n):
    content = pattern(n * PIECE, seed)
    source, target = ctypes.create_string_buffer(content, n * PIECE), calls.host_alloc(n * PIECE)
    back = ctypes.create_string_buffer(n * PIECE)

    def places(start):
        return [start + i * PIECE for i in range(n)]

    for into, out_of in ((target, ctypes.addressof(source)), (ctypes.addressof(back), target)):
        assert calls.copy_batch(stream.handle, places(into), places(out_of), [PIECE] * n)[0] == 0
        calls.ok("stream_synchronize", stream.handle)
    assert back.raw == content


@pytest.mark.parametrize("handle", [0, 1])
def test_batch_copy_on_the_legacy_stream_is_refused(calls, handle):
    source, target = calls.alloc(PIECE), calls.alloc(PIECE)
    assert calls.copy_batch(handle, [target], [source], [PIECE])[0] == INVALID_VALUE


def test_batch_copy_without_an_access_order_is_refused(calls, stream):
    source, target = calls.alloc(PIECE), calls.alloc(PIECE)
    assert calls.copy_batch(stream.handle, [target], [source], [PIECE], Attributes())[0] == INVALID_VALUE


def test_copy_past_the_end_of_an_allocation_is_refused(calls, stream):
    nbytes = 4 << 20  # large, so that CUDA gives it pages of its own
    device, host = calls.alloc(nbytes), calls.host_alloc(2 * nbytes)
    assert calls.memcpy_htod_async(device + PIECE, host, nbytes, stream.handle) == INVALID_VALUE
    assert calls.memcpy_dtoh_async(host, device + PIECE, nbytes, stream.handle) == INVALID_VALUE
    assert calls.memset_d8_async(device + PIECE, 0, nbytes, stream.handle) == INVALID_VALUE


def test_strided_copy_across_two_allocations_is_refused(calls, stream):
    nbytes = 4 << 20
    low, high = sorted(calls.alloc(nbytes) for _ in range(2))
    target = calls.alloc(PIECE * 2)
    assert calls.copy_2d(stream.handle, low, high - low, target, PIECE, PIECE, 2) == INVALID_VALUE
    assert calls.copy_2d(stream.handle, target, PIECE, low, high - low, PIECE, 2) == INVALID_VALUE


def test_copy_across_two_registrations_is_refused(calls, stream):
    page, nbytes = 4096, 1 << 20
    buffer = ctypes.create_string_buffer(2 * nbytes + page)
    start = -(-ctypes.addressof(buffer) // page) * page
    device = calls.alloc(2 * nbytes)
    calls.ok("mem_host_register", start, nbytes, 1)
    calls.ok("mem_host_register", start + nbytes, nbytes, 1)
    assert calls.memcpy_htod_async(device, start, 2 * nbytes, stream.handle) == INVALID_VALUE
    assert calls.memcpy_dtoh_async(start + nbytes - PIECE, device, 2 * PIECE, stream.handle) == INVALID_VALUE
    calls.ok("memcpy_htod_async", device, start + nbytes, nbytes, stream.handle)
    calls.ok("stream_synchronize", stream.handle)
    calls.ok("mem_host_unregister", start)
    calls.ok("mem_host_unregister", start + nbytes)


def test_memory_is_registered_once(calls):
    page = 4096
    buffer = ctypes.create_string_buffer(5 * page)
    start = -(-ctypes.addressof(buffer) // page) * page
    calls.ok("mem_host_register", start, 2 * page, 1)
    assert calls.mem_host_register(start, 2 * page, 1) == ALREADY_REGISTERED
    assert calls.mem_host_register(start + page, 2 * page, 1) == ALREADY_REGISTERED
    calls.ok("mem_host_unregister", start)
    assert calls.mem_host_unregister(start) == NOT_REGISTERED


@pytest.mark.parametrize(("pitch", "width"), [(PIECE - 1, PIECE), (1 << 31, PIECE)])
def test_pitch_below_the_width_or_above_the_limit_is_refused(calls, stream, pitch, width):
    source, target = calls.alloc(8 * PIECE), calls.alloc(8 * PIECE)
    assert calls.copy_2d(stream.handle, source, pitch, target, PIECE, width, 2) == INVALID_VALUE
    assert calls.copy_2d(stream.handle, source, PIECE, target, pitch, width, 2) == INVALID_VALUE


def test_null_pointers_are_refused(calls, stream):
    device, host = calls.alloc(PIECE), calls.host_alloc(PIECE)
    assert calls.memcpy_htod_async(0, host, PIECE, stream.handle) == INVALID_VALUE
    assert calls.memcpy_htod_async(device, None, PIECE, stream.handle) == INVALID_VALUE
    assert calls.mem_alloc(None, PIECE) == INVALID_VALUE


def test_allocating_no_bytes_is_refused(calls):
    assert calls.mem_alloc(ctypes.byref(ctypes.c_uint64()), 0) == INVALID_VALUE


def test_work_without_a_current_context_is_refused(calls, stream):
    device, host = calls.alloc(PIECE), calls.host_alloc(PIECE)
    context = calls.out("ctx_pop_current", ctypes.c_void_p)
    of_others = calls.out("ctx_get_current", ctypes.c_void_p)  # torch leaves one, where an earlier test used it
    calls.ok("ctx_set_current", None)
    assert calls.out("ctx_get_current", ctypes.c_void_p) is None
    assert calls.mem_alloc(ctypes.byref(ctypes.c_uint64()), PIECE) == INVALID_CONTEXT
    assert calls.stream_create(ctypes.byref(ctypes.c_void_p()), 1) == INVALID_CONTEXT
    assert calls.memcpy_htod_async(device, host, PIECE, None) == INVALID_CONTEXT
    calls.ok("ctx_set_current", of_others)
    calls.ok("ctx_push_current", context)


def test_unrecorded_event_counts_as_complete(calls, stream):
    event = calls.out("event_create", ctypes.c_void_p, 2)
    calls.ok("event_query", event)
    calls.ok("event_synchronize", event)
    calls.ok("stream_wait_event", stream.handle, event, 0)
    calls.ok("stream_synchronize", stream.handle)
    calls.ok("event_destroy", event)


def test_pointer_attributes_name_the_allocation(calls):
    device, host = calls.alloc(10 * PIECE), calls.host_alloc(3 * 4096)
    inside = device + 5 * PIECE
    assert calls.out("pointer_get_attribute", ctypes.c_uint, 2, inside) == 2
    assert calls.out("pointer_get_attribute", ctypes.c_int, 9, inside) == 0
    assert calls.out("pointer_get_attribute", ctypes.c_uint64, 11, inside) == device
    assert calls.out("pointer_get_attribute", ctypes.c_size_t, 12, inside) == 10 * PIECE
    assert calls.out("pointer_get_attribute", ctypes.c_uint, 2, host + 4096) == 1


def test_unknown_pointer_has_no_attributes(calls):
    unknown = ctypes.create_string_buffer(64)
    answer = ctypes.c_uint64()
    code = calls.pointer_get_attribute(ctypes.byref(answer), 11, ctypes.addressof(unknown))
    assert code == INVALID_VALUE


def test_memory_that_does_not_exist_is_not_allocated(calls):
    assert calls.mem_alloc(ctypes.byref(ctypes.c_uint64()), 1 << 46) == 2
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    calls.ok("mem_get_info", ctypes.byref(free), ctypes.byref(total))
    assert 0 < free.value <= total.value


def test_freed_memory_cannot_be_freed_again(calls):
    address = calls.alloc(PIECE)
    calls.ok("mem_free", address)
    assert calls.mem_free(address) == INVALID_VALUE


def test_freeing_memory_waits_for_all_work(calls, stream):
    """CUDA says that it may; that it does is how an arena waits, since cuCtxSynchronize spoils captures."""
    nbytes = PIECE if KIND == "host" else 256 << 20
    busy, address = calls.alloc(nbytes), calls.alloc(1)
    if KIND == "host":
        _host.set_delay_us(1000, 1000)
    for value in range(100):
        calls.ok("memset_d8_async", busy, value, nbytes, stream.handle)
    assert not stream.query()
    calls.ok("mem_free", address)
    assert stream.query()


def test_waiting_for_the_context_spoils_a_capture(calls, device):
    with Stream.create(device) as capturing:
        begin_capture(capturing.handle)
        assert calls.ctx_synchronize() == CAPTURE_UNSUPPORTED
        end_capture(capturing.handle, CAPTURE_INVALIDATED)


def test_largest_pitch_is_what_the_planner_assumes(calls):
    assert calls.out("device_get_attribute", ctypes.c_int, 11, 0) == (1 << 31) - 1
    assert calls.out("device_get_attribute", ctypes.c_int, 134, 0) >= -1


def test_error_names_are_those_of_cuda(calls):
    for code, name in [(0, b"CUDA_SUCCESS"), (1, b"CUDA_ERROR_INVALID_VALUE"), (700, b"CUDA_ERROR_ILLEGAL_ADDRESS")]:
        answer = ctypes.c_char_p()
        calls.ok("get_error_name", code, ctypes.byref(answer))
        assert answer.value == name


@pytest.mark.host
def test_stream_that_was_destroyed_is_refused(calls, device):
    """CUDA leaves this undefined; the host driver makes the mistake show."""
    stream = Stream.create(device)
    handle = stream.handle
    stream.close()
    assert calls.stream_query(handle) == INVALID_HANDLE
    assert calls.event_record(calls.out("event_create", ctypes.c_void_p, 2), handle) == INVALID_HANDLE
    assert calls.stream_destroy(handle) == INVALID_HANDLE


def test_the_table_under_test_is_that_of_the_device_asked_for(device):
    assert device.is_host == (KIND == "host")


def test_the_kernel_is_found_by_its_name_alone(calls):
    image = (resources.files("kvortex.transfer") / "pack.ptx").read_bytes()
    assert calls.module_load_data(ctypes.byref(ctypes.c_void_p()), b"no kernel at all") != 0
    module = calls.out("module_load_data", ctypes.c_void_p, image)
    calls.out("module_get_function", ctypes.c_void_p, module, b"kv_pack_blocks")
    assert calls.module_get_function(ctypes.byref(ctypes.c_void_p()), module, b"kv_scatter_blocks") == NOT_FOUND
    calls.ok("module_unload", module)


def test_a_stream_of_any_priority_is_created(calls):
    for priority in (0, -1000, 1000):
        stream = calls.out("stream_create_with_priority", ctypes.c_void_p, 1, priority)
        calls.ok("stream_synchronize", stream)
        calls.ok("stream_destroy", stream)
    assert calls.stream_create_with_priority(ctypes.byref(ctypes.c_void_p()), 64, 0) == INVALID_VALUE


# ---- memory pools ---------------------------------------------------------------------------------------------------

RESERVED, RESERVED_HIGH, USED, USED_HIGH = 5, 6, 7, 8
LARGE = 64 << 20  # CUDA reserves for a pool in units of 32 MiB


@pytest.fixture
def pool(calls):
    made = calls.pool()
    yield made
    calls.ok("mem_pool_destroy", made)


def set_threshold(calls, pool, nbytes):
    calls.ok("mem_pool_set_attribute", pool, 4, ctypes.byref(ctypes.c_uint64(nbytes)))


def test_pools_and_virtual_memory_are_supported(calls):
    assert calls.out("device_get_attribute", ctypes.c_int, 115, 0) == 1
    assert calls.out("device_get_attribute", ctypes.c_int, 102, 0) == 1


def test_memory_of_a_pool_is_there_in_the_order_of_its_stream(calls, pool, stream, seed):
    for step in range(10):
        content = pattern(PIECE, seed + step)
        address = calls.pool_alloc(pool, PIECE, stream.handle)
        calls.ok("memcpy_htod_async", address, pinned_bytes(calls, content), PIECE, stream.handle)
        assert calls.bytes_of(address, PIECE, stream.handle) == content
        calls.ok("mem_free_async", address, stream.handle)


def test_memory_of_a_pool_is_device_memory(calls, pool, stream):
    address = calls.pool_alloc(pool, 10 * PIECE, stream.handle)
    assert calls.out("pointer_get_attribute", ctypes.c_uint, 2, address + PIECE) == 2
    assert calls.out("pointer_get_attribute", ctypes.c_int, 9, address + PIECE) == 0
    calls.ok("mem_free_async", address, stream.handle)


def test_pool_counts_what_is_used_and_what_it_keeps(calls, pool, stream):
    set_threshold(calls, pool, 1 << 40)
    address = calls.pool_alloc(pool, LARGE, stream.handle)
    calls.ok("stream_synchronize", stream.handle)
    assert LARGE <= calls.pool_bytes(pool, USED) <= calls.pool_bytes(pool, RESERVED)
    calls.ok("mem_free_async", address, stream.handle)
    calls.ok("stream_synchronize", stream.handle)
    assert calls.pool_bytes(pool, USED) == 0
    assert calls.pool_bytes(pool, RESERVED) >= LARGE
    assert calls.pool_bytes(pool, USED_HIGH) >= LARGE and calls.pool_bytes(pool, RESERVED_HIGH) >= LARGE
    calls.ok("mem_pool_trim_to", pool, 0)
    assert calls.pool_bytes(pool, RESERVED) == 0
    calls.ok("mem_pool_set_attribute", pool, USED_HIGH, ctypes.byref(ctypes.c_uint64(0)))
    assert calls.pool_bytes(pool, USED_HIGH) == 0


def test_what_exceeds_the_threshold_goes_back_when_the_stream_is_waited_for(calls, pool, stream):
    addresses = [calls.pool_alloc(pool, LARGE, stream.handle) for _ in range(2)]
    for address in addresses:
        calls.ok("mem_free_async", address, stream.handle)
    calls.ok("stream_synchronize", stream.handle)
    assert calls.pool_bytes(pool, RESERVED) == 0


def test_pool_keeps_its_limit(calls, stream):
    pool = calls.pool(LARGE)
    address = calls.pool_alloc(pool, LARGE // 2, stream.handle)
    answer = ctypes.c_uint64()
    assert calls.mem_alloc_from_pool_async(ctypes.byref(answer), LARGE, pool, stream.handle) == OUT_OF_MEMORY
    calls.ok("mem_free_async", address, stream.handle)
    calls.ok("stream_synchronize", stream.handle)  # only then may any way of cutting the memory up serve again
    address = calls.pool_alloc(pool, LARGE, stream.handle)
    calls.ok("mem_free_async", address, stream.handle)
    calls.ok("mem_pool_destroy", pool)


def test_memory_outlives_its_pool(calls, stream, seed):
    pool, content = calls.pool(), pattern(PIECE, seed)
    address = calls.pool_alloc(pool, PIECE, stream.handle)
    calls.ok("mem_pool_destroy", pool)
    calls.ok("memcpy_htod_async", address, pinned_bytes(calls, content), PIECE, stream.handle)
    assert calls.bytes_of(address, PIECE, stream.handle) == content
    calls.ok("mem_free_async", address, stream.handle)
    calls.ok("stream_synchronize", stream.handle)


@pytest.mark.host
def test_freed_memory_of_a_pool_cannot_be_freed_again(calls, pool, stream):
    """CUDA leaves this undefined; the host driver makes the mistake show."""
    address = calls.pool_alloc(pool, PIECE, stream.handle)
    calls.ok("mem_free_async", address, stream.handle)
    assert calls.mem_free_async(address, stream.handle) == INVALID_VALUE


def test_unfit_pools_and_allocations_are_refused(calls, pool, stream):
    answer = ctypes.c_void_p()
    for props in (PoolProps(location=Location(1, 0)), PoolProps(allocation_type=1, location=Location(1, 1000))):
        assert calls.mem_pool_create(ctypes.byref(answer), ctypes.byref(props)) in (INVALID_VALUE, 101)
    assert calls.mem_pool_get_attribute(pool, 1000, ctypes.byref(ctypes.c_uint64())) == INVALID_VALUE
    assert calls.mem_alloc_from_pool_async(None, PIECE, pool, stream.handle) == INVALID_VALUE


def test_context_is_synchronised_as_a_whole(calls, device):
    target = calls.alloc(4 * PIECE)
    with Stream.create(device) as first, Stream.create(device) as second:
        for index, stream in enumerate((first, second)):
            calls.ok("memset_d8_async", target + index * PIECE, 7, PIECE, stream.handle)
        calls.ok("ctx_synchronize")
        assert first.query() and second.query()


# ---- virtual memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def space(calls):
    """Reserved address space of eight units, and the unit."""
    unit = calls.granularity()
    address = calls.out("mem_address_reserve", ctypes.c_uint64, 8 * unit, 0, 0, 0)
    yield address, unit
    calls.ok("mem_address_free", address, 8 * unit)


def map_memory(calls, address, nbytes):
    handle = calls.physical(nbytes)
    calls.ok("mem_map", address, nbytes, 0, handle, 0)
    assert calls.set_access(address, nbytes) == 0
    calls.ok("mem_release", handle)  # the mapping keeps it


@pytest.fixture
def mapped(calls, space):
    """Four units of memory, from three allocations that meet inside of copies."""
    address, unit = space
    for first, count in ((0, 1), (1, 1), (2, 2)):
        map_memory(calls, address + first * unit, count * unit)
    yield address, unit
    for first, count in ((0, 1), (1, 1), (2, 2)):
        calls.ok("mem_unmap", address + first * unit, count * unit)


def test_mapped_memory_is_device_memory(calls, mapped):
    address, unit = mapped
    for inside in (address, address + 3 * unit - 1):
        assert calls.out("pointer_get_attribute", ctypes.c_uint, 2, inside) == 2
        assert calls.out("pointer_get_attribute", ctypes.c_int, 9, inside) == 0


def test_copies_cross_from_one_mapping_into_the_next(calls, mapped, stream, seed):
    address, unit = mapped
    content = pattern(3 * unit, seed)
    calls.ok("memcpy_htod_async", address + PIECE, pinned_bytes(calls, content), len(content), stream.handle)
    assert calls.bytes_of(address + PIECE, len(content), stream.handle) == content
    source, target = address + unit - 3 * PIECE, calls.alloc(6 * PIECE)
    assert calls.copy_batch(stream.handle, [target], [source], [6 * PIECE])[0] == 0
    expected = content[unit - 4 * PIECE :][: 6 * PIECE]
    assert calls.bytes_of(target, 6 * PIECE, stream.handle) == expected


def test_strided_copies_cross_from_one_mapping_into_the_next(calls, mapped, stream, seed):
    """Each of these rows lies in another unit, one of them on a border: what no copy over separate allocations may."""
    address, unit = mapped
    content = pattern(4 * unit, seed)
    calls.ok("memcpy_htod_async", address, pinned_bytes(calls, content), len(content), stream.handle)
    pitch, first, target = unit - PIECE, unit - PIECE // 2, calls.alloc(3 * PIECE)
    assert calls.copy_2d(stream.handle, address + first, pitch, target, PIECE, PIECE, 3) == 0
    expected = b"".join(content[first + row * pitch :][:PIECE] for row in range(3))
    assert calls.bytes_of(target, 3 * PIECE, stream.handle) == expected
    calls.ok("memset_d8_async", target, 0, 3 * PIECE, stream.handle)
    assert calls.copy_2d(stream.handle, target, PIECE, address + first, pitch, PIECE, 3) == 0
    expected = bytearray(content)
    for row in range(3):
        expected[first + row * pitch : first + row * pitch + PIECE] = bytes(PIECE)
    assert calls.bytes_of(address, 4 * unit, stream.handle) == expected


def test_virtual_memory_comes_in_units(calls, space):
    address, unit = space
    props = AllocationProps(type=1, location=Location(1, 0))
    answer = ctypes.c_ulonglong()
    assert calls.mem_create(ctypes.byref(answer), unit + 4096, ctypes.byref(props), 0) == INVALID_VALUE
    handle = calls.physical(unit)
    assert calls.mem_map(address + 4096, unit, 0, handle, 0) == INVALID_VALUE
    calls.ok("mem_map", address, unit, 0, handle, 0)
    second = calls.physical(unit)
    assert calls.mem_map(address, unit, 0, second, 0) == INVALID_VALUE
    calls.ok("mem_unmap", address, unit)
    calls.ok("mem_release", second)
    calls.ok("mem_release", handle)


def test_access_needs_a_mapping(calls, space):
    address, unit = space
    map_memory(calls, address, unit)
    assert calls.set_access(address + unit, unit) == INVALID_VALUE
    calls.ok("mem_unmap", address, unit)
    assert calls.set_access(address, unit) == INVALID_VALUE
