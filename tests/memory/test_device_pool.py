"""DevicePool: a limit that holds, memory that is never early anybody else's, arenas that are one range."""

import contextlib
import gc
import os
import random
import threading
import time
import weakref

import numpy as np
import pytest
from driver_calls import begin_capture, end_capture

import kvortex
from kvortex import ConfigError, DeviceBuffer, DevicePool, EngineClosed, KVLayout, PinnedPool, PoolExhausted, Stream
from kvortex.memory import DeviceArena, PooledBuffer
from kvortex.transfer import probe_layout

MIB = 1 << 20
UNIT = 2 * MIB  # in which arenas grow
LARGE = 20 * MIB  # two of them do not fit into the 32 MiB in which drivers take memory for a pool
OUT_OF_MEMORY = 2


@pytest.fixture
def pool(device):
    with DevicePool(32 * MIB, device) as made:
        yield made


@pytest.fixture
def other(device):
    with Stream.create(device) as created:
        yield created


def content_of(buffer):
    target = bytearray(buffer.nbytes)
    buffer.copy_to(target)
    return bytes(target)


@pytest.fixture
def slow(device, request):
    """Put work on a stream that takes some 20 ms, after which what follows on it is late."""
    scratch = DeviceBuffer(64 * MIB if not device.is_host else 64, device)

    def make_slow(stream):
        if device.is_host:
            request.getfixturevalue("host").set_delay_us(1000, 1000)
        for value in range(20 if device.is_host else 600):
            scratch.fill(value % 256, stream=stream)

    yield make_slow
    scratch.close()


# ---- the order of streams -------------------------------------------------------------------------------------------


def test_memory_is_there_in_the_order_of_its_stream(pool, stream, seed):
    rng = random.Random(seed)
    for _ in range(20):
        content, target = rng.randbytes(5000), bytearray(5000)
        buffer = pool.alloc(5000, stream)
        assert isinstance(buffer, DeviceBuffer) and buffer.pool is pool and buffer.nbytes == 5000
        buffer.copy_from(content, stream=stream)
        buffer.copy_to(target, stream=stream)
        buffer.free(stream)
        stream.synchronize()
        assert target == content and buffer.closed


def free_on_the_stream(buffer, stream, other):
    buffer.free(stream)


def free_on_another_stream(buffer, stream, other):
    buffer.free(other)


def close(buffer, stream, other):
    buffer.close()


def drop(buffer, stream, other):
    pass


@pytest.mark.parametrize("end", [free_on_the_stream, free_on_another_stream, close, drop])
def test_memory_is_not_reused_before_the_work_of_its_last_owner(device, pool, stream, other, slow, end):
    """The second buffer has room only where the first one was, and a stream that is free to run at once."""
    with DeviceBuffer(LARGE, device) as witness:
        buffer = pool.alloc(LARGE, stream)
        buffer.fill(1)
        slow(stream)
        buffer.copy_to(witness, stream=stream)
        end(buffer, stream, other)
        del buffer
        gc.collect()
        with Stream.create(device) as third:
            successor = pool.alloc(LARGE, third)
            successor.fill(2, stream=third)
            third.synchronize()
        stream.synchronize()
        assert content_of(witness) == bytes([1]) * LARGE
        assert content_of(successor) == bytes([2]) * LARGE
        successor.close()


class Address:
    """Memory as torch would describe it, with which whoever lent it knows nothing of the work on it."""

    def __init__(self, buffer):
        self.address, self.shape = buffer.address, (buffer.nbytes,)

    def data_ptr(self):
        return self.address

    def stride(self):
        return (1,)

    def element_size(self):
        return 1


def test_free_comes_after_the_work_of_others_on_its_stream(device, pool, stream, other, slow):
    with DeviceBuffer(LARGE, device) as witness:
        buffer = pool.alloc(LARGE, stream)
        buffer.fill(1)
        slow(stream)
        witness.copy_from(Address(buffer), stream=stream)
        buffer.free(stream)
        successor = pool.alloc(LARGE, other)
        successor.fill(2, stream=other)
        other.synchronize()
        stream.synchronize()
        assert content_of(witness) == bytes([1]) * LARGE
        successor.close()


