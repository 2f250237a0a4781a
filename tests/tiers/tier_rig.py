"""A pool, a store over it, and a hand that reaches behind the store's back."""

import hashlib
import os
import time

import numpy as np
from memory_store import MemoryStore

from kvortex import PinnedPool
from kvortex.codec import PackedBlock, Plane
from kvortex.codec._coder import BlockCoder
from kvortex.slots import PAGE_BYTES
from kvortex.tiers._record import HEADER_BYTES
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.disk._disk_store import DiskStore
from kvortex.tiers.disk.segments import Segments
from kvortex.tiers.remote.objects import FolderClient
from kvortex.tiers.remote.store import RemoteStore

SPACE, TAG, OTHER_TAG = (hashlib.sha256(text).digest() for text in (b"space", b"tag", b"other"))
PAYLOAD_BYTES = 20_000  # no whole pages
NUM_SLOTS, POOL_SLOTS = 40, 48
ALL = range(NUM_SLOTS)
PLANES = [Plane("k", 0, 39, 256, 256), Plane("v", 39 * 256, 39, 256, 256)]  # and 32 bytes of neither
SECONDS = 30_000  # a deadline that no healthy machine comes near
STRIDE_BYTES = PAGE_BYTES + 5 * PAGE_BYTES
SLOT_BYTES = STRIDE_BYTES + 128  # of the quota, with a row of the manifest
SEGMENT_BYTES = (64 << 10) + PAGE_BYTES + 16 * SLOT_BYTES  # 16 slots each


def make_pool(num_slots=POOL_SLOTS):
    pool = PinnedPool(num_slots * STRIDE_BYTES, PAYLOAD_BYTES, "host", header_bytes=PAGE_BYTES)
    pool.wait_ready(SECONDS)
    return pool


def quota_of(num_slots, num_paths=1):
    """The least `disk_bytes` with room for so many slots."""
    whole, rest = divmod(num_slots, 16)
    rest_bytes = (64 << 10) + PAGE_BYTES + rest * SLOT_BYTES if rest else 0
    return (64 << 10) * num_paths + whole * SEGMENT_BYTES + rest_bytes


def open_segments(paths, num_slots=NUM_SLOTS, **settings):
    settings = {"namespace": SPACE, "stride_bytes": STRIDE_BYTES, "segment_bytes": SEGMENT_BYTES, **settings}
    return Segments(paths, disk_bytes=quota_of(num_slots, len(paths)), **settings)


def block(key_id, generation=0, length=PAYLOAD_BYTES):
    """Bytes that name their block and differ at every offset."""
    return np.random.default_rng((key_id, generation)).bytes(length)


def key_of(key_id):
    return np.frombuffer(hashlib.sha256(b"%d" % key_id).digest(), np.uint8).reshape(1, 32)


def keys_of(key_ids):
    return np.concatenate([key_of(int(key_id)) for key_id in key_ids]) if len(key_ids) else np.zeros((0, 32), np.uint8)


class Rig:
    """A store with short verbs: block ids for keys, bytes for slots of the pool."""

    def __init__(self, store, pool):
        self.store, self.pool = store, pool

    def put(self, slots, key_ids, *, generation=0, length=PAYLOAD_BYTES, tag=TAG, timeout_ms=SECONDS, wait=True):
        """Put blocks from the pool's slots 0, 1, ...; return their statuses, or the batch."""
        for i, key_id in enumerate(key_ids):
            self.pool.view(i)[:length] = block(key_id, generation, length)
        batch = self.store.put(slots, range(len(slots)), keys_of(key_ids), length, tag=tag, timeout_ms=timeout_ms)
        return statuses_of(batch) if wait else batch

    def get(self, slots, key_ids, *, length=PAYLOAD_BYTES, tag=TAG, timeout_ms=SECONDS):
        """Get blocks into the pool's last slots; return the content, or the status, of each."""
        first = self.pool.num_slots - len(slots)
        for i in range(len(slots)):
            self.pool.view(first + i)[:] = b"\xee" * self.pool.payload_bytes
        targets = range(first, self.pool.num_slots)
        batch = self.store.get(slots, targets, keys_of(key_ids), length, tag=tag, timeout_ms=timeout_ms)
        return [
            bytes(self.pool.view(first + i)[:length]) if status == BlockStatus.OK else BlockStatus(status)
            for i, status in enumerate(batch.wait())
        ]

    @staticmethod
    def answer_to_another(status):
        """What is said of a slot that holds another block than the one that is asked for."""
        return status

    def close(self):
        self.store.close()
        self.pool.close()


def open_now():
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def require_no_more(before, why=""):
    """There are no more of them than before. Libraries have some for a moment, and a joined thread leaves late."""
    deadline = time.monotonic() + 20
    while any(now > then for now, then in zip(open_now(), before, strict=True)):
        assert time.monotonic() < deadline, f"{before} descriptors and threads became {open_now()}; {why}"
        time.sleep(0.005)


def statuses_of(batch):
    return [BlockStatus(status) for status in batch.wait()]


class MemoryRig(Rig):
    def __init__(self, path=None):
        pool = make_pool()
        super().__init__(MemoryStore(pool, NUM_SLOTS, namespace=SPACE), pool)

    def read_record(self, slot):
        return bytes(self.store.records[slot])

    def write_record(self, slot, record):
        self.store.records[slot][:] = record


