"""Device blocks that vLLM gives to another request: their content is saved in the step that overwrites them."""

from itertools import islice

import numpy as np

from kvortex.integrations.vllm.keys import KEY_BYTES


class Evictions:
    """Know what each device block holds, and which blocks vLLM takes from its prefix cache in a step.

    Parameters
    ----------
    num_blocks : int
        Device blocks.

    Notes
    -----
    vLLM knows a block by its hash as soon as the block's last token is scheduled, which may never be computed: the
    request may be preempted in the same step. Hence a block is worth saving only if a step that was sent to the workers
    completes it (`completed`), no request was given it since, and vLLM still knows it. After a reset, or when a load of
    it has failed, vLLM does not.

    Only the thread that schedules calls this.
    """

    def __init__(self, num_blocks):
        self.keys = np.zeros((num_blocks, KEY_BYTES), dtype=np.uint8)
        self.is_complete = np.zeros(num_blocks, dtype=bool)
        self.evicted = []  # in this step, the least recently used first

    def watch(self, pool):
        """Wrap `get_new_blocks` of vLLM's BlockPool, to see which blocks it gives away."""
        get_new_blocks, queue = pool.get_new_blocks, pool.free_block_queue

        def get_and_tell(num_blocks):
            known = {block.block_id for block in islice(queue.iter_blocks_after(None), num_blocks) if block.block_hash}
            blocks = get_new_blocks(num_blocks)
            self.given_away([block.block_id for block in blocks], known)
            return blocks

        pool.get_new_blocks = get_and_tell

    def given_away(self, block_ids, known):
        """Note that these blocks have a new owner; vLLM's prefix cache had those that are in the set `known`."""
        self.evicted += [block for block in block_ids if block in known and self.is_complete[block]]
        self.is_complete[block_ids] = False

    def take(self):
        """The blocks that were evicted in this step, and their keys, the most recently used first."""
        block_ids = np.array(self.evicted[::-1], dtype=np.int64)
        self.evicted = []
        return block_ids, self.keys[block_ids]

    def completed(self, block_ids, keys):
        """Note that the step completes these blocks. Call it after `take`."""
        self.keys[block_ids], self.is_complete[block_ids] = keys, True

    def forget(self):
        """Save nothing of what blocks hold now."""
        self.is_complete[:] = False
        self.evicted = []
