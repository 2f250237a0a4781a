"""Memory and streams that others hand to us: every protocol, nothing copied, held exactly as long as needed."""

import ctypes
import gc
import sys
import weakref

import numpy as np
import producers
import pytest
from kvortex.driver._memory import borrow_memory
from producers import CPU, CUDA, CUDA_HOST, IS_COPIED, MANAGED, READ_ONLY, ROCM, Producer, memory

import kvortex
from kvortex import DeviceBuffer, KVLayout, Stream

INVALID_VALUE = 1  # CUresult
KINDS = {
    "numpy": lambda array: array,
    "memoryview": memoryview,
    "dlpack": Producer,
    "dlpack 0": lambda array: Producer(array, version=None),
    "dlpack of a GPU": lambda array: Producer(array, device=(CUDA, 0)),
    "dlpack with an offset": lambda array: Producer(array, byte_offset=64),
    "cuda array interface": producers.CudaArray,
    "torch": producers.TorchLike,
    "array interface": producers.ArrayInterface,
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def test_every_protocol_gives_the_same_place_and_shape(kind):
    array = memory(6, 4, 8)[:, ::2]
    borrowed = borrow_memory(kind(array))
    assert borrowed.address == array.ctypes.data
    assert (borrowed.shape, borrowed.strides, borrowed.itemsize) == (array.shape, array.strides, array.itemsize)
    assert borrowed.nbytes == array.nbytes and not borrowed.is_contiguous and not borrowed.read_only


def test_every_protocol_makes_the_same_layout(kind):
    array = memory(2, 6, 4, 8)
    layout = KVLayout.from_tensors([kind(array)], 1)
    assert layout.runs == KVLayout.from_tensors([array], 1).runs
    assert layout.num_blocks == 6 and layout.block_bytes == 2 * 64
    array = memory(2, 3, 5, 4, 2, 8)
    sizes = {"num_layers": 3, "num_blocks": 5, "block_size": 4, "num_heads": 2, "head_dim": 8, "itemsize": 2}
    assert KVLayout.contiguous(kind(array), **sizes).runs == KVLayout.contiguous(array.ctypes.data, **sizes).runs


def test_an_object_lives_as_long_as_its_layout(kind):
    array = memory(6, 16)
    thing = kind(array)
    if isinstance(thing, memoryview):  # has no weak references; the array behind it does
        del thing
        layout = KVLayout.from_tensors([memoryview(array)])
        alive = weakref.ref(array)
    else:
        layout = KVLayout.from_tensors([thing])
        alive = weakref.ref(thing)
    thing = array = None
    gc.collect()
    assert alive() is not None
    del layout
    gc.collect()
    assert alive() is None


def test_a_buffer_stays_exported_as_long_as_its_layout():
    growing = bytearray(4096)
    layout = KVLayout.cross_layer(growing, num_blocks=4, block_bytes=1024)
    with pytest.raises(BufferError):
        growing.append(0)
    del layout
    growing.append(0)


def test_elements_without_a_letter_in_the_buffer_protocol_are_taken():
    array = memory(4, 8, dtype=np.int64).view("M8[ns]")  # numpy refuses the buffer of these, as of bfloat16
    with pytest.raises(ValueError):
        memoryview(array)
    assert borrow_memory(array).shape == (4, 8)


@pytest.mark.parametrize("number", [1 << 20, np.uint64(1 << 20), np.int64(1 << 20)])
def test_integers_are_addresses_of_numpy_too(number):
    """A numpy integer has a buffer and an array interface, of where the number itself lies."""
    borrowed = borrow_memory(number)
    assert (borrowed.address, borrowed.owner, borrowed.shape, borrowed.nbytes) == (1 << 20, None, None, None)
    assert KVLayout.cross_layer(number, num_blocks=2, block_bytes=64).runs == ((1 << 20, 64, 64),)
    assert KVLayout([(number, 64, 64)], 2).runs == ((1 << 20, 64, 64),)


@pytest.mark.parametrize("thing", ["text", object(), None, 1.5, True, [1, 2]])
def test_what_has_no_address_is_refused_with_what_has(thing):
    with pytest.raises(TypeError, match=f"{type(thing).__name__} has no address .* __dlpack__"):
        borrow_memory(thing)


# ---- DLPack ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, (1, 0), (1, 9)])
@pytest.mark.parametrize("device_type", [CPU, CUDA, CUDA_HOST, MANAGED])
def test_a_deleter_is_called_once_when_the_layout_goes(version, device_type):
    producer = Producer(memory(6, 16), version=version, device=(device_type, 0))
    layouts = [KVLayout.from_tensors([producer, producer]) for _ in range(3)]
    assert (producer.capsules, producer.deletions) == (6, 0)
    layouts.pop()
    assert producer.deletions == 2
    layouts.clear()
    assert (producer.deletions, producer.alive) == (6, {})


def test_no_copy_is_asked_for_and_no_stream_made_to_wait_for_a_layout():
    on_cpu, on_gpu = Producer(memory(6, 16)), Producer(memory(6, 16), device=(CUDA, 0))
    layout = KVLayout.from_tensors([on_cpu, on_gpu])
    assert on_cpu.asked == [{"max_version": (1, 0), "copy": False}]
    assert on_gpu.asked == [{"max_version": (1, 0), "copy": False, "stream": -1}]
    assert layout.on_gpu
    old = Producer(memory(6, 16), version=None, device=(CUDA, 0))
    KVLayout.from_tensors([old])
    assert old.asked == [{"stream": -1}]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"version": (2, 0)}, BufferError, "version 2.0 of DLPack"),
        ({"flags": IS_COPIED}, BufferError, "is a copy"),
        ({"bits": 4}, ValueError, "1 x 4 bits"),
        ({"bits": 1, "lanes": 12}, ValueError, "12 x 1 bits"),
        ({"lanes": 0}, ValueError, "0 x 16 bits"),
        ({"ndim": -1}, ValueError, "-1 dimensions"),
        ({"ndim": 1000}, ValueError, "1000 dimensions"),
        ({"shape": None}, ValueError, "no shape"),
        ({"data": (1 << 64) - 8, "byte_offset": 64}, ValueError, "out of the address space"),
    ],
)
def test_a_tensor_that_cannot_be_taken_is_refused_and_deleted_by_its_capsule(changes, error, match):
    producer = Producer(memory(6, 16), **changes)
    with pytest.raises(error, match=match):
        borrow_memory(producer)
    gc.collect()
    assert (producer.capsules, producer.deletions) == (1, 1)


