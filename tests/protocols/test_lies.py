"""What others say of their memory, streams, keys and blocks may be short, empty, missing, of another type, or a lie.

Every entrance answers with one of three errors that names the field; nothing else comes out, and nothing is read or
written by what was refused.
"""

import ctypes
import math
import os

import numpy as np
import producers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvortex.driver._memory import borrow_memory
from producers import CUDA, ROCM, Producer, memory

import kvortex
from kvortex import DeviceBuffer, KVLayout
from kvortex.driver._device import stream_handle

ANSWERS = (TypeError, ValueError, BufferError)
MISSING = object()
ARRAY = memory(4, 16)
ADDRESS = ARRAY.ctypes.data
HUGE = 1 << 70

# What a field may wrongly be; the right description is that of ARRAY, 4 x 16 elements of 2 bytes.
NO_NUMBERS = [1.5, math.nan, "3", b"3", True, np.True_, [], (), {}, object(), 2j, print]
SHAPES = [
    *[MISSING, None, 3, 1.5, "ab", b"ab", {}, {2: 3}, object(), np.array([4, 16]), (number for number in (4, 16))],
    *[(4.0, 16), ("4", 16), (True, 16), (None, 16), ((4,), 16), (-4, 16), (-4, -16), (HUGE, 16), (1,) * 65],
]
STRIDES = [
    *[3, 1.5, "ab", b"ab", {}, object(), (), (2,), (32, 2, 2), (32.0, 2), ("32", 2), (True, 2), (None, 2)],
    *[(HUGE, 2), (-HUGE, 2), (-(1 << 62), 2), (1 << 63, 2), (1,) * 65],
]
TYPESTRS = [
    *[MISSING, None, 2, 1.5, b"<f2", (), object(), "", "<", "<f", "f2", "<2", "<f2x", "<f2[", "<f-2", "<f2.0", "< f2"],
    *["|O8", "|t1", "<f" + "9" * 30, "<f" + "9" * 18, "<f2\n", "<f٢"],
]
DATA = [
    *[MISSING, None, ADDRESS, "ab", b"ab", {}, object(), (), (ADDRESS,), (ADDRESS, False, 0), [ADDRESS, False]],
    *[("1", False), (1.5, False), (True, False), (-1, False), (HUGE, False), ((1 << 64) - 8, False), (0, False)],
    *[(8, False), (None, False), (ADDRESS, "no"), (ADDRESS, None), (ADDRESS, 2), (ADDRESS, ())],
]
VERSIONS = [None, -1, 4, HUGE, *NO_NUMBERS]
STREAMS = [0, -1, 1 << 64, HUGE, *NO_NUMBERS]

INTERFACE = {"shape": SHAPES, "strides": STRIDES, "typestr": TYPESTRS, "data": DATA, "version": VERSIONS}
INTERFACE["mask"] = [1, (), ARRAY]
PROTOCOLS = {"__array_interface__": INTERFACE, "__cuda_array_interface__": INTERFACE | {"stream": STREAMS}}


def shown_by(name, changes):
    description = producers.CudaArray(ARRAY).__cuda_array_interface__ | changes
    description = {field: value for field, value in description.items() if value is not MISSING}
    return shown_as(name, description)


def shown_as(name, answer):
    thing = type("Liar", (), {})()
    setattr(thing, name, answer)
    return thing


class Torch(producers.TorchLike):
    """What torch shows, each method or attribute answering what it is told to."""

    def __init__(self, **changes):
        super().__init__(ARRAY)
        self.changes = changes
        for name in ("shape", "device"):
            if name in changes:
                setattr(self, name, changes[name])
        if self.shape is MISSING:
            del self.shape

    def data_ptr(self):
        return self.changes.get("data_ptr", ADDRESS)

    def stride(self):
        return self.changes.get("stride", (16, 1))

    def element_size(self):
        return self.changes.get("element_size", 2)


TORCH = {
    "data_ptr": [None, 0, 8, -1, HUGE, (1 << 64) - 8, *NO_NUMBERS],
    "shape": SHAPES,
    "stride": [None, *STRIDES],
    "element_size": [None, -1, HUGE, 1 << 63, 1 << 62, *NO_NUMBERS],
    "device": [type("device", (), {"type": kind})() for kind in ("meta", "xpu", None, 5)],
}


def integers(*numbers):
    return (ctypes.c_int64 * len(numbers))(*numbers)


