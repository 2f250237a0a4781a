"""Small blocks that share an object on a server: which ones, and when the object is written.

Only the scheduler's half knows chains: it says which blocks an object has and under which key, and the workers write
and read. An object has `count` consecutive blocks of a chain, from a multiple of `count` on, and the key of the last
one. The catalogue stays one of blocks: `Homes` says in which object the block of a tier slot is.
"""

import time
from dataclasses import dataclass
from itertools import islice

import numpy as np

from kvortex.index import NO_SLOT, CommitStatus, ReserveStatus
from kvortex.integrations.vllm.keys import KEY_BYTES, as_bytes
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.cleaner import PUT_TIMEOUT_MS, RETRY_S, WINDOW_BYTES
from kvortex.tiers.remote.view import Objects, objects_of

LOOKED_AT = 64  # pending objects that a step looks at
TOUCHED_LATER = 64  # most requests whose touch is repeated when an object was written


class Homes:
    """For each tier slot, the object that has its block, and the place in it. Entries of free slots mean nothing."""

    def __init__(self, num_slots):
        self._keys = np.zeros((num_slots, KEY_BYTES), np.uint8)
        self._places, self._counts = np.zeros(num_slots, np.uint8), np.ones(num_slots, np.uint16)

    def note(self, tier_slots, objects):
        """Note where the blocks of these slots are. Call it while no lookup can find these slots."""
        self._keys[tier_slots], self._places[tier_slots], self._counts[tier_slots] = objects

    def of(self, tier_slots):
        """The `Objects` of these slots."""
        return Objects(self._keys[tier_slots], self._places[tier_slots], self._counts[tier_slots])

    def beside(self, tier_slots):
        """All slots whose blocks are in the same objects as the blocks of these slots; some may be free meanwhile."""
        words = self._keys.view(np.uint64)[:, 0]
        near = np.flatnonzero(np.isin(words, words[tier_slots]))
        objects = set(as_bytes(self._keys[tier_slots]))
        return near[[key in objects for key in as_bytes(self._keys[near])]]


@dataclass
class Writing:
    """Objects that are written as one batch."""

    names: list  # keys of their last blocks
    rows: list  # for each object, its slice of the arrays below
    keys: np.ndarray
    slots: np.ndarray
    tier_slots: np.ndarray
    is_new: np.ndarray  # per block, whether its entry in the catalogue is new; else another object has it, too
    batch: object
    tag: bytes
    is_late: bool = False


