"""An engine with a disk tier: block ids for keys, and a content of each that is checked whenever it is loaded."""

import threading
import time

import numpy as np
from faulty_store import FaultyBatch
from tier_rig import PAYLOAD_BYTES, SECONDS, SEGMENT_BYTES, STRIDE_BYTES, block, keys_of, quota_of

from kvortex import DiskTier, KVortexConfig, KVortexEngine
from kvortex.tiers.base import HIT


class HeldStore:
    """A store some of whose verbs seem to be under way until they are let go."""

    def __init__(self, store):
        self._store, self._held = store, set()
        self._gate = threading.Event()
        self.calls = []  # (verb, block keys)

    def __getattr__(self, name):
        return getattr(self._store, name)

    def hold(self, *verbs):
        """From now on batches of these verbs hang."""
        self._held = set(verbs)

    def let_go(self):
        """Those that hang go on; later ones do not hang."""
        self._held = set()
        self._gate.set()
        self._gate = threading.Event()

    def put(self, slots, pool_slots, keys, lengths, *, timeout_ms, **settings):
        return self._run("put", slots, pool_slots, keys, lengths, timeout_ms, settings)

    def get(self, slots, pool_slots, keys, lengths, *, timeout_ms, **settings):
        return self._run("get", slots, pool_slots, keys, lengths, timeout_ms, settings)

    def _run(self, verb, slots, pool_slots, keys, lengths, timeout_ms, settings):
        run, is_held, gate = getattr(self._store, verb), verb in self._held, self._gate
        batch = run(slots, pool_slots, keys, lengths, timeout_ms=SECONDS if is_held else timeout_ms, **settings)
        if is_held:
            batch = FaultyBatch(batch, gate=gate, deadline=time.monotonic() + timeout_ms / 1000)
        self.calls.append((verb, [key.tobytes() for key in keys]))  # last: who waits for it may let it go at once
        return batch


class EngineRig:
    """What a test needs to say of an engine and its tier.

    Parameters
    ----------
    path : path-like
    pool_blocks, disk_blocks : int
    **settings
        Of `DiskTier`, and those of `KVortexConfig` that begin with ``engine_``.
    """

    def __init__(self, path, pool_blocks=16, disk_blocks=64, **settings):
        own = {
            name.removeprefix("engine_"): settings.pop(name) for name in list(settings) if name.startswith("engine_")
        }
        settings = {"segment_bytes": SEGMENT_BYTES, "write_bytes_per_s": 0, **settings}
        self.engine = KVortexEngine.create(
            KVortexConfig(
                cpu_pool_size_bytes=pool_blocks * STRIDE_BYTES,
                block_bytes=PAYLOAD_BYTES,
                device="host",
                tiers=(DiskTier(path, quota_of(disk_blocks), **settings),),
                **{"namespace": "a model", **own},
            )
        )
        self.engine.wait_ready(SECONDS)
        self.index, self.tier = self.engine.index, self.engine.tiering.tier
        self.cleaner, self.promoter = self.engine.tiering._cleaner, self.engine.tiering._promoter
        assert self.tier.adoption.wait(SECONDS)
        self.store = self.tier.store = HeldStore(self.tier.store)

    def save(self, ids, generation=0, after=None):
        """Save blocks of a content that their id and generation name; return the job, which is over."""
        memory = [np.frombuffer(block(i, generation), np.uint8).copy() for i in ids]
        after = None if after is None else keys_of(after)
        job = self.engine.save_blocks(keys_of(ids), data_ptrs=memory, after=after)
        job.wait(SECONDS)
        return job

    def load(self, ids, generation=0, **settings):
        """Load blocks, each compared with what it should be; return how many came."""
        memory = [np.zeros(PAYLOAD_BYTES, np.uint8) for _ in ids]
        job = self.engine.load_blocks(keys_of(ids), data_ptrs=memory, **settings)
        job.wait(SECONDS)
        for i, target in zip(ids, memory[: job.num_blocks], strict=False):
            assert target.tobytes() == block(i, generation), f"block {i} has another content"
        assert not any(target.any() for target in memory[job.num_blocks :])
        return job.num_blocks

    def prefetch(self, ids, timeout_ms=SECONDS, hold_ms=SECONDS):
        return self.engine.prefetch(keys_of(ids), timeout_ms, hold_ms)

    def fetch(self, ids, **settings):
        """A prefetch that is done."""
        prefetch = self.prefetch(ids, **settings)
        prefetch.wait(SECONDS)
        return prefetch

    def put_away(self, ids, generation=0, batch=4):
        """Bring blocks to the disk, and let RAM have none."""
        for first in range(0, len(ids), batch):
            self.save(ids[first : first + batch], generation)
            assert self.engine.flush(SECONDS) == 0
        self.index.evict(self.index.num_slots)

    def in_ram(self, ids):
        return [i for i, found in zip(ids, self.index.lookup(keys_of(ids))[0], strict=True) if found]

    def on_disk(self, ids):
        answers = self.tier.look_up(keys_of(ids))
        return [i for i, answer in zip(ids, answers, strict=True) if answer == HIT]

    def pins_of(self, i):
        (slot,) = self.index.slots_of(keys_of([i]))
        return self.index.slot_info(int(slot))["pins"]

    def gets(self):
        """How many blocks were read."""
        return sum(len(keys) for verb, keys in self.store.calls if verb == "get")

    def stats(self):
        return self.engine.get_stats().tiers[0]

    def is_at_rest(self):
        """Whether nothing is held any more: no pins, no slot being written, nothing on its way."""
        tier, index = self.tier.catalogue.counters(), self.index.counters()
        held = [counts[name] for counts in (tier, index) for name in ("num_pinned", "num_writing")]
        return held == [0, 0, 0, 0] and self.cleaner.num_pinned == self.promoter.num_pinned == 0

    def wait_for(self, condition):
        """Until something is so that a thread brings about."""
        deadline = time.monotonic() + SECONDS / 1000
        while not condition():
            assert time.monotonic() < deadline, "it did not come"
            time.sleep(0.002)

    def close(self):
        self.store.let_go()
        self.engine.shutdown()