class DiskRig(Rig):
    def __init__(self, path, *, num_slots=NUM_SLOTS, pool=None, num_threads=4, queue_blocks=4096, io="threads",
                 coder=None, **settings):  # fmt: skip
        pool = pool or make_pool()
        paths = path if isinstance(path, list) else [path]
        self.segments = open_segments(paths, num_slots, codec=coder.codec if coder else 0, **settings)
        super().__init__(DiskStore(pool, self.segments, namespace=SPACE, num_threads=num_threads,
                                   queue_blocks=queue_blocks, io=io, coder=coder), pool)  # fmt: skip

    def place(self, slot):
        """File and offset of a slot, by a count of our own."""
        name = f"{slot // 16:06}.segment"
        folders = self.segments.folders
        return os.path.join(folders[slot // 16 % len(folders)], name), PAGE_BYTES + slot % 16 * STRIDE_BYTES

    def read_record(self, slot):
        path, offset = self.place(slot)
        with open(path, "rb") as file:
            return os.pread(file.fileno(), STRIDE_BYTES, offset)

    def write_record(self, slot, record):
        path, offset = self.place(slot)
        with open(path, "r+b") as file:
            assert os.pwrite(file.fileno(), record, offset) == STRIDE_BYTES


class BufferedRig(DiskRig):
    def __init__(self, path):
        super().__init__([path / "a", path / "b"], direct=False, num_threads=1)


class AioRig(DiskRig):
    def __init__(self, path):
        super().__init__(path, io="aio")
        assert self.store.stats()["io_engine"] == "aio"


class BufferedAioRig(DiskRig):
    def __init__(self, path):
        super().__init__(path, io="aio", direct=False)


def make_coder(slot_ratio=1, codec="exact", level=1):
    """Of blocks of 39 vectors of K and as many of V; random bytes are no numbers, and stay as they are."""
    return BlockCoder(PackedBlock.of(PLANES, PAYLOAD_BYTES, codec), level, slot_ratio)


class CodedRig(DiskRig):
    def __init__(self, path, **settings):
        super().__init__(path, coder=make_coder(), **settings)


class RemoteRig(Rig):
    """A store on a server: `client` is what it writes with, `raw` another one that reaches behind its back."""

    def __init__(self, client, raw=None, *, pool=None, num_slots=NUM_SLOTS, **settings):
        pool, self.raw = pool or make_pool(), raw or client
        settings = {"name_format": "kvortex/{name:.2}/{name}", "num_threads": 4, **settings}
        super().__init__(RemoteStore(pool, client, namespace=SPACE, num_slots=num_slots, **settings), pool)

        self.placed = {}  # by slot: the name and the bytes of what was put there last

    def put(self, slots, key_ids, *, length=PAYLOAD_BYTES, tag=TAG, **settings):
        names = self.store.names.of(keys_of(key_ids), tag)
        self.placed |= {slot: (name, HEADER_BYTES + length) for slot, name in zip(slots, names, strict=True)}
        return super().put(slots, key_ids, length=length, tag=tag, **settings)

    def _name_in(self, slot):
        """The name of what was put there last, and its bytes; None where nothing was."""
        name, nbytes = self.placed.get(slot, (None, HEADER_BYTES + PAYLOAD_BYTES))
        return self.store._lying.get(slot, name), nbytes

    def read_record(self, slot):
        name, _ = self._name_in(slot)
        record = bytearray(STRIDE_BYTES)
        size = self.raw.sizes([name], True)[0] if name else 0
        if size:
            self.raw.get(name, memoryview(record)[:size])
        return bytes(record)

    def write_record(self, slot, record):
        name, nbytes = self._name_in(slot)
        if name:
            self.raw.put(name, bytes(record[:nbytes]))

    @staticmethod
    def answer_to_another(status):
        return BlockStatus.MISSING  # it has another name


class FolderRig(RemoteRig):
    def __init__(self, path):
        super().__init__(FolderClient(os.fspath(path)))


RIGS = {
    "memory": MemoryRig,
    "disk": DiskRig,
    "disk-aio": AioRig,
    "disk-aio-buffered": BufferedAioRig,
    "disk-buffered-two-folders": BufferedRig,
    "disk-coded": CodedRig,
    "folder": FolderRig,
}


# ---- a catalogue and a store, used as an engine would ----------------------------------------------------------------


def save(tier, pool, key_ids):
    """Save blocks that are not there yet."""
    keys = keys_of(key_ids)
    slots, statuses = tier.catalogue.reserve(keys, PAYLOAD_BYTES)
    new = np.flatnonzero(statuses == 0)
    for i in new:
        pool.view(int(i))[:] = block(int(key_ids[i]))
    batch = tier.store.put(slots[new], new, keys[new], PAYLOAD_BYTES, tag=tier.tag, timeout_ms=SECONDS)
    is_kept = batch.wait() == BlockStatus.OK
    tier.catalogue.commit(slots[new[is_kept]])
    tier.store.erase(slots[new[~is_kept]], timeout_ms=None)
    tier.catalogue.abort(slots[new[~is_kept]])


def load(tier, pool, key_ids):
    """The blocks that the tier serves, by number; wrong ones fail the test."""
    found = {}
    for key_id in key_ids:
        keys = keys_of([key_id])
        slots = tier.catalogue.acquire(keys, PAYLOAD_BYTES)
        if len(slots):
            batch = tier.store.get(slots, [40], keys, PAYLOAD_BYTES, tag=tier.tag, timeout_ms=SECONDS)
            if statuses_of(batch) == [BlockStatus.OK]:
                assert bytes(pool.view(40)) == block(key_id)
                found[key_id] = int(slots[0])
            tier.catalogue.release(slots)
    return found
