"""How often keys were seen: a block that no second request asks for need not be saved."""

import numpy as np

from kvortex import BlockIndex, ReserveStatus
from kvortex.index import NO_SLOT

KEYS_PER_SLOT = 4  # keys that are counted, for each slot of the pool
MOST_COUNTED = np.iinfo(np.uint8).max


class Sights:
    """Count how often keys were seen; the least recently seen ones are forgotten.

    Parameters
    ----------
    num_keys : int
        Most keys that are counted, in some 70 bytes each.
    """

    def __init__(self, num_keys):
        self.index = BlockIndex(num_keys)  # it has no pool: its slots are the places of the counts
        self.index.add_slots(0, num_keys)
        self.counts = np.zeros(num_keys, dtype=np.uint8)

    def see(self, keys):
        """Count these keys of one chain; return how often each was seen before, as an array."""
        slots, statuses = self.index.reserve(keys, 1)
        new = slots[statuses == ReserveStatus.NEW]
        self.counts[new] = 0
        self.index.commit(new)
        self.touch(keys)
        slots = self.index.slots_of(keys)
        is_known = slots != NO_SLOT  # the others are more than `num_keys`
        before = np.zeros(len(keys), dtype=np.uint8)
        before[is_known] = counts = self.counts[slots[is_known]]
        self.counts[slots[is_known]] = np.where(counts < MOST_COUNTED, counts + 1, counts)
        return before

    def touch(self, keys):
        """Make these keys of one chain the most recent, the head of the chain last."""
        self.index.touch(keys)

    def run(self, keys, least):
        """Count as `see` does; return how many leading keys were seen at least `least` times before."""
        return int(np.logical_and.accumulate(self.see(keys) >= least).sum())