class Capsules(Producer):
    """A DLPack producer that hands out anything."""

    def __init__(self, capsule):
        super().__init__(ARRAY)
        self.capsule = capsule

    def __dlpack__(self, **wishes):
        return self.capsule


FOREIGN_NAME = b"something else"  # a capsule keeps the pointer only
FOREIGN_CAPSULE = producers.python.PyCapsule_New(ADDRESS, FOREIGN_NAME, producers.Destructor())
DEVICES = [None, 1, "ab", (), (1,), (1, 0, 0), (1.0, 0), ("1", 0), (True, 0), (None, 0), (-1, 0), (HUGE, 0), {1: 0}]
DLPACK = {
    **{f"device {value!r}": lambda value=value: Producer(ARRAY, device=value) for value in DEVICES},
    **{f"version {major}": lambda major=major: Producer(ARRAY, version=(major, 0)) for major in (0, 2, (1 << 32) - 1)},
    **{f"ndim {ndim}": lambda ndim=ndim: Producer(ARRAY, ndim=ndim) for ndim in (-1, -(1 << 31), 65, (1 << 31) - 1)},
    "no shape": lambda: Producer(ARRAY, shape=None),
    "shape of nothing": lambda: Producer(ARRAY, shape=integers(-4, 16)),
    "shape of everything": lambda: Producer(ARRAY, shape=integers(1 << 62, 1 << 62)),
    "dense shape of everything": lambda: Producer(ARRAY, shape=integers(1 << 62, 1 << 62), strides=None),
    "strides to the front": lambda: Producer(ARRAY, strides=integers(-(1 << 62), 1)),
    "strides to the end": lambda: Producer(ARRAY, strides=integers(1 << 62, 1)),
    "no data": lambda: Producer(ARRAY, data=None),
    "data at 8": lambda: Producer(ARRAY, data=8),
    "data at the end": lambda: Producer(ARRAY, data=(1 << 64) - 8),
    "offset to the end": lambda: Producer(ARRAY, data=(1 << 64) - 64, byte_offset=128),
    "no bits": lambda: Producer(ARRAY, bits=0),
    "no lanes": lambda: Producer(ARRAY, lanes=0),
    "odd bits": lambda: Producer(ARRAY, bits=7),
    "a GPU said to be the CPU": lambda: Producer(ARRAY, device_type=CUDA),
    "the CPU said to be a GPU": lambda: Producer(ARRAY, device=(CUDA, 0), device_type=1),
    "another GPU said to be the CPU": lambda: Producer(ARRAY, device_type=ROCM),
    "no device": lambda: Producer(ARRAY, device_type=0),
    **{
        f"capsule of {type(value).__name__}": lambda value=value: Capsules(value)
        for value in (None, 5, "ab", ARRAY, FOREIGN_CAPSULE)
    },
}


def test_the_truth_is_taken():
    """What is wrong below is wrong by the one field that differs."""
    for thing in (*[shown_by(name, {}) for name in PROTOCOLS], Torch(), Producer(ARRAY), ARRAY):
        borrowed = borrow_memory(thing)
        assert (borrowed.address, borrowed.shape, borrowed.strides) == (ADDRESS, (4, 16), (32, 2))
    stated = shown_by("__array_interface__", {"version": MISSING, "strides": MISSING, "shape": [4, 16]})
    assert borrow_memory(stated).shape == (4, 16)


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in PROTOCOLS.items() for field in fields])
def test_a_wrong_field_of_an_interface_is_named(name, field):
    for wrong in PROTOCOLS[name][field]:
        with pytest.raises(ANSWERS, match=rf"{name} of Liar.*({field}|strides)"):
            borrow_memory(shown_by(name, {field: wrong}))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_interface_that_is_no_dict_is_named(name):
    for wrong in (5, 1.5, "ab", (), [], object(), property(lambda self: {})):
        with pytest.raises(TypeError, match=f"{name} of Liar must be a dict"):
            borrow_memory(shown_as(name, wrong))


@pytest.mark.parametrize("field", TORCH)
def test_a_wrong_field_of_a_torch_like_tensor_is_named(field):
    named = {"element_size": "element_size|elements|strides", "data_ptr": "data_ptr|data "}.get(field, field)
    for wrong in TORCH[field]:
        with pytest.raises(ANSWERS, match=f"Torch.*({named})"):
            borrow_memory(Torch(**{field: wrong}))


