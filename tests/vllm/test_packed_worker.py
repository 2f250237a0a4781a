"""The worker's half with a codec: a block that cannot be packed is neither kept, nor written, nor a false alarm."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvortex import KVLayout
from kvortex.integrations.vllm.messages import PUT, SAVE, StepMetadata, TierTransfer, Transfer
from kvortex.integrations.vllm.options import ConnectorOptions
from kvortex.integrations.vllm.worker import WorkerHalf
from kvortex.slots import Slots
from kvortex.transfer import packed_bytes

POOL_BYTES, REFUSED, SOUND = 8 << 20, 2, 3  # device blocks


@pytest.fixture
def make_worker(tmp_path):
    """A worker over three layers, one of whose blocks has a NaN."""
    workers = []

    def make(verify=False):
        disk = {"disk_path": str(tmp_path), "disk_bytes": "32MiB", "namespace": "x"}
        options = ConnectorOptions.parse({"cpu_pool_size_bytes": POOL_BYTES, "codec": "q8", "verify": verify, **disk})
        tensors = [torch.randn(12, 16, 2, 64, dtype=torch.bfloat16) for _ in range(3)]
        tensors[1][REFUSED, 0, 0, 5] = float("nan")
        layout = KVLayout.from_tensors(tensors, roles="k")
        slot_bytes = packed_bytes(layout, "q8")
        slots = Slots.of(POOL_BYTES, slot_bytes, header_bytes=options.engine.header_bytes)
        shape = SimpleNamespace(slots=slots, block_bytes=slot_bytes, num_stages=1, groups=())
        worker = WorkerHalf(
            shape,
            options,
            reports_aborted_loads=True,
            open_store=lambda pool: options.tier.open_store(pool, namespace=b"n" * 32),
        )
        worker.register(layout)
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        worker.close()


def save_of(*blocks):
    return Transfer(SAVE, 1, np.arange(len(blocks), dtype=np.uint32), np.array(blocks), None)


def test_its_slot_is_reported_and_verify_agrees(make_worker):
    worker = make_worker(verify=True)
    step = StepMetadata(transfers=[save_of(SOUND, REFUSED)])
    worker.begin(step)
    worker.start_save(step)
    worker.running[1].job.wait()
    while 1 in worker.running:
        worker.collect([])
    assert worker.take_report().bad == {(SAVE, 1): {1}}
    counters = worker.take_counters()
    assert (counters["verify_blocks"], counters["verify_mismatches"], counters["blocks_not_packed"]) == (2, 0, 1)


@pytest.mark.parametrize("block, is_written", [(SOUND, True), (REFUSED, False)])
def test_it_is_not_written_when_the_server_ends(make_worker, block, is_written):
    worker = make_worker()
    transfer = {"kind": PUT, "number": 1, "tier_slots": np.zeros(1, np.uint32), "slots": np.zeros(1, np.uint32),
                "keys": np.ones((1, 32), np.uint8), "tag": b"t" * 32, "timeout_ms": None, "save": 1}  # fmt: skip
    missing = {name: None for name in TierTransfer._fields if name not in transfer}
    step = StepMetadata(transfers=[save_of(block)], tier=[TierTransfer(**transfer, **missing)])
    worker.begin(step)
    worker.start_save(step)
    worker.begin(StepMetadata())  # the server ends before anybody has collected the save
    worker.running[1].job.wait()
    begun, start = [], worker.tier.start
    worker.tier.start = lambda transfer: (begun.append(transfer.number), start(transfer))
    worker.end_saves()
    assert begun == ([1] if is_written else [])
