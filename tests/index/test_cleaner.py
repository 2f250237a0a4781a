"""What the index offers whoever copies blocks to a lower tier: the coldest first, and recency as if nobody had."""

import os
import random

import numpy as np
import pytest

from kvortex.index import NO_SLOT, BlockFact, ReserveStatus

NEW, PRESENT, PENDING, FULL = ReserveStatus
ADMITTED, CLEAN, OFFERED, RAM_ONLY = BlockFact
OPERATIONS = 100_000 if os.environ.get("KVORTEX_SOAK") == "1" else 5_000


def save(index, keys, **facts):
    slots, statuses = index.reserve(keys, 100, **facts)
    assert statuses.tolist() == [NEW] * len(keys)
    index.commit(slots)
    return slots


def order(index, keys):
    """Numbers of the keys in the order in which they are evicted; empties the index."""
    gone, here = [], set(np.flatnonzero(index.lookup(keys)[0]).tolist())
    while index.evict(1):
        left = set(np.flatnonzero(index.lookup(keys)[0]).tolist())
        gone += here - left
        here = left
    return gone


@pytest.fixture
def index(make_index, make_keys):
    """Ten slots with the keys 0 to 9; 0 is the coldest."""
    index = make_index(10)
    for number in range(10):
        save(index, make_keys(number))
    return index


def test_a_batch_of_nothing_is_given_back(index):
    index.release(index.coldest(0).slots, offered=[], clean=[])
    assert index.num_pinned == 0


def test_the_cleaner_gets_the_coldest_blocks_pinned_and_told(index, make_keys):
    blocks = index.coldest(3)
    assert (blocks.keys == make_keys(0, 1, 2)).all() and blocks.slots.tolist() == [0, 1, 2]
    assert blocks.lengths.tolist() == [100] * 3 and blocks.facts.tolist() == [OFFERED] * 3
    assert index.num_pinned == 3 and index.evict(10) == 7
    assert index.coldest(1).slots.size == 0


def test_cleaning_leaves_the_order_of_eviction_as_it_was(index, make_keys):
    first, second = index.coldest(3), index.coldest(4)
    index.release(first.slots, offered=True, clean=True)
    index.release(second.slots, offered=True)
    assert order(index, make_keys(*range(10))) == [*range(10)]


def test_what_the_cleaner_has_passed_it_does_not_get_again(index, make_keys):
    index.release(index.coldest(4).slots, offered=True)
    assert index.coldest(10).slots.tolist() == [4, 5, 6, 7, 8, 9]


def test_a_block_whose_write_failed_comes_next_again(index, make_keys):
    blocks = index.coldest(4)
    index.release(blocks.slots, offered=np.array([True, False, True, False]), clean=True)
    again = index.coldest(3)
    assert again.slots.tolist() == [1, 3, 4] and again.facts.tolist() == [OFFERED] * 3
    assert index.slot_info(0)["facts"] == OFFERED | CLEAN


@pytest.mark.parametrize("use", ["touch", "present", "chain", "load", "lookup"])
@pytest.mark.parametrize("when", ["while_cleaned", "afterwards"])
def test_a_block_that_is_used_is_the_most_recent_and_offered_no_more(index, make_keys, use, when):
    key = make_keys(1)
    blocks = index.coldest(3)
    if when == "afterwards":
        index.release(blocks.slots, offered=True)
    if use == "touch":
        index.touch(key)
    elif use == "lookup":
        index.lookup(key, touch=True)
    elif use == "present":
        assert index.reserve(key, 100)[1].tolist() == [PRESENT]
    elif use == "chain":
        index.reserve(make_keys(), 100, after=key)
    else:
        index.release(index.acquire(key))
    if when == "while_cleaned":
        index.release(blocks.slots, offered=True)
    assert index.slot_info(1)["facts"] == 0
    assert index.coldest(10).slots.tolist() == [3, 4, 5, 6, 7, 8, 9, 1]


def test_a_reader_that_outlives_the_cleaner_releases_last(index, make_keys):
    blocks = index.coldest(2)
    held = index.acquire(make_keys(0))
    index.release(blocks.slots, offered=True)
    assert index.num_pinned == 1
    index.release(held)
    assert order(index, make_keys(*range(10))) == [*range(1, 10), 0]


def test_a_block_discarded_while_it_is_cleaned_is_freed_by_its_release(index, make_keys):
    blocks = index.coldest(2)
    index.discard(make_keys(0))
    index.release(blocks.slots, offered=np.array([True, False]))
    assert index.num_free == 1 and index.num_pinned == 0


def test_offering_again_begins_at_the_cold_end(index, make_keys):
    index.release(index.coldest(6).slots, offered=True)
    index.touch(make_keys(2))
    index.offer_again()
    assert index.coldest(3).slots.tolist() == [0, 1, 3]


def test_the_first_new_keys_of_a_batch_are_admitted(make_index, make_keys):
    index = make_index(8)
    save(index, make_keys(2))
    slots, statuses = index.reserve(make_keys(1, 2, 3, 4), 100, admit=2)
    assert statuses.tolist() == [NEW, PRESENT, NEW, NEW]
    assert [index.slot_info(slot)["facts"] for slot in slots[[0, 2, 3]]] == [ADMITTED, ADMITTED, 0]


