"""Stream, Event and DeviceBuffer, of its own or of a DevicePool, as users see them."""

import copy
import gc
import random
import weakref

import numpy as np
import pytest
from driver_calls import KIND

from kvortex.driver import Device, DeviceBuffer, Event, Stream
from kvortex.errors import ConfigError, DriverError, EngineClosed
from kvortex.memory import DevicePool, PinnedPool


def pooled(device):
    with DevicePool(4096, device) as pool, Stream.create(device) as stream:
        return pool.alloc(4096, stream)


def arena(device):
    with DevicePool(32 << 20, device) as pool:
        made = pool.arena(4096)
        made.grow(4096)
        return made


@pytest.fixture(params=[lambda device: DeviceBuffer(4096, device), pooled, arena], ids=["own", "pooled", "arena"])
def buffer(device, request):
    with request.param(device) as allocated:
        yield allocated


def content_of(buffer):
    target = bytearray(buffer.nbytes)
    buffer.copy_to(target)
    return bytes(target)


def test_buffer_gives_back_what_it_was_given(buffer, seed):
    content = random.Random(seed).randbytes(4096)
    buffer.copy_from(content)
    assert content_of(buffer) == content


def test_copies_hit_their_offset_and_nothing_else(buffer):
    buffer.fill(0)
    buffer.copy_from(b"abc", offset=100)
    assert content_of(buffer) == bytes(100) + b"abc" + bytes(4096 - 103)
    target = bytearray(5)
    buffer.copy_to(target, offset=99)
    assert target == b"\0abc\0"


def test_fill_sets_only_its_range(buffer):
    buffer.fill(1)
    buffer.fill(255, offset=10, nbytes=4)
    buffer.fill(2, offset=4095)
    assert content_of(buffer) == b"\1" * 10 + b"\xff" * 4 + b"\1" * 4081 + b"\2"


def test_any_contiguous_array_is_a_host_buffer(buffer):
    source = np.arange(1024, dtype=np.float32).reshape(32, 32)
    target = np.zeros_like(source)
    buffer.copy_from(source)
    buffer.copy_to(target)
    assert (source == target).all()


def test_array_with_gaps_is_refused(buffer):
    with pytest.raises(ValueError, match="contiguous"):
        buffer.copy_from(np.zeros((8, 8))[:, ::2])


def test_read_only_target_is_refused(buffer):
    with pytest.raises(BufferError):
        buffer.copy_to(b"read-only")


@pytest.mark.parametrize(("nbytes", "offset"), [(4097, 0), (1, 4096), (4096, 1), (0, 4097), (8, 1 << 62)])
def test_range_outside_of_the_buffer_is_refused(buffer, nbytes, offset):
    message = f"{nbytes} bytes at offset {offset} do not fit into a {type(buffer).__name__} of 4096"
    with pytest.raises(ValueError, match=message):
        buffer.copy_from(bytes(nbytes), offset=offset)
    with pytest.raises(ValueError, match=message):
        buffer.copy_to(bytearray(nbytes), offset=offset)
    with pytest.raises(ValueError, match="do not fit"):
        buffer.fill(0, offset=offset, nbytes=nbytes)


@pytest.mark.parametrize("byte", [-1, 256])
def test_fill_with_what_is_no_byte_is_refused(buffer, byte):
    with pytest.raises(ValueError, match="0..255"):
        buffer.fill(byte)


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 48])
def test_absurd_size_is_refused(device, nbytes):
    with pytest.raises(ConfigError, match=str(nbytes)):
        DeviceBuffer(nbytes, device)


def test_device_can_be_given_by_name():
    with DeviceBuffer(64, f"{KIND}:0") as buffer:
        assert buffer.device.name == f"{KIND}:0" and len(buffer) == 64 and buffer.address > 0
        inner = buffer.device
    assert inner.closed


def test_work_with_a_stream_is_ordered_on_it(device, buffer, stream):
    target = bytearray(4096)
    for value in range(10):
        buffer.fill(value, stream=stream)
        buffer.copy_to(target, stream=stream)
        stream.synchronize()
        assert target == bytes([value]) * 4096


def test_closed_objects_refuse_work_and_close_again(device):
    buffer, stream, event = DeviceBuffer(64, device), Stream.create(device), Event.create(device)
    uses = (lambda: buffer.address, lambda: buffer.fill(0), stream.query, stream.synchronize, event.query)
    for thing in (buffer, stream, event):
        thing.close()
        thing.close()
        assert thing.closed and "closed" in repr(thing)
    for use in uses:
        with pytest.raises(EngineClosed):
            use()


@pytest.mark.parametrize("kind", [Device, Stream, Event])
def test_classes_without_constructor_say_what_to_call(kind):
    with pytest.raises(TypeError, match="has no constructor; use"):
        kind()


def test_borrowed_stream_is_not_destroyed_and_its_owner_is_kept(device):
    owner = Stream.create(device)
    alive = weakref.ref(owner)
    borrowed = Stream.borrow(device, owner)
    assert borrowed.handle == owner.handle and not borrowed.is_owned
    del owner
    gc.collect()
    assert alive() is not None
    borrowed.synchronize()
    borrowed.close()
    assert alive() is None


def test_closing_a_borrowed_stream_leaves_it_usable(device, stream):
    Stream.borrow(device, stream.handle).close()
    assert stream.query()


def test_objects_in_a_cycle_are_collected(device):
    class Holder:
        pass

    holder = Holder()
    holder.parts = [Stream.create(device), Event.create(device), DeviceBuffer(64, device), holder]
    alive = weakref.ref(holder)
    del holder
    gc.collect()
    assert alive() is None


def test_stream_speaks_the_stream_protocol(stream):
    assert stream.__cuda_stream__() == (0, stream.handle)


def test_buffer_is_not_copied_by_python(device):
    with DeviceBuffer(64, device) as buffer, pytest.raises(TypeError, match="pickle"):
        copy.copy(buffer)


class Memory(np.ndarray):
    """Memory that a weak reference can watch."""


@pytest.mark.host
def test_memory_of_a_copy_whose_end_is_not_known_is_held(device, host):
    with DeviceBuffer(64, device) as buffer, PinnedPool(4096, 4096, device) as pool:
        buffer.fill(7)
        memory = np.asarray(pool.slot(0))[:64].view(Memory)
        alive = weakref.ref(memory)
        host.hold()
        host.fail_call(2, 2, field="stream_query")
        with pytest.raises(DriverError, match="cuStreamQuery"):
            buffer.copy_to(memory)
        del memory
        is_held = alive() is not None
        host.release()
        assert is_held
        buffer.copy_to(np.zeros(64, np.uint8))
        assert alive() is None