@pytest.mark.parametrize("use", ["its_stream", "another_stream", "no_stream"])
def test_whatever_a_buffer_does_comes_after_its_memory_was_there(device, pool, stream, other, slow, use):
    """The allocation itself is late: it waits for the free of the first buffer, behind slow work."""
    with DeviceBuffer(LARGE, device) as witness, Stream.create(device) as third:
        buffer = pool.alloc(LARGE, stream)
        buffer.fill(1)
        slow(stream)
        buffer.copy_to(witness, stream=stream)
        buffer.free(stream)
        successor = pool.alloc(LARGE, other)
        successor.fill(2, stream={"its_stream": other, "another_stream": third, "no_stream": None}[use])
        third.synchronize()
        other.synchronize()
        stream.synchronize()
        assert content_of(witness) == bytes([1]) * LARGE
        assert content_of(successor) == bytes([2]) * LARGE
        successor.close()


@pytest.mark.host
@pytest.mark.parametrize("call", ["fill", "copy"])
def test_memory_is_not_given_away_under_a_call_of_another_thread(pool, stream, host, call):
    buffer = pool.alloc(4096, stream)
    stream.synchronize()
    host.hold()
    host.count_calls()
    target, argument, row = {
        "fill": (buffer.fill, 1, "memset_d8_async"),
        "copy": (buffer.copy_from, bytes(4096), "stream_query"),
    }[call]
    calling = threading.Thread(target=target, args=[argument])
    calling.start()
    deadline = time.monotonic() + 20
    while not host.num_calls(row):
        assert time.monotonic() < deadline, "the call never began"
    buffer.free(stream)
    assert pool.usage().used_bytes == 4096
    host.release()
    calling.join()
    assert pool.usage().used_bytes == 0 and buffer.closed


@pytest.mark.host
def test_nothing_blocks(device, pool, stream, host):
    pool.alloc(4096, stream).free(stream)  # the worker of the stream runs
    host.hold()
    for end in (free_on_the_stream, close, drop):
        buffer = pool.alloc(4096, stream)
        buffer.fill(1, stream=stream)
        end(buffer, stream, None)
        del buffer
    pool.trim()
    assert pool.usage().used_bytes == 0 and not stream.query()
    pool.close()


@pytest.mark.host
def test_source_of_a_late_copy_is_held_after_the_buffer_is_closed(device, pool, stream, host):
    source = DeviceBuffer(4096, device)
    alive = weakref.ref(source)
    buffer = pool.alloc(4096, stream)
    host.hold()
    buffer.copy_from(source, stream=stream)
    buffer.close()
    del source, buffer
    pool.alloc(4096, stream).close()
    gc.collect()
    assert alive() is not None
    host.release()
    stream.synchronize()
    deadline = time.monotonic() + 20
    while alive() is not None:  # the buffer's own stream learns of the copy's end a moment later
        assert time.monotonic() < deadline, "nobody let go of the source"
        pool.trim()


@pytest.mark.parametrize("first", ["pool", "buffers"])
def test_buffers_that_copied_to_each_other_end_with_their_pool(device, stream, slow, first):
    pool = DevicePool(32 * MIB, device)
    source, target = pool.alloc(4096, stream), pool.alloc(4096, stream)
    alive = weakref.ref(pool)
    slow(stream)
    source.copy_to(target, stream=stream)
    ends = [source, target]
    for thing in [pool, *ends] if first == "pool" else [*ends, pool]:
        thing.close()
    assert alive() is pool
    del source, target, ends, thing, pool
    assert alive() is None


# ---- limit and usage ------------------------------------------------------------------------------------------------


def test_limit_is_kept_to_the_byte(pool, stream):
    first = pool.alloc(30 * MIB, stream)
    second = pool.alloc(2 * MIB, stream)
    used = pool.usage()
    assert used.used_bytes == used.limit_bytes == pool.limit_bytes == 32 * MIB
    with pytest.raises(PoolExhausted, match=f"^1 bytes .* has {32 * MIB} of its {32 * MIB} bytes in use; free buffers"):
        pool.alloc(1, stream)
    assert pool.usage() == used
    second.free(stream)
    with pytest.raises(PoolExhausted):
        pool.alloc(2 * MIB + 1, stream)
    pool.alloc(2 * MIB, stream).close()
    first.close()


@pytest.mark.host
def test_refusal_of_the_driver_says_what_to_do(pool, stream, host):
    host.fail_call(1, OUT_OF_MEMORY, field="mem_alloc_from_pool_async")
    with pytest.raises(PoolExhausted, match=r"has no 4096 bytes .* with 0 of its 33554432 .* synchronise .* trim"):
        pool.alloc(4096, stream)
    assert pool.usage().used_bytes == 0
    pool.alloc(4096, stream).close()


