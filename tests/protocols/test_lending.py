"""Memory of ours in others' hands: buffers, DLPack, the CUDA array interface; counted, and alive until all is back."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import producers
import pytest
from producers import CPU, CUDA_HOST

import kvortex
from kvortex import DeviceBuffer, KVLayout, PinnedPool, Stream
from kvortex.driver import _host

PAGE = 4096


@pytest.fixture
def pool(device):
    with PinnedPool(8 * PAGE, 3000, device) as made:
        made.wait_ready(20_000)
        yield made


@pytest.fixture
def buffer(device):
    with DeviceBuffer(PAGE, device) as made:
        yield made


class Taken:
    """A consumer of a DLPack capsule: reads the structs by the standard, and calls the deleter when told to."""

    def __init__(self, capsule):
        self.capsule = capsule
        for structure, name in producers.NAMES.items():
            if producers.python.PyCapsule_IsValid(id(capsule), name):
                self.address = producers.python.PyCapsule_GetPointer(id(capsule), name)
                self.managed = structure.from_address(self.address)
                self.used = ctypes.create_string_buffer(b"used_" + name)
                set_name = ctypes.pythonapi.PyCapsule_SetName
                set_name.argtypes = [ctypes.py_object, ctypes.c_char_p]
                assert set_name(capsule, ctypes.addressof(self.used) and self.used) == 0
        tensor = self.managed.tensor
        self.device = tensor.device_type, tensor.device_id
        self.shape = [tensor.shape[dim] for dim in range(tensor.ndim)]
        self.strides = [tensor.strides[dim] for dim in range(tensor.ndim)]
        self.type = tensor.code, tensor.bits, tensor.lanes
        self.data = tensor.data + tensor.byte_offset

    def content(self):
        return ctypes.string_at(self.data, self.shape[0])

    def delete(self):
        self.managed.deleter(self.address)


# ---- pool slots -----------------------------------------------------------------------------------------------------


def test_a_slot_is_an_array_of_its_payload(pool):
    slot = pool.slot(3)
    array = np.asarray(slot)
    assert (array.dtype, array.shape, array.ctypes.data) == (np.uint8, (3000,), pool.address(3))
    typed = np.frombuffer(slot, dtype=np.float16).reshape(15, 100)
    typed[:] = 1.5
    assert bytes(pool.view(3)) == typed.tobytes()
    assert len(slot) == slot.nbytes == 3000 and slot.slot == 3 and slot.pool is pool
    assert f"{pool.address(3):#x}" in repr(slot)


def test_numpy_takes_a_slot_through_dlpack(pool):
    array = np.from_dlpack(pool.slot(1))
    assert array.ctypes.data == pool.address(1) and array.flags.writeable
    array[:] = 77
    assert bytes(pool.view(1)) == b"\x4d" * 3000


def test_slots_refuse_what_views_refuse(pool):
    with pytest.raises(ValueError, match="slot must be 0 to 7, got 8"):
        pool.slot(8)
    with pytest.raises(TypeError, match="use PinnedPool.slot"):
        kvortex.memory.PoolSlot()
    slot = pool.slot(0)
    pool.close()
    for use in (pool.slot, lambda _: np.from_dlpack(slot), lambda _: memoryview(slot)):
        with pytest.raises(kvortex.EngineClosed):
            use(0)


def test_the_mapping_outlives_its_pool_until_the_last_holder(device):
    pool = PinnedPool(8 * PAGE, PAGE, device)
    pool.wait_ready(20_000)
    pool.view(2)[:] = bytes([5]) * PAGE
    holders = [np.asarray(pool.slot(2)), np.from_dlpack(pool.slot(2)), pool.view(2)]
    start = pool.address(2)
    pool.close()
    while holders:
        assert bytes(holders[-1]) == bytes([5]) * PAGE
        holders.pop()
    gc.collect()
    with pytest.raises(AssertionError):
        assert is_mapped(start)


def is_mapped(address):
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps]
    return any(int(first, 16) <= address < int(end, 16) for first, end in spans)


def test_a_pool_lives_as_long_as_its_slots(device):
    pool = PinnedPool(8 * PAGE, PAGE, device)
    alive = weakref.ref(pool)
    array = np.from_dlpack(pool.slot(0))
    del pool
    gc.collect()
    assert alive() is not None
    array[:] = 1
    del array
    gc.collect()
    assert alive() is None


@pytest.mark.host
def test_a_slot_is_memory_of_the_cpu_and_of_nothing_else(pool):
    slot = pool.slot(0)
    assert slot.__dlpack_device__() == (CPU, 0)
    assert Taken(slot.__dlpack__(dl_device=(CPU, 0))).device == (CPU, 0)
    with pytest.raises(BufferError, match=r"is of the device \(1, 0\) .* not copied to \(3, 0\)"):
        slot.__dlpack__(dl_device=(CUDA_HOST, 0))
    with pytest.raises(ValueError, match="no streams, got stream 1"):
        slot.__dlpack__(stream=1)


# ---- DLPack, to the letter ------------------------------------------------------------------------------------------


@pytest.fixture(params=["slot", "buffer"])
def lent(request, pool, buffer):
    """Something that can be lent, and its memory."""
    if request.param == "slot":
        return pool.slot(1), pool.address(1), 3000
    return buffer, buffer.address, PAGE


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 3), (2, 0)])
def test_a_capsule_says_what_the_standard_says(lent, version):
    thing, address, nbytes = lent
    taken = Taken(thing.__dlpack__(max_version=version))
    assert isinstance(taken.managed, producers.Versioned if version and version >= (1, 0) else producers.Managed)
    if isinstance(taken.managed, producers.Versioned):
        assert (taken.managed.major, taken.managed.minor, taken.managed.flags) == (1, 0, 0)
    assert (taken.data, taken.shape, taken.strides, taken.type) == (address, [nbytes], [1], (1, 8, 1))
    assert taken.device == thing.__dlpack_device__()
    taken.delete()


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_capsule_holds_its_owner_until_deleted_or_dropped(lent, version):
    thing, _, _ = lent
    before = sys.getrefcount(thing), sys.getrefcount(getattr(thing, "pool", thing))
    for _ in range(50):
        thing.__dlpack__(max_version=version)  # dropped
    kept = [Taken(thing.__dlpack__(max_version=version)) for _ in range(50)]
    assert sys.getrefcount(getattr(thing, "pool", thing)) > before[1]
    for taken in kept:
        taken.delete()
    kept.clear()
    assert (sys.getrefcount(thing), sys.getrefcount(getattr(thing, "pool", thing))) == before


def test_a_deleter_may_be_called_on_any_thread_without_the_gil(lent):
    thing, _, _ = lent
    owner = getattr(thing, "pool", thing)
    before = sys.getrefcount(owner)
    kept = [Taken(thing.__dlpack__()) for _ in range(8)]  # ctypes gives the GIL up around a CDLL's call
    threads = [threading.Thread(target=taken.delete) for taken in kept]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept.clear()
    assert sys.getrefcount(owner) == before


def test_copies_and_foreign_devices_are_refused(lent):
    thing, _, _ = lent
    with pytest.raises(BufferError, match="copies none of it"):
        thing.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"not copied to \(7, 1\)"):
        thing.__dlpack__(dl_device=(7, 1))
    assert Taken(thing.__dlpack__(copy=False, dl_device=thing.__dlpack_device__())).delete() is None


# ---- a DeviceBuffer -------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_a_host_buffer_is_an_array(buffer):
    for array in (np.asarray(buffer), np.from_dlpack(buffer), np.frombuffer(buffer, np.uint8)):
        assert (array.dtype, array.shape, array.ctypes.data) == (np.uint8, (PAGE,), buffer.address)
    array[:] = 3
    content = bytearray(PAGE)
    buffer.copy_to(content)
    assert content == b"\3" * PAGE
    assert not hasattr(buffer, "__cuda_array_interface__")
    with pytest.raises(ValueError, match="no streams"):
        buffer.__dlpack__(stream=1)


@pytest.mark.host
@pytest.mark.parametrize("view", [np.asarray, np.from_dlpack])
def test_an_array_shows_what_the_streams_of_the_buffer_were_given_before(device, stream, host, view):
    with DeviceBuffer(1 << 20, device) as buffer:
        host.set_delay_us(2000, 3000)
        for byte in range(1, 10):
            buffer.fill(byte, stream=stream)
            array = view(buffer)
            assert (array == byte).all()


@pytest.mark.host
def test_calls_without_a_stream_come_after_those_with_one(device, stream, host):
    with DeviceBuffer(PAGE, device) as buffer:
        host.set_delay_us(2000, 3000)
        content = bytearray(PAGE)
        for byte in range(1, 10):
            buffer.fill(byte, stream=stream)
            buffer.copy_to(content)
            assert content == bytes([byte]) * PAGE


@pytest.mark.host
@pytest.mark.parametrize(
    "hold",
    [
        np.asarray,
        np.from_dlpack,
        memoryview,
        lambda buffer: KVLayout.cross_layer(buffer, num_blocks=4, block_bytes=1024),
        lambda buffer: KVLayout.from_tensors([buffer]),
    ],
    ids=["array", "dlpack", "memoryview", "layout", "layout of tensors"],
)
def test_memory_that_others_hold_is_freed_when_they_let_go(device, hold):
    before = _host.live_objects()["device_allocations"]
    buffer = DeviceBuffer(PAGE, device)
    held = hold(buffer)
    buffer.close()
    buffer.close()
    assert buffer.closed and "closed" in repr(buffer)
    for use in (lambda: buffer.address, lambda: buffer.fill(0), lambda: memoryview(buffer), buffer.__dlpack__):
        with pytest.raises(kvortex.EngineClosed):
            use()
    assert _host.live_objects()["device_allocations"] == before + 1
    if not isinstance(held, KVLayout):
        assert len(bytes(held)) == PAGE
    del held
    gc.collect()
    assert _host.live_objects()["device_allocations"] == before


@pytest.mark.host
def test_a_buffer_of_a_named_device_keeps_it_until_the_memory_is_back():
    buffer = DeviceBuffer(PAGE, "host:1")
    device, array = buffer.device, np.asarray(buffer)
    buffer.close()
    assert not device.closed
    array[:] = 1
    del array
    assert device.closed


def test_a_dropped_buffer_is_kept_by_who_holds_its_memory(device):
    buffer = DeviceBuffer(PAGE, device)
    alive = weakref.ref(buffer)
    layout = KVLayout.cross_layer(buffer, num_blocks=4, block_bytes=1024)
    assert layout.owners == (buffer,)
    del buffer
    gc.collect()
    assert alive() is not None
    del layout
    gc.collect()
    assert alive() is None


def test_a_layout_over_buffers_is_not_made_to_wait(device, stream, host):
    with DeviceBuffer(PAGE, device) as buffer:
        if device.is_host:
            host.hold()
        try:
            buffer.fill(1, stream=stream)
            KVLayout.cross_layer(buffer, num_blocks=4, block_bytes=1024)
        finally:
            if device.is_host:
                host.release()


def test_buffers_in_a_cycle_with_what_holds_them_are_collected(device):
    class Holder(DeviceBuffer):
        pass

    holder = Holder(PAGE, device)
    holder.layout = KVLayout.cross_layer(holder, num_blocks=4, block_bytes=1024)
    alive = weakref.ref(holder)
    del holder
    gc.collect()
    assert alive() is None


@pytest.mark.host
def test_an_order_that_cannot_be_made_is_waited_for(device, stream, host):
    with DeviceBuffer(PAGE, device) as buffer:
        host.set_delay_us(2000, 3000)
        host.fail_call(1, 2, field="event_record")
        buffer.fill(4, stream=stream)
        assert stream.query()


# ---- a DeviceBuffer of CUDA, over a libcuda.so.1 that is the host driver ---------------------------------------------

CUDA_PROGRAM = """
import ctypes, threading, time
import numpy as np
import pytest
import producers
from producers import CUDA, Producer
from kvortex import DeviceBuffer, KVLayout, KVortexConfig, KVortexEngine, PinnedPool, Stream
from kvortex.driver import Device

