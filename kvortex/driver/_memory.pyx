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

from kvortex import arguments


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
    FIRST_ADDRESS = 4096  # the page of the null pointer is nobody's

TYPESTR = re.compile(r"[<>|=](?P<kind>[A-Za-z])(?P<size>[0-9]{1,18})(\[.*\])?")
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

    cdef int describe(self, str what, object address, object shape, object strides, object itemsize) except -1:
        """Take what a protocol says, if it holds together: `strides` in bytes, None where the elements are dense."""
        cdef bint empty
        shape = whole_numbers(shape, what, ": shape")
        itemsize = whole_number(itemsize, what, ": the size of its elements")
        if not 0 <= itemsize < 1 << 63:
            raise ValueError(f"{what} has elements of {itemsize} bytes; 0 to 2^63 - 1 are possible")
        strides = dense_strides(shape, itemsize) if strides is None else whole_numbers(strides, what, ": strides")
        if len(strides) != len(shape):
            raise ValueError(f"{what} has shape {shape} and strides {strides} bytes; they must have one length")
        first, end, empty = address, address + itemsize, 0 in shape
        for count, stride in zip(shape, strides):
            if count < 0:
                raise ValueError(f"{what} has shape {shape}; it must not be negative")
            if empty:
                continue
            if stride < 0:
                first += (count - 1) * stride
            else:
                end += (count - 1) * stride
        if first < (0 if empty else FIRST_ADDRESS) or end >= 1 << 64:
            raise ValueError(f"{what} has data {address:#x}, shape {shape} and strides {strides} bytes: null, or out "
                             f"of the address space")
        self.address, self.shape, self.strides, self.itemsize = address, shape, strides, itemsize
        return 0

    cdef int read_torch(self, object tensor) except -1:
        what = type(tensor).__name__
        address = whole_number(tensor.data_ptr(), what, ".data_ptr()")
        device = getattr(tensor, "device", None)
        if hasattr(device, "type"):
            if device.type not in ("cpu", "cuda"):
                raise ValueError(f"{what} lies on the device {device.type!r}; memory of cpu and cuda can be moved")
            self.is_cuda = device.type == "cuda"
        if not hasattr(tensor, "stride") or not hasattr(tensor, "element_size"):
            self.address = whole_address(address, f"{what}.data_ptr()")
            return 0
        if not callable(tensor.stride) or not callable(tensor.element_size):
            raise TypeError(f"stride and element_size of {what} must be methods, got {tensor.stride!r} and "
                            f"{tensor.element_size!r}")
        itemsize = whole_number(tensor.element_size(), what, ".element_size()")
        strides = tuple([step * itemsize for step in whole_numbers(tensor.stride(), what, ".stride()")])
        return self.describe(what, address, getattr(tensor, "shape", None), strides, itemsize)

    cdef int read_interface(self, str name, object description) except -1:
        """`__cuda_array_interface__`, versions 0 to 3, and `__array_interface__`: dicts of the same shape."""
        what = f"{name} of {type(self.owner).__name__}"
        if not isinstance(description, dict):
            raise TypeError(f"{what} must be a dict, got {description!r}")
        version = whole_number(description.get("version", 0), what, ": version")
        if not 0 <= version <= 3:
            raise ValueError(f"{what} has version {version}; 0 to 3 are understood")
        data, typestr = description.get("data"), description.get("typestr")
        if not isinstance(data, tuple) or len(data) != 2 or data[1] not in (False, True):
            raise ValueError(f"{what} has data {data!r}; an address and whether it is read-only are needed, as a tuple")
        match = TYPESTR.fullmatch(typestr) if isinstance(typestr, str) else None
        if match is None or match["kind"] in "tO":
            raise ValueError(f"{what} has typestr {typestr!r}; elements of whole bytes are needed, e.g. '<f2'")
        if description.get("mask") is not None:
            raise ValueError(f"{what} has a mask, and masked memory cannot be moved as bytes; pass it without")
        address = whole_number(0 if data[0] is None else data[0], what, ": data[0]")
        itemsize = int(match["size"]) * (4 if match["kind"] == "U" else 1)
        self.describe(what, address, description.get("shape"), description.get("strides"), itemsize)
        self.read_only = bool(data[1])
        self.is_cuda = name == "__cuda_array_interface__"
        stream = description.get("stream")
        if stream is not None:
            stream = whole_number(stream, what, ": stream")
            if not 1 <= stream < 1 << 64:
                raise ValueError(f"{what} names the stream {stream}; it must be None, 1 (the legacy default stream), "
                                 f"2 (the per-thread one) or a handle")
        self.stream = stream
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
        what = type(memory).__name__
        device_type, _ = whole_pair(memory.__dlpack_device__(), what, ".__dlpack_device__()")
        self.is_cuda = is_of_gpu(device_type, what)
        keywords = {}
        if self.is_cuda:
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
        strides = None
        if tensor.strides is not NULL:
            strides = tuple(tensor.strides[dim] * <object>(bits // 8) for dim in range(tensor.ndim))
        address = <uint64_t>tensor.data + <object>tensor.byte_offset
        self.describe("the DLPack tensor", address, shape, strides, bits // 8)
        self.read_only = flags & KV_DLPACK_READ_ONLY != 0
        if is_of_gpu(tensor.device_type, "the DLPack tensor") != self.is_cuda:
            raise ValueError(f"the DLPack tensor lies on a device of type {tensor.device_type}, but its owner's "
                             f"__dlpack_device__() says {'a GPU' if self.is_cuda else 'the CPU'}")
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
        borrowed.address = whole_address(operator.index(memory), "an address")
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


cdef bint is_of_gpu(object device_type, str what) except -1:
    """Which of the two a device type of DLPack is; a ValueError for others."""
    if device_type not in (KV_DLPACK_CPU, KV_DLPACK_CUDA, KV_DLPACK_CUDA_HOST, KV_DLPACK_CUDA_MANAGED):
        raise ValueError(f"{what} lies on a device of DLPack's type {int(device_type)}; memory of the CPU (1), CUDA "
                         f"(2), CUDA host (3) and CUDA managed (13) can be moved")
    return device_type in (KV_DLPACK_CUDA, KV_DLPACK_CUDA_MANAGED)


cdef object whole_address(object number, str what):
    if not 0 <= number < 1 << 64:
        raise ValueError(f"{what} must be in 0..2**64-1, got {number}")
    return number


cdef bint is_integer(object thing):
    """An int of Python or numpy; a bool or a timedelta is none, and numpy's integers are no buffers here."""
    return type(thing) is int or (
        isinstance(thing, numbers.Integral) and not isinstance(thing, bool) and hasattr(thing, "__index__")
    )


cdef object whole_number(object number, str what, str field=""):
    """`kvortex.arguments.whole_number` of `what` and `field` joined."""
    return number if type(number) is int else arguments.whole_number(number, what + field)


cdef tuple whole_numbers(object items, str what, str field=""):
    if not isinstance(items, (tuple, list)):
        raise TypeError(f"{what}{field} must be a tuple of whole numbers, got {items!r}")
    if len(items) > MAX_DIMENSIONS:
        raise ValueError(f"{what}{field} must have {MAX_DIMENSIONS} numbers at most, got {len(items)}")
    return tuple([item if type(item) is int else whole_number(item, f"{what}{field}[{index}]")
                  for index, item in enumerate(items)])


cdef tuple whole_pair(object items, str what, str field=""):
    pair = whole_numbers(items, what, field)
    if len(pair) != 2:
        raise ValueError(f"{what}{field} must be two whole numbers, got {pair}")
    return pair


def dense_strides(shape, itemsize):
    """Strides in bytes of a C-contiguous array."""
    strides, step = [], itemsize
    for count in reversed(shape):
        strides.append(step)
        step *= count
    return tuple(reversed(strides))


# ---- sharing our own ------------------------------------------------------------------------------------------------

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
        version = (0, 0) if max_version is None else whole_pair(max_version, "max_version")
        if min(version) < 0:
            raise ValueError(f"max_version must not be negative, got {version}")
        cdef bint is_versioned = version[0] >= DLPACK_MAJOR
        cdef kv_dlpack_tensor *tensor
        cdef Loan *loan = <Loan *>PyMem_RawMalloc(sizeof(Loan))
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
    if copy is not None and copy is not False:
        raise BufferError(f"KVortex shares its memory and copies none of it; ask with copy=None or False, not {copy!r}")
    if dl_device is None:
        return devices[0]
    wanted = whole_pair(dl_device, "dl_device")
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