def test_other_devices_are_refused_before_a_capsule_is_made():
    producer = Producer(memory(6, 16), device=(ROCM, 0))
    with pytest.raises(ValueError, match=r"DLPack's type 10; .* CUDA managed \(13\)"):
        borrow_memory(producer)
    assert producer.capsules == 0


def test_a_capsule_is_taken_only_once():
    class OneCapsule:
        def __init__(self, producer):
            self.capsule = producer.__dlpack__()

        def __dlpack_device__(self):
            return CPU, 0

        def __dlpack__(self, **wishes):
            return self.capsule

    producer = Producer(memory(6, 16))
    thing = OneCapsule(producer)
    borrowed = borrow_memory(thing)
    with pytest.raises(ValueError, match="taken before"):
        borrow_memory(thing)
    del borrowed
    assert producer.deletions == 1
    del thing
    assert producer.deletions == 1


def test_a_deleter_may_be_missing():
    producer = Producer(memory(6, 16))
    capsule = producer.__dlpack__()
    address = next(iter(producer.alive))
    producers.Versioned.from_address(address).deleter = producers.Deleter()
    thing = type("One", (), {"__dlpack_device__": lambda self: (1, 0), "__dlpack__": lambda self, **wishes: capsule})()
    borrow_memory(thing)
    assert producer.deletions == 0


def test_lanes_strides_and_offset_are_read():
    array = memory(6, 4, 8)
    borrowed = borrow_memory(Producer(array, bits=4, lanes=4))  # 16 bits an element, as four of 4
    assert borrowed.itemsize == 2
    borrowed = borrow_memory(Producer(array, strides=None))
    assert borrowed.strides == (64, 16, 2)
    borrowed = borrow_memory(Producer(array[::-1]))
    assert borrowed.strides == (-64, 16, 2)