SIZE = 1 << 16
with Device.open("cuda:1") as device, Stream.create(device) as stream, Stream.create(device) as other:
    buffer = DeviceBuffer(SIZE, device)
    # what it says
    said = buffer.__cuda_array_interface__
    assert said == {"shape": (SIZE,), "strides": None, "typestr": "|u1", "data": (buffer.address, False), "version": 3,
                    "stream": None}, said
    assert buffer.__dlpack_device__() == (CUDA, 1)
    with pytest.raises(BufferError, match="out of the CPU's reach"):
        memoryview(buffer)
    # work on a stream shows in the interface, and capsules order the consumer's stream after it
    buffer.fill(1, stream=stream)
    ours = buffer.__cuda_array_interface__["stream"]
    assert ours > 2 and ours not in (stream.handle, other.handle)
    for consumer in (None, 1, 2, other.handle, -1):
        buffer.__dlpack__(stream=consumer)
    for wrong in (0, True, "1"):
        with pytest.raises((ValueError, TypeError)):
            buffer.__dlpack__(stream=wrong)
    # in: an interface with a stream, and a DLPack tensor told of ours
    second = DeviceBuffer(SIZE, device)

    class Shown:
        __cuda_array_interface__ = buffer.__cuda_array_interface__

    for byte in range(2, 8):
        buffer.fill(byte, stream=stream)
        second.copy_from(Shown())
        content = bytearray(SIZE)
        second.copy_to(content)
        assert content == bytes([byte]) * SIZE
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * SIZE).from_address(second.address))
    producer = Producer(memory, device=(CUDA, 1))
    buffer.copy_from(producer, stream=other)
    buffer.copy_from(producer, stream=0)
    assert [asked["stream"] for asked in producer.asked] == [other.handle, 1]
    other.synchronize()
    # an engine over such memory
    keys = np.arange(64, dtype=np.uint8).reshape(2, 32)
    config = KVortexConfig(cpu_pool_size_bytes=1 << 20, block_bytes=SIZE, device="cuda:1")
    with KVortexEngine.create(config) as engine:
        for byte in range(8, 16):
            engine.clear()
            buffer.fill(byte, stream=stream)
            with pytest.raises(ValueError, match="stream is None"):
                engine.save_blocks(keys[:1], data_ptrs=[Shown()])
            engine.save_blocks(keys, data_ptrs=[Shown(), producer], stream=other).wait()
            target = DeviceBuffer(SIZE, device)
            job = engine.load_blocks(keys[:1], data_ptrs=[target], stream=other)
            assert job.num_blocks == 1
            job.wait_on(other)  # what reads the target comes after the load
            target.copy_to(content, stream=other)
            other.synchronize()
            assert content == bytes([byte]) * SIZE
            target.close()
        assert producer.asked[-1]["stream"] == other.handle
    buffer.copy_to(bytearray(SIZE))  # now it knows that its copies on streams are over
    assert producer.deletions == producer.capsules, (producer.deletions, producer.capsules)
    # pinned memory can be asked for as such
    with PinnedPool(1 << 20, 4096, device) as pool:
        slot = pool.slot(0)
        assert slot.__dlpack_device__() == (1, 0)
        slot.__dlpack__(dl_device=(3, 0))
        assert np.from_dlpack(slot).ctypes.data == pool.address(0)
    layout = KVLayout.cross_layer(buffer, num_blocks=4, block_bytes=1024)
    assert layout.on_gpu
    buffer.close()
    del layout
    second.close()
print("done")
"""


@pytest.mark.host
def test_a_cuda_buffer_speaks_the_protocols_of_cuda(libcuda):
    path = os.pathsep.join([os.path.dirname(producers.__file__), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libcuda), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", CUDA_PROGRAM], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stdout == "done\n", done.stderr


def test_streams_of_two_buffers_meet(device):
    """A buffer's own work on one stream, a copy out of it on another."""
    size = 1 << 20
    with (
        Stream.create(device) as first,
        Stream.create(device) as second,
        DeviceBuffer(size, device) as source,
        DeviceBuffer(size, device) as target,
    ):
        content = bytearray(size)
        for byte in range(1, 10):
            source.fill(byte, stream=first)
            target.copy_from(source, stream=second)
            target.copy_to(content)
            assert content == bytes([byte]) * size