def test_methods_of_torch_that_are_none_are_named():
    for name in ("stride", "element_size"):
        tensor = Torch()
        setattr(tensor, name, (16, 1))
        with pytest.raises(TypeError, match="stride and element_size of Torch must be methods, got .*16, 1"):
            borrow_memory(tensor)


@pytest.mark.parametrize("lie", DLPACK)
def test_a_wrong_dlpack_tensor_is_refused_and_stays_its_owners(lie):
    producer = DLPACK[lie]()
    with pytest.raises(ANSWERS, match=r"DLPack|\.__dlpack_device__\(\)"):
        borrow_memory(producer)
    assert producer.deletions == producer.capsules


# ---- streams --------------------------------------------------------------------------------------------------------

HANDLES = [None, -1, 1 << 64, HUGE, *NO_NUMBERS]
PAIRS = [None, 5, "ab", {}, {0: 1}, object(), (), (0,), (0, 1, 2)]
PAIRS += [(HUGE, 1), (-1, 1), (1, 1), (0.0, 1), ("0", 1), (False, 1)]


@pytest.mark.parametrize("make", [int, producers.TorchStream, producers.CupyStream, producers.MethodStream])
def test_a_handle_that_is_none_is_named(make):
    for wrong in HANDLES:
        with pytest.raises((TypeError, ValueError), match="stream"):
            stream_handle(wrong if make is int else make(wrong))


def test_a_cuda_stream_that_is_no_pair_is_named():
    for wrong in PAIRS:
        for protocol in (wrong, lambda self, wrong=wrong: wrong):
            with pytest.raises((TypeError, ValueError), match="__cuda_stream__"):
                stream_handle(type("Liar", (), {"__cuda_stream__": protocol})())


# ---- ours -----------------------------------------------------------------------------------------------------------

NO_PAIRS = [1, 1.5, "ab", b"ab", {}, print, (), (1,), (1, 0, 0), (1.0, 0), ("1", 0), (True, 0), (None, 0), (-1, 0)]
OURS = {
    "max_version": NO_PAIRS,
    "dl_device": [*NO_PAIRS, (HUGE, 0)],
    "copy": [True, 1, "no", (), {}, 1.5, object()],
}


@pytest.mark.parametrize("field", OURS)
def test_a_wrong_wish_of_a_dlpack_consumer_is_named(device, field):
    with DeviceBuffer(4096, device) as buffer, kvortex.PinnedPool(4096, 4096, device) as pool:
        pool.wait_ready(20_000)
        for lender in (buffer, pool.slot(0)):
            for wrong in OURS[field]:
                with pytest.raises(ANSWERS, match=f"{field}|device|copy"):
                    lender.__dlpack__(**{field: wrong})


@pytest.mark.host
def test_a_stream_for_memory_of_the_cpu_is_refused(device):
    with DeviceBuffer(4096, device) as buffer:
        for wrong in (0, 1, -1, HUGE, *NO_NUMBERS):
            with pytest.raises(ValueError, match="stream"):
                buffer.__dlpack__(stream=wrong)


# ---- every entrance -------------------------------------------------------------------------------------------------

KEYS = kvortex.block_keys(np.arange(16), 16)
CHANGES = {
    **{
        f"{name} {field}": lambda wrong, name=name, field=field: shown_by(name, {field: wrong})
        for name, fields in PROTOCOLS.items()
        for field in fields
    },
    **{f"torch {field}": lambda wrong, field=field: Torch(**{field: wrong}) for field in TORCH},
    **{f"dlpack {lie}": lambda wrong, lie=lie: DLPACK[lie]() for lie in DLPACK},
}
WRONGS = {
    **{f"{name} {field}": wrongs for name, fields in PROTOCOLS.items() for field, wrongs in fields.items()},
    **{f"torch {field}": wrongs for field, wrongs in TORCH.items()},
    **{f"dlpack {lie}": [None] for lie in DLPACK},
}


@pytest.fixture(scope="module")
def engine():
    config = kvortex.KVortexConfig(
        cpu_pool_size_bytes=1 << 20, block_bytes=4096, device=os.environ.get("KVORTEX_TEST_DEVICE", "host")
    )
    with kvortex.KVortexEngine.create(config) as made:
        yield made


@pytest.fixture(scope="module")
def buffer(engine):
    with DeviceBuffer(4096, engine.device) as made:
        yield made


