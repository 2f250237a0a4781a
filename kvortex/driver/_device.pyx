"""Device: one driver table, one primary context."""

import re
import threading

from libc.stdint cimport int64_t, uint64_t
from posix.unistd cimport getpid

from kvortex._c cimport (
    KV_CAPTURE_MODE_RELAXED,
    KV_CAPTURE_STATUS_NONE,
    KV_CUDA_INVALID_DEVICE,
    KV_CUDA_INVALID_HANDLE,
    KV_CUDA_INVALID_VALUE,
    KV_CUDA_STREAM_CAPTURE_IMPLICIT,
    KV_CUDA_STREAM_CAPTURE_UNSUPPORTED,
    KV_DEVICE_ATTRIBUTE_HOST_NUMA_ID,
    KV_DRIVER_MIN_VERSION,
    KV_DRIVER_NUM_ROWS,
    KV_MEMORY_TYPE_DEVICE,
    KV_POINTER_MEMORY_TYPE,
    ctx_set_current,
    device_get,
    device_get_count,
    device_get_name,
    device_primary_ctx_retain,
    driver_get_version,
    init,
    kv_answer,
    kv_call,
    kv_devptr,
    kv_driver,
    kv_driver_rows,
    kv_result_call,
    kv_result_code,
    pointer_get_attribute,
    stream_get_ctx,
    stream_is_capturing,
    thread_exchange_stream_capture_mode,
)
from kvortex.driver._host cimport host_table
from kvortex.driver._memory cimport is_integer, whole_number

from kvortex.driver import _cuda
from kvortex.errors import ConfigError, DriverError, EngineClosed
from kvortex.log import warn_once

SPEC = re.compile(r"(?P<kind>auto|host|cuda)(:(?P<ordinal>\d{1,4}))?")

cdef enum:
    LAST_DEFAULT_STREAM = 2  # 0 and 1: the legacy default stream, 2: the per-thread one; all of the current context

cdef extern from "kvortex/context.h" nogil:
    int kv_context_enter(const kv_driver *drv, void *context, int *mode)
    void kv_context_leave(const kv_driver *drv, void *context, int mode)

cuda_lock = threading.Lock()

cdef kv_driver cuda_functions          # filled once per process, never changed afterwards
cdef const kv_driver *cuda_table = NULL


