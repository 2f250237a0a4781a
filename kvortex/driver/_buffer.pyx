"""DeviceBuffer: memory of a device, for callers without a framework."""

from cpython.buffer cimport PyBuffer_FillInfo
from cython cimport auto_pickle, no_gc_clear
from libc.stdint cimport uint64_t
from posix.unistd cimport getpid

from kvortex._c cimport (
    KV_DLPACK_CPU,
    KV_DLPACK_CUDA,
    kv_call,
    kv_devptr,
    mem_alloc,
    memcpy_dtod_async,
    memcpy_dtoh_async,
    memcpy_htod_async,
    memset_d8_async,
)
from kvortex.driver._device cimport Device, check
from kvortex.driver._memory cimport BorrowedMemory, Lender, borrow_memory, is_integer, whole_number
from kvortex.driver._stream cimport Stream, order_streams, wait_a_while

from kvortex.arguments import shown
from kvortex.driver._memory import require_shareable
from kvortex.errors import ConfigError, DriverError, EngineClosed


@auto_pickle(False)  # copy.copy would make a second owner of the memory
@no_gc_clear  # __dealloc__ needs the device, which the collector would clear before it
cdef class DeviceBuffer(Lender):
    """Memory allocated on a device, not initialised.

    Without a stream the copies and `fill` are complete on return; they run on a private stream that is ordered after
    the buffer's own earlier calls and nothing else, so memory that other streams write or read needs a stream argument
    or a synchronisation by the caller. With a stream they are ordered on it and may return early: the other memory is
    held, and must stay unchanged, until the stream has passed (pageable memory is copied before the return). All of
    them release the GIL. Ctrl-C ends the waiting, and an error may be one of the waiting: then the copy may go on, for
    which the other memory is held.

    Others see the memory as bytes, without a copy, and hold it: through ``__cuda_array_interface__`` and DLPack on a
    GPU, through the buffer protocol and DLPack (as memory of the CPU) on the host device. They find the buffer's own
    calls done, or are made to wait for them: on the device by DLPack's stream argument or the interface's stream entry,
    on the host device before the memory is handed out.

    Parameters
    ----------
    nbytes : int
        At least 1.
    device : Device or str, optional
        A name is opened as `Device.open` does, and closed with the buffer.

    Attributes
    ----------
    device : Device
    nbytes : int
    closed : bool

    Raises
    ------
    ConfigError
        `nbytes` is not in 1..2**48-1.
    DriverError
        E.g. CUDA_ERROR_OUT_OF_MEMORY.
    """

    def __init__(self, nbytes, device="auto"):
        if self.device is not None:
            raise TypeError("a DeviceBuffer cannot be initialised twice")
        nbytes = whole_number(nbytes, "nbytes")
        if not 0 < nbytes < 1 << 48:
            raise ConfigError(f"nbytes must be in 1..2**48-1, got {nbytes}")
        from_name = not isinstance(device, Device)
        cdef Device opened = Device.open(device) if from_name else device
        cdef Stream stream = Stream.create(opened)
        cdef kv_devptr start = 0
        cdef size_t size = nbytes
        cdef int code, mode = 0
        with nogil:
            code = opened.enter(&mode)
            if code == 0:
                code = kv_call(opened.drv, mem_alloc, &start, size)
                opened.leave(mode)
        check(opened, code)
        self.device = opened
        self.owns_device = from_name
        self.stream = stream
        self.start = start
        self.nbytes = size
        self.closed = False

    def __cinit__(self):
        self.closed = True

    @property
    def address(self):
        """The device address of the first byte."""
        self.require_open()
        return self.start

    def __len__(self):
        return self.nbytes

    def copy_from(self, source, offset=0, stream=None):
        """Copy all bytes of a source to `offset`.

        Parameters
        ----------
        source : object
            C-contiguous memory of the host or a device that says where it is and how large: by ``data_ptr()`` as torch
            does, ``__cuda_array_interface__``, the buffer protocol, ``__array_interface__`` or DLPack. The copy waits
            for the stream that an interface names, and a DLPack producer is told of the copy's stream.
        offset : int, optional
            In bytes.
        stream : Stream, int or object, optional
            See the class.

        Raises
        ------
        TypeError
            The source does not say where its memory is, or how much.
        ValueError
            It has gaps or does not fit, the host device cannot reach it, or the stream is refused.
        DriverError, EngineClosed
        """
        self.copy(source, whole_size(offset, "offset"), stream, True)

    def copy_to(self, target, offset=0, stream=None):
        """Fill all bytes of a target from `offset`.

        Parameters
        ----------
        target : object
            C-contiguous memory, as for `copy_from`.
        offset : int, optional
            In bytes.
        stream : Stream, int or object, optional
            See the class.

        Raises
        ------
        BufferError
            The target is read-only.
        TypeError, ValueError, DriverError, EngineClosed
            As for `copy_from`.
        """
        self.copy(target, whole_size(offset, "offset"), stream, False)

    cdef int copy(self, object other, size_t offset, object stream, bint inward) except -1:
        self.require_open()
        self.exports += 1  # ours: a close or free meanwhile must not give back what the copy uses
        try:
            return self.copy_held(other, offset, stream, inward)
        finally:
            self.take_back()

    cdef int copy_held(self, object other, size_t offset, object stream, bint inward) except -1:
        cdef void *handle = self.stream_for(stream)
        cdef BorrowedMemory memory = borrow_memory(other, dlpack_stream(handle))
        cdef bint blocking = stream is None, on_device
        cdef int code, mode = 0
        cdef uint64_t address = memory.address
        memory.require_copyable(not inward)
        cdef size_t size = memory.nbytes
        self.require_inside(offset, size)
        if self.device.is_host and memory.is_cuda:
            raise ValueError(f"{type(other).__name__} is memory of a GPU, out of reach for the device "
                             f"{self.device.name}")
        if size == 0:
            return 0
        if not blocking and self.lent is not None and self.stream.query():
            self.lent = None
        wait_for_producer(self.device, handle, memory)
        if blocking and not self.stream.query():
            self.stream.synchronize()  # here Ctrl-C is heard; a driver call waits as well, if memory is pageable
        lent = self.lent
        held = (lent, memory)
        self.require_open()  # other people's code may have closed it
        self.lent = held  # before the copy: whatever fails after it, the memory is in use
        with nogil:
            code = self.device.lies_on_device(address, &on_device)
            if code == 0:
                code = self.device.enter(&mode)
            if code == 0:
                if on_device and inward:
                    code = kv_call(self.device.drv, memcpy_dtod_async, self.start + offset, address, size, handle)
                elif on_device:
                    code = kv_call(self.device.drv, memcpy_dtod_async, address, self.start + offset, size, handle)
                elif inward:
                    code = kv_call(self.device.drv, memcpy_htod_async, self.start + offset, <void *>address, size,
                                   handle)
                else:
                    code = kv_call(self.device.drv, memcpy_dtoh_async, <void *>address, self.start + offset, size,
                                   handle)
                self.device.leave(mode)
        if code and self.lent is held:  # there is no copy
            self.lent = lent
        check(self.device, code)
        if not blocking:
            self.follow(handle)
            return 0
        self.stream.synchronize()
        if self.lent is held:  # no other thread added to it, and all of it was waited for
            self.lent = None
        return 0

    def fill(self, byte, offset=0, nbytes=None, stream=None):
        """Set bytes to one value: `nbytes` of them from `offset`, or all that follow it.

        Raises
        ------
        ValueError
            `byte` is not in 0..255, the range is outside of the buffer, or the stream is refused.
        DriverError, EngineClosed
        """
        byte, offset = whole_size(byte, "byte", 255), whole_size(offset, "offset")
        self.require_open()
        self.exports += 1  # ours, as in `copy`
        try:
            self.fill_held(byte, offset, nbytes, stream)
        finally:
            self.take_back()

    cdef int fill_held(self, size_t byte, size_t offset, object nbytes, object stream) except -1:
        cdef int code, mode = 0
        self.require_inside(offset, 0)
        cdef size_t size = self.nbytes - offset if nbytes is None else whole_size(nbytes, "nbytes")
        self.require_inside(offset, size)
        cdef void *handle = self.stream_for(stream)
        self.require_open()  # other people's code may have closed it
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = kv_call(self.device.drv, memset_d8_async, self.start + offset, byte, size, handle)
                self.device.leave(mode)
        check(self.device, code)
        if stream is None:
            self.stream.synchronize()
        else:
            self.follow(handle)
        return 0

    cdef int follow(self, void *handle) except -1:
        """Let the private stream wait for the work that was just put on another one."""
        self.worked_elsewhere = self.followed = True
        try:
            order_streams(self.device, self.stream.stream, handle)
        except DriverError:  # the work is there all the same: what cannot be followed is over instead
            while not wait_a_while(self.device, handle, NULL):
                pass
        return 0

    # ---- sharing ----------------------------------------------------------------------------------------------------

    cdef int lend(self, BorrowedMemory borrowed) except -1:
        self.require_open()
        borrowed.address, borrowed.itemsize = self.start, 1
        borrowed.shape, borrowed.strides = (self.nbytes,), (1,)
        borrowed.is_cuda = not self.device.is_host
        if self.worked_elsewhere:
            borrowed.stream = self.stream.handle
        self.exports += 1
        return 1

    @property
    def __cuda_array_interface__(self):
        """The memory as ``nbytes`` uint8, version 3; on a GPU only. Whoever keeps it keeps the buffer, and open."""
        if self.device is None or self.device.is_host:
            raise AttributeError("only a DeviceBuffer on a GPU has __cuda_array_interface__; here it is a host buffer")
        self.require_open()
        self.shown = True
        return {
            "shape": (self.nbytes,),
            "strides": None,
            "typestr": "|u1",
            "data": (self.start, False),
            "version": 3,
            "stream": self.stream.handle if self.worked_elsewhere else None,
        }

    def __dlpack_device__(self):
        """(device type, device number) in DLPack's counting: CUDA, or the CPU for the host device."""
        self.require_open()
        if self.device.is_host:
            return KV_DLPACK_CPU, 0
        return KV_DLPACK_CUDA, self.device.ordinal

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule over the memory as ``nbytes`` uint8, never a copy.

        Parameters
        ----------
        stream : int, optional
            The consumer's, which waits for the buffer's own calls: None or 1 is the legacy default stream, 2 the
            per-thread one, -1 waits for nothing. On the host device None only, and this call waits.
        max_version, dl_device, copy
            As the array API standard has them.

        Raises
        ------
        BufferError
            A copy was asked for, or another device.
        ValueError
            The stream is refused.
        EngineClosed
        """
        cdef void *consumer
        device = require_shareable(dl_device, copy, (self.__dlpack_device__(),))
        if self.device.is_host:
            if stream is not None:
                raise ValueError(f"memory of the CPU has no streams, got stream {stream!r}; pass None")
            if self.worked_elsewhere:
                self.stream.synchronize()
        elif stream is None or not is_integer(stream) or stream != -1:
            if stream is not None and is_integer(stream) and stream == 0:
                raise ValueError("stream 0 is ambiguous in DLPack; pass 1 for the legacy default stream, 2 for the "
                                 "per-thread one")
            consumer = self.device.borrow_stream(1 if stream is None else stream)
            if self.worked_elsewhere:
                order_streams(self.device, consumer, self.stream.stream)
        self.require_open()
        self.shown = True
        return self.capsule(self.start, self.nbytes, device[0], device[1], max_version)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.require_open()
        if not self.device.is_host:
            raise BufferError(f"memory of {self.device.name} is out of the CPU's reach; use copy_to or give the buffer "
                              f"to what reads __cuda_array_interface__ or DLPack")
        if self.worked_elsewhere:
            self.stream.synchronize()
            self.require_open()
        PyBuffer_FillInfo(buffer, self, <void *>self.start, <Py_ssize_t>self.nbytes, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.take_back()

    # ---- end --------------------------------------------------------------------------------------------------------

    def close(self):
        """Free the memory, after all work of the device that may still use it. Idempotent.

        Memory that others hold (a buffer, a DLPack tensor, a layout over this buffer) is freed when the last of them
        lets go; who only read `address` or ``__cuda_array_interface__`` is not known here. Close the device later.
        """
        if not self.closed:
            self.closed = True
            if self.exports == 0:
                self.give_back()

    cdef void all_is_back(self) noexcept:
        if self.closed:
            self.give_back()

    cdef void give_back(self) noexcept:
        self.release()
        self.lent = None
        self.stream.close()
        if self.owns_device:
            self.device.close()

    cdef void release(self) noexcept:
        cdef kv_devptr start = self.start
        self.start = 0  # taken under the GIL, so that nobody frees it twice
        if start != 0 and not self.device.closed and getpid() == self.device.pid:
            with nogil:
                self.device.give_memory_back(start)

    def __dealloc__(self):
        if self.start != 0:
            self.release()  # stream and device, if nobody else holds them, go with their own objects

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        if self.closed:
            return f"<{type(self).__name__} closed>"
        return f"<{type(self).__name__} {self.nbytes} bytes at {self.start:#x} of {self.device.name}>"

    cdef int require_open(self) except -1:
        if self.closed:
            raise EngineClosed(f"this {type(self).__name__} is closed; allocate another")
        return self.device.require_open()

    cdef int require_inside(self, size_t offset, size_t nbytes) except -1:
        if offset > self.nbytes or nbytes > self.nbytes - offset:
            raise ValueError(f"{nbytes} bytes at offset {offset} do not fit into a {type(self).__name__} of "
                             f"{self.nbytes} bytes")
        return 0

    cdef void *stream_for(self, object stream) except? NULL:
        self.require_open()
        return self.stream.stream if stream is None else self.device.borrow_stream(stream)


cdef size_t whole_size(object number, str name, size_t most=<size_t>-1) except? <size_t>-1:
    number = whole_number(number, name)
    if not 0 <= number <= most:
        raise ValueError(f"{name} must be in 0..{most}, got {shown(number)}")
    return number


cdef int wait_for_producer(Device device, void *handle, BorrowedMemory memory) except -1:
    cdef void *producer
    if memory.stream is None:
        return 0
    if memory.lender is not None and (<DeviceBuffer>memory.lender).device.is_host != device.is_host:
        (<DeviceBuffer>memory.lender).stream.synchronize()  # no stream of the one waits for one of the other
        return 0
    producer = device.borrow_stream(memory.stream)
    if dlpack_stream(producer) != dlpack_stream(handle):
        order_streams(device, handle, producer)
    return 0


cdef object dlpack_stream(void *handle):
    return <size_t>handle or 1
