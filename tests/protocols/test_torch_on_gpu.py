"""torch and KVortex share memory and streams, on a GPU."""

import importlib
import subprocess
import sys

import numpy as np
import pages
import pytest
from kvcache import keys_of
from kvortex.driver._memory import borrow_memory

import kvortex
from kvortex import DeviceBuffer, KVLayout, PinnedPool, Stream

pytestmark = pytest.mark.gpu
SIZE = 256 << 20  # long enough to copy that an order nobody made shows


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


def test_tensors_are_read(torch):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = torch.zeros(2, 6, 4, 8, dtype=dtype, device="cuda", requires_grad=True)
        borrowed = borrow_memory(tensor)
        assert (borrowed.address, borrowed.is_cuda) == (tensor.data_ptr(), True)
        assert KVLayout.from_tensors([tensor], 1).on_gpu


def test_tensors_of_the_gpu_are_refused_by_the_host_device(torch):
    layout = KVLayout.from_tensors([torch.zeros(64, 1024, device="cuda")])
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, device="host")
    with pytest.raises(kvortex.ConfigError, match="the layout's memory is a GPU's"):
        kvortex.KVortexEngine.create(config, layout=layout)


def test_torch_shares_a_buffer(torch, device):
    with DeviceBuffer(1 << 20, device) as buffer:
        buffer.fill(5)
        for tensor in (torch.from_dlpack(buffer), torch.as_tensor(buffer, device="cuda")):
            assert tensor.data_ptr() == buffer.address and tensor.is_cuda
            assert bool((tensor == 5).all())


def test_a_tensor_outlives_its_buffer(torch, device):
    buffer = DeviceBuffer(1 << 20, device)
    buffer.fill(7)
    tensor = torch.from_dlpack(buffer)
    buffer.close()
    others = [DeviceBuffer(1 << 20, device) for _ in range(16)]
    for other in others:
        other.fill(1)
    assert bool((tensor == 7).all())


def test_the_stream_of_torch_waits_for_the_work_of_a_buffer(torch, device, stream):
    source = torch.empty(SIZE, dtype=torch.uint8, pin_memory=True)
    with DeviceBuffer(SIZE, device) as buffer:
        for byte in range(1, 6):
            source.fill_(byte)
            with torch.cuda.stream(torch.cuda.Stream()):
                buffer.copy_from(source, stream=stream)
                copied = torch.from_dlpack(buffer).clone()
                torch.cuda.current_stream().synchronize()
            assert bool((copied == byte).all())


def test_a_copy_waits_on_the_stream_of_torch_that_it_is_given(torch, device):
    with DeviceBuffer(SIZE, device) as buffer:
        tensor = torch.zeros(SIZE, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        for byte in range(1, 6):
            theirs = torch.cuda.Stream()
            with torch.cuda.stream(theirs):
                tensor.fill_(byte)
                buffer.copy_from(tensor, stream=theirs)
            target = torch.zeros(SIZE, dtype=torch.uint8)
            buffer.copy_to(target)
            assert bool((target == byte).all())


def test_torch_works_on_our_stream(torch, device):
    with Stream.create(device) as ours, DeviceBuffer(1 << 20, device) as buffer:
        theirs = torch.cuda.ExternalStream(ours.handle)
        assert Stream.borrow(device, theirs).handle == ours.handle
        tensor = torch.from_dlpack(buffer)
        with torch.cuda.stream(theirs):
            tensor.fill_(3)
        content = bytearray(1 << 20)
        buffer.copy_to(content, stream=ours)
        ours.synchronize()
        assert content == b"\3" * (1 << 20)


def test_slots_are_pinned_tensors_of_the_cpu(torch, device):
    with PinnedPool(8 * 4096, 4096, device) as pool:
        pool.wait_ready(20_000)
        tensor = torch.from_dlpack(pool.slot(3))
        assert tensor.data_ptr() == pool.address(3) and tensor.device.type == "cpu" and tensor.is_pinned()
        tensor.copy_(torch.full((4096,), 9, dtype=torch.uint8, device="cuda"), non_blocking=True)
        torch.cuda.synchronize()
        assert bytes(pool.view(3)) == b"\x09" * 4096


def test_tensors_are_blocks(torch, device):
    keys, count = keys_of(range(8)), 8
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=256 << 20, block_bytes=8 << 20, device=device.name)
    with kvortex.KVortexEngine.create(config) as engine:
        engine.wait_ready(20_000)
        for round_ in range(5):
            engine.clear()
            stream = torch.cuda.current_stream()
            sources = [torch.empty(4 << 20, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
            for number, source in enumerate(sources):
                source.fill_(number + 10 * round_)
            job = engine.save_blocks(keys, data_ptrs=sources, stream=stream)
            job.wait_on(stream)
            for source in sources:
                source.fill_(-1)
            del sources, source
            job.wait()
            targets = [torch.zeros(4 << 20, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
            job = engine.load_blocks(keys, data_ptrs=targets, stream=stream)
            job.wait_on(stream)
            assert job.num_blocks == count
            assert all(bool((t == number + 10 * round_).all()) for number, t in enumerate(targets))


def test_dlpack_of_torch_is_ordered_after_torch(torch, device):
    class OnlyDlpack:
        def __init__(self, tensor):
            self.__dlpack_device__, self.__dlpack__ = tensor.__dlpack_device__, tensor.__dlpack__

    tensor = torch.zeros(SIZE, dtype=torch.uint8, device="cuda")
    target = np.zeros(SIZE, np.uint8)
    torch.cuda.synchronize()
    with DeviceBuffer(SIZE, device) as buffer:
        for byte in range(1, 6):
            with torch.cuda.stream(torch.cuda.Stream()):
                tensor.fill_(byte)
                buffer.copy_from(OnlyDlpack(tensor))  # on the buffer's stream, which torch is told of
            buffer.copy_to(target)
            assert (target == byte).all()


@pytest.mark.parametrize("example", pages.python_examples(with_torch=True).values())
def test_the_examples_of_the_pages_run_on_a_gpu(example):
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{example}\n{done.stderr}"
