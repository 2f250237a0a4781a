"""CuPy and KVortex share memory and streams, on a GPU."""

import importlib

import numpy as np
import pytest
from kvcache import keys_of
from kvortex.driver._memory import borrow_memory

import kvortex
from kvortex import DeviceBuffer, KVLayout, PinnedPool, Stream

pytestmark = pytest.mark.gpu
SIZE = 256 << 20


@pytest.fixture(scope="module")
def cupy():
    return importlib.import_module("cupy")


def test_arrays_are_read(cupy):
    array = cupy.zeros((2, 6, 4, 8), cupy.float16)
    borrowed = borrow_memory(array[:, ::2])
    assert (borrowed.address, borrowed.shape, borrowed.is_cuda) == (array.data.ptr, (2, 3, 4, 8), True)
    assert borrowed.strides == array[:, ::2].strides
    assert KVLayout.from_tensors([array], 1).block_bytes == 128


def test_memory_of_cupy_is_no_stream(cupy, device):
    with pytest.raises(TypeError, match="MemoryPointer"):
        Stream.borrow(device, cupy.zeros(16).data)


def test_cupy_shares_a_buffer(cupy, device):
    with DeviceBuffer(1 << 20, device) as buffer:
        buffer.fill(5)
        for array in (cupy.from_dlpack(buffer), cupy.asarray(buffer)):
            assert array.data.ptr == buffer.address and array.shape == (1 << 20,)
            assert bool((array == 5).all())


@pytest.mark.parametrize("view", ["from_dlpack", "asarray"])
def test_cupy_waits_for_the_work_of_a_buffer(cupy, device, stream, view):
    with PinnedPool(SIZE, SIZE, device) as pool, DeviceBuffer(SIZE, device) as buffer:
        pool.wait_ready(20_000)
        source = np.asarray(pool.slot(0))
        for byte in range(1, 6):
            source[:] = byte
            with cupy.cuda.Stream(non_blocking=True) as theirs:
                buffer.copy_from(source, stream=stream)
                copied = getattr(cupy, view)(buffer).copy()
                theirs.synchronize()
            assert bool((copied == byte).all())


def test_a_copy_waits_for_the_stream_that_cupy_names(cupy, device):
    array, target = cupy.zeros(SIZE, cupy.uint8), np.zeros(SIZE, np.uint8)
    cupy.cuda.Device().synchronize()
    with DeviceBuffer(SIZE, device) as buffer:
        for byte in range(1, 6):
            with cupy.cuda.Stream(non_blocking=True):  # its current stream is what the interface names
                array.fill(byte)
                buffer.copy_from(array)
            buffer.copy_to(target)
            assert (target == byte).all()


def test_streams_go_both_ways(cupy, device):
    theirs = cupy.cuda.Stream(non_blocking=True)
    assert Stream.borrow(device, theirs).handle == theirs.ptr
    with Stream.create(device) as ours, DeviceBuffer(1 << 20, device) as buffer:
        array = cupy.from_dlpack(buffer)
        with cupy.cuda.ExternalStream(ours.handle):
            array.fill(3)
        content = bytearray(1 << 20)
        buffer.copy_to(content, stream=ours)
        ours.synchronize()
        assert content == b"\3" * (1 << 20)


def test_an_array_outlives_its_buffer(cupy, device):
    buffer = DeviceBuffer(1 << 20, device)
    buffer.fill(7)
    array = cupy.from_dlpack(buffer)
    buffer.close()
    others = [DeviceBuffer(1 << 20, device) for _ in range(16)]
    for other in others:
        other.fill(1)
    assert bool((array == 7).all())


def test_arrays_are_blocks_ordered_after_the_stream_that_cupy_names(cupy, device, stream):
    keys = keys_of(range(4))
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=512 << 20, block_bytes=64 << 20, device=device.name)
    with kvortex.KVortexEngine.create(config) as engine:
        engine.wait_ready(20_000)
        sources = [cupy.zeros(64 << 20, cupy.uint8) for _ in range(4)]
        cupy.cuda.Device().synchronize()
        for byte in range(1, 6):
            engine.clear()
            with cupy.cuda.Stream(non_blocking=True):
                for number, source in enumerate(sources):
                    source.fill(byte + 10 * number)
                engine.save_blocks(keys, data_ptrs=sources, stream=stream).wait()
            targets = [cupy.zeros(64 << 20, cupy.uint8) for _ in range(4)]
            engine.load_blocks(keys, data_ptrs=targets, stream=cupy.cuda.get_current_stream()).wait()
            assert all(bool((target == byte + 10 * number).all()) for number, target in enumerate(targets))
