"""What the tests with vLLM share. They run in the environments of `make test-vllm`, never in plain `make test`."""

import os
import random

import pytest
import vllm
from faulty_calls import faulty, faulty_disk, faulty_library  # noqa: F401

# For whoever calls pytest by hand; the Makefile sets the same.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_report_header(config):
    return f"vLLM {vllm.__version__}"


@pytest.fixture(params=[True, False], ids=["async", "sync"])
def load_async(request):
    """Whether requests wait for their load between steps or inside one."""
    return request.param


@pytest.fixture
def make_rig(host):
    """Makes `Rig`s, and closes them when the test is over, however it left the host driver."""
    from rig import Rig  # late: tests of a whole engine need none

    rigs = []

    def make(**options):
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    host.stop_calls()
    host.release()
    host.set_delay_us(0, 0)
    host.fail_call(0, 0)
    for rig in rigs:
        rig.close()


@pytest.fixture
def prompt():
    """Makes prompts: the same `count` tokens for the same `name`, and a longer one continues a shorter."""

    def make(name, count):
        draw = random.Random(name)
        return [draw.randrange(3, 1000) for _ in range(count)]

    return make
