"""DeviceBuffer: memory of a device, for callers without a framework."""

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cython cimport auto_pickle, no_gc_clear
from posix.unistd cimport getpid

from kvortex._c cimport kv_devptr
from kvortex.driver._device cimport Device, check
from kvortex.driver._stream cimport Stream

from kvortex.errors import ConfigError, EngineClosed


@auto_pickle(False)  # copy.copy would make a second owner of the memory
@no_gc_clear  # __dealloc__ needs the device, which the collector would clear before it
cdef class DeviceBuffer:
    """Memory allocated on a device, not initialised.

    Without a stream the copies and `fill` are complete on return; they run on a private stream that is ordered after
    nothing else, so memory that other streams write or read needs a stream argument or a synchronisation by the caller.
    With a stream they are ordered on it and may return early: the host memory must then stay alive and unchanged until
    the stream has passed (pageable memory is copied before the return). All of them release the GIL.

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
        `nbytes` is not positive.
    DriverError
        E.g. CUDA_ERROR_OUT_OF_MEMORY.
    """

    def __init__(self, nbytes, device="auto"):
        if self.device is not None:
            raise TypeError("a DeviceBuffer cannot be initialised twice")
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
                code = opened.drv.mem_alloc(&start, size)
                opened.leave(mode)
        check(opened, code, b"cuMemAlloc")
        self.device = opened
        self.owns_device = from_name
        self.stream = stream
        self.start = start
        self.nbytes = size

    @property
    def closed(self):
        """True after `close`."""
        return self.start == 0

    @property
    def address(self):
        """The device address of the first byte."""
        self.require_open()
        return self.start

    def __len__(self):
        return self.nbytes

    def copy_from(self, source, size_t offset=0, stream=None):
        """Copy a whole host buffer to `offset`.

        Parameters
        ----------
        source : buffer
            Any C-contiguous object with the buffer protocol; its bytes are what counts.
        offset : int, optional
            In bytes.
        stream : Stream, int or object, optional
            See the class.

        Raises
        ------
        ValueError
            The buffer does not fit, or the stream is refused.
        DriverError, EngineClosed
        """
        cdef int code, mode = 0
        cdef Py_buffer view
        cdef void *handle = self.stream_for(stream)
        cdef bint blocking = stream is None
        PyObject_GetBuffer(source, &view, PyBUF_C_CONTIGUOUS)
        try:
            self.require_inside(offset, view.len)
            with nogil:
                code = self.device.enter(&mode)
                if code == 0:
                    code = self.device.drv.memcpy_htod_async(self.start + offset, view.buf, view.len, handle)
                    if code == 0 and blocking:
                        code = self.device.drv.stream_synchronize(handle)
                    self.device.leave(mode)
        finally:
            PyBuffer_Release(&view)
        check(self.device, code, b"cuMemcpyHtoDAsync")

    def copy_to(self, target, size_t offset=0, stream=None):
        """Fill a whole host buffer from `offset`.

        Parameters
        ----------
        target : writable buffer
            Any C-contiguous object with the buffer protocol.
        offset : int, optional
            In bytes.
        stream : Stream, int or object, optional
            See the class.

        Raises
        ------
        ValueError
            The buffer is larger than what follows `offset`, or the stream is refused.
        DriverError, EngineClosed
        """
        cdef int code, mode = 0
        cdef Py_buffer view
        cdef void *handle = self.stream_for(stream)
        cdef bint blocking = stream is None
        PyObject_GetBuffer(target, &view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)
        try:
            self.require_inside(offset, view.len)
            with nogil:
                code = self.device.enter(&mode)
                if code == 0:
                    code = self.device.drv.memcpy_dtoh_async(view.buf, self.start + offset, view.len, handle)
                    if code == 0 and blocking:
                        code = self.device.drv.stream_synchronize(handle)
                    self.device.leave(mode)
        finally:
            PyBuffer_Release(&view)
        check(self.device, code, b"cuMemcpyDtoHAsync")

    def fill(self, int byte, size_t offset=0, nbytes=None, stream=None):
        """Set bytes to one value: `nbytes` of them from `offset`, or all that follow it.

        Raises
        ------
        ValueError
            `byte` is not in 0..255, the range is outside of the buffer, or the stream is refused.
        DriverError, EngineClosed
        """
        cdef int code, mode = 0
        if not 0 <= byte <= 255:
            raise ValueError(f"byte must be in 0..255, got {byte}")
        self.require_inside(offset, 0)
        cdef size_t size = self.nbytes - offset if nbytes is None else nbytes
        self.require_inside(offset, size)
        cdef void *handle = self.stream_for(stream)
        cdef bint blocking = stream is None
        with nogil:
            code = self.device.enter(&mode)
            if code == 0:
                code = self.device.drv.memset_d8_async(self.start + offset, byte, size, handle)
                if code == 0 and blocking:
                    code = self.device.drv.stream_synchronize(handle)
                self.device.leave(mode)
        check(self.device, code, b"cuMemsetD8Async")

    def close(self):
        """Free the memory, after all work of the device that may still use it. Idempotent."""
        if self.start != 0:
            self.release()
            self.start = 0
            self.stream.close()
            if self.owns_device:
                self.device.close()

    cdef void release(self) noexcept:
        cdef int mode = 0
        if not self.device.closed and getpid() == self.device.pid:
            with nogil:
                if self.device.enter(&mode) == 0:
                    self.device.drv.mem_free(self.start)
                    self.device.leave(mode)

    def __dealloc__(self):
        if self.start != 0:
            self.release()  # stream and device, if nobody else holds them, go with their own objects

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        if self.start == 0:
            return "<DeviceBuffer closed>"
        return f"<DeviceBuffer {self.nbytes} bytes at {self.start:#x} of {self.device.name}>"

    cdef int require_open(self) except -1:
        if self.start == 0:
            raise EngineClosed("this DeviceBuffer is closed; allocate another")
        return self.device.require_open()

    cdef int require_inside(self, size_t offset, size_t nbytes) except -1:
        if offset > self.nbytes or nbytes > self.nbytes - offset:
            raise ValueError(f"{nbytes} bytes at offset {offset} do not fit into a DeviceBuffer of {self.nbytes} bytes")
        return 0

    cdef void *stream_for(self, object stream) except? NULL:
        self.require_open()
        return self.stream.stream if stream is None else self.device.borrow_stream(stream)