def test_an_error_of_the_producer_is_the_callers_to_see():
    class Broken(Producer):
        def __dlpack__(self, **wishes):
            raise BufferError("requires a gradient")

    with pytest.raises(BufferError, match="requires a gradient"):
        KVLayout.from_tensors([Broken(memory(6, 16))])


def test_no_reference_is_leaked():
    producer, array = Producer(memory(6, 16)), memory(6, 16)
    before = sys.getrefcount(producer), sys.getrefcount(array)
    for _ in range(100):
        KVLayout.from_tensors([producer, array])
        borrow_memory(producer)
    assert (sys.getrefcount(producer), sys.getrefcount(array)) == before
    assert producer.deletions == producer.capsules == 200


def test_memory_in_a_garbage_cycle_is_given_back():
    class Holder:
        pass

    producer, holder = Producer(memory(6, 16)), Holder()
    holder.layout, holder.cycle = KVLayout.from_tensors([producer, bytearray(6)]), holder
    del holder
    assert producer.deletions == 0
    gc.collect()
    assert producer.deletions == 1


# ---- interfaces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mask": np.zeros(1)}, "has a mask"),
        ({"stream": 0}, "names the stream 0; it must be None, 1"),
        ({"typestr": "|t1"}, "whole bytes"),
        ({"typestr": "|O8"}, "whole bytes"),
        ({"data": None}, "an address"),
    ],
)
def test_interfaces_that_cannot_be_read_as_bytes_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        borrow_memory(producers.CudaArray(memory(6, 16), **changes))


def test_the_stream_of_an_interface_is_kept_and_means_nothing_to_a_layout():
    array = producers.CudaArray(memory(6, 16), stream=12345)
    assert borrow_memory(array).stream == 12345
    assert KVLayout.from_tensors([array]).on_gpu  # nobody asked a driver whether there is such a stream


def test_a_base_too_small_or_with_gaps_is_refused():
    with pytest.raises(ValueError, match="base must have 400 bytes without gaps, got 192"):
        KVLayout.cross_layer(memory(6, 16), num_blocks=4, block_bytes=100)
    with pytest.raises(ValueError, match="base 1 must have 192 bytes without gaps, got 192 .* strides"):
        KVLayout.mla([memory(6, 16), memory(6, 32)[:, ::2]], num_blocks=6, block_size=2, latent_dim=8, itemsize=2)
    with pytest.raises(ValueError, match="run 0 must have 200 bytes"):
        KVLayout([(memory(6, 16), 64, 8)], 4)
    array = memory(6, 16)
    assert KVLayout([(array, 64, 8)], 3).runs == ((array.ctypes.data, 64, 8),)


# ---- read-only memory, a GPU's memory for the host device -----------------------------------------------------------


READ_ONLY_KINDS = {
    "bytes": lambda array: array.tobytes(),
    "dlpack": lambda array: Producer(array, flags=READ_ONLY),
    "interface": lambda array: producers.CudaArray(array, read_only=True),
}


@pytest.mark.parametrize("make", READ_ONLY_KINDS.values(), ids=READ_ONLY_KINDS)
def test_read_only_memory_is_never_written_to(device, make):
    thing = make(memory(4, 1024, dtype=np.uint8))
    assert borrow_memory(thing).read_only
    layout = KVLayout.cross_layer(thing, num_blocks=4, block_bytes=1024)
    assert layout.read_only
    with (
        kvortex.PinnedPool(1 << 16, 1024, device) as pool,
        kvortex.TransferQueue(device, "H2D") as queue,
        pytest.raises(ValueError, match="read-only, so nothing can be loaded into it"),
    ):
        queue.submit(layout, [0], pool, [0], stream=0)
    with DeviceBuffer(4096, device) as buffer, pytest.raises(BufferError, match="is read-only"):
        buffer.copy_to(thing)


