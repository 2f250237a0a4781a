"""How often keys were seen: what nobody asks for twice need not be saved."""

import numpy as np

from kvortex import BlockIndex, ReserveStatus
from kvortex.index import NO_SLOT

KEYS_PER_SLOT = 4  # of host memory, that are remembered
MOST_COUNTED = np.iinfo(np.uint8).max


class Sights:
    """Count keys, of which the least recently seen are forgotten.

    Parameters
    ----------
    num_keys : int
        Keys that are remembered, some 70 bytes each.
    """

    def __init__(self, num_keys):
        self.index = BlockIndex(num_keys)  # it has no pool: its slots are the places of the counts
        self.index.add_slots(0, num_keys)
        self.counts = np.zeros(num_keys, dtype=np.uint8)

    def see(self, keys):
        """Count these keys of one chain, the first ones first; how often each was seen before, an array."""
        slots, statuses = self.index.reserve(keys, 1)
        new = slots[statuses == ReserveStatus.NEW]
        self.counts[new] = 0
        self.index.commit(new)
        self.touch(keys)
        slots = self.index.slots_of(keys)
        is_known = slots != NO_SLOT  # else there are more keys than are remembered
        before = np.zeros(len(keys), dtype=np.uint8)
        before[is_known] = counts = self.counts[slots[is_known]]
        self.counts[slots[is_known]] = np.where(counts < MOST_COUNTED, counts + 1, counts)
        return before

    def touch(self, keys):
        """These keys of one chain are not forgotten before others, and the last ones first."""
        self.index.touch(keys)

    def run(self, keys, least):
        """Count them as `see` does; how many leading ones were seen `least` times before."""
        return int(np.logical_and.accumulate(self.see(keys) >= least).sum())
