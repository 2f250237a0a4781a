"""What the benchmarks share: the device (KVORTEX_BENCH_DEVICE, or CUDA where there is a GPU), and their table rows."""

import os

import pytest

import kvortex

DEVICE = os.environ.get("KVORTEX_BENCH_DEVICE", "auto")


def pytest_configure(config):
    config.addinivalue_line("markers", "peer: runs somebody else's code, so `make bench-compare` leaves it out")


def pytest_report_header(config):
    with kvortex.Device.open(DEVICE) as opened:
        return f"device: {opened.name}, {opened.description}"


def pytest_benchmark_update_machine_info(config, machine_info):
    """A baseline belongs to one machine and one device, and the table says which."""
    with kvortex.Device.open(DEVICE) as opened:
        machine_info["device"] = f"{opened.name}, {opened.description}"


@pytest.fixture(scope="session")
def device():
    with kvortex.Device.open(DEVICE) as opened:
        yield opened


@pytest.fixture
def stream(device):
    """A stream of the caller, as an engine's compute stream."""
    with kvortex.Stream.create(device) as created:
        yield created


@pytest.fixture
def row(benchmark):
    """Say what the table shows of a benchmark: `row("what", side=..., operations=...)`; see bench/table.py."""

    def describe(what, **extra):
        benchmark.extra_info.update(row=what, **extra)

    return describe


@pytest.fixture
def smoke(benchmark):
    """Whether nothing is timed: `make test` only wants to see that a benchmark works, so sizes may be small."""
    return benchmark.disabled
