"""The way to a CUDA driver through cuda-python, run for real over a libcuda.so.1 that is the host driver."""

import os
import subprocess
import sys

import pytest

from kvortex.driver._device import driver_rows

COPY_THERE_AND_BACK = """
from kvortex.driver import Device, DeviceBuffer, Event, Stream, list_devices
assert list_devices() == ["cuda:0", "cuda:1", "host:0", "host:1"], list_devices()
with Device.open("cuda:0") as device, DeviceBuffer(4096, device) as buffer:
    assert not device.is_host
    content, target = bytes(range(256)) * 16, bytearray(4096)
    buffer.copy_from(content)
    with Stream.create(device) as stream, Event.create(device) as event:
        buffer.copy_to(target, stream=stream)
        event.record(stream)
        event.synchronize()
    assert target == content
assert Device.open("auto").name == "cuda:0"
assert Device.open("cuda:1").name == "cuda:1"
print("copied")
"""

OPEN_CUDA = """
from kvortex.driver import Device
from kvortex.errors import ConfigError
try:
    Device.open("cuda:0")
except ConfigError as error:
    print(error)
print(Device.open("auto").name)
"""


def run(program, folder, **settings):
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), **settings}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.host
def test_cuda_device_works_through_cuda_python(libcuda):
    assert run(COPY_THERE_AND_BACK, libcuda) == "copied\n"


@pytest.mark.host
def test_each_row_is_asked_once_at_its_version_as_legacy_stream(libcuda, tmp_path):
    log = tmp_path / "log"
    run(COPY_THERE_AND_BACK, libcuda, KV_FAKE_LOG=str(log))
    asked = [line.split() for line in log.read_text().splitlines()]
    assert asked == [[symbol, str(version)] for _, symbol, version, _ in driver_rows()]


@pytest.mark.host
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"KV_FAKE_VERSION": "12040"}, "supports CUDA 12.4, KVortex needs 12.8 or later; update the NVIDIA driver"),
        ({"KV_FAKE_DEVICES": "0"}, "sees no device; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ({"KV_FAKE_DEVICES": "-1"}, "sees no device; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ({"KV_FAKE_MISSING": "cuMemcpyBatchAsync"}, "has no cuMemcpyBatchAsync of CUDA 12.8"),
    ],
)
def test_unusable_driver_is_refused_with_a_way_out_and_auto_takes_the_host(libcuda, settings, message):
    explained, chosen = run(OPEN_CUDA, libcuda, **settings).splitlines()
    assert message in explained and "use device='host'" in explained
    assert chosen == "host:0"


@pytest.mark.host
def test_missing_driver_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "libcuda.so.1").write_text("not a library")
    explained, chosen = run(OPEN_CUDA, tmp_path).splitlines()
    assert "libcuda.so.1 cannot be loaded" in explained and "use device='host'" in explained
    assert chosen == "host:0"


def test_importing_the_package_does_not_import_cuda_python(tmp_path):
    program = "import sys, kvortex.driver; print([name for name in sys.modules if name.startswith('cuda')])"
    assert run(program, tmp_path) == "[]\n"