def test_a_promoted_block_is_clean_and_pinned_for_each_reader(make_index, make_keys):
    index = make_index(4)
    slots, _ = index.reserve(make_keys(1, 2), 100)
    index.commit(slots, pins=[3, 0], clean=True)
    assert [index.slot_info(slot)["pins"] for slot in slots] == [3, 0]
    assert [index.slot_info(slot)["facts"] for slot in slots] == [CLEAN, CLEAN]
    assert index.num_pinned == 1
    index.release(slots[[0, 0, 0]])
    assert index.num_pinned == 0


def test_a_new_tenant_inherits_no_facts(make_index, make_keys):
    index = make_index(1)
    save(index, make_keys(1), admit=1)
    index.release(index.coldest(1).slots, offered=True, clean=True)
    save(index, make_keys(2))
    assert index.slot_info(0)["facts"] == 0


def test_reserve_tells_its_victims(make_index, make_keys):
    index = make_index(3)
    save(index, make_keys(1, 2), admit=1)
    save(index, make_keys(3))
    slots, statuses, victims = index.reserve(make_keys(7, 8), 100, victims=True)
    assert victims.keys.tolist() == make_keys(2, 1).tolist()
    assert victims.slots.tolist() == slots.tolist() and victims.lengths.tolist() == [100, 100]
    assert victims.facts.tolist() == [0, ADMITTED]


def test_acquire_over_gaps_pins_what_is_there(make_index, make_keys):
    index = make_index(4)
    slots = save(index, make_keys(1, 3, 4))
    assert index.acquire(make_keys(1, 2, 3, 9, 4), gaps=True).tolist() == [
        slots[0],
        NO_SLOT,
        slots[1],
        NO_SLOT,
        slots[2],
    ]
    assert index.num_pinned == 3
    assert index.acquire(make_keys(1, 3), [100, 7], gaps=True).tolist() == [slots[0], NO_SLOT]


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda index: index.coldest(-1), "n must be at least 0"),
        (lambda index: index.release([0], offered=[True, False]), "offered must be a bool or 1, one a slot"),
        (lambda index: index.release([0], offered=1), "offered must be a bool or 1"),
        (lambda index: index.release([0], offered=True, clean="yes"), "clean must be a bool or 1"),
        (lambda index: index.release([1], offered=True), "not pinned"),
        (lambda index: index.release([0], clean=True), "pass offered with it"),
        (lambda index: index.commit([], pins=[1]), "pins must be 0, one a slot"),
        (lambda index: index.commit([], pins=[], pin=True), "not beside pin=True"),
        (lambda index: index.reserve(np.zeros((1, 32), np.uint8), 1, admit=-1), "admit must be at least 0"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(index, make_keys, call, error):
    index.coldest(1)
    before = index.counters()
    with pytest.raises(ValueError, match=error):
        call(index)
    assert index.counters() == before


class Beside:
    """An index with a cleaner and one without, which are used alike.

    What is used while the cleaner has it counts as used when the cleaner is done: that is when it is linked again.
    """

    def __init__(self, with_cleaner, without, names):
        self.with_cleaner, self.without, self.names = with_cleaner, without, names
        self.batches, self.used = [], set()  # out with the cleaner, and which of those keys were used

    def save(self, chosen):
        for index in (self.with_cleaner, self.without):
            slots, statuses = index.reserve(self.names[chosen], 100)
            index.commit(slots[statuses == NEW])
        assert (self.with_cleaner.lookup(self.names)[0] == self.without.lookup(self.names)[0]).all()

    def use(self, chosen, touch):
        for index in (self.with_cleaner, self.without):
            if touch:
                index.touch(self.names[chosen])
            else:
                slots = index.acquire(self.names[chosen], gaps=True)
                index.release(slots[slots != NO_SLOT])
        self.used.update(key.tobytes() for key in self.names[chosen])

    def clean(self, count):
        blocks = self.with_cleaner.coldest(count)
        self.used -= {key.tobytes() for key in blocks.keys}
        self.batches.append(blocks)

    def finish(self, clean):
        blocks = self.batches.pop(0)
        self.with_cleaner.release(blocks.slots, offered=True, clean=clean)
        for key in blocks.keys:  # the coldest first
            if key.tobytes() in self.used:
                self.without.touch(key.reshape(1, 32))


def test_any_mixture_of_uses_and_cleaning_evicts_in_the_order_of_use(make_index, make_keys, seed):
    draw, names = random.Random(seed), make_keys(*range(100))
    both = Beside(make_index(60), make_index(60), names)
    for operation in range(OPERATIONS):
        chosen = draw.sample(range(100), draw.randrange(1, 6))
        kind = draw.choice(["save", "save", "touch", "load", "clean", "finish", "finish", "again"])
        if kind == "save" and not both.batches:  # otherwise others would be evicted for those that are pinned
            both.save(chosen)
        elif kind in ("touch", "load"):
            both.use(chosen, kind == "touch")
        elif kind == "clean" and len(both.batches) < 3:
            both.clean(draw.randrange(1, 8))
        elif kind == "finish" and both.batches:
            both.finish(draw.random() < 0.5)
        elif kind == "again" and not both.batches and draw.random() < 0.3:
            both.with_cleaner.offer_again()
        if operation % 200 == 199:
            while both.batches:
                both.finish(True)
            assert order(both.with_cleaner, names) == order(both.without, names)
