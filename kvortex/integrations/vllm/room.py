"""Which device blocks are taken, and whether one more request finds room on the device."""

import numpy as np

from kvortex.integrations.vllm.groups import RUN


class Room:
    """Count the owners of each device block.

    Parameters
    ----------
    groups : tuple of Group
    num_blocks : int
        vLLM's null block included.
    step_tokens : int
        Most tokens that vLLM schedules before it frees the blocks that left a window.
    """

    def __init__(self, groups, num_blocks, step_tokens):
        self.groups, self.num_blocks, self.step_tokens = groups, num_blocks, step_tokens
        self.forgetful = [group for group in groups if group.kind != RUN]
        self.holders = np.zeros(num_blocks, dtype=np.int32)  # requests, and saves, that have a device block
        self.counted = 0  # blocks with an owner; None: not counted yet

    @property
    def num_taken(self):
        """Device blocks that have an owner."""
        if self.counted is None:
            self.counted = np.count_nonzero(self.holders)
        return self.counted

    @property
    def num_free(self):
        """Device blocks without an owner, vLLM's null block included."""
        return self.num_blocks - self.num_taken

    def take(self, state, tables):
        """Note that a request has these device blocks now, instead of those that it had."""
        self.count(blocks_of(state), -1)
        state.tables, state.left = [list(table) for table in tables], {}
        state.num_blocks = self.count(blocks_of(state), 1)

    def extend(self, state, tables):
        """Note that a request has these device blocks, too."""
        for table, ids in zip(state.tables, tables, strict=True):
            table.extend(ids)
        state.num_blocks += self.count(flat(tables), 1)

    def give_back(self, state):
        """Note that a request has lost the blocks of groups that forget which it no longer needs."""
        for group in self.forgetful:
            first, end = state.left.get(group.index, 0), group.first_needed(state.request.num_computed_tokens)
            if first < end:
                state.num_blocks -= self.count(state.tables[group.index][first:end], -1)
                state.left[group.index] = end

    def count(self, block_ids, change):
        """Change the number of these blocks' owners; return how many blocks these are, without vLLM's null block."""
        if not len(block_ids):
            return 0
        block_ids = np.asarray(block_ids, dtype=np.int64)
        np.add.at(self.holders, block_ids, change)
        self.holders[0], self.counted = 0, None
        return np.count_nonzero(block_ids)

    def has_room(self, request, hit_tokens, states):
        """Whether a request fits beside the blocks that are taken and those that their owners need next.

        It finds `hit_tokens` on the device. Hits without an owner are free until then, so they count as needed, too.
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
    """The device blocks of a request; vLLM's null block stands for each one that it does not have."""
    return flat(table[state.left.get(index, 0) :] for index, table in enumerate(state.tables))


def flat(tables):
    """The numbers of all tables, in one list."""
    return [block for table in tables for block in table]
