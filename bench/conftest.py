"""The device of the benchmarks: KVORTEX_BENCH_DEVICE, or CUDA where there is a GPU and the host driver elsewhere."""

import os

import pytest

import kvortex

DEVICE = os.environ.get("KVORTEX_BENCH_DEVICE", "auto")


def pytest_report_header(config):
    with kvortex.Device.open(DEVICE) as opened:
        return f"device: {opened.name}, {opened.description}"


@pytest.fixture(scope="session")
def device():
    with kvortex.Device.open(DEVICE) as opened:
        yield opened


@pytest.fixture
def stream(device):
    """A stream of the caller, as an engine's compute stream."""
    with kvortex.Stream.create(device) as created:
        yield created
