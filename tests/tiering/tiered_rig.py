"""An engine over a disk tier, and blocks whose content follows from their key and from the weights."""

import hashlib
import time

import numpy as np
from tier_rig import (
    PAYLOAD_BYTES,
    PLANES,
    SECONDS,
    SEGMENT_BYTES,
    STRIDE_BYTES,
    DiskRig,
    keys_of,
    make_coder,
    quota_of,
)  # fmt: skip

from kvortex import DiskTier, KVLayout, KVortexConfig, KVortexEngine
from kvortex.slots import PAGE_BYTES
from kvortex.tiers.base import HIT, look_up

POOL_SLOTS, TIER_SLOTS = 24, 48
NAMESPACE = "model"
POISON = 0xDB
NOISE = np.frombuffer(np.random.default_rng(7).bytes(1 << 20), np.uint8)
NUMBERS = np.random.default_rng(8).standard_normal(1 << 19, np.float32).view(np.uint16)[1::2].copy().view(np.uint8)


def content(key_id, weights, noise=NOISE):
    """What the model computes: a block that is stale, of another key or torn differs from it."""
    digest = hashlib.sha256(b"%d of %s" % (key_id, weights.encode())).digest()
    start = int.from_bytes(digest[:4]) % (len(noise) - PAYLOAD_BYTES) // 2 * 2
    data = noise[start : start + PAYLOAD_BYTES].copy()
    data[-32:] = np.frombuffer(digest, np.uint8)
    return data


