"""Eight threads against the race oracle, on streams that run late, on one and on two devices."""

import os
import time
from contextlib import ExitStack

import pytest
from kvcache import DeviceCache, make_engine
from stress import CHAIN_BLOCKS, run_stress

import kvortex

SOAK = os.environ.get("KVORTEX_SOAK") == "1"
# Under a sanitizer everything is ten times slower, and a fault shows in a tenth of the operations.
OPERATIONS = 1_000_000 if SOAK else 10_000 if os.environ.get("KVORTEX_SANITIZE") else 25_000
DEVICE = os.environ.get("KVORTEX_TEST_DEVICE", "host")


def pairs(stack, devices, shape, num_slots):
    for device in devices:
        cache = DeviceCache(device, shape, num_blocks=8 * CHAIN_BLOCKS, num_layers=2, piece_bytes=128)
        engine = make_engine(cache, num_slots)
        stack.callback(cache.close)
        stack.callback(engine.shutdown)
        yield engine, cache


def require_sound(report, engines):
    print(report)
    assert report.wrong_blocks == 0
    assert report.loaded_blocks > report.operations // 10
    assert sum(engine.get_stats().blocks_evicted for engine in engines) > report.operations // 20
    deadline = time.monotonic() + 20
    for engine in engines:
        while engine.get_stats().jobs_in_flight:
            assert time.monotonic() < deadline, "a job never ended"
        engine.clear()
        assert engine.get_stats().pool_blocks_used == 0, "a slot leaked"


@pytest.mark.timeout(7200 if SOAK else 600)
@pytest.mark.host
def test_eight_threads_on_two_late_devices_get_no_wrong_block(host, seed):
    host.set_delay_us(0, 60, seed=seed)
    with ExitStack() as stack:
        devices = [stack.enter_context(kvortex.Device.open(f"host:{ordinal}")) for ordinal in range(2)]
        built = list(pairs(stack, devices, "one_allocation", 60))
        report = run_stress(built, operations=OPERATIONS, seed=seed)
        assert report.operations == OPERATIONS
        assert report.cancelled > 0
        require_sound(report, [engine for engine, _ in built])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", ["one_allocation", "separate_allocations", "gathered", "packed", "cross_layer"])
def test_eight_threads_get_no_wrong_block(device, shape, seed):
    with ExitStack() as stack:
        built = list(pairs(stack, [device], shape, 60))
        report = run_stress(built, operations=4000, seed=seed)
        require_sound(report, [engine for engine, _ in built])
