"""Device blocks that vLLM may give to nobody else until they have been saved."""

import numpy as np


class Holds:
    """Hold blocks of groups that forget: vLLM reuses what left a window in the next step, before any fence of ours.

    Parameters
    ----------
    groups : set of int
        Groups whose blocks are held.
    most : int
        Blocks that may be held at a time, but for one request's if there are none: held blocks are missing to requests.

    Notes
    -----
    A reset of vLLM's prefix cache fails while any block is held: whoever resets calls `SchedulerHalf.let_go` before.

    For the thread that schedules. Until `pool` is set, which vLLM before 0.26 does not show, nothing is held: there the
    fences are in time.
    """

    def __init__(self, groups, most):
        self.groups, self.most = groups, most
        self.pool = None  # vLLM's BlockPool
        self.count = self.blocks_refused = 0
        self.promised = 0  # in this step, so far

    def have_room_for(self, wanted):
        """Whether so many more blocks may be held; see `SchedulerHalf.offer`."""
        if self.pool is None:
            return True
        taken = self.count + self.promised
        if wanted and taken and taken + wanted > self.most:
            self.blocks_refused += wanted
            return False
        self.promised += wanted
        return True

    def take(self, block_ids, group_indexes):
        """Hold those of these blocks that need it, of all that there was room for; an array of them."""
        if self.pool is None:
            return block_ids[:0]
        held = block_ids[np.isin(group_indexes, list(self.groups))]
        self.pool.touch([self.pool.blocks[block] for block in held.tolist()])
        self.count += len(held)
        return held

    def give_back(self, block_ids):
        """vLLM may give these to others again."""
        if len(block_ids):
            self.pool.free_blocks([self.pool.blocks[block] for block in block_ids.tolist()])
            self.count -= len(block_ids)