@pytest.mark.host
@pytest.mark.parametrize(
    "make",
    [producers.CudaArray, lambda array: Producer(array, device=(CUDA, 0)), lambda a: producers.TorchLike(a, "cuda")],
    ids=["interface", "dlpack", "torch"],
)
def test_memory_of_a_gpu_is_out_of_reach_for_the_host_device(device, make):
    thing = make(memory(4, 1024, dtype=np.uint8))
    layout = KVLayout.cross_layer(thing, num_blocks=4, block_bytes=1024)
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, device="host")
    with pytest.raises(kvortex.ConfigError, match="the layout's memory is a GPU's"):
        kvortex.KVortexEngine.create(config, layout=layout)
    with DeviceBuffer(4096, device) as buffer:
        for copy in (buffer.copy_from, buffer.copy_to):
            with pytest.raises(ValueError, match="memory of a GPU, out of reach for the device host:0"):
                copy(thing)


# ---- copies of a DeviceBuffer ---------------------------------------------------------------------------------------

ON_HOST = {name: make for name, make in KINDS.items() if name not in ("dlpack of a GPU", "cuda array interface")}


@pytest.mark.parametrize("make", ON_HOST.values(), ids=ON_HOST)
def test_a_device_buffer_copies_from_and_to_every_kind_of_host_memory(device, make):
    source, target = memory(8, 64), np.zeros((8, 64), np.float16)
    with DeviceBuffer(source.nbytes, device) as buffer:
        buffer.copy_from(make(source))
        buffer.copy_to(make(target))
    assert source.tobytes() == target.tobytes()


def test_arrays_of_python_objects_are_no_bytes(device):
    with kvortex.DeviceBuffer(64, device) as buffer:
        for dtype in ("O", [("number", "i8"), ("thing", "O")]):
            with pytest.raises(TypeError, match="Python objects"):
                buffer.copy_from(np.zeros(2, dtype))
        buffer.copy_from(np.zeros(2, [("O", "i8"), ("xOx", "i8")]))


def test_a_device_buffer_copies_to_another_after_the_work_that_is_on_it(device, stream):
    with DeviceBuffer(1 << 20, device) as first, DeviceBuffer(1 << 20, device) as second:
        for byte in range(1, 6):
            first.fill(byte, stream=stream)
            second.copy_from(first)
            target = bytearray(1 << 20)
            second.copy_to(target)
            assert target == bytes([byte]) * (1 << 20)


@pytest.mark.host
def test_memory_is_held_until_the_stream_has_passed(device, stream, host):
    with DeviceBuffer(4096, device) as buffer, kvortex.PinnedPool(4096, 4096, device) as pool:
        producer = Producer(np.frombuffer(pool.view(0), np.uint8))  # pinned: the copy does not wait
        host.hold()
        try:
            buffer.copy_to(producer, stream=stream)
            assert producer.deletions == 0
        finally:
            host.release()
        stream.synchronize()
        buffer.copy_to(bytearray(4096))
        assert producer.deletions == 1


def test_memory_is_let_go_with_the_buffer(device, stream):
    producer = Producer(memory(4, 1024, dtype=np.uint8))
    with DeviceBuffer(4096, device) as buffer:
        buffer.copy_from(producer, stream=stream)
    assert producer.deletions == 1


def test_sizes_that_nobody_knows_are_refused(device):
    with DeviceBuffer(64, device) as buffer:
        with pytest.raises(TypeError, match="the size of an address is unknown"):
            buffer.copy_from(1 << 20)
        with pytest.raises(TypeError, match="has no address"):
            buffer.copy_from("text")


# ---- streams --------------------------------------------------------------------------------------------------------

STREAMS = [int, np.uint64, producers.MethodStream, producers.TupleStream, producers.TorchStream, producers.CupyStream]


@pytest.mark.parametrize("make", STREAMS)
def test_streams_are_taken_in_every_form(device, make):
    with Stream.create(device) as ours, DeviceBuffer(4096, device) as buffer:
        theirs = make(ours.handle)
        borrowed = Stream.borrow(device, theirs)
        assert borrowed.handle == ours.handle and not borrowed.is_owned
        target = bytearray(4096)
        buffer.fill(7, stream=theirs)
        buffer.copy_to(target, stream=theirs)
        ours.synchronize()
        assert target == b"\7" * 4096


