"""One passing error of the driver, at any of its calls, is no reason to leak what is being closed."""

from contextlib import suppress

import numpy as np
import pytest

from kvortex.driver import Device, DeviceBuffer, Event, Stream
from kvortex.errors import DriverError
from kvortex.memory import DevicePool, PinnedPool
from kvortex.transfer import KVLayout, TransferQueue

OUT_OF_MEMORY = 2
MIB = 1 << 20

pytestmark = pytest.mark.host


def pooled_buffer(device, *, shown=False):
    """Closed while work of its own may be going on; `shown` to others as a DLPack tensor, whose work nobody knows."""
    with DevicePool(MIB, device) as pool, Stream.create(device) as stream:
        buffer = pool.alloc(4096, stream)
        buffer.fill(1, stream=stream)
        if shown:
            np.from_dlpack(buffer)
        return buffer


def arena(device):
    with DevicePool(32 * MIB, device) as pool:
        made = pool.arena(32 * MIB)
        for _ in range(2):
            made.grow(4 * MIB)
        return made


def gathering(device):
    queue = TransferQueue(device, "D2H", max_jobs=3)
    queue.use_gather(LAYOUT, 4, None)
    return queue


LAYOUT = KVLayout.from_tensors([np.zeros((4, 4096), np.uint8) for _ in range(2)])
MAKERS = {
    "device": lambda device: Device.open("host:1"),
    "stream": Stream.create,
    "event": Event.create,
    "buffer": lambda device: DeviceBuffer(4096, device),
    "buffer with a device of its own": lambda device: DeviceBuffer(4096, "host"),
    "device pool": lambda device: DevicePool(MIB, device),
    "pooled buffer": pooled_buffer,
    "pooled buffer that others have seen": lambda device: pooled_buffer(device, shown=True),
    "arena": arena,
    "pinned pool": lambda device: PinnedPool(16 * 4096, 4096, device, first_chunk_bytes=4096, chunk_bytes=8 * 4096),
    "pinned pool of the driver": lambda device: PinnedPool(16 * 4096, 4096, device, driver_allocated=True),
    "queue": lambda device: TransferQueue(device, "D2H", max_jobs=3),
    "queue that gathers": gathering,
}


@pytest.mark.parametrize("what", MAKERS)
def test_one_passing_error_of_a_close_leaks_nothing(device, host, what):
    before, n, struck = host.live_objects(), 0, True
    while struck:
        n += 1
        made = MAKERS[what](device)
        if hasattr(made, "wait_ready"):
            made.wait_ready(20_000)
        host.fail_call(n, OUT_OF_MEMORY)
        with suppress(DriverError):
            made.close()
        struck = not host.fail_pending()
        host.fail_call(0, 0)
        assert host.live_objects() == before, f"call {n}"
    assert n > 1