ENTRANCES = {
    "tensors": lambda thing, engine, buffer: KVLayout.from_tensors([ARRAY, thing]),
    "contiguous": lambda thing, engine, buffer: KVLayout.contiguous(
        thing, kv=1, num_layers=1, num_blocks=4, block_size=1, num_heads=1, head_dim=8, itemsize=2
    ),
    "mla": lambda thing, engine, buffer: KVLayout.mla([thing], num_blocks=4, block_size=1, latent_dim=8, itemsize=2),
    "cross_layer": lambda thing, engine, buffer: KVLayout.cross_layer(thing, num_blocks=4, block_bytes=32),
    "runs": lambda thing, engine, buffer: KVLayout([(thing, 32, 32)], 4),
    "copy_from": lambda thing, engine, buffer: buffer.copy_from(thing),
    "copy_to": lambda thing, engine, buffer: buffer.copy_to(thing),
    "save_blocks": lambda thing, engine, buffer: engine.save_blocks(KEYS, data_ptrs=[thing], stream=0),
    "load_blocks": lambda thing, engine, buffer: engine.load_blocks(KEYS, data_ptrs=[thing], sizes=64, stream=0),
}


@given(data=st.data())
def test_no_entrance_takes_a_lie_and_nothing_is_touched(engine, buffer, data):
    which = data.draw(st.sampled_from(sorted(CHANGES)))
    thing = CHANGES[which](data.draw(st.sampled_from(WRONGS[which])))
    before, stats = ARRAY.tobytes(), engine.get_stats()
    with pytest.raises(ANSWERS) as refused:
        ENTRANCES[data.draw(st.sampled_from(sorted(ENTRANCES)))](thing, engine, buffer)
    assert str(refused.value)
    assert ARRAY.tobytes() == before
    assert engine.get_stats().bytes_saved == stats.bytes_saved


@given(data=st.data())
def test_an_interface_of_which_several_fields_are_wrong_is_refused(data):
    name = data.draw(st.sampled_from(sorted(PROTOCOLS)))
    fields = data.draw(st.lists(st.sampled_from(sorted(PROTOCOLS[name])), min_size=2, unique=True))
    thing = shown_by(name, {field: data.draw(st.sampled_from(PROTOCOLS[name][field])) for field in fields})
    with pytest.raises(ANSWERS, match="Liar"):
        borrow_memory(thing)


numbers = st.integers(-(1 << 66), 1 << 66) | st.integers(-4, 20) | st.sampled_from([*NO_NUMBERS, None])


@given(
    shape=st.lists(numbers, max_size=3),
    strides=st.none() | st.lists(numbers, max_size=3),
    typestr=st.from_regex(r"[<>|=][a-zA-Z][0-9]{1,4}", fullmatch=True) | st.text(max_size=5),
    address=numbers | st.just(ADDRESS),
)
def test_what_is_taken_of_any_interface_lies_in_the_address_space(shape, strides, typestr, address):
    """Whether it is the memory that the owner has, only the owner knows."""
    changes = {"shape": tuple(shape), "strides": strides, "typestr": typestr, "data": (address, False)}
    try:
        borrowed = borrow_memory(shown_by("__array_interface__", changes))
    except ANSWERS as refused:
        assert "Liar" in str(refused)
        return
    assert borrowed.shape == changes["shape"] and len(borrowed.strides) == len(shape)
    corners = [borrowed.address]
    for count, stride in zip(borrowed.shape, borrowed.strides, strict=True):
        corners += [corner + (count - 1) * stride for corner in corners]
    if borrowed.nbytes:
        assert min(corners) >= 4096 and max(corners) + borrowed.itemsize < 1 << 64


@given(runs=st.lists(st.tuples(numbers, numbers, numbers) | st.lists(numbers, max_size=4), max_size=3), count=numbers)
def test_what_is_taken_of_any_runs_lies_in_the_address_space(runs, count):
    try:
        layout = KVLayout(runs, count)
    except ANSWERS as refused:
        assert str(refused)
        return
    for base, stride, piece in layout.runs:
        assert base >= 4096 and piece >= 1 and base + (count - 1) * stride + piece < 1 << 64


# ---- keys, ids, addresses, sizes ------------------------------------------------------------------------------------


def keys_shown_as(**changes):
    """An object with a dtype and a shape, as keys have, and no buffer."""
    return type("Liar", (), {"dtype": np.dtype(np.uint8), "shape": (1, 32)} | changes)()