class ObjectWriter:
    """Write each object when all of its blocks have been saved; they are pinned meanwhile.

    When a block is in the index, every rank has saved it, and what a failed load made wrong has been discarded. If the
    pool has lost a block of an object, the object is not written.

    Parameters
    ----------
    index : BlockIndex
        Of the pool.
    slots : Slots
        Of the pool.
    tier : Tier
    budget : WriteBudget
    breaker : Breaker
    most_joined : int
        Blocks of an object.
    saves_late : bool
        Blocks of a request are saved some time later, in any order, or never.
    """

    def __init__(self, index, slots, tier, budget, breaker, *, most_joined, saves_late):
        self.index, self.tier, self.budget, self.breaker = index, tier, budget, breaker
        self._stride_bytes, self._block_bytes, self._saves_late = slots.stride_bytes, slots.payload_bytes, saves_late
        self._window_blocks = max(1, WINDOW_BYTES // slots.stride_bytes)
        self.most_pinned = max(most_joined, slots.num_slots // 8)
        self.most_pending = 64 + 2 * slots.num_slots // most_joined
        self._pending, self._num_to_look_at = {}, 0  # by the key of the last block: keys of all; the oldest first
        self._out, self._names_out = [], set()
        self._to_touch, self._not_before_s = [], 0.0
        self.num_pinned = self.num_written = self.num_failed = 0

    @property
    def is_busy(self):
        """Whether the next step may begin to write something. While a server hangs, it may not."""
        hangs = any(writing.is_late for writing in self._out)
        return self._num_to_look_at > 0 and not hangs and self.breaker.allows(time.monotonic())

    def add(self, blocks):
        """Note objects, as keys (n, count, 32) uint8. Those that the server lacks are written when they can be."""
        for i in np.flatnonzero(self.tier.catalogue.slots_of(np.ascontiguousarray(blocks[:, -1])) == NO_SLOT):
            self._pending[blocks[i, -1].tobytes()] = blocks[i]
        while len(self._pending) > self.most_pending:
            self.num_failed += len(self._pending.pop(next(iter(self._pending))))
        self.look_again()

    def look_again(self):
        """Look at all pending objects again, because something was saved."""
        self._num_to_look_at = len(self._pending)

    def step(self, now_s):
        """Note what was written, and begin to write what can be."""
        for writing in list(self._out):
            if writing.batch.done():
                self._out.remove(writing)
                self._end(writing, now_s)
            elif not writing.is_late and (writing.batch.statuses == BlockStatus.LATE).all():
                writing.is_late = True  # until the batch is over, its slots belong to the store
                self.breaker.saw(writing.batch.statuses, now_s)
        if now_s < self._not_before_s or not self.breaker.allows(now_s):
            return
        window = []
        for name in list(islice(self._pending, min(LOOKED_AT, self._num_to_look_at))):
            blocks = self._pending[name]
            if self.num_pinned and self.num_pinned + len(blocks) > self.most_pinned:
                break
            self._num_to_look_at -= 1
            del self._pending[name]
            if not self.index.lookup(blocks)[0].all():
                if self._saves_late or (self.index.slots_of(blocks) != NO_SLOT).all():
                    self._pending[name] = blocks  # not saved yet
                else:
                    self.num_failed += len(blocks)
            elif (begun := self._reserve(name, blocks)) is not None:
                window.append(begun)
                if sum(len(keys) for _, keys, *_ in window) >= self._window_blocks:
                    self._begin(window)
                    window = []
        if window:
            self._begin(window)

    def _reserve(self, name, blocks):
        """Pin the blocks of an object and reserve its entries; None if it is not to be written now."""
        num_admitted = self.budget.admit(len(blocks), self._stride_bytes)
        tier_slots, statuses = np.zeros(0, np.uint32), np.zeros(0, np.uint8)
        if num_admitted == len(blocks):
            tier_slots, statuses = self.tier.catalogue.reserve(blocks, self._block_bytes)
            if statuses[-1] == ReserveStatus.NEW:
                is_new = statuses == ReserveStatus.NEW
                objects = objects_of(blocks[np.newaxis])
                self.tier.homes.note(tier_slots[is_new], Objects(*(each[is_new] for each in objects)))
                slots = self.index.acquire(blocks)
                self.num_pinned += len(blocks)
                return name, blocks, slots, tier_slots, is_new
        self.budget.give_back(num_admitted * self._stride_bytes)
        self.tier.catalogue.abort(tier_slots[statuses == ReserveStatus.NEW])
        if not len(statuses) or statuses[-1] != ReserveStatus.PRESENT:
            self._pending[name] = blocks
        return None

    def _begin(self, window):
        names, blocks, *arrays = zip(*window, strict=True)
        slots, tier_slots, is_new = map(np.concatenate, arrays)
        parts = [objects_of(each[np.newaxis]) for each in blocks]
        objects = Objects(*map(np.concatenate, zip(*parts, strict=True)))
        ends = np.cumsum([len(each) for each in blocks]).tolist()
        rows = [slice(end - len(each), end) for each, end in zip(blocks, ends, strict=True)]
        keys = np.concatenate(blocks)
        tag, places = self.tier.tag, np.zeros(len(keys), np.uint32)  # slots do not matter where objects are named
        batch = self.tier.store.put(places, slots, keys, None, tag=tag, timeout_ms=PUT_TIMEOUT_MS, objects=objects)
        self._out.append(Writing(names, rows, keys, slots, tier_slots, is_new, batch, tag))
        self._names_out.update(names)

    def _end(self, writing, now_s):
        """Make objects visible whose blocks the pool had all the time; erase those of which it discarded a block.

        After a reset, objects of the earlier weights stay on the server for others: they are not wrong.
        """
        statuses, is_current = writing.batch.statuses, writing.tag == self.tier.tag
        is_same = self.index.slots_of(writing.keys) == writing.slots
        for name, rows in zip(writing.names, writing.rows, strict=True):
            keys, new = writing.keys[rows], writing.tier_slots[rows][writing.is_new[rows]]
            is_kept = is_current and bool(is_same[rows].all())
            is_ok = bool((statuses[rows] == BlockStatus.OK).all())
            self._names_out.discard(name)
            if is_ok and is_kept:
                is_kept = (self.tier.catalogue.commit(new) == CommitStatus.READY).all()
                self.num_written += len(keys)
            else:
                self.tier.catalogue.abort(new)
                self.num_failed += len(keys)
            if is_current and not is_kept:  # some block of it was wrong
                self.tier.erase_objects(keys[-1:], len(keys))
                self.tier.catalogue.discard(keys)
            elif is_current and not is_ok:
                self._pending.setdefault(name, keys)
                self._not_before_s = now_s + RETRY_S
        if not writing.is_late:
            self.breaker.saw(statuses, now_s)
        self.index.release(writing.slots[::-1])  # the heads of chains outlive their tails
        self.num_pinned -= len(writing.slots)
        self.look_again()
        for keys, _ in self._to_touch:
            self.index.touch(keys)
        self._to_touch = [each for each in self._to_touch if not self._has_none_of(each[1])]

    def _has_none_of(self, names):
        return self._names_out.isdisjoint(names) and not any(name in self._pending for name in names)

    def touch_later(self, keys):
        """Touch these blocks of an ended request again when the last of their objects is written."""
        names = {name for name in as_bytes(keys) if name in self._pending or name in self._names_out}
        if names and len(self._to_touch) < TOUCHED_LATER:
            self._to_touch.append((keys, names))

    def clear(self):
        """Forget what is pending, because the pool is empty."""
        self._pending, self._num_to_look_at, self._to_touch = {}, 0, []