def test_usage_has_high_water_marks(pool, stream):
    assert pool.usage() == (32 * MIB, 0, 0, 0, 0)
    buffers = [pool.alloc(4 * MIB, stream) for _ in range(3)]
    assert pool.usage().used_bytes == 12 * MIB <= pool.usage().reserved_bytes
    for buffer in buffers:
        buffer.free(stream)
    stream.synchronize()
    usage = pool.usage()
    assert (usage.used_bytes, usage.used_high_bytes) == (0, 12 * MIB)
    assert usage.reserved_high_bytes >= usage.reserved_bytes >= 12 * MIB  # kept for the next
    assert "0 of 33554432 bytes" in repr(pool)


def test_steady_state_takes_nothing_more_from_the_device(pool, stream):
    for round_ in range(30):
        buffers = [pool.alloc(size * 1000, stream) for size in (1, 20, 300, 4000)]
        for buffer in buffers:
            buffer.fill(round_, stream=stream)
            buffer.free(stream)
        stream.synchronize()
        if round_ == 0:
            reserved = pool.usage().reserved_bytes
    assert pool.usage().reserved_bytes == pool.usage().reserved_high_bytes == reserved


def test_trim_gives_back_what_nobody_uses(pool, stream):
    kept, freed = pool.alloc(64, stream), [pool.alloc(7 * MIB, stream) for _ in range(4)]
    kept.fill(5)
    for buffer in freed:
        buffer.free(stream)
    stream.synchronize()
    before = pool.usage().reserved_bytes
    pool.trim(32 * MIB)
    assert pool.usage().reserved_bytes == before
    pool.trim()
    assert content_of(kept) == bytes([5]) * 64
    kept.free(stream)
    stream.synchronize()
    pool.trim()
    assert pool.usage().reserved_bytes == 0


def test_threshold_decides_what_is_kept(device, stream):
    with DevicePool(64 * MIB, device, release_threshold_bytes=0) as pool:
        assert pool.release_threshold_bytes == 0
        pool.alloc(40 * MIB, stream).free(stream)
        stream.synchronize()
        assert pool.usage().reserved_bytes == 0


# ---- arenas ---------------------------------------------------------------------------------------------------------


def test_parts_of_an_arena_lie_behind_each_other(pool, seed):
    rng, parts = random.Random(seed), []
    arena = pool.arena(20 * MIB)
    assert arena.nbytes == arena.mapped_bytes == 0 and arena.reserve_bytes >= 20 * MIB
    for nbytes in (100, UNIT, 3 * UNIT - 7, 512):
        offset = arena.grow(nbytes)
        assert offset == sum(len(part) for part in parts)
        parts.append(rng.randbytes(nbytes))
        arena.copy_from(parts[-1], offset)
        assert content_of(arena) == b"".join(parts)
    assert isinstance(arena, DeviceBuffer) and arena.pool is pool and len(arena) == arena.nbytes
    assert 0 <= arena.mapped_bytes - arena.nbytes < UNIT and arena.mapped_bytes == pool.usage().used_bytes
    arena.close()
    assert pool.usage().used_bytes == 0


def test_arenas_and_buffers_share_the_limit(pool, stream):
    arena = pool.arena(64 * MIB)
    arena.grow(20 * MIB)
    buffer = pool.alloc(12 * MIB, stream)
    used = pool.usage()
    for ask in (lambda: arena.grow(1), lambda: pool.alloc(1, stream)):
        with pytest.raises(PoolExhausted, match="bytes in use"):
            ask()
    assert pool.usage() == used and arena.nbytes == 20 * MIB
    buffer.free(stream)
    stream.synchronize()
    arena.grow(12 * MIB)
    assert pool.usage().reserved_bytes == 32 * MIB  # what the pool kept made way
    arena.close()


def test_address_space_of_an_arena_ends(pool):
    arena = pool.arena(3 * MIB)
    arena.grow(4 * MIB)  # the space was rounded up to units
    with pytest.raises(PoolExhausted, match=r"1 bytes more than 4194304 exceed .* larger reserve_bytes"):
        arena.grow(1)
    arena.close()