@pytest.mark.parametrize(
    ("stream", "error", "match"),
    [
        (None, ValueError, "stream is None"),
        (producers.MethodStream(0, version=1), ValueError, "version 1 of __cuda_stream__"),
        (producers.MethodStream("handle"), TypeError, "got MethodStream"),
        (type("MemoryPointer", (), {"ptr": 1 << 20})(), TypeError, "got MemoryPointer"),
        (-1, ValueError, "0..2"),
        (True, TypeError, "got bool"),
        ("0", TypeError, "got str"),
    ],
)
def test_what_is_no_stream_is_refused(device, stream, error, match):
    with pytest.raises(error, match=match):
        Stream.borrow(device, stream)


def test_our_stream_speaks_the_protocol_to_others_and_to_us(device):
    with Stream.create(device) as stream:
        version, handle = stream.__cuda_stream__()
        assert (version, handle) == (0, stream.handle)
        assert Stream.borrow(device, stream).handle == handle
    with pytest.raises(kvortex.EngineClosed):
        stream.__cuda_stream__()


# ---- data_ptrs of an engine -----------------------------------------------------------------------------------------


def keys(count):
    return np.arange(count * 32, dtype=np.uint8).reshape(count, 32)


@pytest.fixture
def engine(device):
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, block_bytes=4096, device=device.name)
    with kvortex.KVortexEngine.create(config) as created:
        yield created


@pytest.mark.parametrize("make", ON_HOST.values(), ids=ON_HOST)
def test_blocks_are_saved_from_and_loaded_into_objects(engine, make):
    sources = [memory(16, 256, dtype=np.uint8) ^ np.uint8(i) for i in range(3)]
    targets = [np.zeros((16, 256), np.uint8) for _ in range(3)]
    engine.save_blocks(keys(3), data_ptrs=[make(source) for source in sources]).wait()
    job = engine.load_blocks(keys(3), data_ptrs=[make(target) for target in targets])
    job.wait()
    assert job.num_blocks == 3
    assert all(np.array_equal(source, target) for source, target in zip(sources, targets, strict=True))


def test_device_buffers_are_blocks(engine, device, stream):
    with DeviceBuffer(4096, device) as source, DeviceBuffer(4096, device) as target:
        source.fill(9, stream=stream)
        with Stream.create(device) as other:  # ordered after the fill, which the buffer knows of
            engine.save_blocks(keys(1), data_ptrs=[source], stream=other).wait()
            engine.load_blocks(keys(1), data_ptrs=[target], stream=other).wait()
        content = bytearray(4096)
        target.copy_to(content)
        assert content == b"\x09" * 4096


def test_objects_and_addresses_mix_where_sizes_are_given(engine):
    arrays = [memory(4096, dtype=np.uint8), memory(4096, dtype=np.uint8) ^ 1]
    engine.save_blocks(keys(2), data_ptrs=[arrays[0], arrays[1].ctypes.data], sizes=[4096, 1000]).wait()
    target = np.zeros(1000, np.uint8)
    engine.load_blocks(keys(2)[1:], data_ptrs=[target]).wait()
    assert (target == arrays[1][:1000]).all()


@pytest.mark.host
def test_a_lone_block_of_cpu_memory_goes_where_plain_copies_refuse_it(engine, host):
    """As CUDA does, which takes memory of the CPU for both sides of a copy in batches only."""
    source, target = memory(4096, dtype=np.uint8), np.zeros(4096, np.uint8)
    host.fail_call(1, INVALID_VALUE, field="memcpy_dtoh_async")
    engine.save_blocks(keys(1), data_ptrs=[source]).wait()
    host.fail_call(1, INVALID_VALUE, field="memcpy_htod_async")
    assert engine.load_blocks(keys(1), data_ptrs=[target]).num_blocks == 1
    assert not host.fail_pending()
    engine.shutdown()
    assert np.array_equal(source, target)


def test_memory_of_a_job_is_held_until_it_is_over_however_soon_its_handle_goes(engine, device, host):
    producer = Producer(memory(4096, dtype=np.uint8))
    if device.is_host:
        host.hold()
    engine.save_blocks(keys(1), data_ptrs=[producer])
    gc.collect()
    if device.is_host:
        engine.check_blocks(keys(1))
        assert producer.deletions == 0
        host.release()
    job = engine.load_blocks(keys(1), data_ptrs=[np.zeros(4096, np.uint8)])
    while engine.check_blocks(keys(1)).leading == 0:
        pass
    job.wait()
    engine.check_blocks(keys(1))
    assert producer.deletions == 1


