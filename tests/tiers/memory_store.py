"""A store in a dictionary: the contract in its smallest form, and what a disk has in common with a list of bytes."""

import collections

import numpy as np

from kvortex.errors import EngineClosed
from kvortex.tiers._record import HEADER_BYTES, check_record, read_header, write_record
from kvortex.tiers.base import BlockStatus


class MemoryBatch:
    seconds = 0.0

    def __init__(self, n):
        self.statuses = np.full(n, BlockStatus.PENDING, np.uint8)
        self.keys = np.zeros((n, 32), np.uint8)
        self.lengths, self.groups = np.zeros(n, np.uint32), np.zeros(n, np.uint32)

    def wait(self, timeout_ms=None):
        return self.statuses

    def done(self):
        return True


class MemoryStore:
    """Does everything within the call."""

    def __init__(self, pool, num_slots, *, namespace, rank=0):
        self.pool, self.num_slots, self.payload_bytes = pool, num_slots, pool.payload_bytes
        self.codec, self.record_bytes = "exact", pool.stride_bytes
        self.names = {"namespace": namespace, "rank": rank}
        self.records = {slot: bytearray(pool.stride_bytes) for slot in range(num_slots)}
        self.counts = {verb: collections.Counter() for verb in ("put", "get", "erase", "scan")}
        self.closed = False

    def _run(self, verb, slots, one, timeout_ms):
        if self.closed:
            raise EngineClosed("the store is closed")
        if any(not 0 <= slot < self.num_slots for slot in slots):
            raise ValueError("slots")
        batch = MemoryBatch(len(slots))
        for i, slot in enumerate(slots):
            batch.statuses[i] = BlockStatus.LATE if timeout_ms == 0 else one(batch, i, int(slot))
            self.counts[verb][BlockStatus(batch.statuses[i]).name] += 1
        return batch

    def _check(self, slots, pool_slots, keys, lengths):
        lengths = np.full(len(slots), lengths) if np.ndim(lengths) == 0 else lengths
        if not len(slots) == len(pool_slots) == len(keys) or len(lengths) != len(slots):
            raise ValueError("counts")
        if any(not 0 <= slot < self.pool.num_slots for slot in pool_slots):
            raise ValueError("pool_slots")
        if any(not 0 < length <= self.payload_bytes for length in lengths):
            raise ValueError("lengths")
        return [int(length) for length in lengths]

    def put(self, slots, pool_slots, keys, lengths, *, tag, group=0, timeout_ms):
        lengths = self._check(slots, pool_slots, keys, lengths)

        def one(batch, i, slot):
            record = self.records[slot]
            record[HEADER_BYTES : HEADER_BYTES + lengths[i]] = self.pool.view(int(pool_slots[i]))[: lengths[i]]
            write_record(record, keys[i], **self.names, tag=tag, stored_bytes=lengths[i], group=group)
            return BlockStatus.OK

        return self._run("put", slots, one, timeout_ms)

    def get(self, slots, pool_slots, keys, lengths, *, tag, timeout_ms):
        lengths = self._check(slots, pool_slots, keys, lengths)

        def one(batch, i, slot):
            record = self.records[slot]
            self.pool.view(int(pool_slots[i]))[: lengths[i]] = record[HEADER_BYTES : HEADER_BYTES + lengths[i]]
            return check_record(record, keys[i], **self.names, tag=tag, stored_bytes=lengths[i])

        return self._run("get", slots, one, timeout_ms)

    def erase(self, slots, *, timeout_ms):
        def one(batch, i, slot):
            self.records[slot][:HEADER_BYTES] = bytes(HEADER_BYTES)
            return BlockStatus.OK

        return self._run("erase", slots, one, timeout_ms)

    def scan(self, slots, *, tag, timeout_ms):
        def one(batch, i, slot):
            status, header = read_header(self.records[slot])
            if status == BlockStatus.OK and header.tag != tag:
                status = BlockStatus.TAG_DIFFERS
            if status == BlockStatus.OK:
                batch.keys[i] = np.frombuffer(header.key, np.uint8)
                batch.lengths[i], batch.groups[i] = header.stored_bytes, header.group
            return status

        return self._run("scan", slots, one, timeout_ms)

    def flush(self, timeout_ms, *, durable=True):
        self._run("scan", [], None, timeout_ms)
        return 0

    def stats(self):
        return {verb: dict(counts) for verb, counts in self.counts.items()}

    def close(self, timeout_ms=5000):
        self.closed = True
