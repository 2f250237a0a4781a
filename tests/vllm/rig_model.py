"""What a model runner does to blocks, and a model that is nothing but its KV."""

import numpy as np
from rig_cache import planes

POISON = -1.0
NOT_A_NUMBER = np.float32("nan")


class Model:
    """The part of a `Rig` that reads and writes its caches."""

    def prepare_blocks(self, output, runs):
        """What a model runner does to blocks before a forward, in its order."""
        for cache in self.caches:
            self.zero(cache, getattr(output, "new_block_ids_to_zero", None) or [])
            self.copy_on_write(cache, getattr(output, "kv_cache_block_copies", None) or [])
            self.copy_states(cache, runs)

    def zero(self, cache, block_ids):
        """Blocks that attention reads in part: what is left there of a state may be no number."""
        for group in self.groups:
            for page in group.pages(cache):
                if not group.is_state:
                    page[block_ids] = 0

    def copy_on_write(self, cache, copies):
        """Blocks of which a request has hit a part only."""
        for group in self.groups:
            for page in group.pages(cache):
                for source, target in copies:
                    page[target] = page[source]

    def copy_states(self, cache, runs):
        """The running state into the next block, where a request enters one."""
        for group in self.groups:
            for name, before, after in runs if group.is_state else []:
                table = self.tables[name][group.index]
                source, target = group.state_block(table, before), group.state_block(table, after)
                if before and source != target:
                    for page in group.pages(cache):
                        page[target] = page[source]

    def kv(self, name, first, last, plane):
        """What the KV of these tokens must be, in one layer and part; exact in float32."""
        return self.truths[name].states(last)[first:last] + ((self.epoch % 8 << 20) + plane)

    def forward(self, runs):
        """Write what is scheduled, read what is computed; per rank the names of the requests that found it wrong.

        Written comes first, as in every layer of a model: a request may read blocks that another one computes in the
        same step. Only a state is read first, and then written where it was.
        """
        wrong_states = [self.read(cache, runs, states=True) for cache in self.caches]
        poisoned, found = None, set()
        while poisoned != found:  # once more where poison has been written, because others may read that
            poisoned = found
            for cache in self.caches:
                self.write(cache, runs, poisoned)
            wrong = [names | self.read(cache, runs) for cache, names in zip(self.caches, wrong_states, strict=True)]
            found = set().union(*wrong)
        self.read_tokens += sum(before for _, before, _ in runs) * len(self.caches)
        return wrong

    def read(self, cache, runs, *, states=False):
        """Read what is computed, as attention does, or as a state's layer; names of those that found something else."""
        wrong = set()
        for number, (group, plane) in planes(cache, self.groups):
            for name, before, after in runs if group.is_state == states else []:
                table = self.tables[name][group.index]
                if states:
                    first = max(0, before - 1)
                    found = plane[group.state_block(table, after)] if before else []  # it has been copied there
                else:
                    first = group.first_read(before)
                    found = plane[group.blocks(table, first, before)].reshape(-1)
                    found = found[first % group.block_tokens :][: before - first]
                    rest = plane[group.state_block(table, after)][(after - 1) % group.block_tokens + 1 :]
                    if group.is_zeroed and np.isnan(rest).any():  # a kernel reads the whole block
                        wrong.add(name)
                if not np.array_equal(np.atleast_1d(found), self.kv(name, first, before, number)):
                    wrong.add(name)
        return wrong

    def write(self, cache, runs, poisoned, tables=None):
        """Write what is scheduled, into the blocks of its request or those of `tables`."""
        for number, (group, plane) in planes(cache, self.groups):
            for name, before, after in runs:
                table = np.asarray((tables or self.tables[name])[group.index])
                at = np.arange(before, after)
                if group.is_state:
                    at = at[-1:]
                blocks = table[at // group.block_tokens]
                assert blocks.all(), f"{name} is to write into the null block"
                values = POISON if name in poisoned else self.kv(name, at[0], after, number)
                plane[blocks if group.is_state else (blocks, at % group.block_tokens)] = values
        for group in self.groups:
            for page in group.pages(cache) if group.is_state else ():
                for name, _, after in runs:
                    page[group.state_block(self.tables[name][group.index], after), 1:-1] = NOT_A_NUMBER

    def settle(self, runs, wrong, invalid):
        """Count tokens read wrong, except where a load was reported as failed: there vLLM computes anew."""
        for failed, names in zip(self.failed_blocks, wrong, strict=True):
            failed |= invalid
            for name, before, after in runs:
                tables = list(zip(self.groups, self.tables[name], strict=True))
                read, written, whole = set(), set(), set()
                for group, table in tables:
                    read.update(group.blocks(table, group.first_read(before), before))
                    written.update(group.blocks(table, before, after))
                    whole.update(table[before // group.block_tokens : after // group.block_tokens])
                if name not in names:
                    failed.difference_update(whole)
                elif failed & read:
                    failed |= written
                else:
                    self.wrong_tokens += max(before, 1)
