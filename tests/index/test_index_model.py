"""BlockIndex beside the model, under random operations; hypothesis prints the steps that make them differ."""

from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from index_model import Model

from kvortex.index import BlockIndex

NO_SLOT = 4294967295
ANSWERS = ["new", "present", "pending", "full"]
NAMES = [bytes([i]) * 32 for i in range(12)]
batches = st.lists(st.sampled_from(NAMES), max_size=6)
chains = st.lists(st.sampled_from(NAMES), max_size=6, unique=True)
lengths = st.sampled_from([100, 100, 100, 200])


def rows(keys):
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32)


class IndexBesideModel(RuleBasedStateMachine):
    @initialize(capacity=st.integers(1, 8), data=st.data())
    def start(self, capacity, data):
        self.index, self.model = BlockIndex(capacity), Model()
        self.capacity, self.added = capacity, 0
        self.writing, self.pinned = [], []
        self.grow(data)

    @rule(data=st.data())
    def grow(self, data):
        count = data.draw(st.integers(0, self.capacity - self.added))
        self.index.add_slots(self.added, count)
        self.model.add(self.added, count)
        self.added += count

    @rule(keys=batches, length=lengths, after=st.none() | chains, data=st.data())
    def reserve(self, keys, length, after, data):
        stops = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=len(keys), max_size=len(keys)))
        given = {} if after is None else {"after": rows(after)}
        slots, statuses = self.index.reserve(rows(keys), length, stops=stops, **given)
        expected = self.model.reserve_all(keys, length, after, stops)
        assert [ANSWERS[status] for status in statuses] == [answer for _, answer in expected]
        assert slots.tolist() == [NO_SLOT if slot is None else slot for slot, _ in expected]
        self.writing += [slot for slot, _ in expected if slot is not None]

    def draw_some(self, data, slots):
        chosen = data.draw(st.permutations(slots))[: data.draw(st.integers(0, len(slots)))]
        for slot in chosen:
            slots.remove(slot)
        return chosen

    @rule(data=st.data(), pin=st.booleans())
    def commit(self, data, pin):
        slots = self.draw_some(data, self.writing)
        gone = [self.model.slots[slot]["gone"] for slot in slots]
        assert self.index.commit(slots, pin=pin).tolist() == gone
        self.model.commit(slots, pin)
        if pin:
            self.pinned += [slot for slot, was_gone in zip(slots, gone, strict=True) if not was_gone]

    @rule(data=st.data())
    def abort(self, data):
        slots = self.draw_some(data, self.writing)
        self.index.abort(slots)
        self.model.abort(slots)

    @rule(keys=batches, length=lengths)
    def acquire(self, keys, length):
        slots = self.index.acquire(rows(keys), length).tolist()
        assert slots == self.model.acquire(keys, length)
        self.pinned += slots

    @rule(data=st.data())
    def release(self, data):
        slots = self.draw_some(data, self.pinned)
        self.index.release(slots)
        self.model.release(slots)

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


TestIndexBesideModel = IndexBesideModel.TestCase
TestIndexBesideModel.settings = settings(max_examples=150, stateful_step_count=40)
