"""Objects that speak the protocols exactly, over memory of their own: DLPack through ctypes, interfaces, streams.

What they say is written down here once more, from the standards, so that tests do not believe the code they test.
"""

import ctypes

import numpy as np

CPU, CUDA, CUDA_HOST, ROCM, MANAGED = 1, 2, 3, 10, 13
READ_ONLY, IS_COPIED = 1, 2


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("manager", ctypes.c_void_p), ("deleter", Deleter)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


python = ctypes.pythonapi
Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # not py_object: the capsule is dying
python.PyCapsule_New.restype = ctypes.py_object
python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, Destructor]
for function in (python.PyCapsule_IsValid, python.PyCapsule_GetPointer):
    function.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
python.PyCapsule_IsValid.restype = ctypes.c_int
python.PyCapsule_GetPointer.restype = ctypes.c_void_p

NAMES = {Managed: b"dltensor", Versioned: b"dltensor_versioned"}


@Destructor
def end_capsule(capsule):
    """As the standard asks: call the deleter if nobody has taken the tensor."""
    for structure, name in NAMES.items():
        if python.PyCapsule_IsValid(capsule, name):
            pointer = python.PyCapsule_GetPointer(capsule, name)
            structure.from_address(pointer).deleter(pointer)


class Producer:
    """A DLPack producer over the memory of a numpy array, which lives as long as somebody may use it.

    `deletions` counts the calls of the deleters, `capsules` what was handed out, `asked` what for.
    """

    def __init__(self, array, *, device=(CPU, 0), version=(1, 0), flags=0, accepts=None, **changes):
        self.array, self.device, self.version, self.flags, self.changes = array, device, version, flags, changes
        self.accepts = accepts or ({"stream", "max_version", "copy", "dl_device"} if version else {"stream"})
        self.deletions, self.capsules, self.asked = 0, 0, []
        self.alive = {}  # by address: what the consumer may still use

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **wishes):
        unknown = set(wishes) - self.accepts
        if unknown:
            raise TypeError(f"__dlpack__() got an unexpected keyword argument {unknown.pop()!r}")
        self.asked.append(wishes)
        array, itemsize = self.array, self.array.itemsize
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        strides = (ctypes.c_int64 * array.ndim)(*[step // itemsize for step in array.strides])
        offset = self.changes.get("byte_offset", 0)
        tensor = Tensor(
            array.ctypes.data - offset, *self.device, array.ndim, 2, 8 * itemsize, 1, shape, strides, offset
        )
        for name, value in self.changes.items():
            setattr(tensor, name, value)
        deleter = Deleter(self.delete)
        if self.version:
            managed = Versioned(*self.version, None, deleter, self.flags, tensor)
        else:
            managed = Managed(tensor, None, deleter)
        address = ctypes.addressof(managed)
        self.alive[address] = managed, shape, strides, deleter
        self.capsules += 1
        return python.PyCapsule_New(address, NAMES[type(managed)], end_capsule)

    def delete(self, address):
        assert address in self.alive, "deleted twice"
        del self.alive[address]
        self.deletions += 1


class CudaArray:
    """What CuPy and Numba show: a dict. The memory is numpy's."""

    def __init__(self, array, read_only=False, **changes):
        self.array = array
        contiguous = array.flags.c_contiguous
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, read_only),
            "version": 3,
            "strides": None if contiguous else array.strides,
            "stream": None,
        } | changes


class TorchLike:
    """What torch shows without a protocol: an address, and strides in elements."""

    def __init__(self, array, device_type="cpu"):
        self.array, self.shape = array, array.shape
        self.device = type("device", (), {"type": device_type})()

    def data_ptr(self):
        return self.array.ctypes.data

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self):
        return self.array.itemsize


class ArrayInterface:
    """numpy's interface alone, without the buffer protocol."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


class MethodStream:
    def __init__(self, handle, version=0):
        self.handle, self.version = handle, version

    def __cuda_stream__(self):
        return self.version, self.handle


class TupleStream:
    def __init__(self, handle):
        self.__cuda_stream__ = (0, handle)


class TorchStream:
    def __init__(self, handle):
        self.cuda_stream = handle


class CupyStream:
    def __init__(self, handle):
        self.ptr = handle

    def synchronize(self): ...


def memory(*shape, dtype=np.float16):
    """An array whose bytes are all different from their neighbours'."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.resize(np.arange(251, dtype=np.uint8), count).view(dtype).reshape(shape)
