"""Random operations on every store while it is slow, hangs, fails, forgets, exchanges and corrupts: no wrong block."""

import os

import numpy as np
import pytest
from faulty_store import FAULTS, FaultyStore
from tier_rig import NUM_SLOTS, OTHER_TAG, PAYLOAD_BYTES, POOL_SLOTS, SECONDS, TAG, block, keys_of

from kvortex.tiers.base import BlockStatus

NUM_OPERATIONS = 20_000 if os.environ.get("KVORTEX_SOAK") == "1" else 400
TAGS = (TAG, OTHER_TAG)


@pytest.mark.timeout(3600)
def test_no_fault_makes_a_store_serve_a_wrong_block(rig, seed):
    """A block's content follows from its key and tag, as in an engine; a store may forget it and may not change it."""
    rng, store = np.random.default_rng(seed), FaultyStore(rig, seed)
    put, served, late = {}, 0, []
    for _ in range(NUM_OPERATIONS):
        tag = int(rng.integers(2))
        n = int(rng.integers(1, 5))
        slots = rng.choice(NUM_SLOTS, n, replace=False)
        verb = rng.choice(["put", "put", "get", "get", "get", "erase"])
        late = [batch for batch in late if not batch.done()]
        if late:
            store.open_gate()  # what is late holds its memory, so it ends before the memory is used again
        if verb == "put":
            ids = rng.integers(0, 20, n)
            for i, key_id in enumerate(ids):
                rig.pool.view(i)[:] = block(int(key_id), tag)
            batch = store.put(slots, range(n), keys_of(ids), PAYLOAD_BYTES, tag=TAGS[tag], timeout_ms=50)
            batch.wait()
            put.update({int(slot): (int(key_id), tag) for slot, key_id in zip(slots, ids, strict=True)})
        elif verb == "get":
            wanted = [put.get(int(slot), (0, tag)) for slot in slots]
            ids = [key_id if rng.integers(8) else int(rng.integers(20)) for key_id, _ in wanted]
            tag = wanted[0][1]
            targets = np.arange(POOL_SLOTS - n, POOL_SLOTS)
            batch = store.get(slots, targets, keys_of(ids), PAYLOAD_BYTES, tag=TAGS[tag], timeout_ms=50)
            for key_id, target, status in zip(ids, targets, batch.wait(), strict=True):
                if status == BlockStatus.OK:
                    served += 1
                    assert bytes(rig.pool.view(int(target))) == block(key_id, tag)
        else:
            batch = store.erase(slots, timeout_ms=None)
            assert (batch.wait() == BlockStatus.OK).all()
        if not batch.done():
            late.append(batch)
    store.open_gate()
    assert served > NUM_OPERATIONS / 20


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_is_well_again_serves_again(rig, seed, fault):
    faulty = FaultyStore(rig, seed, rate=1, faults=[fault])
    timeout_ms = 50 if fault == "hung" else SECONDS
    rig.pool.view(0)[:] = block(1)
    batch = faulty.put([3], [0], keys_of([1]), PAYLOAD_BYTES, tag=TAG, timeout_ms=timeout_ms)
    put = BlockStatus(batch.wait()[0])
    got = faulty.get([3], [9], keys_of([1]), PAYLOAD_BYTES, tag=TAG, timeout_ms=timeout_ms)
    status = BlockStatus(got.wait()[0])
    expected = {"slow": (BlockStatus.OK,), "hung": (BlockStatus.LATE,), "failing": (BlockStatus.IO_ERROR,)}
    assert status in expected.get(fault, tuple(BlockStatus)) and status is not BlockStatus.PENDING
    assert put is expected.get(fault, (BlockStatus.OK,))[0]
    assert got.done() == (fault != "hung")
    faulty.open_gate()
    assert rig.store.flush(SECONDS) == 0 and batch.done() and got.done()
    assert rig.put([3], [1]) == [BlockStatus.OK] and rig.get([3], [1]) == [block(1)]
