"""Device blocks that vLLM must not reuse until they have been saved."""

import numpy as np


class Holds:
    """Hold blocks of groups that forget: vLLM reuses what left a window in the next step, before a fence of ours.

    Parameters
    ----------
    groups : set of int
        Groups whose blocks are held.
    most : int
        Most blocks that are held at a time, because requests lack them. If none are held, one request may hold more.

    Notes
    -----
    While any block is held, a reset of vLLM's prefix cache fails: `SchedulerHalf.let_go` must be called before it.

    Only the thread that schedules calls this. vLLM before 0.26 does not pass its BlockPool: then `pool` stays None and
    nothing is held, because there the fences are in time.
    """

    def __init__(self, groups, most):
        self.groups, self.most = groups, most
        self.pool = None  # vLLM's BlockPool
        self.count = self.blocks_refused = 0
        self.promised = 0  # blocks that will be held in this step, so far

    def have_room_for(self, wanted):
        """Whether `wanted` more blocks may be held; see `SchedulerHalf.offer`."""
        if self.pool is None:
            return True
        taken = self.count + self.promised
        if wanted and taken and taken + wanted > self.most:
            self.blocks_refused += wanted
            return False
        self.promised += wanted
        return True

    def take(self, block_ids, group_indexes):
        """Hold those of these blocks whose group needs it, after `have_room_for`; return an array of them."""
        if self.pool is None:
            return block_ids[:0]
        held = block_ids[np.isin(group_indexes, list(self.groups))]
        self.pool.touch([self.pool.blocks[block] for block in held.tolist()])
        self.count += len(held)
        return held

    def give_back(self, block_ids):
        """Let vLLM give these blocks to others again."""
        if len(block_ids):
            self.pool.free_blocks([self.pool.blocks[block] for block in block_ids.tolist()])
            self.count -= len(block_ids)
