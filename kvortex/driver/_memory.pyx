"""The one place that knows how libraries describe memory to each other, without importing any of them."""

import math
import numbers
import operator
import re

from cpython.buffer cimport PyObject_CheckBuffer
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New, PyCapsule_SetName
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from cython cimport auto_pickle, no_gc_clear
from libc.stdint cimport int64_t, uint64_t

from kvortex._c cimport (
    KV_DLPACK_CPU,
    KV_DLPACK_CUDA,
    KV_DLPACK_CUDA_HOST,
    KV_DLPACK_CUDA_MANAGED,
    KV_DLPACK_IS_COPIED,
    KV_DLPACK_READ_ONLY,
    KV_DLPACK_UINT,
    kv_dlpack_managed,
    kv_dlpack_tensor,
    kv_dlpack_versioned,
)


cdef extern from "Python.h" nogil:
    int Py_IsInitialized()
    void PyErr_Fetch(PyObject **kind, PyObject **value, PyObject **trace)
    void PyErr_Restore(PyObject *kind, PyObject *value, PyObject *trace)

cdef const char *NAME = "dltensor"
cdef const char *NAME_WHEN_TAKEN = "used_dltensor"
cdef const char *VERSIONED_NAME = "dltensor_versioned"
cdef const char *VERSIONED_NAME_WHEN_TAKEN = "used_dltensor_versioned"
cdef enum:
    DLPACK_MAJOR = 1  # the version written, and the one understood
    MAX_DIMENSIONS = 64

NO_ORDER = -1  # DLPack's word for "make no stream wait"