cdef class Device:
    """One device: the driver that serves it and its primary context.

    Get one with `Device.open`. It is usable from any thread; each call makes the context current for its duration, and
    leaves the thread as it found it. In a forked child it counts as closed.

    Attributes
    ----------
    name : str
        ``"host:0"``, ``"cuda:1"``.
    ordinal : int
    is_host : bool
        True if host memory plays the device.
    closed : bool
    """

    def __init__(self):
        raise TypeError("Device has no constructor; use Device.open('auto'), ('host:0') or ('cuda:0')")

    @staticmethod
    def open(spec="auto"):
        """Open a device by name and retain its primary context (the one that torch uses).

        Parameters
        ----------
        spec : str
            ``"cuda"``, ``"cuda:1"``, ``"host"``, ``"host:1"`` or ``"auto"``: CUDA where a usable driver sees a device,
            host memory otherwise.

        Raises
        ------
        ConfigError
            The name is not one of these, there is no such device, or the driver is missing or too old.
        DriverError
            The driver failed.
        """
        match = SPEC.fullmatch(spec) if isinstance(spec, str) else None
        if match is None or (match["kind"] == "auto" and match["ordinal"]):
            raise ConfigError(f"device must be 'auto', 'host', 'host:N', 'cuda' or 'cuda:N', got {spec!r}")
        kind = match["kind"]
        if kind == "auto":
            reason = why_no_cuda()
            kind = "cuda" if reason is None else "host"
            if reason is not None:
                warn_once("host_fallback", "device='auto' takes host memory", reason=reason)
        cdef Device self = Device.__new__(Device)
        self.is_host = kind == "host"
        self.drv = load_table(self.is_host)
        self.ordinal = int(match["ordinal"] or 0)
        self.name = f"{kind}:{self.ordinal}"
        self.retain()
        return self

    cdef int retain(self) except -1:
        cdef int count = 0, device = 0, code
        cdef void *context = NULL
        with nogil:
            code = kv_call(self.drv, device_get_count, &count)
        check(self, code)
        if self.ordinal >= count:
            raise ConfigError(f"device {self.name!r} does not exist: the driver sees {count}, numbered from 0")
        with nogil:
            code = kv_call(self.drv, device_get, &device, self.ordinal)
            if code == 0:
                code = kv_call(self.drv, device_primary_ctx_retain, &context, device)
        check(self, code)
        self.context = context
        self.closed = False
        return 0

    def close(self):
        """Release the primary context. Idempotent; with the last holder of the context all of its objects go."""
        if not self.closed:
            self.closed = True
            self.release()

    cdef void release(self) noexcept:
        cdef int device = 0, code = 0, attempts = 0
        if self.context != NULL and getpid() == self.pid:
            with nogil:
                while try_again(&attempts, code):
                    code = self.drv.device_get(&device, self.ordinal)
                    if code == 0:
                        code = self.drv.device_primary_ctx_release(device)
        self.context = NULL

    def __cinit__(self):
        self.pid = getpid()
        self.closed = True

    def __dealloc__(self):
        if not self.closed:
            self.release()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        return f"<Device {self.name}{' closed' if self.closed else ''}>"

    @property
    def description(self):
        """What the driver calls the device, e.g. ``"NVIDIA H100 80GB HBM3"``."""
        cdef char name[256]
        cdef int code, device = 0
        self.require_open()
        with nogil:
            code = kv_call(self.drv, device_get, &device, self.ordinal)
            if code == 0:
                code = kv_call(self.drv, device_get_name, name, sizeof(name), device)
        check(self, code)
        return name.decode()

    @property
    def cuda_version(self):
        """The newest CUDA version that the driver serves, e.g. ``"13.0"``; of the host driver, the one it imitates."""
        cdef int version = 0, code
        self.require_open()
        with nogil:
            code = kv_call(self.drv, driver_get_version, &version)
        check(self, code)
        return _cuda.version_text(version)

    @property
    def numa_node(self):
        """The NUMA node of host memory that is nearest to the device, or None where there is none or nobody knows."""
        cdef int code, device = 0, node = -1
        self.require_open()
        with nogil:
            code = self.drv.device_get(&device, self.ordinal)
            if code == 0:
                code = self.drv.device_get_attribute(&node, KV_DEVICE_ATTRIBUTE_HOST_NUMA_ID, device)
        return node if code == 0 and node >= 0 else None

    cdef int enter(self, int *mode) noexcept nogil:
        return kv_context_enter(self.drv, self.context, mode)

    cdef void leave(self, int mode) noexcept nogil:
        kv_context_leave(self.drv, self.context, mode)

    cdef int give_back(self, int (*end)(void *) noexcept nogil, void *thing) noexcept nogil:
        cdef int mode = 0, code = 0, attempts = 0
        while try_again(&attempts, code):
            code = self.enter(&mode)
            if code == 0:
                code = end(thing)
                self.leave(mode)
        return code

    cdef int give_memory_back(self, kv_devptr address) noexcept nogil:
        cdef int mode = 0, code = 0, attempts = 0
        while try_again(&attempts, code):
            code = self.enter(&mode)
            if code == 0:
                code = self.drv.mem_free(address)
                self.leave(mode)
        return code

    cdef int bind_thread(self) noexcept nogil:
        cdef int mode = KV_CAPTURE_MODE_RELAXED
        cdef int code = kv_call(self.drv, ctx_set_current, self.context)
        return code if code else kv_call(self.drv, thread_exchange_stream_capture_mode, &mode)

    cdef int require_open(self) except -1:
        if self.closed:
            raise EngineClosed(f"device {self.name} is closed; open it again with Device.open({self.name!r})")
        if getpid() != self.pid:
            raise EngineClosed(
                f"device {self.name} belongs to process {self.pid} and cannot be used in its forked child {getpid()}; "
                "start workers with the 'spawn' method"
            )
        return 0

    cdef int check_stream(self, void *handle) noexcept nogil:
        cdef int status = KV_CAPTURE_STATUS_NONE, mode = 0
        cdef void *context = NULL
        cdef int code = self.enter(&mode)
        if code != 0:
            return code
        code = kv_call(self.drv, stream_is_capturing, handle, &status)
        if code == 0 and status != KV_CAPTURE_STATUS_NONE:
            code = kv_answer(KV_CUDA_STREAM_CAPTURE_UNSUPPORTED, stream_is_capturing)
        if code == 0 and <size_t>handle > LAST_DEFAULT_STREAM:
            code = kv_call(self.drv, stream_get_ctx, handle, &context)
            if code == 0 and context != self.context:
                code = KV_CUDA_INVALID_DEVICE
        self.leave(mode)
        return code

    cdef int lies_on_device(self, uint64_t address, bint *answer) noexcept nogil:
        cdef unsigned int memory_type = 0
        cdef int mode = 0
        cdef int code = self.enter(&mode)
        if code == 0:
            code = kv_call(self.drv, pointer_get_attribute, &memory_type, KV_POINTER_MEMORY_TYPE, address)
            self.leave(mode)
            if code == kv_answer(KV_CUDA_INVALID_VALUE, pointer_get_attribute):  # the driver does not know it
                memory_type = code = 0
        answer[0] = memory_type == <unsigned int>KV_MEMORY_TYPE_DEVICE
        return code

    cdef void *borrow_stream(self, object stream) except? NULL:
        self.require_open()
        cdef void *handle = <void *><size_t>stream_handle(stream)
        cdef int code
        with nogil:
            code = self.check_stream(handle)
        if code != 0:
            self.require_open()  # closed meanwhile by another thread: that is what the error should say
            refuse_stream(self, stream, code)
        return handle


