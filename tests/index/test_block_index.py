"""The contract of BlockIndex, one sentence a test. Blocks are 100 bytes long unless a test is about lengths."""

import numpy as np
import pytest

from kvortex.index import NO_SLOT, BlockIndex, CommitStatus, ReserveStatus

NEW, PRESENT, PENDING, FULL = ReserveStatus
READY, DISCARDED = CommitStatus


def save(index, keys, length=100, **kwargs):
    slots, statuses = index.reserve(keys, length)
    assert statuses.tolist() == [NEW] * len(keys)
    assert index.commit(slots, **kwargs).tolist() == [READY] * len(keys)
    return slots


def found(index, keys):
    return index.lookup(keys)[0].tolist()


# --- Two-phase writes ---------------------------------------------------------------------------------------------


def test_a_reserved_block_is_invisible_until_its_commit(make_index, make_keys):
    index, keys = make_index(4), make_keys(1, 2)
    slots, statuses = index.reserve(keys, 100)
    assert statuses.tolist() == [NEW, NEW]
    assert index.lookup(keys) == (pytest.approx([False, False]), 0)
    assert len(index.acquire(keys)) == 0
    assert index.touch(keys) == 0
    index.commit(slots)
    assert index.lookup(keys) == (pytest.approx([True, True]), 2)
    assert index.acquire(keys).tolist() == slots.tolist()


def test_an_aborted_block_is_as_if_never_reserved(make_index, make_keys):
    index, keys = make_index(2), make_keys(1, 2)
    slots, _ = index.reserve(keys, 100)
    index.abort(slots)
    assert found(index, keys) == [False, False]
    assert index.num_free == 2
    assert index.reserve(keys, 100)[0].tolist() == slots.tolist()


def test_reserve_answers_present_for_a_ready_key_and_gives_no_slot(make_index, make_keys):
    index, keys = make_index(2), make_keys(1)
    save(index, keys)
    slots, statuses = index.reserve(keys, 100)
    assert (slots.tolist(), statuses.tolist()) == ([NO_SLOT], [PRESENT])


def test_reserve_answers_pending_while_another_writes_the_key(make_index, make_keys):
    index, keys = make_index(2), make_keys(1)
    index.reserve(keys, 100)
    slots, statuses = index.reserve(keys, 100)
    assert (slots.tolist(), statuses.tolist()) == ([NO_SLOT], [PENDING])


def test_a_key_twice_in_one_batch_gets_one_slot(make_index, make_keys):
    index = make_index(4)
    slots, statuses = index.reserve(make_keys(1, 2, 1), 100)
    assert (slots.tolist(), statuses.tolist()) == ([0, 1, NO_SLOT], [NEW, NEW, PENDING])


def test_reserve_answers_full_when_everything_is_written_or_pinned(make_index, make_keys):
    index = make_index(2)
    index.reserve(make_keys(1), 100)
    save(index, make_keys(2), pin=True)
    slots, statuses = index.reserve(make_keys(3, 4), 100)
    assert (slots.tolist(), statuses.tolist()) == ([NO_SLOT, NO_SLOT], [FULL, FULL])
    assert index.counters()["full"] == 2


def test_a_batch_larger_than_the_pool_gets_what_there_is_heads_first(make_index, make_keys):
    index = make_index(2)
    save(index, make_keys(8, 9))
    slots, statuses = index.reserve(make_keys(1, 2, 3), 100)
    assert statuses.tolist() == [NEW, NEW, FULL]
    assert slots[2] == NO_SLOT


# --- Lengths ------------------------------------------------------------------------------------------------------


def test_a_block_of_another_length_ends_the_leading_run_and_is_counted(make_index, make_keys):
    index, keys = make_index(4), make_keys(1, 2, 3)
    slots, _ = index.reserve(keys, [100, 200, 100])
    index.commit(slots)
    assert index.acquire(keys, 100).tolist() == slots[:1].tolist()
    assert index.acquire(keys, [100, 200, 100]).tolist() == slots.tolist()
    assert index.acquire(keys).tolist() == slots.tolist()
    assert index.counters()["length_mismatches"] == 1


def test_reserving_with_another_length_replaces_the_block(make_index, make_keys):
    index, keys = make_index(2), make_keys(1)
    save(index, keys, 100)
    slots, statuses = index.reserve(keys, 200)
    assert statuses.tolist() == [NEW]
    assert found(index, keys) == [False]
    index.commit(slots)
    assert len(index.acquire(keys, 100)) == 0
    assert len(index.acquire(keys, 200)) == 1