SHAPE = {"num_layers": 6, "num_blocks": 48, "block_size": 16, "num_heads": 2, "head_dim": 112, "itemsize": 4}
LAYER_BYTES = 48 * 16 * 2 * 112 * 4  # K or V of one layer: no multiple of a unit, so pieces cross from map to map


def grown(pool, device, seed):
    """An arena of twelve parts, full of random bytes, the layout over all of them, and the bytes as an array."""
    arena = pool.arena(12 * LAYER_BYTES)
    for part in range(12):
        assert arena.grow(LAYER_BYTES) == part * LAYER_BYTES
    content = np.random.default_rng(seed).integers(0, 256, (2, 6, 48, LAYER_BYTES // 48), np.uint8)
    arena.copy_from(content)
    return arena, KVLayout.contiguous(arena, **SHAPE), content


def test_layers_grown_one_by_one_are_one_strided_range(pool, device, seed):
    arena, layout, _ = grown(pool, device, seed)
    with kvortex.TransferQueue(device, "D2H") as queue:
        rows = probe_layout(layout, queue, measure=False)
    assert {row.backend for row in rows} == {"strided"}
    del layout
    arena.close()


@pytest.mark.parametrize("probed", [True, False])
def test_blocks_of_a_grown_cache_go_and_come_back(pool, device, stream, seed, probed):
    arena, layout, content = grown(pool, device, seed)
    rng = np.random.default_rng(seed + 1)
    blocks, targets, slots = (rng.permutation(48) for _ in range(3))
    with (
        PinnedPool(48 * layout.block_bytes, layout.block_bytes, device) as pinned,
        kvortex.TransferQueue(device, "D2H") as saves,
        kvortex.TransferQueue(device, "H2D") as loads,
    ):
        pinned.wait_ready(20_000)
        if probed:
            probe_layout(layout, saves)
            probe_layout(layout, loads)
        saves.submit(layout, blocks, pinned, slots, stream=stream).wait(20_000)
        for block, slot in zip(blocks, slots, strict=True):
            assert bytes(pinned.view(slot)) == content[:, :, block].swapaxes(0, 1).tobytes()
        arena.fill(0)
        loads.submit(layout, targets, pinned, slots, stream=stream).wait(20_000)
        found = np.frombuffer(content_of(arena), np.uint8).reshape(content.shape)
        assert (found[:, :, targets] == content[:, :, blocks]).all()
    del layout
    arena.close()


def test_threads_grow_an_arena_in_turns(pool):
    arena, offsets = pool.arena(32 * MIB), []

    def work():
        offsets.extend(arena.grow(100_000) for _ in range(40))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(offsets) == list(range(0, 160 * 100_000, 100_000)) and arena.nbytes == 160 * 100_000
    arena.fill(1)
    arena.close()


def test_arena_ends_after_all_work_and_leaves_a_capture_alone(pool, device, stream, slow):
    """cuCtxSynchronize would spoil the capture, and unmapping what is in use would end the context."""
    arena = pool.arena(UNIT)
    arena.grow(UNIT)
    with Stream.create(device) as capturing:
        begin_capture(capturing.handle)
        slow(stream)
        arena.fill(1, stream=stream)
        arena.close()
        assert stream.query()
        assert end_capture(capturing.handle) == 0
    assert pool.usage().used_bytes == 0


# ---- in others' hands -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["buffer", "arena"])
def lent(request, pool, stream):
    if request.param == "buffer":
        return pool.alloc(4096, stream)
    arena = pool.arena(UNIT)
    arena.grow(4096)
    return arena


@pytest.mark.host
def test_memory_is_an_array_and_lives_as_long_as_its_holders(pool, lent):
    lent.fill(7)
    holders = [np.asarray(lent), np.from_dlpack(lent), memoryview(lent)]
    holders[0][:10] = 1
    lent.close()
    pool.close()
    while holders:
        assert bytes(holders[-1]) == bytes([1]) * 10 + bytes([7]) * 4086
        holders.pop()


@pytest.mark.host
def test_what_others_hold_counts_until_they_let_go(pool, lent):
    used, array = pool.usage().used_bytes, np.asarray(lent)
    lent.close()
    assert pool.usage().used_bytes == used
    del array
    assert pool.usage().used_bytes == 0


@pytest.mark.host
def test_freed_while_others_hold_it_means_freed_when_they_let_go(pool, stream, other, host):
    buffer = pool.alloc(4096, stream)
    array = np.asarray(buffer)
    host.hold()
    other_work = pool.alloc(64, other)
    other_work.fill(1, stream=other)
    buffer.free(other)
    with pytest.raises(EngineClosed):
        buffer.fill(1)
    assert pool.usage().used_bytes == 4096 + 64
    array[:] = 3
    del array
    assert pool.usage().used_bytes == 64
    host.release()


@pytest.mark.gpu
def test_memory_that_a_protocol_handed_out_is_freed_after_the_work_of_the_device(pool, stream, slow):
    buffer = pool.alloc(4096, stream)
    assert buffer.__cuda_array_interface__["data"] == (buffer.address, False)
    slow(stream)
    buffer.close()
    assert stream.query()


def test_layout_holds_its_arena(pool, device, seed):
    arena, layout, _ = grown(pool, device, seed)
    arena.close()
    assert pool.usage().used_bytes >= 12 * LAYER_BYTES
    del layout
    gc.collect()
    assert pool.usage().used_bytes == 0


# ---- lifetimes ------------------------------------------------------------------------------------------------------


def test_memory_outlives_its_pool(device, stream):
    pool = DevicePool(32 * MIB, device)
    buffer, arena = pool.alloc(4096, stream), pool.arena(UNIT)
    arena.grow(4096)
    pool.close()
    pool.close()
    assert pool.closed and "closed" in repr(pool)
    for use in (lambda: pool.alloc(1, stream), lambda: pool.arena(1), lambda: arena.grow(UNIT), pool.usage, pool.trim):
        with pytest.raises(EngineClosed, match="make another"):
            use()
    for memory in (buffer, arena):
        memory.fill(9)
        assert content_of(memory) == bytes([9]) * 4096
        memory.close()


@pytest.mark.host
@pytest.mark.parametrize("first", ["pool", "memory"])
def test_nothing_is_left(stream, host, first):
    before = host.live_objects()
    pool = DevicePool(32 * MIB, "host:1")
    with kvortex.Device.open("host:1") as second, Stream.create(second) as own:
        buffers, arena = [pool.alloc(5000, own) for _ in range(5)], pool.arena(UNIT)
        arena.grow(100)
        buffers.pop().free(own)
        buffers.pop().close()
        buffers.pop()
        for buffer in buffers:
            buffer.fill(1, stream=own)
        if first == "pool":
            pool.close()
        del buffer
        buffers.clear()
        arena.close()
        own.synchronize()
        if first == "memory":
            pool.close()
        assert pool.device.closed
    gc.collect()
    assert host.live_objects() == before


@pytest.mark.host
def test_collected_pool_gives_everything_back(device, stream, host):
    before = host.live_objects()
    pool = DevicePool(32 * MIB, device)
    alive = weakref.ref(pool)
    holder = [pool, pool.alloc(64, stream), pool.arena(UNIT)]
    holder[2].grow(1)
    holder.append(holder)
    del pool, holder
    gc.collect()
    stream.synchronize()
    assert alive() is None and host.live_objects() == before


def run_apart(step):
    """Whether a step raised; in a thread of its own, which is left with a context where popping it fails."""
    raised = []

    def work():
        try:
            step()
        except (kvortex.DriverError, PoolExhausted) as error:
            raised.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return bool(raised)


@pytest.mark.host
def test_steps_that_fail_leave_nothing(device, stream, host):
    """Each driver call of an allocation and of a growth fails in turn."""
    with DevicePool(32 * MIB, device) as pool:
        arena = pool.arena(16 * UNIT)
        pool.alloc(64, stream).close()
        for step in (lambda: pool.alloc(4096, stream).close(), lambda: arena.grow(UNIT)):
            for n in range(1, 60):
                stream.synchronize()
                before, nbytes, used = host.live_objects(), arena.nbytes, pool.usage().used_bytes
                host.fail_call(n, OUT_OF_MEMORY)
                raised = run_apart(step)
                if host.fail_pending():
                    break
                host.fail_call(0, 0)
                gc.collect()
                if raised:
                    assert arena.nbytes == nbytes
                    stream.synchronize()
                    pool.trim()
                    after = host.live_objects()
                    for what in ("pool_allocations", "physical_allocations"):
                        assert after[what] == before[what], f"call {n}"
                    assert pool.usage().used_bytes == used, f"call {n}"
            assert 5 < n < 59
            host.fail_call(0, 0)
        arena.close()


@pytest.mark.host
def test_child_of_a_fork_has_no_pool(device, stream):
    pool = DevicePool(32 * MIB, device)
    buffer, arena = pool.alloc(4096, stream), pool.arena(UNIT)
    arena.grow(4096)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(EngineClosed):
            pool.alloc(1, 0)
            os._exit(2)
        with contextlib.suppress(EngineClosed):
            buffer.fill(1)
            os._exit(3)
        for thing in (buffer, arena, pool):
            thing.close()
        del buffer, arena, pool, thing
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    buffer.fill(1)
    for thing in (buffer, arena, pool):
        thing.close()


def test_threads_share_a_pool(device, pool, seed):
    """Each thread allocates, fills and frees in the order of its own stream; at the limit they refuse, and no more."""
    wrong = []

    def work(number):
        rng = random.Random(seed + number)
        with Stream.create(device) as stream:
            for _ in range(60):
                nbytes, target = rng.randrange(1, 2 * MIB), bytearray(1000)
                try:
                    buffer = pool.alloc(nbytes, stream)
                except PoolExhausted:
                    continue
                byte = rng.randrange(256)
                buffer.fill(byte, stream=stream)
                buffer.copy_to(memoryview(target)[: min(nbytes, 1000)], stream=stream)
                rng.choice([lambda b: b.free(stream), DeviceBuffer.close, lambda b: None])(buffer)
                del buffer
                stream.synchronize()
                if set(target[: min(nbytes, 1000)]) != {byte}:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert wrong == [] and pool.usage().used_bytes == 0


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 48])
def test_absurd_sizes_are_refused(device, pool, stream, nbytes):
    arena = pool.arena(UNIT)
    for ask in (
        lambda: DevicePool(nbytes, device),
        lambda: pool.alloc(nbytes, stream),
        lambda: pool.arena(nbytes),
        lambda: arena.grow(nbytes),
        lambda: pool.trim(nbytes or -5),
        lambda: DevicePool(1, device, release_threshold_bytes=nbytes or -5),
    ):
        with pytest.raises(ConfigError, match=f"must be in [01]..2\\*\\*48-1, got {nbytes or '(0|-5)'}"):
            ask()
    arena.close()