@auto_pickle(False)  # copy.copy would call a deleter twice
@no_gc_clear  # in a garbage cycle it must outlive the copies that use it
cdef class BorrowedMemory:
    """Memory of someone else, as `borrow_memory` read it; kept alive, exported or uncollected as long as this object.

    Attributes
    ----------
    address : int
    owner : object
        What was handed in, None for a bare address.
    shape, strides : tuple of int or None
        Strides in bytes. None when only the address is known.
    itemsize : int
        In bytes.
    read_only : bool
    is_cuda : bool or None
        None when the protocol does not tell.
    stream : int or None
        The producer's stream that the memory must be waited for on, if the protocol names one.
    """

    @property
    def nbytes(self):
        """Bytes of all elements, None when only the address is known."""
        return None if self.shape is None else math.prod(self.shape) * self.itemsize

    @property
    def is_contiguous(self):
        """Whether the elements lie in C order without gaps; None when only the address is known."""
        if self.shape is None:
            return None
        return 0 in self.shape or all(
            count == 1 or stride == dense
            for count, stride, dense in zip(self.shape, self.strides, dense_strides(self.shape, self.itemsize))
        )

    cdef int require_copyable(self, bint as_target) except -1:
        """All of it as one run of bytes, or an error that says why not."""
        what = type(self.owner).__name__
        if self.shape is None:
            raise TypeError(f"the size of {'an address' if self.owner is None else what} is unknown; pass an object "
                            f"that describes its shape, e.g. an array")
        if not self.is_contiguous:
            raise ValueError(f"{what} is not C-contiguous (shape {self.shape}, strides {self.strides} bytes); copy it "
                             f"into an array that is")
        if as_target and self.read_only:
            raise BufferError(f"{what} is read-only, and would be written to")
        return 0

    cdef int read_torch(self, object tensor) except -1:
        self.address = tensor.data_ptr()
        device = getattr(tensor, "device", None)
        if hasattr(device, "type"):
            self.is_cuda = device.type == "cuda"
        if hasattr(tensor, "stride") and hasattr(tensor, "element_size"):
            self.itemsize = tensor.element_size()
            self.shape = tuple(tensor.shape)
            self.strides = tuple(step * self.itemsize for step in tensor.stride())
        return 0

    cdef int read_interface(self, str name, object description) except -1:
        """`__cuda_array_interface__`, versions 0 to 3, and `__array_interface__`: dicts of the same shape."""
        what = f"{name} of {type(self.owner).__name__}"
        data = description.get("data")
        typestr = description["typestr"]
        if not isinstance(data, tuple) or typestr[1] in "tO":
            raise ValueError(f"{what} has data {data!r} of type {typestr!r}; an address of whole bytes is needed")
        if description.get("mask") is not None:
            raise ValueError(f"{what} has a mask, and masked memory cannot be moved as bytes; pass it without")
        self.address, self.read_only = data[0] or 0, bool(data[1])
        self.itemsize = int(typestr[2:].split("[")[0]) * (4 if typestr[1] == "U" else 1)
        self.shape = tuple(description["shape"])
        strides = description.get("strides")
        self.strides = dense_strides(self.shape, self.itemsize) if strides is None else tuple(strides)
        self.is_cuda = name == "__cuda_array_interface__"
        self.stream = description.get("stream")
        if self.stream is not None and self.stream < 1:
            raise ValueError(f"{what} names the stream {self.stream}; it must be None, 1 (the legacy default stream), "
                             f"2 (the per-thread one) or a handle")
        return 0

    cdef int read_buffer(self, object memory) except -1:
        view = memoryview(memory)
        cdef Py_buffer *buffer = PyMemoryView_GET_BUFFER(view)
        if view.suboffsets:
            raise ValueError(f"{type(memory).__name__} is an array of pointers, not one piece of memory")
        if "O" in re.sub(":[^:]*:", "", view.format):  # without the names of fields
            raise TypeError(f"{type(memory).__name__} has elements of type {view.format!r}, Python objects, which "
                            f"cannot be moved as bytes; pass an array of numbers")
        self.view = view
        self.address = <uint64_t>buffer.buf
        self.shape, self.strides, self.itemsize = view.shape, view.strides, view.itemsize
        self.read_only, self.is_cuda = view.readonly, False
        return 0

    cdef int read_dlpack(self, object memory, object stream) except -1:
        device_type, _ = memory.__dlpack_device__()
        if device_type not in (KV_DLPACK_CPU, KV_DLPACK_CUDA, KV_DLPACK_CUDA_HOST, KV_DLPACK_CUDA_MANAGED):
            raise ValueError(f"{type(memory).__name__} lies on a device of DLPack's type {int(device_type)}; memory of "
                             f"the CPU (1), CUDA (2), CUDA host (3) and CUDA managed (13) can be moved")
        keywords = {}
        if device_type in (KV_DLPACK_CUDA, KV_DLPACK_CUDA_MANAGED):
            keywords["stream"] = stream
        try:
            # A copy would be someone else's memory: what is read from it grows stale, what is written to it is lost.
            capsule = memory.__dlpack__(**keywords, max_version=(DLPACK_MAJOR, 0), copy=False)
        except TypeError:  # made before version 1, when nothing was copied and nothing asked for
            capsule = memory.__dlpack__(**keywords)
        try:
            self.take(capsule)
        finally:
            capsule = None  # here, not on the way out: what is run by a refused one should meet no pending exception
        return 0

    cdef int take(self, object capsule) except -1:
        """Take the tensor out of a DLPack capsule. From here on its deleter is ours to call, and is called once.

        A capsule that is refused is left as it was, so that its own destructor cleans up.
        """
        cdef kv_dlpack_versioned *versioned
        cdef kv_dlpack_tensor *tensor
        cdef uint64_t flags = 0
        cdef void *managed
        cdef bint is_versioned = PyCapsule_IsValid(capsule, VERSIONED_NAME)
        cdef int dim
        if not is_versioned and not PyCapsule_IsValid(capsule, NAME):
            raise ValueError(f"{capsule!r} is no DLPack capsule, or was taken before")
        if is_versioned:
            managed = PyCapsule_GetPointer(capsule, VERSIONED_NAME)
            versioned = <kv_dlpack_versioned *>managed
            if versioned.major != DLPACK_MAJOR:
                raise BufferError(f"the capsule has version {versioned.major}.{versioned.minor} of DLPack; "
                                  f"{DLPACK_MAJOR}.x and those before it are understood")
            tensor, flags = &versioned.tensor, versioned.flags
        else:
            managed = PyCapsule_GetPointer(capsule, NAME)
            tensor = &(<kv_dlpack_managed *>managed).tensor
        if not 0 <= tensor.ndim <= MAX_DIMENSIONS or (tensor.ndim and tensor.shape is NULL):
            raise ValueError(f"the DLPack tensor has {tensor.ndim} dimensions or no shape")
        bits = tensor.type_bits * tensor.type_lanes
        if bits == 0 or bits % 8:
            raise ValueError(f"the DLPack tensor's elements have {tensor.type_lanes} x {tensor.type_bits} bits; whole "
                             f"bytes are needed, so show it as uint8")
        if flags & KV_DLPACK_IS_COPIED:
            raise BufferError("the DLPack tensor is a copy; pass memory that can be shared")
        shape = tuple(tensor.shape[dim] for dim in range(tensor.ndim))
        if tensor.strides is not NULL:
            strides = tuple(tensor.strides[dim] * (bits // 8) for dim in range(tensor.ndim))
        else:
            strides = dense_strides(shape, bits // 8)
        if any(count < 0 for count in shape):
            raise ValueError(f"the DLPack tensor has the shape {shape}")
        address = <uint64_t>tensor.data + <object>tensor.byte_offset
        if address >= 1 << 64:
            raise ValueError(f"the DLPack tensor's byte_offset {tensor.byte_offset} leads out of the address space")
        self.address, self.shape, self.strides, self.itemsize = address, shape, strides, bits // 8
        self.read_only = flags & KV_DLPACK_READ_ONLY != 0
        self.is_cuda = tensor.device_type in (KV_DLPACK_CUDA, KV_DLPACK_CUDA_MANAGED)
        PyCapsule_SetName(capsule, VERSIONED_NAME_WHEN_TAKEN if is_versioned else NAME_WHEN_TAKEN)
        self.managed, self.is_versioned = managed, is_versioned
        return 0

    def __dealloc__(self):
        cdef void *managed = self.managed
        cdef kv_dlpack_versioned *versioned = <kv_dlpack_versioned *>managed
        cdef kv_dlpack_managed *unversioned = <kv_dlpack_managed *>managed
        self.managed = NULL
        if managed is not NULL:
            if self.is_versioned:
                if versioned.deleter is not NULL:
                    versioned.deleter(versioned)
            elif unversioned.deleter is not NULL:
                unversioned.deleter(unversioned)
        if self.lender is not None:
            self.lender.take_back()


cpdef BorrowedMemory borrow_memory(object memory, object stream=NO_ORDER):
    """Read where memory is, and hold it.

    Parameters
    ----------
    memory : int or object
        A bare address, or an object that speaks one of these, asked for in this order: ``data_ptr()`` (torch, whose
        other protocols refuse bfloat16 or tensors that require a gradient), ``__cuda_array_interface__``, the buffer
        protocol, ``__array_interface__``, ``__dlpack__``.
    stream : int, optional
        The handle of a CUDA stream as DLPack wants it (1 is the legacy default stream), which the producer of a DLPack
        tensor makes wait for its own work. By default nothing waits: for whoever only wants to know the place.

    Returns
    -------
    BorrowedMemory
        While it lives, a buffer stays exported, a DLPack tensor undeleted, an object referred to.

    Raises
    ------
    TypeError
        It is none of these.
    ValueError, BufferError
        It describes memory that cannot be moved: masked, of another kind of device, of elements that are no whole
        bytes, a copy.
    """
    cdef BorrowedMemory borrowed = BorrowedMemory.__new__(BorrowedMemory)
    if is_integer(memory):
        borrowed.address = operator.index(memory)
        return borrowed
    borrowed.owner = memory
    if isinstance(memory, Lender) and (<Lender>memory).lend(borrowed):
        borrowed.lender = memory
        return borrowed
    if callable(getattr(memory, "data_ptr", None)):
        borrowed.read_torch(memory)
        return borrowed
    description = getattr(memory, "__cuda_array_interface__", None)
    if description is not None:
        borrowed.read_interface("__cuda_array_interface__", description)
        return borrowed
    description = getattr(memory, "__array_interface__", None)
    if PyObject_CheckBuffer(memory):
        try:
            borrowed.read_buffer(memory)
            return borrowed
        except ValueError:  # numpy has no letter for the type of some elements, bfloat16 among them
            if description is None:
                raise
    if description is not None:
        borrowed.read_interface("__array_interface__", description)
        return borrowed
    if hasattr(memory, "__dlpack__") and hasattr(memory, "__dlpack_device__"):
        borrowed.read_dlpack(memory, stream)
        return borrowed
    raise TypeError(
        f"{type(memory).__name__} has no address that KVortex can read; pass an int, or an object with data_ptr(), "
        f"__cuda_array_interface__, the buffer protocol, __array_interface__ or __dlpack__"
    )


cdef bint is_integer(object thing):
    """An int of Python or numpy; a bool is none, and numpy's integers are no buffers here."""
    return type(thing) is int or (isinstance(thing, numbers.Integral) and not isinstance(thing, bool))


def dense_strides(shape, itemsize):
    """Strides in bytes of a C-contiguous array."""
    strides, step = [], itemsize
    for count in reversed(shape):
        strides.append(step)
        step *= count
    return tuple(reversed(strides))


# ---- ours, in others' hands -----------------------------------------------------------------------------------------

@auto_pickle(False)  # what it lends is not copied by Python
cdef class Lender:
    """What DeviceBuffer and PinnedPool have in common; see the map."""

    cdef int lend(self, BorrowedMemory borrowed) except -1:
        return 0

    cdef void take_back(self) noexcept:
        self.exports -= 1
        if self.exports == 0:
            self.all_is_back()

    cdef void all_is_back(self) noexcept:
        pass

    cdef object capsule(self, uint64_t address, size_t nbytes, int device_type, int device_id, object max_version):
        cdef Loan *loan = <Loan *>PyMem_RawMalloc(sizeof(Loan))
        cdef kv_dlpack_tensor *tensor
        cdef bint is_versioned = max_version is not None and max_version[0] >= DLPACK_MAJOR
        if loan is NULL:
            raise MemoryError("no memory for a DLPack capsule")
        if is_versioned:
            tensor = &loan.managed.versioned.tensor
            loan.managed.versioned.major, loan.managed.versioned.minor = DLPACK_MAJOR, 0
            loan.managed.versioned.flags = 0
            loan.managed.versioned.manager, loan.managed.versioned.deleter = <void *>self, end_versioned_loan
        else:
            tensor = &loan.managed.unversioned.tensor
            loan.managed.unversioned.manager, loan.managed.unversioned.deleter = <void *>self, end_unversioned_loan
        loan.shape, loan.stride = <int64_t>nbytes, 1
        tensor.data, tensor.byte_offset = <void *>address, 0
        tensor.device_type, tensor.device_id = device_type, device_id
        tensor.ndim, tensor.shape, tensor.strides = 1, &loan.shape, &loan.stride
        tensor.type_code, tensor.type_bits, tensor.type_lanes = KV_DLPACK_UINT, 8, 1
        try:
            made = PyCapsule_New(loan, VERSIONED_NAME if is_versioned else NAME, drop_capsule)
        except BaseException:
            PyMem_RawFree(loan)
            raise
        Py_INCREF(self)
        self.exports += 1
        return made


def require_shareable(dl_device, copy, tuple devices):
    """Check what a consumer asks of `__dlpack__`: one of `devices`, the first unless it says which, and no copy.

    Returns that device.
    """
    if copy:
        raise BufferError("KVortex shares its memory and copies none of it; ask with copy=None or False")
    if dl_device is None:
        return devices[0]
    wanted = tuple(int(part) for part in dl_device)
    if wanted not in devices:
        raise BufferError(f"this memory is of the device {' or '.join(map(str, devices))} in DLPack's counting, and is "
                          f"not copied to {wanted}")
    return wanted


cdef union Managed:
    kv_dlpack_versioned versioned      # which of the two, the capsule's name says
    kv_dlpack_managed unversioned


cdef struct Loan:
    Managed managed                    # first, so that a pointer to what it holds is one to the loan
    int64_t shape, stride


cdef void end_versioned_loan(kv_dlpack_versioned *managed) noexcept nogil:
    end(<Loan *>managed, managed.manager)


cdef void end_unversioned_loan(kv_dlpack_managed *managed) noexcept nogil:
    end(<Loan *>managed, managed.manager)


cdef void end(Loan *loan, void *lender) noexcept nogil:
    """Called by the consumer, on any of its threads, with the GIL or without."""
    cdef PyObject *kind = NULL
    cdef PyObject *value = NULL
    cdef PyObject *trace = NULL
    PyMem_RawFree(loan)
    if Py_IsInitialized():  # a consumer's static objects die after the interpreter, and then nobody counts any more
        with gil:
            PyErr_Fetch(&kind, &value, &trace)  # a consumer that is refusing the tensor has one pending
            (<Lender>lender).take_back()
            Py_DECREF(<Lender>lender)
            PyErr_Restore(kind, value, trace)


cdef void drop_capsule(object capsule) noexcept:
    """The capsule's destructor: if nobody took the tensor out, the loan ends here."""
    cdef Loan *loan
    if PyCapsule_IsValid(capsule, VERSIONED_NAME):
        loan = <Loan *>PyCapsule_GetPointer(capsule, VERSIONED_NAME)
        end(loan, loan.managed.versioned.manager)
    elif PyCapsule_IsValid(capsule, NAME):
        loan = <Loan *>PyCapsule_GetPointer(capsule, NAME)
        end(loan, loan.managed.unversioned.manager)
