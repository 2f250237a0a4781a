"""BlockIndex beside OrderedDict and cachetools.LRUCache as an LRU cache from keys to slots, in batches of 1 to 256.

One thread, full caches of 131 072 entries, keys in random order and made beforehand: (n, 32) arrays for BlockIndex,
`bytes` of 32 for the dicts, which know no batches and take no lock here. No payload is touched on any side.
"""

from collections import OrderedDict

import numpy as np
import pytest

from kvortex.index import BlockIndex

NUM_SLOTS = 1 << 17
LENGTH = 4096
IN_A_ROUND = 4096
BATCHES = [1, 2, 4, 8, 16, 64, 256]
SHOWN = {1, 8, 64, 256}
OPERATIONS = {"touch": "contains and move to end", "get": "get", "put": "put with eviction"}


class Index:
    name = "KVortex"

    def __init__(self, keys):
        self.index = BlockIndex(len(keys))
        self.index.add_slots(0, len(keys))
        self.index.commit(self.index.reserve(keys, LENGTH)[0])

    def prepared(self, keys, batch):
        return [keys[first : first + batch] for first in range(0, len(keys), batch)]

    def touch(self, batches):
        found = 0
        for batch in batches:
            found += self.index.lookup(batch)[1]
            self.index.touch(batch)
        return found

    def get(self, batches):
        found = 0
        for batch in batches:
            slots = self.index.acquire(batch, LENGTH)
            found += slots.size
            self.index.release(slots)
        return found

    def put(self, batches):
        for batch in batches:
            self.index.commit(self.index.reserve(batch, LENGTH)[0])

    def holds(self, keys):
        return self.index.lookup(keys)[1] == len(keys)

    def __len__(self):
        return self.index.num_ready


class Dict:
    name = "OrderedDict"

    def __init__(self, keys):
        self.slots = OrderedDict((key.tobytes(), slot) for slot, key in enumerate(keys))

    def prepared(self, keys, batch):
        return [key.tobytes() for key in keys]

    def touch(self, keys):
        slots, found = self.slots, 0
        for key in keys:
            if key in slots:
                slots.move_to_end(key)
                found += 1
        return found

    def get(self, keys):
        slots, found = self.slots, 0
        for key in keys:
            found += slots[key] >= 0
            slots.move_to_end(key)
        return found

    def put(self, keys):
        slots = self.slots
        for key in keys:
            if key in slots:  # which none is here, but a cache must ask, as `reserve` does
                continue
            _, slot = slots.popitem(last=False)
            slots[key] = slot

    def holds(self, keys):
        return all(key.tobytes() in self.slots for key in keys)

    def __len__(self):
        return len(self.slots)


class Cachetools(Dict):
    name = "cachetools"

    def __init__(self, keys):
        cachetools = pytest.importorskip("cachetools", reason="cachetools is not installed; its rows are left out")
        self.slots = cachetools.LRUCache(len(keys))
        for slot, key in enumerate(keys):
            self.slots[key.tobytes()] = slot

    def touch(self, keys):
        slots, found = self.slots, 0
        for key in keys:
            if key in slots:
                found += slots[key] >= 0  # which moves it to the end
        return found

    def get(self, keys):
        slots, found = self.slots, 0
        for key in keys:
            found += slots[key] >= 0
        return found

    def put(self, keys):
        slots = self.slots
        for slot, key in enumerate(keys):
            slots[key] = slot


SIDES = [(Index, batch) for batch in BATCHES]
SIDES += [pytest.param(peer, None, marks=pytest.mark.peer) for peer in (Dict, Cachetools)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("side", "batch"), SIDES)
def test_lru(benchmark, row, smoke, side, batch, operation):
    num_slots = IN_A_ROUND if smoke else NUM_SLOTS
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 256, (num_slots, 32), dtype=np.uint8)
    cache = side(keys)
    row(
        f"{OPERATIONS[operation]}, batch of {batch}",
        side=side.name,
        group=OPERATIONS[operation],
        operations=IN_A_ROUND,
        unit="keys",
        batch=batch,
        target="> 1x" if batch and batch >= 8 else None,
        in_table=batch in SHOWN,
    )

    def next_round():
        if operation == "put":
            drawn = rng.integers(0, 256, (IN_A_ROUND, 32), dtype=np.uint8)
        else:
            drawn = keys[rng.choice(num_slots, IN_A_ROUND, replace=False)]
        next_round.keys = drawn
        return (cache.prepared(drawn, batch),), {}

    done = benchmark.pedantic(getattr(cache, operation), setup=next_round, rounds=60, warmup_rounds=5)
    assert operation == "put" or done == IN_A_ROUND
    assert cache.holds(next_round.keys)
    assert len(cache) == num_slots
