"""Any store, made slow, hung, failing, short, lying or corrupting, from a seed."""

import random
import threading
import time

import numpy as np

from kvortex.tiers.base import BlockStatus

FAULTS = ("slow", "hung", "failing", "torn", "lost", "exchanged", "flipped")


class FaultyBatch:
    """A batch some of whose blocks failed, or that hangs until its gate opens."""

    def __init__(self, batch, failed=(), gate=None, deadline=None):
        self._batch, self._failed, self._gate, self._deadline = batch, list(failed), gate, deadline
        self._is_late = False

    def __getattr__(self, name):
        return getattr(self._batch, name)

    @property
    def statuses(self):
        return self.wait(0)

    @property
    def seconds(self):
        return None if self._gate is not None else self._batch.seconds

    def wait(self, timeout_ms=None):
        if self._gate is not None and not self._is_late:
            left_s = self._deadline - time.monotonic()
            wanted_s = left_s if timeout_ms is None else min(left_s, timeout_ms / 1000)
            if not self._gate.wait(max(0, wanted_s)):
                self._is_late = time.monotonic() >= self._deadline
                status = BlockStatus.LATE if self._is_late else BlockStatus.PENDING
                return np.full(len(self._batch.wait()), status, np.uint8)
        statuses = self._batch.wait(timeout_ms).copy()
        if self._is_late:
            statuses[:] = BlockStatus.LATE
        statuses[self._failed] = BlockStatus.IO_ERROR
        return statuses

    def done(self):
        return (self._gate is None or self._gate.is_set()) and self._batch.done()


class FaultyStore:
    """A store on a store.

    Parameters
    ----------
    rig : Rig
        Of the store below: its `read_record` and `write_record` reach behind that store's back.
    seed : int
    rate : float
        Share of the calls that something happens to.
    faults : sequence of str
        slow, hung (until `open_gate`, or the deadline), failing (one block), torn (half of a record is the one before),
        lost (a put that never was), exchanged (another slot's record), flipped (one bit).
    """

    def __init__(self, rig, seed, rate=0.3, faults=FAULTS):
        self._rig, self._store = rig, rig.store
        self._random, self._rate, self._faults = random.Random(seed), rate, faults
        self._gate = threading.Event()

    def __getattr__(self, name):
        return getattr(self._store, name)

    def open_gate(self):
        """Let what hangs go on."""
        self._gate.set()
        self._gate = threading.Event()

    def _draw(self, slots):
        fault = self._random.choice(self._faults) if self._random.random() < self._rate and len(slots) else None
        return fault, self._random.randrange(len(slots)) if len(slots) else 0

    def put(self, slots, pool_slots, keys, lengths, **settings):
        fault, victim = self._draw(slots)
        before = self._rig.read_record(int(slots[victim])) if fault else b""
        batch = self._store.put(slots, pool_slots, keys, lengths, **settings)
        if fault in ("torn", "lost") and batch.wait()[victim] == BlockStatus.OK:
            after = self._rig.read_record(int(slots[victim]))
            border = 4096 * self._random.randrange(1, len(after) // 4096) if fault == "torn" else 0
            self._rig.write_record(int(slots[victim]), after[:border] + before[border:])
        return self._trouble(batch, fault, victim, settings["timeout_ms"])

    def get(self, slots, pool_slots, keys, lengths, **settings):
        fault, victim = self._draw(slots)
        slot = int(slots[victim]) if len(slots) else 0
        if fault == "exchanged":
            other = self._random.randrange(self._store.num_slots)
            first, second = self._rig.read_record(slot), self._rig.read_record(other)
            self._rig.write_record(slot, second)
            self._rig.write_record(other, first)
        elif fault == "flipped":
            record = bytearray(self._rig.read_record(slot))
            record[self._random.randrange(len(record))] ^= 1 << self._random.randrange(8)
            self._rig.write_record(slot, record)
        return self._trouble(self._store.get(slots, pool_slots, keys, lengths, **settings), fault, victim,
                             settings["timeout_ms"])  # fmt: skip

    def _trouble(self, batch, fault, victim, timeout_ms):
        if fault == "slow":
            time.sleep(0.002)
        elif fault == "failing":
            batch.wait()
            return FaultyBatch(batch, [victim])
        elif fault == "hung":
            return FaultyBatch(batch, gate=self._gate, deadline=time.monotonic() + timeout_ms / 1000)
        return batch