def test_reserving_a_pinned_block_with_another_length_is_pending_and_leaves_it_alone(make_index, make_keys):
    index, keys = make_index(2), make_keys(1)
    slots = save(index, keys, 100, pin=True)
    assert index.reserve(keys, 200)[1].tolist() == [PENDING]
    index.release(slots)
    assert index.acquire(keys, 100).tolist() == slots.tolist()


# --- Pins ---------------------------------------------------------------------------------------------------------


def test_acquire_pins_the_leading_run_only(make_index, make_keys):
    index = make_index(4)
    slots = save(index, make_keys(1, 2, 4))
    assert index.acquire(make_keys(1, 2, 3, 4)).tolist() == slots[:2].tolist()
    assert index.num_pinned == 2
    assert index.counters()["hits"] == 2
    assert index.counters()["misses"] == 2


def test_a_pinned_block_survives_eviction(make_index, make_keys):
    index = make_index(3)
    save(index, make_keys(1, 2, 3))
    index.acquire(make_keys(2))
    assert index.evict(9) == 2
    assert found(index, make_keys(1, 2, 3)) == [False, True, False]
    save(index, make_keys(4, 5))
    assert index.reserve(make_keys(6, 7, 8), 100)[1].tolist() == [NEW, NEW, FULL]
    assert found(index, make_keys(2)) == [True]


def test_pins_count(make_index, make_keys):
    index, keys = make_index(1), make_keys(1)
    slots = save(index, keys, pin=True)
    index.acquire(keys)
    index.release(slots)
    assert index.evict(1) == 0
    index.release(slots)
    assert index.evict(1) == 1


def test_commit_with_pin_leaves_no_moment_for_eviction(make_index, make_keys):
    index, keys = make_index(2), make_keys(1, 2)
    slots = save(index, keys, pin=True)
    assert index.num_pinned == 2
    assert index.reserve(make_keys(3), 100)[1].tolist() == [FULL]
    index.release(slots)
    assert index.reserve(make_keys(3), 100)[1].tolist() == [NEW]


# --- Victim order -------------------------------------------------------------------------------------------------


def victims(index, keys):
    """Evict one by one; return the positions in `keys` in the order they went."""
    order = []
    while index.evict(1):
        order += [i for i, there in enumerate(found(index, keys)) if not there and i not in order]
    return order


@pytest.mark.parametrize("link", ["commit", "release", "commit and release", "touch"])
def test_the_tail_of_a_batch_is_evicted_first(make_index, make_keys, link):
    index, keys = make_index(40), make_keys(*range(40))
    slots = save(index, keys[:20], pin="release" in link)
    if "release" in link:
        index.release(slots)
    save(index, keys[20:])
    if link == "touch":
        assert index.touch(keys[:20]) == 20
        assert victims(index, keys) == [*range(39, 19, -1), *range(19, -1, -1)]
    else:
        assert victims(index, keys) == [*range(19, -1, -1), *range(39, 19, -1)]


def test_reserve_evicts_the_least_recently_used(make_index, make_keys):
    index, keys = make_index(3), make_keys(1, 2, 3)
    save(index, keys)
    index.touch(make_keys(3))
    save(index, make_keys(4))
    assert found(index, keys) == [True, False, True]
    assert index.counters()["evictions"] == 1


def test_a_present_key_is_not_evicted_by_its_own_batch(make_index, make_keys):
    index = make_index(3)
    save(index, make_keys(1, 2, 3))
    assert index.reserve(make_keys(3, 7, 8), 100)[1].tolist() == [PRESENT, NEW, NEW]
    assert found(index, make_keys(1, 2, 3)) == [False, False, True]


def test_lookup_changes_nothing(make_index, make_keys):
    index, keys = make_index(3), make_keys(1, 2, 3)
    save(index, keys)
    before = index.counters()
    index.lookup(make_keys(3, 9))
    assert index.counters() == before
    assert victims(index, keys) == [2, 1, 0]


@pytest.mark.parametrize("chained", [True, False])
def test_a_batch_never_evicts_what_it_has_already_met(make_index, make_keys, chained):
    index = make_index(4)
    save(index, make_keys(1, 2))
    save(index, make_keys(8, 9))
    after = {"after": make_keys()} if chained else {}
    statuses = index.reserve(make_keys(1, 2, 3, 4, 5, 6), 100, **after)[1]
    assert statuses.tolist() == [PRESENT, PRESENT, NEW, NEW, FULL, FULL]
    assert found(index, make_keys(1, 2, 8, 9)) == [True, True, False, False]