def stream_handle(stream):
    """Return the handle of a stream given as an int or as an object that says it has one; check nothing else.

    The one place that knows how libraries name their streams: ``__cuda_stream__``, a method or an attribute that gives
    ``(0, handle)``, ``cuda_stream`` (torch) and ``ptr`` (CuPy, whose memory has one too, but cannot synchronise).

    Raises
    ------
    ValueError
        `stream` is None, or names a handle or a version of the protocol that there is not.
    TypeError
        It is neither.
    """
    if stream is None:
        raise ValueError(
            "stream is None, but device memory needs the stream its other work runs on; pass a stream, or 0 for the "
            "legacy default stream"
        )
    if is_integer(stream):
        handle = stream
    elif hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        named = protocol() if callable(protocol) else protocol
        if not isinstance(named, (tuple, list)) or len(named) != 2:
            raise TypeError(f"__cuda_stream__ of {type(stream).__name__} must be (version, handle), got {named!r}")
        version, handle = named
        if whole_number(version, f"the version of __cuda_stream__ of {type(stream).__name__}") != 0:
            raise ValueError(f"{type(stream).__name__} speaks version {version} of __cuda_stream__, 0 is understood")
    elif hasattr(stream, "cuda_stream"):
        handle = stream.cuda_stream
    elif hasattr(stream, "ptr") and hasattr(stream, "synchronize"):
        handle = stream.ptr
    else:
        handle = None
    if not is_integer(handle):
        raise TypeError(
            f"stream must be an int handle or an object with __cuda_stream__, cuda_stream or CuPy's ptr, got "
            f"{type(stream).__name__} with the handle {handle!r}"
        )
    if not 0 <= handle < 1 << 64:
        raise ValueError(f"stream handle must be in 0..2**64-1, got {handle}")
    return int(handle)


cdef object refuse_stream(Device device, object stream, int code):
    if code == kv_answer(KV_CUDA_STREAM_CAPTURE_UNSUPPORTED, stream_is_capturing):
        raise ValueError(
            f"stream {stream!r} is capturing a graph, and transfers cannot be captured; call outside of the capture, "
            "or pass another stream"
        )
    if code == kv_answer(KV_CUDA_STREAM_CAPTURE_IMPLICIT, stream_is_capturing):
        raise ValueError(
            f"stream {stream!r} is the legacy default stream while a blocking stream captures a graph, which would "
            "pull it into the capture; call outside of the capture, or pass another stream"
        )
    if code == KV_CUDA_INVALID_DEVICE:
        raise ValueError(f"stream {stream!r} belongs to another device than {device.name}; pass a stream of this one")
    if code in (kv_answer(KV_CUDA_INVALID_HANDLE, stream_is_capturing),
                kv_answer(KV_CUDA_INVALID_HANDLE, stream_get_ctx)):
        raise ValueError(f"stream {stream!r} is not a stream of this process, or was destroyed; pass a live one")
    check(device, code)


