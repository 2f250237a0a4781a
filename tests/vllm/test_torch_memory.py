"""torch and KVortex share memory, on a CPU; tests/protocols/test_torch_on_gpu.py does the same on a GPU.

Here because here torch is: `python -m pytest tests/vllm/test_torch_memory.py` in an environment made by .ci/vllm-env.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
from kvortex.driver._memory import borrow_memory

import kvortex
from kvortex import DeviceBuffer, KVLayout, PinnedPool

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]


@pytest.fixture
def buffer():
    with DeviceBuffer(4096, "host") as made:
        yield made


@pytest.fixture
def pool():
    with PinnedPool(8 * 4096, 3000, "host") as made:
        made.wait_ready(20_000)
        yield made


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_type_are_read(dtype):
    tensor = torch.zeros(2, 6, 4, 8).to(dtype)
    borrowed = borrow_memory(tensor[:, 1:])
    assert borrowed.address == tensor.data_ptr() + 32 * tensor.element_size()
    assert borrowed.strides == tuple(step * tensor.element_size() for step in tensor.stride())
    assert (borrowed.is_cuda, borrowed.read_only, borrowed.itemsize) == (False, False, tensor.element_size())
    layout = KVLayout.from_tensors([tensor], 1)
    assert layout.block_bytes == 2 * 32 * tensor.element_size() and not layout.on_gpu


def test_a_tensor_that_requires_a_gradient_is_read():
    tensor = torch.zeros(6, 16, requires_grad=True)
    assert KVLayout.from_tensors([tensor]).runs[0][0] == tensor.data_ptr()


def test_tensors_without_memory_are_refused():
    for tensor in (torch.zeros(6, 16, device="meta"), torch.zeros(6, 16).to_sparse()):
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            KVLayout.from_tensors([tensor])


def test_a_tensor_lives_as_long_as_its_layout():
    tensor = torch.zeros(6, 16)
    alive = weakref.ref(tensor)
    layout = KVLayout.from_tensors([tensor])
    del tensor
    gc.collect()
    assert alive() is not None
    del layout
    gc.collect()
    assert alive() is None


class OnlyDlpack:
    """A tensor seen through DLPack alone."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **wishes):
        return self.tensor.__dlpack__(**wishes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.bool])
def test_dlpack_of_torch_says_what_torch_says(dtype):
    tensor = torch.zeros(2, 6, 4, 8).to(dtype)[:, ::2]
    through_dlpack, direct = borrow_memory(OnlyDlpack(tensor)), borrow_memory(tensor)
    for name in ("address", "shape", "strides", "itemsize", "is_cuda", "read_only", "nbytes"):
        assert getattr(through_dlpack, name) == getattr(direct, name), name


def test_torch_shares_a_buffer(buffer):
    for tensor in (torch.from_dlpack(buffer), torch.frombuffer(buffer, dtype=torch.uint8)):
        assert tensor.data_ptr() == buffer.address and tensor.shape == (4096,)
        tensor += 1
    content = bytearray(4096)
    buffer.fill(0)
    torch.from_dlpack(buffer)[:] = 9
    buffer.copy_to(content)
    assert content == b"\x09" * 4096


def test_a_tensor_outlives_the_buffer_and_the_pool_it_came_from(buffer, pool):
    buffer.fill(3)
    pool.view(2)[:] = b"\4" * 3000
    tensors = (
        torch.from_dlpack(buffer),
        torch.from_dlpack(pool.slot(2)),
        torch.frombuffer(pool.slot(2), dtype=torch.int8),
    )
    buffer.close()
    pool.close()
    assert [int(tensor.sum()) for tensor in tensors] == [3 * 4096, 4 * 3000, 4 * 3000]
    part = tensors[1][:100].view(torch.float32)
    del tensors
    gc.collect()
    assert part.numel() == 25 and (part == part[0]).all()


def test_a_slot_is_a_tensor(pool):
    tensor = torch.from_dlpack(pool.slot(5))
    assert tensor.data_ptr() == pool.address(5) and tensor.dtype is torch.uint8 and len(tensor) == 3000
    tensor.view(torch.bfloat16)[:] = 1.5
    assert (torch.frombuffer(pool.slot(5), dtype=torch.bfloat16) == 1.5).all()


def test_tensors_are_copied_and_saved():
    source, target = torch.randn(1024).to(torch.bfloat16), torch.zeros(1024, dtype=torch.bfloat16)
    with DeviceBuffer(2048, "host") as buffer:
        buffer.copy_from(source)
        buffer.copy_to(target)
    assert torch.equal(source, target)
    keys = np.arange(96, dtype=np.uint8).reshape(3, 32)
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, block_bytes=2048, device="host")
    with kvortex.KVortexEngine.create(config) as engine:
        engine.save_blocks(keys, data_ptrs=[source + i for i in range(3)]).wait()
        targets = [torch.zeros(1024, dtype=torch.bfloat16) for _ in range(3)]
        assert engine.load_blocks(keys, data_ptrs=targets).num_blocks == 3
        engine.load_blocks(keys, data_ptrs=targets).wait()
        assert all(torch.equal(source + i, target) for i, target in enumerate(targets))