def test_what_a_batch_continues_is_not_evicted_for_it(make_index, make_keys):
    index = make_index(5)
    save(index, make_keys(1, 2, 3))
    save(index, make_keys(8, 9))
    assert index.reserve(make_keys(4, 5, 6, 7), 100, after=make_keys(1, 2, 3))[1].tolist() == [NEW, NEW, FULL, FULL]
    assert found(index, make_keys(1, 2, 3, 8, 9)) == [True, True, True, False, False]


def test_the_tail_of_a_chain_goes_before_its_head(make_index, make_keys):
    """A block that comes later in the chain may be evicted for one that comes before it, never the other way round."""
    index = make_index(4)
    save(index, make_keys(1, 4, 5, 6))
    slots, statuses = index.reserve(make_keys(2, 3, 4, 5, 6), 100, after=make_keys(1))
    assert statuses.tolist() == [NEW, NEW, PRESENT, FULL, FULL]
    index.commit(slots[:2])
    assert found(index, make_keys(1, 2, 3, 4, 5, 6)) == [True] * 4 + [False] * 2


def test_what_is_present_of_a_chain_is_kept_before_what_others_left(make_index, make_keys):
    index = make_index(4)
    save(index, make_keys(1, 3))
    save(index, make_keys(8, 9))
    assert index.reserve(make_keys(1, 2, 3, 4), 100, after=make_keys())[1].tolist() == [PRESENT, NEW, PRESENT, NEW]


def test_present_blocks_become_most_recent_and_the_head_of_them_most_of_all(make_index, make_keys):
    index = make_index(5)
    save(index, make_keys(1, 2, 3))
    save(index, make_keys(8, 9))
    index.reserve(make_keys(1, 2, 3), 100)
    assert victims(index, make_keys(8, 9, 1, 2, 3)) == [1, 0, 4, 3, 2]


def test_eviction_ends_at_the_stop_of_each_key(make_index, make_keys):
    index = make_index(4)
    save(index, make_keys(1))
    save(index, make_keys(2))
    stop = int(index.slots_of(make_keys(2))[0])
    save(index, make_keys(3))
    save(index, make_keys(4))
    assert index.reserve(make_keys(5, 6, 7), 100, stops=[stop, stop, NO_SLOT])[1].tolist() == [NEW, FULL, NEW]
    assert found(index, make_keys(1, 2, 3, 4)) == [False, False, True, True]


def test_stops_pair_up_with_keys(make_index, make_keys):
    index = make_index(2)
    with pytest.raises(ValueError, match="stops must be 2, one a key; got 1"):
        index.reserve(make_keys(1, 2), 100, stops=[0])
    assert index.num_free == 2


def test_eviction_is_as_cheap_with_ten_thousand_pinned_as_with_none(make_index, make_keys):
    """Counted, not timed: pinned blocks are on no list, so the first victim is the first that is looked at."""
    index = make_index(10_001)
    save(index, make_keys(*range(10_000)), pin=True)
    slots = save(index, make_keys(10_000))
    assert index.reserve(make_keys(20_000), 100)[0].tolist() == slots.tolist()


# --- Forgetting ---------------------------------------------------------------------------------------------------


def test_a_discarded_ready_block_frees_its_slot_at_once(make_index, make_keys):
    index, keys = make_index(2), make_keys(1, 2)
    save(index, keys)
    assert index.discard(make_keys(1, 9)) == 1
    assert found(index, keys) == [False, True]
    assert index.num_free == 1


def test_a_block_discarded_while_it_is_written_is_freed_by_its_commit(make_index, make_keys):
    index, keys = make_index(2), make_keys(1, 2)
    slots, _ = index.reserve(keys, 100)
    assert index.discard(keys[:1]) == 1
    assert index.slot_info(slots[0])["discarded"]
    assert index.num_free == 0
    assert index.commit(slots, pin=True).tolist() == [DISCARDED, READY]
    assert found(index, keys) == [False, True]
    assert (index.num_free, index.num_pinned) == (1, 1)


def test_a_block_discarded_while_it_is_written_is_freed_by_its_abort(make_index, make_keys):
    index, keys = make_index(1), make_keys(1)
    slots, _ = index.reserve(keys, 100)
    index.discard(keys)
    index.abort(slots)
    assert index.num_free == 1