def test_memory_of_a_job_is_let_go_as_soon_as_somebody_sees_it_done(engine):
    for look in (lambda job: job.wait(), lambda job: [None for _ in iter(job.done, True)]):
        engine.clear()
        producer = Producer(memory(4096, dtype=np.uint8))
        job = engine.save_blocks(keys(1), data_ptrs=[producer])
        look(job)
        assert producer.deletions == 1


def test_memory_is_let_go_when_nothing_is_moved_or_the_engine_ends(engine):
    producer = Producer(memory(4096, dtype=np.uint8))
    engine.load_blocks(keys(1), data_ptrs=[producer]).wait()  # a miss
    assert producer.deletions == 1
    engine.save_blocks(keys(1), data_ptrs=[producer])
    engine.save_blocks(keys(2)[1:], data_ptrs=[producer])
    engine.shutdown()
    assert producer.deletions == 3


@pytest.mark.host
def test_memory_of_a_failed_submission_is_let_go(engine, host):
    producer = Producer(memory(4096, dtype=np.uint8))
    host.fail_call(1, 2, field="memcpy_batch_async")
    host.fail_call(1, 2, field="event_record")
    with pytest.raises(kvortex.DriverError):
        engine.save_blocks(keys(1), data_ptrs=[producer])
    engine.check_blocks(keys(1))
    assert producer.deletions == 1


@pytest.mark.host
def test_memory_of_a_dead_context_is_never_given_back(device, host):
    config = kvortex.KVortexConfig(
        cpu_pool_size_bytes=1 << 20, block_bytes=4096, device=device.name, shutdown_timeout_ms=50
    )
    engine = kvortex.KVortexEngine.create(config)
    producer = Producer(memory(4096, dtype=np.uint8))
    host.hold()
    job = engine.save_blocks(keys(1), data_ptrs=[producer])
    engine.shutdown()
    host.release()
    with pytest.raises(kvortex.DriverError):
        job.wait()
    del engine, job
    gc.collect()
    assert producer.deletions == 0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"data_ptrs": [memory(4096, dtype=np.uint8), 1 << 20]}, ValueError, "need sizes"),
        ({"data_ptrs": [memory(64, dtype=np.uint8)] * 2, "sizes": 65}, ValueError, r"data_ptrs\[0\] has 64 bytes"),
        ({"data_ptrs": [memory(64, 64)[:, ::2]] * 2}, ValueError, "not C-contiguous"),
        ({"data_ptrs": [memory(4097, dtype=np.uint8)] * 2}, ValueError, r"sizes\[0\] is 4097"),
        ({"data_ptrs": ["a", "b"]}, TypeError, r"data_ptrs\[0\]: str has no address"),
    ],
)
def test_unfit_objects_are_refused(engine, arguments, error, match):
    with pytest.raises(error, match=match):
        engine.save_blocks(keys(2), **arguments)


def test_read_only_blocks_are_saved_and_not_loaded(engine):
    content = bytes(4096)
    engine.save_blocks(keys(1), data_ptrs=[content]).wait()
    with pytest.raises(BufferError, match="bytes is read-only"):
        engine.load_blocks(keys(1), data_ptrs=[content])


def test_deleters_run_where_the_copy_reads_no_more(engine):
    """The race that a deleter called too early would lose: memory is scribbled over as soon as it is given back."""

    class Scribbled(Producer):
        def delete(self, address):
            super().delete(address)
            ctypes.memset(self.array.ctypes.data, 0xFF, self.array.nbytes)

    for round_ in range(20):
        engine.clear()
        blocks = [memory(4096, dtype=np.uint8) ^ np.uint8(i + round_) for i in range(8)]
        wanted = [block.tobytes() for block in blocks]
        engine.save_blocks(keys(8), data_ptrs=[Scribbled(block) for block in blocks])
        targets = [np.zeros(4096, np.uint8) for _ in blocks]
        while engine.check_blocks(keys(8)).leading < 8:
            pass
        engine.load_blocks(keys(8), data_ptrs=targets).wait()
        assert [target.tobytes() for target in targets] == wanted