def test_streams_are_needed_and_must_be_the_devices(pool, stream):
    buffer = pool.alloc(64, stream)
    for ask in (lambda: pool.alloc(64, None), lambda: buffer.free(None)):
        with pytest.raises(ValueError, match="needs the stream"):
            ask()
    with pytest.raises(TypeError):
        pool.alloc(64, "stream")
    assert not buffer.closed and pool.usage().used_bytes == 64
    buffer.free(stream)
    with pytest.raises(EngineClosed, match="this PooledBuffer is closed"):
        buffer.free(stream)


@pytest.mark.host
def test_stream_of_another_device_or_a_capturing_one_is_refused(device, pool, stream, host):
    belongs = pytest.raises(ValueError, match="belongs to another device")
    with kvortex.Device.open("host:1") as second, Stream.create(second) as theirs, belongs:
        pool.alloc(64, theirs)
    buffer = pool.alloc(64, stream)
    assert host.begin_capture(stream.handle) == 0
    for ask in (lambda: pool.alloc(64, stream), lambda: buffer.free(stream)):
        with pytest.raises(ValueError, match="is capturing"):
            ask()
    assert host.end_capture(stream.handle) == (0, 0)
    buffer.free(stream)


@pytest.mark.host
def test_device_without_pools_or_virtual_memory_says_so(device, pool, host):
    host.fail_call(1, 1, field="device_get_attribute")
    with pytest.raises(ConfigError, match=r"host:0 has no memory pools .* gpu_pool_size_bytes at 0"):
        DevicePool(MIB, device)
    host.fail_call(1, 1, field="device_get_attribute")
    with pytest.raises(ConfigError, match="no virtual memory management .* with alloc"):
        pool.arena(UNIT)


def test_classes_without_constructor_say_what_to_call():
    for kind, call in ((PooledBuffer, "DevicePool.alloc"), (DeviceArena, "DevicePool.arena")):
        with pytest.raises(TypeError, match=call):
            kind()
    with DevicePool(MIB) as pool, pytest.raises(TypeError, match="twice"):
        pool.__init__(MIB)
