"""BlockIndex beside the model, under random operations; hypothesis prints the steps that make them differ."""

from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from index_model import Model

from kvortex.index import BlockFact, BlockIndex

NO_SLOT = 4294967295
ANSWERS = ["new", "present", "pending", "full"]
NAMES = [bytes([i]) * 32 for i in range(12)]
batches = st.lists(st.sampled_from(NAMES), max_size=6)
lengths = st.sampled_from([100, 100, 100, 200])


def rows(keys):
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32)


def told(blocks):
    """Key, length and facts of each, as the model names them."""
    facts = [{fact.name.lower() for fact in BlockFact if fact & int(bits)} for bits in blocks.facts]
    return [*zip([key.tobytes() for key in blocks.keys], blocks.lengths.tolist(), facts, strict=True)]


class IndexBesideModel(RuleBasedStateMachine):
    @initialize(capacity=st.integers(1, 8), data=st.data())
    def start(self, capacity, data):
        self.index, self.model = BlockIndex(capacity), Model()
        self.capacity, self.added = capacity, 0
        self.writing, self.pinned, self.taken = [], [], []  # taken: batches that the cleaner has
        self.grow(data)

    @rule(data=st.data())
    def grow(self, data):
        count = data.draw(st.integers(0, self.capacity - self.added))
        self.index.add_slots(self.added, count)
        self.model.add(self.added, count)
        self.added += count

    @rule(
        keys=batches,
        length=lengths,
        after=st.none() | batches,
        admit=st.integers(0, 3),
        tell=st.booleans(),
        data=st.data(),
    )
    def reserve(self, keys, length, after, admit, tell, data):
        stops = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=len(keys), max_size=len(keys)))
        given = {"admit": admit, "victims": tell} | ({} if after is None else {"after": rows(after)})
        slots, statuses, *victims = self.index.reserve(rows(keys), length, stops=stops, **given)
        expected = self.model.reserve_all(keys, length, after, stops, admit)
        assert [ANSWERS[status] for status in statuses] == [answer for _, answer in expected]
        assert slots.tolist() == [NO_SLOT if slot is None else slot for slot, _ in expected]
        self.writing += [slot for slot, _ in expected if slot is not None]
        if tell:
            assert told(victims[0]) == [(block["key"], block["length"], block["facts"]) for block in self.model.victims]

    def draw_some(self, data, slots):
        chosen = data.draw(st.permutations(slots))[: data.draw(st.integers(0, len(slots)))]
        for slot in chosen:
            slots.remove(slot)
        return chosen

    @rule(data=st.data(), pin=st.none() | st.booleans(), clean=st.booleans())
    def commit(self, data, pin, clean):
        slots = self.draw_some(data, self.writing)
        gone = [self.model.slots[slot]["gone"] for slot in slots]
        pins = (
            [int(pin)] * len(slots)
            if pin is not None
            else data.draw(st.lists(st.integers(0, 3), min_size=len(slots), max_size=len(slots)))
        )
        given = {"pins": pins} if pin is None else {"pin": pin}
        assert self.index.commit(slots, clean=clean, **given).tolist() == gone
        self.model.commit(slots, pins, clean)
        for slot, count, was_gone in zip(slots, pins, gone, strict=True):
            self.pinned += [slot] * (0 if was_gone else count)

    @rule(data=st.data())
    def abort(self, data):
        slots = self.draw_some(data, self.writing)
        self.index.abort(slots)
        self.model.abort(slots)

    @rule(keys=batches, length=lengths, gaps=st.booleans())
    def acquire(self, keys, length, gaps):
        slots = [
            None if slot == NO_SLOT else slot for slot in self.index.acquire(rows(keys), length, gaps=gaps).tolist()
        ]
        assert slots == self.model.acquire(keys, length, gaps)
        self.pinned += [slot for slot in slots if slot is not None]

    @rule(data=st.data())
    def release(self, data):
        slots = self.draw_some(data, self.pinned)
        self.index.release(slots)
        self.model.release(slots)

    @rule(n=st.integers(0, 4))
    def coldest(self, n):
        blocks = self.index.coldest(n)
        expected = self.model.coldest(n)
        assert blocks.slots.tolist() == expected
        known = [self.model.slots[slot] for slot in expected]
        assert told(blocks) == [(block["key"], block["length"], block["facts"]) for block in known]
        self.taken.append(expected)

    @rule(data=st.data())
    def release_offered(self, data):
        if self.taken:
            slots = self.taken.pop(0)
            flags = st.lists(st.booleans(), min_size=len(slots), max_size=len(slots))
            passed, clean = data.draw(flags), data.draw(flags)
            self.index.release(slots, offered=np.array(passed, bool), clean=np.array(clean, bool))
            self.model.release_offered(slots, passed, clean)

    @rule()
    def offer_again(self):
        self.index.offer_again()
        self.model.offer_again()

    @rule(keys=batches, with_mask=st.booleans())
    def touch(self, keys, with_mask):
        expected = [self.model.has(key) for key in keys]
        if with_mask:
            mask, leading = self.index.lookup(rows(keys), touch=True)
            assert mask.tolist() == expected
            assert leading == (expected + [False]).index(False)
        else:
            assert self.index.touch(rows(keys)) == sum(expected)
        self.model.touch(keys)

    @rule(keys=batches)
    def slots_of(self, keys):
        expected = [self.model.by_key.get(key, NO_SLOT) for key in keys]
        assert self.index.slots_of(rows(keys)).tolist() == expected

    @rule(n=st.integers(0, 4))
    def evict(self, n):
        assert self.index.evict(n) == sum(self.model.evict() for _ in range(n))

    @rule(keys=batches)
    def discard(self, keys):
        assert self.index.discard(rows(keys)) == sum(map(self.model.forget, keys))

    @rule()
    def clear(self):
        self.index.clear()
        for slot in sorted(self.model.by_key.values()):
            self.model.forget(self.model.slots[slot]["key"])

    @invariant()
    def agree(self):
        if not hasattr(self, "index"):
            return
        mask, leading = self.index.lookup(rows(NAMES))
        expected = [self.model.has(key) for key in NAMES]
        assert mask.tolist() == expected
        assert leading == (expected + [False]).index(False)
        blocks = self.model.slots.values()
        states = Counter("ready" if block["written"] else "writing" for block in blocks)
        now = self.index.counters()
        assert now["slots_added"] == self.added == now["num_free"] + now["num_writing"] + now["num_ready"]
        assert now["num_free"] == len(self.model.free)
        assert (now["num_writing"], now["num_ready"]) == (states["writing"], states["ready"])
        assert now["num_pinned"] == sum(block["pins"] > 0 for block in blocks)
        for slot, block in self.model.slots.items():
            assert self.index.slot_info(slot)["facts"] == sum(BlockFact[fact.upper()] for fact in block["facts"])


TestIndexBesideModel = IndexBesideModel.TestCase
TestIndexBesideModel.settings = settings(max_examples=150, stateful_step_count=40)
