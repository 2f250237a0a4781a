"""A device to test on: of the host driver, or the GPU that KVORTEX_TEST_DEVICE=cuda asks for (missing: an error)."""

import ctypes

import pytest
from driver_calls import KIND, Calls

from kvortex.driver import Device, Event, Stream, _host


@pytest.fixture(autouse=True)
def clean_host_driver():
    """Whatever a test did to the host driver ends with it."""
    yield
    _host.reset()


@pytest.fixture
def device():
    with Device.open(f"{KIND}:0") as opened:
        yield opened


@pytest.fixture
def calls(device):
    """The driver table, with the device's context current on this thread."""
    table = Calls(device)
    context = table.out("device_primary_ctx_retain", ctypes.c_void_p, 0)
    table.ok("ctx_push_current", context)
    yield table
    _host.release()
    table.ctx_pop_current(ctypes.byref(ctypes.c_void_p()))
    table.device_primary_ctx_release(0)


@pytest.fixture
def stream(device):
    with Stream.create(device) as created:
        yield created


@pytest.fixture
def event(device):
    with Event.create(device) as created:
        yield created
