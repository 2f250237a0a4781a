"""Device: names, contexts, borrowed streams, errors, fork."""

import ctypes
import gc
import multiprocessing
import os
import re
import threading

import pytest
from driver_calls import ILLEGAL_ADDRESS, KIND, Calls, begin_capture, end_capture

from kvortex.driver import Device, DeviceBuffer, Event, Stream, _host, list_devices
from kvortex.errors import ConfigError, DriverError, EngineClosed


@pytest.mark.parametrize("spec", ["", "gpu", "cuda:", "host:-1", "auto:0", "cuda:0 ", 0, None])
def test_unknown_device_name_is_refused(spec):
    with pytest.raises(ConfigError, match=re.escape(repr(spec))):
        Device.open(spec)


def test_device_number_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="does not exist"):
        Device.open(f"{KIND}:999")


@pytest.mark.host
def test_number_of_host_devices_can_be_set_while_none_is_open():
    gc.collect()
    _host.set_num_devices(3)
    try:
        assert list_devices()[-3:] == ["host:0", "host:1", "host:2"]
        with Device.open("host:2") as device:
            assert device.name == "host:2" and device.ordinal == 2
            with pytest.raises(ConfigError, match="while none is open"):
                _host.set_num_devices(2)
    finally:
        _host.set_num_devices(2)


def test_device_describes_itself(device):
    assert device.name == f"{KIND}:0" and device.name in list_devices()
    assert len(device.description) > 3
    assert repr(device) == f"<Device {KIND}:0>"


def test_auto_is_the_gpu_where_there_is_one_and_the_host_otherwise():
    with Device.open("auto") as device:
        assert device.is_host == (KIND == "host")


def test_closing_twice_is_closing_once(device):
    extra = Device.open(device.name)
    extra.close()
    extra.close()
    assert extra.closed
    assert Stream.create(device).query()  # the other holder's context is untouched


def test_closed_device_refuses_work():
    device = Device.open(f"{KIND}:0")
    device.close()
    for use in (lambda: Stream.create(device), lambda: DeviceBuffer(64, device), lambda: device.description):
        with pytest.raises(EngineClosed, match="closed"):
            use()


def test_calls_leave_the_context_of_the_thread_as_it_was(device):
    table = Calls(device)
    found = []

    def visit():
        before = table.out("ctx_get_current", ctypes.c_void_p)
        with DeviceBuffer(64, device) as buffer, Stream.create(device) as stream, Event.create(device) as event:
            buffer.fill(1)
            event.record(stream)
            stream.wait_event(event)
            event.synchronize()
        found.append((before, table.out("ctx_get_current", ctypes.c_void_p)))

    thread = threading.Thread(target=visit)
    thread.start()
    thread.join()
    assert found == [(None, None)]


def test_calls_leave_the_capture_mode_of_the_thread_as_it_was(device, stream):
    table = Calls(device)
    stream.synchronize()
    mode = ctypes.c_int(0)
    table.ok("thread_exchange_stream_capture_mode", ctypes.byref(mode))
    assert mode.value == 0


class WithProtocol:
    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return 0, self.handle


class WithAttribute:
    def __init__(self, handle):
        self.cuda_stream = handle


@pytest.mark.parametrize("wrap", [int, WithProtocol, WithAttribute])
def test_stream_can_be_given_as_handle_or_object(device, stream, event, wrap):
    event.record(wrap(stream.handle))
    event.synchronize()
    assert event.query()


@pytest.mark.parametrize("handle", [0, 1, 2])
def test_default_streams_are_legal(device, event, handle):
    event.record(handle)
    event.synchronize()


def test_missing_stream_is_refused_with_a_way_out(event):
    with pytest.raises(ValueError, match="0 for the legacy default stream"):
        event.record(None)


@pytest.mark.parametrize("stream", ["0", 1.5, True, object()])
def test_what_is_no_stream_is_refused(event, stream):
    with pytest.raises(TypeError, match=type(stream).__name__):
        event.record(stream)


@pytest.mark.parametrize("handle", [-1, 1 << 64])
def test_handle_out_of_range_is_refused(event, handle):
    with pytest.raises(ValueError, match="2\\*\\*64"):
        event.record(handle)


@pytest.mark.host
def test_stream_of_another_device_is_refused(event):
    with (
        Device.open("host:1") as other,
        Stream.create(other) as stream,
        pytest.raises(ValueError, match="another device than host:0"),
    ):
        event.record(stream)


def test_capturing_stream_is_refused_before_anything_is_recorded(device, stream, event):
    with DeviceBuffer(64, device) as buffer:
        begin_capture(stream.handle)
        for use in (
            lambda: event.record(stream),
            lambda: stream.wait_event(event),
            lambda: buffer.fill(1, stream=stream),
            lambda: Stream.borrow(device, stream.handle),
        ):
            with pytest.raises(ValueError, match="capturing a graph"):
                use()
        assert end_capture(stream.handle) == 0  # captured operations; and it was not invalidated


def test_our_own_calls_never_spoil_the_capture_of_others(device, event):
    with Stream.create(device) as capturing, Stream.create(device) as ours:
        begin_capture(capturing.handle)
        with DeviceBuffer(64, device) as buffer:
            buffer.fill(1)
            event.record(ours)
            event.synchronize()
            assert event.query() and ours.query()
        assert end_capture(capturing.handle) == 0


@pytest.mark.host
def test_driver_error_carries_code_name_and_call(device, stream):
    _host.fail_call(1, ILLEGAL_ADDRESS, field="stream_synchronize")
    with pytest.raises(DriverError, match="cuStreamSynchronize answered CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        stream.synchronize()
    error = caught.value
    assert (error.code, error.name, error.call) == (700, "CUDA_ERROR_ILLEGAL_ADDRESS", "cuStreamSynchronize")


@pytest.mark.host
def test_error_code_without_a_name_is_still_reported(device, stream):
    _host.fail_call(1, 12345, field="stream_synchronize")
    with pytest.raises(DriverError, match="12345"):
        stream.synchronize()


@pytest.mark.host
def test_failed_opening_releases_what_it_took():
    before = _host.live_objects()
    for field in ("device_get_count", "device_get", "device_primary_ctx_retain"):
        _host.fail_call(1, 999, field=field)
        with pytest.raises(DriverError):
            Device.open("host")
    assert _host.live_objects() == before


def use_inherited(device, stream, event, buffer, queue):
    """In a forked child: every use is refused, every close is harmless."""
    refused = 0
    for use in (stream.synchronize, event.query, lambda: buffer.fill(1), lambda: Stream.create(device)):
        try:
            use()
        except EngineClosed as error:
            refused += str(os.getpid()) in str(error)
    stream.close()
    event.close()
    buffer.close()
    device.close()
    queue.put(refused)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_sees_everything_closed_and_disturbs_nothing(device, stream, event):
    with DeviceBuffer(4096, device) as buffer:
        buffer.fill(7)
        fork = multiprocessing.get_context("fork")
        queue = fork.Queue()
        child = fork.Process(target=use_inherited, args=(device, stream, event, buffer, queue))
        child.start()
        assert queue.get(timeout=30) == 4
        child.join(30)
        assert child.exitcode == 0
        target = bytearray(4096)
        buffer.copy_to(target)
        assert target == bytes([7]) * 4096


@pytest.mark.host
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_cannot_open_a_device_after_the_parent_did(device):
    child = os.fork()
    if child == 0:
        try:
            Device.open("host")
        except DriverError as error:
            os._exit(0 if error.code == 3 else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