cdef int64_t require_timeout(object timeout_ms) except? -2:
    if timeout_ms is None:
        return -1
    if not is_integer(timeout_ms):
        raise TypeError(f"timeout_ms must be whole milliseconds or None, got {timeout_ms!r}")
    if timeout_ms < 0:
        raise ValueError(f"timeout_ms must be at least 0, or None to wait as long as it takes, got {timeout_ms}")
    return min(int(timeout_ms), 1 << 62)  # which is for ever, too


cdef int check(Device device, int code, const char *call=NULL) except -1 nogil:
    if code == 0:
        return 0
    with gil:
        raise_driver_error(device, code, call)


cdef object raise_driver_error(Device device, int code, const char *call):
    cdef const char *name = NULL
    cdef const char *text = NULL
    if call is NULL or code != kv_result_code(code):
        call = kv_result_call(code)
    code = kv_result_code(code)
    if device.drv.get_error_name(code, &name) != 0 or name == NULL:
        name = b"CUDA_ERROR_UNRECOGNIZED"
    if device.drv.get_error_string(code, &text) != 0 or text == NULL:
        text = b""
    raise DriverError(code, name.decode(), call.decode(), f"{text.decode()} on {device.name}".strip())


def list_devices():
    """Return the names of the devices that can be opened, the CUDA ones first."""
    names = []
    for is_host in (False, True):
        if is_host or why_no_cuda() is None:
            names += [f"{'host' if is_host else 'cuda'}:{i}" for i in range(count_devices(is_host))]
    return names


def driver_rows():
    """Return (field, symbol, version, parameters) of every entry point of the driver table."""
    return [
        (
            kv_driver_rows[i].field.decode(),
            kv_driver_rows[i].symbol.decode(),
            kv_driver_rows[i].version,
            kv_driver_rows[i].parameters.decode(),
        )
        for i in range(KV_DRIVER_NUM_ROWS)
    ]


def entry_points(Device device not None):
    """Return the address of every entry point that serves the device, by field; for tests and tools."""
    device.require_open()
    return {
        kv_driver_rows[i].field.decode(): (<size_t *>(<char *>device.drv + kv_driver_rows[i].offset))[0]
        for i in range(KV_DRIVER_NUM_ROWS)
    }


cdef int count_devices(bint is_host) except -1:
    cdef const kv_driver *table = load_table(is_host)
    cdef int count = 0
    cdef int code = table.device_get_count(&count)
    return count if code == 0 else 0


def why_no_cuda():
    """Return why no CUDA device can be opened, as a sentence, or None if one can."""
    try:
        load_table(False)
    except (ConfigError, DriverError) as error:
        return str(error)
    return None


cdef const kv_driver *load_table(bint is_host) except NULL:
    global cuda_table
    cdef int code
    if is_host:
        code = kv_call(host_table(), init, 0)
        if code != 0:
            raise DriverError(
                kv_result_code(code), "CUDA_ERROR_NOT_INITIALIZED", kv_result_call(code).decode(),
                "the host driver cannot serve a forked child; start workers with the spawn method",
            )
        return host_table()
    with cuda_lock:
        if cuda_table == NULL:
            addresses = _cuda.load_addresses([row[:3] for row in driver_rows()], KV_DRIVER_MIN_VERSION)
            for i in range(KV_DRIVER_NUM_ROWS):
                (<void **>(<char *>&cuda_functions + kv_driver_rows[i].offset))[0] = (
                    <void *><size_t>addresses[kv_driver_rows[i].field.decode()]
                )
            cuda_table = &cuda_functions
    return cuda_table