def test_a_block_discarded_while_pinned_is_freed_by_its_last_release(make_index, make_keys):
    index, keys = make_index(2), make_keys(1)
    slots = save(index, keys, pin=True)
    index.acquire(keys)
    assert index.discard(keys) == 1
    assert found(index, keys) == [False]
    assert len(index.acquire(keys)) == 0
    index.release(slots)
    assert index.slot_info(slots[0])["state"] == "ready"
    assert index.num_free == 1
    index.release(slots)
    assert index.slot_info(slots[0])["state"] == "free"
    assert index.num_free == 2


def test_a_discarded_key_can_be_written_anew_while_its_old_slot_is_still_held(make_index, make_keys):
    index, keys = make_index(2), make_keys(1)
    old = save(index, keys, pin=True)
    index.discard(keys)
    new = save(index, keys)
    assert new[0] != old[0]
    index.release(old)
    assert index.acquire(keys).tolist() == new.tolist()


def test_discarding_twice_counts_once(make_index, make_keys):
    index, keys = make_index(2), make_keys(1)
    index.reserve(keys, 100)
    assert (index.discard(keys), index.discard(keys)) == (1, 0)
    assert index.counters()["discards"] == 1


def test_clear_forgets_every_state_and_frees_what_nobody_holds(make_index, make_keys):
    index = make_index(4)
    written, _ = index.reserve(make_keys(1), 100)
    pinned = save(index, make_keys(2), pin=True)
    save(index, make_keys(3))
    index.clear()
    assert found(index, make_keys(1, 2, 3)) == [False] * 3
    assert (index.num_free, index.num_writing, index.num_ready, index.num_pinned) == (2, 1, 1, 1)
    assert index.counters()["discards"] == 3
    index.clear()
    assert index.counters()["discards"] == 3
    assert index.commit(written).tolist() == [DISCARDED]
    index.release(pinned)
    assert index.num_free == 4
    assert save(index, make_keys(1, 2, 3, 4)).size == 4


# --- Slots --------------------------------------------------------------------------------------------------------


def test_a_new_index_is_full_until_slots_are_added(make_keys):
    index, keys = BlockIndex(4), make_keys(1, 2, 3)
    assert index.reserve(keys, 100)[1].tolist() == [FULL] * 3
    index.add_slots(2, 2)
    assert index.reserve(keys, 100)[0].tolist() == [2, 3, NO_SLOT]
    index.add_slots(0, 2)
    assert index.reserve(keys[2:], 100)[0].tolist() == [0]
    assert (index.slots_added, index.num_slots) == (4, 4)


def test_fresh_slots_are_handed_out_in_ascending_order(make_keys):
    index = BlockIndex(6)
    index.add_slots(0, 3)
    index.add_slots(3, 3)
    assert index.reserve(make_keys(*range(6)), 100)[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_slots_added_while_blocks_are_written_and_pinned_disturb_none(make_keys):
    index = BlockIndex(4)
    index.add_slots(0, 2)
    pinned = save(index, make_keys(1), pin=True)
    written, _ = index.reserve(make_keys(2), 100)
    index.add_slots(2, 2)
    assert save(index, make_keys(3, 4)).tolist() == [2, 3]
    index.commit(written)
    index.release(pinned)
    assert found(index, make_keys(1, 2, 3, 4)) == [True] * 4


def test_a_pool_of_two_slots_serves_any_number_of_keys(make_index, make_keys):
    index = make_index(2)
    for i in range(1000):
        save(index, make_keys(i))
        assert found(index, make_keys(i, i - 1 if i else 0, i + 1)) == [True, True, False]
    assert index.counters()["evictions"] == 998


def test_the_generation_counts_the_tenants_of_a_slot(make_index, make_keys):
    index = make_index(1)
    for i in range(3):
        save(index, make_keys(i))
        info = index.slot_info(0)
        assert (info["state"], info["generation"], info["length"]) == ("ready", i + 1, 100)
        assert info["key"] == make_keys(i).tobytes()


def test_memory_is_at_most_80_bytes_a_slot():
    for num_slots in (1000, 12_345, 1 << 17):
        assert BlockIndex(num_slots).memory_bytes <= 80 * num_slots


# --- Bad input loses nothing --------------------------------------------------------------------------------------

VERBS = ["acquire", "lookup", "touch", "discard", "reserve"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (np.zeros((2, 31), np.uint8), ValueError, r"shape \(n, 32\), got \(2, 31\)"),
        (np.zeros(32, np.uint8), ValueError, r"shape \(n, 32\), got \(32,\)"),
        (np.zeros((2, 32), np.int8), TypeError, "dtype uint8, got int8"),
        (np.zeros((2, 64), np.uint8)[:, ::2], ValueError, "C-contiguous"),
        (b"x" * 32, TypeError, "uint8 array, got bytes"),
        (None, TypeError, "uint8 array, got NoneType"),
    ],
)
def test_wrong_keys_get_a_clear_error(make_index, verb, keys, error, message):
    index = make_index(2)
    before = index.counters()
    with pytest.raises(error, match=message):
        getattr(index, verb)(keys, *([100] if verb == "reserve" else []))
    assert index.counters() == before


