"""Which device blocks are taken, and whether a request finds room beside those that have them."""

import numpy as np

from kvortex.integrations.vllm.groups import RUN


class Room:
    """Count who has each device block.

    Parameters
    ----------
    groups : tuple of Group
    num_blocks : int
        vLLM's null block included.
    step_tokens : int
        Most tokens that are scheduled before vLLM gives back what left a window.
    """

    def __init__(self, groups, num_blocks, step_tokens):
        self.groups, self.num_blocks, self.step_tokens = groups, num_blocks, step_tokens
        self.forgetful = [group for group in groups if group.kind != RUN]
        self.holders = np.zeros(num_blocks, dtype=np.int32)  # requests, and saves, that have a device block
        self.counted = 0  # blocks that somebody has, None: to be counted

    @property
    def num_taken(self):
        """Device blocks that somebody has."""
        if self.counted is None:
            self.counted = np.count_nonzero(self.holders)
        return self.counted

    @property
    def num_free(self):
        """Device blocks that nobody has, and vLLM's null block."""
        return self.num_blocks - self.num_taken

    def take(self, state, tables):
        """From now on the request has these device blocks, instead of those it had."""
        self.count(blocks_of(state), -1)
        state.tables, state.left = [list(table) for table in tables], {}
        state.num_blocks = self.count(blocks_of(state), 1)

    def extend(self, state, tables):
        """It has these besides."""
        for table, ids in zip(state.tables, tables, strict=True):
            table.extend(ids)
        state.num_blocks += self.count(flat(tables), 1)

    def give_back(self, state):
        """Of groups that forget, it has no more than it needs."""
        for group in self.forgetful:
            first, end = state.left.get(group.index, 0), group.first_needed(state.request.num_computed_tokens)
            if first < end:
                state.num_blocks -= self.count(state.tables[group.index][first:end], -1)
                state.left[group.index] = end

    def count(self, block_ids, change):
        """So many more have these blocks; the number of blocks, without vLLM's null block, which nobody has."""
        if not len(block_ids):
            return 0
        block_ids = np.asarray(block_ids, dtype=np.int64)
        np.add.at(self.holders, block_ids, change)
        self.holders[0], self.counted = 0, None
        return np.count_nonzero(block_ids)

    def has_room(self, request, hit_tokens, states):
        """Whether a request fits beside the blocks that are taken, and those that their holders need next.

        It finds `hit_tokens` on the device; their blocks that nobody has count as well, they are free until then.
        """
        needed, shared = self.blocks_to_go_on(request), 0
        hash_tokens = self.groups[0].hash_tokens
        num_hits = hit_tokens // hash_tokens
        for state in states:
            if state.tables:  # else it was preempted, and waits as well
                needed += max(1, self.blocks_to_go_on(state.request) - state.num_blocks)
                hashes = state.request.block_hashes
                while shared < min(num_hits, len(hashes)) and hashes[shared] == request.block_hashes[shared]:
                    shared += 1
        for group in self.groups:
            needed -= max(0, shared * hash_tokens // group.block_tokens - group.first_needed(hit_tokens))
        return needed < self.num_free

    def blocks_to_go_on(self, request):
        """Device blocks for all tokens of a request and the next one."""
        return sum(group.most_blocks(request.num_tokens, self.step_tokens) for group in self.groups)


def blocks_of(state):
    """The device blocks of a request, with vLLM's null block for those it does not have."""
    return flat(table[state.left.get(index, 0) :] for index, table in enumerate(state.tables))


def flat(tables):
    """Their numbers, in one list."""
    return [block for table in tables for block in table]
