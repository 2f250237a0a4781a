"""The driver table as ctypes functions, so that tests can call what the library never would."""

import ctypes
import os

from kvortex.driver import _host
from kvortex.driver._device import driver_rows, entry_points

KIND = os.environ.get("KVORTEX_TEST_DEVICE", "host").partition(":")[0]

INVALID_VALUE = 1
OUT_OF_MEMORY = 2
INVALID_CONTEXT = 201
INVALID_HANDLE = 400
NOT_FOUND = 500
NOT_READY = 600
ILLEGAL_ADDRESS = 700
ALREADY_REGISTERED = 712
NOT_REGISTERED = 713
CAPTURE_UNSUPPORTED = 900
CAPTURE_INVALIDATED = 901
CAPTURE_ISOLATION = 905
CAPTURE_IMPLICIT = 906

C_TYPES = {
    "kv_devptr": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "unsigned int": ctypes.c_uint,
    "unsigned long long": ctypes.c_ulonglong,
    "unsigned char": ctypes.c_ubyte,
    "int": ctypes.c_int,
    "kv_result": ctypes.c_int,
}


def c_type(parameter):
    return ctypes.c_void_p if "*" in parameter else C_TYPES[parameter.rpartition(" ")[0]]


class Memcpy2D(ctypes.Structure):
    _fields_ = [
        *((f"source_{name}", kind) for name, kind in [("x_bytes", ctypes.c_size_t), ("y", ctypes.c_size_t)]),
        ("source_memory_type", ctypes.c_uint),
        ("source_host", ctypes.c_void_p),
        ("source_device", ctypes.c_uint64),
        ("source_array", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        *((f"target_{name}", kind) for name, kind in [("x_bytes", ctypes.c_size_t), ("y", ctypes.c_size_t)]),
        ("target_memory_type", ctypes.c_uint),
        ("target_host", ctypes.c_void_p),
        ("target_device", ctypes.c_uint64),
        ("target_array", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("width_bytes", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]


class Attributes(ctypes.Structure):
    _fields_ = [
        ("source_access_order", ctypes.c_int),
        ("hints", ctypes.c_int * 4),
        ("flags", ctypes.c_uint),
    ]


class Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class PoolProps(ctypes.Structure):
    _fields_ = [
        ("allocation_type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("security_attributes", ctypes.c_void_p),
        ("max_bytes", ctypes.c_size_t),
        ("rest", ctypes.c_char * 56),
    ]


class AllocationProps(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("security_attributes", ctypes.c_void_p),
        ("flags", ctypes.c_char * 8),
    ]


class Access(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


def begin_capture(handle):
    """Let a stream capture a graph in GLOBAL mode, so that unsafe calls of other threads spoil it too."""
    if KIND == "host":
        assert _host.begin_capture(handle) == 0
        return
    from cuda.bindings import driver

    (code,) = driver.cuStreamBeginCapture(
        driver.CUstream(handle), driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
    )
    assert code == 0


def end_capture(handle, expected=0):
    """End the capture, which must answer `expected` (by default: be valid still); how many operations were captured."""
    if KIND == "host":
        code, num_captured = _host.end_capture(handle)
        assert code == expected
        return num_captured
    from cuda.bindings import driver

    code, graph = driver.cuStreamEndCapture(driver.CUstream(handle))
    assert code == expected
    if code:
        return 0
    code, _, num_nodes = driver.cuGraphGetNodes(graph, 0)
    assert code == 0 and driver.cuGraphDestroy(graph)[0] == 0
    return num_nodes


class Calls:
    """The driver table of a device: one ctypes function per row, answering the CUresult."""

    def __init__(self, device):
        addresses = entry_points(device)
        for field, _, _, parameters in driver_rows():
            named = parameters.strip("()").split(",") if parameters != "(void)" else []
            types = [c_type(parameter.strip()) for parameter in named]
            setattr(self, field, ctypes.CFUNCTYPE(ctypes.c_int, *types)(addresses[field]))

    def ok(self, field, *arguments):
        code = getattr(self, field)(*arguments)
        assert code == 0, f"{field} answered {code}"

    def out(self, field, kind, *arguments):
        """Call a row whose first parameter is where the answer goes."""
        value = kind()
        self.ok(field, ctypes.byref(value), *arguments)
        return value.value

    def alloc(self, nbytes):
        return self.out("mem_alloc", ctypes.c_uint64, nbytes)

    def host_alloc(self, nbytes):
        return self.out("mem_host_alloc", ctypes.c_void_p, nbytes, 0)

    def pool(self, max_bytes=0):
        """A memory pool of the first device."""
        props = PoolProps(allocation_type=1, location=Location(1, 0), max_bytes=max_bytes)
        return self.out("mem_pool_create", ctypes.c_void_p, ctypes.byref(props))

    def pool_bytes(self, pool, attribute):
        """What a pool answers: RESERVED (5), its mark (6), USED (7) or its mark (8)."""
        value = ctypes.c_uint64()
        self.ok("mem_pool_get_attribute", pool, attribute, ctypes.byref(value))
        return value.value

    def pool_alloc(self, pool, nbytes, stream):
        return self.out("mem_alloc_from_pool_async", ctypes.c_uint64, nbytes, pool, stream)

    def granularity(self):
        props = AllocationProps(type=1, location=Location(1, 0))
        return self.out("mem_get_allocation_granularity", ctypes.c_size_t, ctypes.byref(props), 0)

    def physical(self, nbytes):
        """Physical memory of the first device, mapped nowhere; its handle."""
        props = AllocationProps(type=1, location=Location(1, 0))
        return self.out("mem_create", ctypes.c_ulonglong, nbytes, ctypes.byref(props), 0)

    def set_access(self, address, nbytes):
        """Let the first device read and write a range; the CUresult."""
        return self.mem_set_access(address, nbytes, ctypes.byref(Access(Location(1, 0), 3)), 1)

    def copy_2d(self, stream, source, source_pitch, target, target_pitch, width, height):
        """Copy device to device, strided; the CUresult."""
        copy = Memcpy2D(
            source_memory_type=2, source_device=source, source_pitch=source_pitch,
            target_memory_type=2, target_device=target, target_pitch=target_pitch,
            width_bytes=width, height=height,
        )  # fmt: skip
        return self.memcpy_2d_async(ctypes.byref(copy), stream)

    def copy_batch(self, stream, targets, sources, sizes, attributes=None):
        """Copy many pieces in one call; the CUresult and the index of the bad one."""
        n = len(sizes)
        attributes = attributes or Attributes(source_access_order=1)
        failed = ctypes.c_size_t()
        code = self.memcpy_batch_async(
            (ctypes.c_uint64 * n)(*targets), (ctypes.c_uint64 * n)(*sources), (ctypes.c_size_t * n)(*sizes), n,
            ctypes.byref(attributes), (ctypes.c_size_t * 1)(0), 1, ctypes.byref(failed), stream,
        )  # fmt: skip
        return code, failed.value

    def bytes_of(self, address, nbytes, stream=None):
        """The content of device memory, through a copy on the stream."""
        target = ctypes.create_string_buffer(nbytes)
        self.ok("memcpy_dtoh_async", target, address, nbytes, stream)
        self.ok("stream_synchronize", stream)
        return target.raw