class OtherShape(np.ndarray):
    shape = (1, 32)


UINT8 = np.uint8
WRONG_KEYS = [
    *[None, 5, 1.5, "ab", b"x" * 32, bytearray(32), memoryview(bytes(32)), [], {}, [[0] * 32], object()],
    *[np.zeros((1, 31), UINT8), np.zeros((1, 33), UINT8), np.zeros((1, 0), UINT8), np.zeros(32, UINT8)],
    *[np.zeros((1, 1, 32), UINT8), np.zeros((), UINT8), np.zeros((2, 64), UINT8)[:, ::2], np.zeros((32, 2), UINT8).T],
    *[np.zeros((1, 32), dtype) for dtype in ("i1", "f4", "?", "S1", "O", "M8[s]", "u8", "V1")],
    *[keys_shown_as(shape=shape) for shape in (None, 5, (), (1,), {0: 1, 1: 32}, [1, 32], (1, "32"), (1, 32), "ab")],
    *[keys_shown_as(dtype=dtype) for dtype in (None, 5, "uint8", "B", np.dtype("f4"), object())],
    np.zeros((2, 16), UINT8).view(OtherShape),
]
WRONG_INTEGERS = [
    *[5, 1.5, "ab", b"ab", {}, object(), [1.5], ["0"], [True], [None], [[0]], [object()]],
    *[[HUGE], [-HUGE], [[0], [1, 2]]],
    *[[-1], [1 << 63], [(1 << 64) - 1], np.array([0], "m8[s]"), np.array([0], "c8"), np.array([False]), np.array(0)],
    *[np.ma.masked_array([4096], [0]), np.zeros((1, 1), np.int64), [math.nan], [0, 0]],
]


@pytest.mark.parametrize("wrong", range(len(WRONG_KEYS)))
def test_what_is_no_array_of_keys_is_named(engine, wrong):
    index = kvortex.BlockIndex(4)
    ids = np.zeros(1, np.int64)
    for call in (
        engine.check_blocks,
        engine.touch_blocks,
        engine.discard_blocks,
        lambda keys: engine.save_blocks(keys, data_ptrs=ids + ADDRESS, sizes=64, stream=0),
        lambda keys: engine.load_blocks(keys, data_ptrs=ids + ADDRESS, sizes=64, stream=0),
        lambda keys: index.reserve(keys, 64),
        *[index.lookup, index.acquire, index.touch, index.discard],
    ):
        with pytest.raises(ANSWERS, match="keys"):
            call(WRONG_KEYS[wrong])


@pytest.mark.parametrize("wrong", range(len(WRONG_INTEGERS)))
def test_what_is_no_array_of_blocks_slots_addresses_or_sizes_is_named(engine, wrong):
    wrong, layout = WRONG_INTEGERS[wrong], KVLayout.from_tensors([ARRAY], block_size=16)
    with (
        kvortex.PinnedPool(1 << 14, 4096, engine.device) as pool,
        kvortex.TransferQueue(engine.device, "D2H") as queue,
    ):
        pool.wait_ready(20_000)
        with pytest.raises(ANSWERS, match="block_ids|block ids"):
            queue.submit(layout, wrong, pool, [0], stream=0)
        with pytest.raises(ANSWERS, match="slot_ids|slots"):
            queue.submit(layout, [0], pool, wrong, stream=0)
    for call in (engine.save_blocks, engine.load_blocks):
        if not (isinstance(wrong, list) and wrong == [1 << 63]):  # a bare address is taken at its word
            with pytest.raises(ANSWERS, match="data_ptrs|blocks"):
                call(KEYS, data_ptrs=wrong, sizes=64, stream=0)
        if not isinstance(wrong, int):  # 5 bytes: fine
            with pytest.raises(ANSWERS, match="sizes"):
                call(KEYS, data_ptrs=[ADDRESS], sizes=wrong, stream=0)
    if not (isinstance(wrong, list) and wrong == [0, 0]):  # two blocks: fine
        with pytest.raises(ANSWERS, match="block_ids"):
            layout.slot_mapping(wrong)


def test_a_queue_counts_whole_jobs(device):
    for wrong in (*NO_NUMBERS, None, 0, -1, HUGE):
        with pytest.raises((TypeError, ValueError), match="max_jobs must be"):
            kvortex.TransferQueue(device, "D2H", max_jobs=wrong)