@pytest.mark.parametrize(
    ("lengths", "error"),
    [([100], ValueError), ([100] * 3, ValueError), (-1, ValueError), (1 << 32, ValueError), (1.5, TypeError)],
)
def test_wrong_lengths_get_a_clear_error(make_index, make_keys, lengths, error):
    index = make_index(2)
    with pytest.raises(error, match="lengths must be"):
        index.reserve(make_keys(1, 2), lengths)
    with pytest.raises(error, match="lengths must be"):
        index.acquire(make_keys(1, 2), lengths)
    assert index.num_free == 2


@pytest.mark.parametrize("verb", ["commit", "abort"])
@pytest.mark.parametrize("bad", ["ready", "free", "absent", "twice", "range", "none"])
def test_handing_back_a_slot_that_is_not_written_changes_nothing(make_keys, verb, bad):
    index = BlockIndex(8)
    index.add_slots(0, 5)
    save(index, make_keys(1))
    good, _ = index.reserve(make_keys(2, 3), 100)
    wrong = {"ready": 0, "free": 4, "absent": 6, "twice": good[0], "range": 8, "none": NO_SLOT}[bad]
    before = index.counters()
    with pytest.raises(ValueError, match=rf"{verb}: slots\[2\] = {wrong} is .*; nothing was changed"):
        getattr(index, verb)([*good, wrong])
    assert index.counters() == before
    assert index.commit(good).tolist() == [READY, READY]


@pytest.mark.parametrize("bad", ["writing", "unpinned", "free", "absent", "too often", "range"])
def test_releasing_what_is_not_pinned_changes_nothing(make_keys, bad):
    index = BlockIndex(8)
    index.add_slots(0, 6)
    good = save(index, make_keys(1, 2), pin=True)
    wrong = {
        "writing": index.reserve(make_keys(3), 100)[0][0],
        "unpinned": save(index, make_keys(4))[0],
        "free": 5,
        "absent": 7,
        "too often": good[1],
        "range": 1 << 31,
    }[bad]
    before = index.counters()
    with pytest.raises(ValueError, match=rf"release: slots\[2\] = {wrong} is .*; nothing was changed"):
        index.release([*good, wrong])
    assert index.counters() == before
    index.release(good)
    assert index.num_pinned == 0


@pytest.mark.parametrize(
    ("slots", "error"), [([-1], ValueError), ([1 << 32], ValueError), ([0.5], TypeError), ([[0]], ValueError)]
)
def test_slots_that_are_no_slot_numbers_get_a_clear_error(make_index, slots, error):
    with pytest.raises(error, match="slots must be"):
        make_index(2).commit(slots)


@pytest.mark.parametrize(("first", "count"), [(0, 5), (3, 2), (-1, 1), (0, -1), (5, 0)])
def test_slots_outside_the_capacity_are_refused(first, count):
    index = BlockIndex(4)
    with pytest.raises(ValueError, match="not within the 4"):
        index.add_slots(first, count)
    assert index.slots_added == 0


def test_a_slot_added_twice_is_refused_whole():
    index = BlockIndex(8)
    index.add_slots(4, 2)
    with pytest.raises(ValueError, match="slot 4 was added before"):
        index.add_slots(2, 4)
    assert index.slots_added == 2
    index.add_slots(2, 2)


@pytest.mark.parametrize("num_slots", [0, -1, (1 << 32) - 3, 1 << 64])
def test_absurd_capacities_are_refused(num_slots):
    with pytest.raises(ValueError, match=rf"num_slots must be in 1 .. 4294967292, got {num_slots}"):
        BlockIndex(num_slots)


def test_empty_batches_are_fine(make_index, make_keys):
    index, none = make_index(2), make_keys()
    assert [part.size for part in index.reserve(none, 100)] == [0, 0]
    assert [part.size for part in index.reserve(none, [])] == [0, 0]
    assert index.commit([]).size == 0
    assert index.acquire(none).size == 0
    assert index.lookup(none)[1] == index.touch(none) == index.discard(none) == index.evict(0) == 0
    index.abort([])
    index.release([])