class EngineRig(DiskRig):
    """An engine, and memory of a caller who saves from it and loads into it.

    Parameters
    ----------
    path : path
    weights : str, optional
        As the config says them; blocks of unnamed weights have the content of "the checkpoint".
    tier : optional
        Settings of another tier than a disk in `path`.
    by_layout : bool, default False
        Name blocks by their number in a layout; else by address.
    coded : bool, default False
        The disk codes blocks, which consist of numbers then and are named by their number.
    """

    def __init__(self, path, *, pool_slots=POOL_SLOTS, tier_slots=TIER_SLOTS, weights=None, num_blocks=16,
                 by_layout=False, coded=False, disk=None, tier=None, **settings):  # fmt: skip
        self.weights = weights or "the checkpoint"
        self.memory = np.zeros((num_blocks, PAYLOAD_BYTES), np.uint8)
        start = self.memory.ctypes.data
        self.addresses = start + np.arange(num_blocks) * PAYLOAD_BYTES
        self.coder, by_layout = make_coder() if coded else None, by_layout or coded
        runs = [(start, PAYLOAD_BYTES, PAYLOAD_BYTES)]
        layout = KVLayout(runs, num_blocks, planes=PLANES) if by_layout else None
        self.by_layout, self.is_closed, self.tier_settings = by_layout, False, tier
        disk = (
            {"disk_bytes": quota_of(tier_slots), "segment_bytes": SEGMENT_BYTES, "write_bytes_per_s": 0}
            | ({"codec": "ecsq", "slot_ratio": 1} if coded else {})
            | (disk or {})
        )
        config = KVortexConfig(
            cpu_pool_size_bytes=pool_slots * STRIDE_BYTES, block_bytes=PAYLOAD_BYTES, device="host",
            tiers=(tier or DiskTier(path, **disk),), namespace=NAMESPACE, weights=weights, **settings,
        )  # fmt: skip
        self.engine = KVortexEngine.create(config, layout=layout)
        self.engine.wait_ready(SECONDS)
        self.tier = self.engine.tiering.tier
        self.store, self.pool = self.tier.store, self.engine.pool
        self.segments = getattr(self.store, "segments", None)

    def content(self, key_id, weights):
        """What the model computes."""
        return content(key_id, weights, NOISE if self.coder is None else NUMBERS)

    def decoded(self, key_id, weights=None):
        """What the tier gives back of it."""
        data = self.content(key_id, weights or self.weights)
        coded = np.empty(self.coder.stride_bytes - PAGE_BYTES, np.uint8)
        assert self.coder.decode(coded[: self.coder.encode(data, coded)], data)
        return data

    def rights(self, key_id, weights):
        """What may be loaded: from RAM, or from the tier."""
        yield self.content(key_id, weights)
        if self.coder is not None:
            yield self.decoded(key_id, weights)

    def adopted(self):
        """Wait until all is known that the folder has; return this rig."""
        assert self.tier.adoption.wait(SECONDS)
        return self

    def places(self, blocks):
        if self.by_layout:
            return {"block_ids": np.asarray(blocks)}
        return {"data_ptrs": self.addresses[np.asarray(blocks, int)], "sizes": PAYLOAD_BYTES}

    def begin_save(self, key_ids, weights=None, blocks=None, **settings):
        """Compute blocks and save them; the job."""
        blocks = range(len(key_ids)) if blocks is None else blocks
        for key_id, block in zip(key_ids, blocks, strict=True):
            self.memory[block] = self.content(key_id, weights or self.weights)
        return self.engine.save_blocks(keys_of(key_ids), **self.places(blocks), **settings)

    def save(self, key_ids, weights=None):
        """Save blocks, as many at once as the caller has memory for; return how many were new."""
        num_new, most = 0, len(self.memory)
        for first in range(0, len(key_ids), most):
            job = self.begin_save(key_ids[first : first + most], weights)
            job.wait(SECONDS)
            num_new += job.num_blocks
        return num_new

    def load(self, key_ids, *, among=None, blocks=None, **settings):
        """Load a run of blocks; return how many came. A wrong one, or a touched target behind the run, fails the test.

        `among` are the weights that a block may be of.
        """
        blocks = range(len(key_ids)) if blocks is None else blocks
        for block in blocks:
            self.memory[block] = POISON
        job = self.engine.load_blocks(keys_of(key_ids), **self.places(blocks), **settings)
        job.wait(SECONDS)
        among = [self.weights] if among is None else among() if callable(among) else among
        for i, (key_id, block) in enumerate(zip(key_ids, blocks, strict=True)):
            if i < job.num_blocks:
                rights = [right for weights in among for right in self.rights(key_id, weights)]
                is_right = any(np.array_equal(self.memory[block], right) for right in rights)
                assert is_right, f"a wrong block for key {key_id}: {bytes(self.memory[block][:40]).hex()}"
            else:
                assert (self.memory[block] == POISON).all(), f"the target of key {key_id} was touched"
        return job.num_blocks

    def found(self, key_ids, timeout_ms=SECONDS):
        """Which blocks it has, on any level: each is loaded by itself and compared."""
        return [key_id for key_id in key_ids if self.load([key_id], promote_timeout_ms=timeout_ms)]

    def known(self, key_ids):
        """Which blocks the tier says that it has."""
        return [key_id for key_id in key_ids if look_up(self.tier.catalogue, keys_of([key_id]))[0] == HIT]

    def forget_ram(self):
        """Nothing is left in RAM; the tier keeps what it has."""
        self.engine.index.clear()

    def require_quiet(self):
        """Nothing is on its way any more, and nobody holds anything."""
        tiering, index = self.engine.tiering, self.engine.index
        wait_until(lambda: not tiering._cleaner.num_pinned and not tiering._promoter.num_pinned)
        wait_until(lambda: not index.num_writing and not index.num_pinned)
        wait_until(lambda: not self.tier.catalogue.num_writing and not self.tier.catalogue.num_pinned)
        wait_until(lambda: not tiering._promoter._landings and not tiering._promoter._promotions)
        for each in (index, self.tier.catalogue):  # a leaked slot stays so; the cleaner may have begun once more
            wait_until(lambda each=each: each.num_ready + each.num_free == each.slots_added)

    def close(self):
        self.is_closed = True
        self.engine.shutdown()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def wait_until(condition, seconds=30):
    """Wait for what has to happen soon."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)
