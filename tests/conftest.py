"""What every test shares: one printed seed, a PYTHONPATH for child processes, and no silent absence of a GPU."""

import gc
import os
import random
import signal
import subprocess
from pathlib import Path

import hypothesis
import pytest

import kvortex
from kvortex.driver import _host as host_control

ROOT = Path(__file__).resolve().parents[1]
SEED = int(os.environ.get("KVORTEX_SEED") or random.SystemRandom().randrange(1 << 32))
DEVICE = os.environ.get("KVORTEX_TEST_DEVICE", "host")
SOAK = os.environ.get("KVORTEX_SOAK") == "1"

# Tests that start a Python of their own import this tree, wherever they run.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# A shell that starts the tests in the background leaves SIGINT ignored, and Python leaves that to its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("kvortex", deadline=None, print_blob=True)
hypothesis.settings.register_profile("soak", deadline=None, print_blob=True, max_examples=5000)
# A mutant only has to be noticed, so nothing is shrunk there.
hypothesis.settings.register_profile("mutant", deadline=None, database=None, phases=["explicit", "generate"])
hypothesis.settings.load_profile("soak" if SOAK else "mutant" if os.environ.get("KVORTEX_MUTANT") else "kvortex")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header(config):
    return f"device: {DEVICE}, seed: {SEED} (repeat with KVORTEX_SEED={SEED})"


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"repeat with KVORTEX_SEED={SEED}")


def pytest_collection_modifyitems(config, items):
    """Leave out tests of the other device: those marked gpu on the host device, those marked host on a GPU."""
    other = "gpu" if DEVICE == "host" else "host"
    left_out = [item for item in items if item.get_closest_marker(other)]
    items[:] = [item for item in items if not item.get_closest_marker(other)]
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish():
    """What lives as long as the run is left out of the many collections that tests ask for."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """On a GPU a skipped test is a failed one: what was to be shown there was not shown."""
    report = (yield).get_result()
    if DEVICE != "host" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped although KVORTEX_TEST_DEVICE={DEVICE}: {report.longrepr}"


@pytest.fixture
def seed():
    """The session's seed, for tests that draw their own random numbers."""
    return SEED


@pytest.fixture
def device():
    """The device under test, open for one test."""
    with kvortex.Device.open(DEVICE) as opened:
        yield opened


@pytest.fixture
def stream(device):
    """A stream of the caller, as an engine's compute stream."""
    with kvortex.Stream.create(device) as created:
        yield created


@pytest.fixture
def host():
    """The controls of the host driver, put back after the test."""
    yield host_control
    host_control.reset()


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory):
    """The folder of a libcuda.so.1 made of the host driver: CUDA without a GPU, for programs started with it."""
    folder = tmp_path_factory.mktemp("libcuda")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-std=gnu11", "-O1", "-fvisibility=hidden", "-pthread", "-I", ROOT / "include"]
        + ["-o", folder / "libcuda.so.1", ROOT / "tests/driver/libcuda_host.c"]
        + sorted((ROOT / "kvortex/driver").glob("host_*.c")),
        check=True,
    )
    return folder
