"""An index that learns of blocks which lay in their slots before it was made."""

import numpy as np
import pytest

from kvortex.index import NO_SLOT, BlockIndex, ReserveStatus


@pytest.fixture
def index():
    return BlockIndex(8)


def test_what_is_adopted_is_there_in_its_slot_with_its_length(index, make_keys):
    keys = make_keys(1, 2, 3)
    assert index.adopt([2, 3, 4], keys, [100, 0, 300]).tolist() == [True, False, True]
    assert index.slots_of(keys).tolist() == [2, NO_SLOT, 4]
    assert index.acquire(keys[2:], 300).tolist() == [4]
    assert index.acquire(keys[:1], 99).tolist() == []
    assert (index.slots_added, index.num_free, index.num_ready) == (3, 1, 2)


def test_a_slot_without_a_block_is_free(index, make_keys):
    index.adopt([5, 6], make_keys(1, 2), [0, 100])
    assert index.reserve(make_keys(7), 100)[0].tolist() == [5]


@pytest.mark.parametrize("is_committed", [True, False])
def test_a_key_that_is_there_already_keeps_its_newer_slot(index, make_keys, is_committed):
    index.add_slots(0, 1)
    slots, _ = index.reserve(make_keys(1), 100)
    if is_committed:
        index.commit(slots)
    assert index.adopt([1, 2, 3], make_keys(1, 2, 2), 100).tolist() == [False, True, False]
    assert index.slots_of(make_keys(1, 2)).tolist() == [0, 2]
    assert index.num_free == 2


def test_adopted_blocks_go_first_and_the_last_of_them_before_the_others(index, make_keys):
    index.add_slots(0, 2)
    index.commit(index.reserve(make_keys(1, 2), 100)[0])
    index.adopt([2, 3], make_keys(3, 4), 100)
    index.adopt([7, 5], make_keys(5, 6), 100)
    _, _, victims = index.reserve(make_keys(*range(10, 16)), 100, victims=True)
    assert np.array_equal(victims.keys, make_keys(6, 5, 4, 3, 2, 1)) and victims.slots.tolist()[:2] == [5, 7]


def test_adopted_blocks_go_before_those_that_a_cleaner_has_passed(index, make_keys):
    index.add_slots(0, 2)
    index.commit(index.reserve(make_keys(1, 2), 100)[0])
    index.release(index.coldest(2).slots, offered=[True, True], clean=[True, True])
    index.adopt([2], make_keys(3), 100)
    _, _, victims = index.reserve(make_keys(10, 11, 12), 100, victims=True)
    assert np.array_equal(victims.keys, make_keys(3, 2, 1))


@pytest.mark.parametrize(
    "slots, message",
    [
        ([0, 1, 2], r"adopt: slots\[2\] = 2 is added before, or given twice"),
        ([4, 3, 4], r"adopt: slots\[2\] = 4 is added before, or given twice"),
        ([6, 7, 8], r"adopt: slots\[2\] = 8 is not within the 8 slots"),
        ([6, 7], "keys must be 2, one a slot; got 3"),
    ],
)
def test_a_slot_is_adopted_once_and_a_bad_batch_changes_nothing(index, make_keys, slots, message):
    index.add_slots(2, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            index.adopt(slots, make_keys(1, 2, 3), 100)
    assert index.slots_added == 1 and index.slots_of(make_keys(1, 2, 3)).tolist() == [NO_SLOT] * 3


def test_a_forgotten_adopted_slot_is_used_again(index, make_keys):
    index.adopt([0], make_keys(1), 100)
    assert index.discard(make_keys(1)) == 1
    slots, statuses = index.reserve(make_keys(2), 50)
    assert slots.tolist() == [0] and statuses.tolist() == [ReserveStatus.NEW]


def test_nothing_may_be_adopted(index, make_keys):
    assert index.adopt([], make_keys(), []).tolist() == [] and index.slots_added == 0
