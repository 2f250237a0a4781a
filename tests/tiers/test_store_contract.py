"""What every store promises."""

import collections

import numpy as np
import pytest
from tier_rig import NUM_SLOTS, OTHER_TAG, PAYLOAD_BYTES, POOL_SLOTS, SECONDS, TAG, block, keys_of, statuses_of

from kvortex import EngineClosed
from kvortex.tiers._record import HEADER_BYTES, read_header
from kvortex.tiers.base import BlockStatus

OK, MISSING = BlockStatus.OK, BlockStatus.MISSING


def test_what_is_put_comes_back(rig):
    slots = [39, 0, 17, 16, 15]
    assert rig.put(slots, range(5)) == [OK] * 5
    assert rig.get(slots, range(5)) == [block(i) for i in range(5)]


def test_a_batch_says_how_long_its_io_took_when_that_is_over(rig):
    batch = rig.store.scan(range(8), tag=bytes(32), timeout_ms=60_000)
    batch.wait()
    while not batch.done():
        pass
    assert 0 <= batch.seconds < 60


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, PAYLOAD_BYTES])
def test_a_shorter_block_comes_back_whole(rig, length):
    rig.put([3], [1], generation=1)
    assert rig.put([3], [1], length=length) == [OK]
    assert rig.get([3], [1], length=length) == [block(1, 0, length)]


def test_a_slot_that_nobody_wrote_is_a_miss(rig):
    assert rig.get(range(NUM_SLOTS), range(NUM_SLOTS)) == [MISSING] * NUM_SLOTS


def test_only_the_block_that_was_asked_for_is_given(rig):
    rig.put([5], [1])
    assert rig.get([5], [2]) == [rig.answer_to_another(BlockStatus.KEY_DIFFERS)]
    assert rig.get([5], [1], tag=OTHER_TAG) == [rig.answer_to_another(BlockStatus.TAG_DIFFERS)]
    assert rig.get([5], [1], length=PAYLOAD_BYTES - 1) == [BlockStatus.LENGTH_DIFFERS]
    assert rig.get([5], [1]) == [block(1)]


def test_a_failure_is_the_blocks_and_no_other_s(rig):
    rig.put([1, 2, 3], [1, 2, 3])
    other = rig.answer_to_another(BlockStatus.KEY_DIFFERS)
    assert rig.get([1, 9, 2, 3], [1, 9, 7, 3]) == [block(1), MISSING, other, block(3)]


def test_swapped_records_are_misses(rig):
    rig.put([4, 20], [1, 2])
    first, second = rig.read_record(4), rig.read_record(20)
    rig.write_record(4, second)
    rig.write_record(20, first)
    assert rig.get([4, 20], [1, 2]) == [BlockStatus.KEY_DIFFERS] * 2
    rig.write_record(4, first)
    rig.write_record(20, second)
    assert rig.get([4, 20], [1, 2]) == [block(1), block(2)]


def test_an_older_record_under_new_weights_is_a_miss(rig):
    """As after a folder was copied back from an earlier state."""
    rig.put([4], [1])
    old = rig.read_record(4)
    assert rig.put([4], [1], generation=1, tag=OTHER_TAG) == [OK]
    rig.write_record(4, old)
    assert rig.get([4], [1], tag=OTHER_TAG) == [BlockStatus.TAG_DIFFERS]


def test_a_torn_record_is_a_miss(rig):
    """A new header and an old payload, or only a part of it: what a crash leaves."""
    rig.put([4], [1], generation=1)
    old = rig.read_record(4)
    rig.put([4], [1])
    new = rig.read_record(4)
    for border in range(HEADER_BYTES, HEADER_BYTES + PAYLOAD_BYTES, 4096):
        rig.write_record(4, new[:border] + old[border:])
        assert rig.get([4], [1]) == [BlockStatus.PAYLOAD_DAMAGED]
        rig.write_record(4, old[:border] + new[border:])
        assert rig.get([4], [1]) == [BlockStatus.PAYLOAD_DAMAGED]


def test_no_flipped_bit_is_served(rig, seed):
    rng = np.random.default_rng(seed)
    rig.put([4], [1])
    record = rig.read_record(4)
    bits = [8 * at + int(rng.integers(8)) for at in range(184)]  # every byte of every field
    bits += rng.integers(184 * 8, 8 * HEADER_BYTES, 20).tolist()
    bits += range(8 * HEADER_BYTES - 64, 8 * HEADER_BYTES)  # the header's own sum
    bits += rng.integers(8 * HEADER_BYTES, 8 * (HEADER_BYTES + PAYLOAD_BYTES), 100).tolist()
    for bit in bits:
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << bit % 8
        rig.write_record(4, flipped)
        (answer,) = rig.get([4], [1])
        assert isinstance(answer, BlockStatus) and answer in {
            MISSING, BlockStatus.VERSION_DIFFERS, BlockStatus.HEADER_DAMAGED, BlockStatus.PAYLOAD_DAMAGED
        }, bit  # fmt: skip
    rig.write_record(4, record)
    assert rig.get([4], [1]) == [block(1)]


def test_an_erased_block_is_a_miss(rig):
    rig.put([1, 2], [1, 2])
    assert statuses_of(rig.store.erase([1], timeout_ms=None)) == [OK]
    assert rig.get([1, 2], [1, 2]) == [MISSING, block(2)]
    assert rig.store.flush(SECONDS) == 0
    assert read_header(rig.read_record(1)) == (MISSING, None)


def test_operations_on_one_slot_run_in_the_order_of_the_calls(rig):
    batches = []
    for round_ in range(20):
        batches.append(rig.put([7], [round_], wait=False))
        batches.append(rig.store.get([7], [POOL_SLOTS - 1], keys_of([round_]), PAYLOAD_BYTES, tag=TAG,
                                     timeout_ms=SECONDS))  # fmt: skip
        assert statuses_of(batches[-1]) == [OK]
        assert bytes(rig.pool.view(POOL_SLOTS - 1)) == block(round_)
        batches.append(rig.store.erase([7], timeout_ms=SECONDS))
    assert [statuses_of(batch) for batch in batches] == [[OK]] * 60
    assert rig.get([7], [19]) == [MISSING]


def test_a_scan_tells_what_lies_where(rig):
    rig.put([1, 30], [5, 6])
    rig.put([2], [7], tag=OTHER_TAG)
    rig.put([3], [8], length=100)
    batch = rig.store.scan(range(NUM_SLOTS), tag=TAG, timeout_ms=SECONDS)
    found = statuses_of(batch)
    assert {slot: status for slot, status in enumerate(found) if status is not MISSING} == {
        1: OK, 30: OK, 3: OK, 2: BlockStatus.TAG_DIFFERS
    }  # fmt: skip
    assert np.array_equal(batch.keys[[1, 30, 3]], keys_of([5, 6, 8]))
    assert batch.lengths[[1, 30, 3]].tolist() == [PAYLOAD_BYTES, PAYLOAD_BYTES, 100]


def test_a_scan_does_not_announce_a_damaged_header(rig):
    rig.put([1], [5])
    record = bytearray(rig.read_record(1))
    record[100] ^= 1
    rig.write_record(1, record)
    assert statuses_of(rig.store.scan([1], tag=TAG, timeout_ms=SECONDS)) == [BlockStatus.HEADER_DAMAGED]


def test_what_has_no_time_is_late_and_changes_nothing(rig):
    rig.put([1], [1])
    assert rig.put([1], [2], timeout_ms=0) == [BlockStatus.LATE]
    assert statuses_of(rig.store.erase([1], timeout_ms=0)) == [BlockStatus.LATE]
    assert rig.get([1], [1], timeout_ms=0) == [BlockStatus.LATE]
    assert rig.get([1], [1]) == [block(1)]


def test_an_empty_batch_is_done(rig):
    batch = rig.put([], [], wait=False)
    assert batch.done() and statuses_of(batch) == []


@pytest.mark.parametrize(
    "slots, pool_slots, num_keys, lengths",
    [
        ([NUM_SLOTS], [0], 1, 1),
        ([-1], [0], 1, 1),
        ([0], [POOL_SLOTS], 1, 1),
        ([0], [0], 1, PAYLOAD_BYTES + 1),
        ([0], [0], 1, 0),
        ([0, 1], [0], 2, 1),
        ([0, 1], [0, 1], 1, 1),
        ([0, 1], [0, 1], 2, [1]),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_begun(rig, slots, pool_slots, num_keys, lengths):
    for verb in (rig.store.put, rig.store.get):
        with pytest.raises(ValueError):
            verb(slots, pool_slots, keys_of(range(num_keys)), lengths, tag=TAG, timeout_ms=SECONDS)
    assert not rig.store.stats()["put"] and not rig.store.stats()["get"]


def test_blocks_are_counted_by_what_they_were_answered(rig):
    rig.put([1, 2], [1, 2])
    rig.get([1, 2, 3], [1, 7, 3])
    assert rig.store.stats()["put"] == {"OK": 2}
    counts = collections.Counter(["OK", rig.answer_to_another(BlockStatus.KEY_DIFFERS).name, "MISSING"])
    assert rig.store.stats()["get"] == counts


def test_a_closed_store_takes_nothing_and_forgets_no_answer(rig):
    batch = rig.put([1], [1], wait=False)
    assert statuses_of(batch) == [OK]
    rig.store.close()
    rig.store.close()
    assert statuses_of(batch) == [OK] and batch.done()
    for call in (lambda: rig.put([1], [1]), lambda: rig.get([1], [1]), lambda: rig.store.flush(SECONDS)):
        with pytest.raises(EngineClosed):
            call()


def test_operations_on_one_name_run_in_the_order_of_the_calls(rig):
    """In the same slot, without waiting in between: the last one counts."""
    for _ in range(5):
        batches = [rig.put([7], [3], wait=False), rig.store.erase([7], timeout_ms=SECONDS)]
        assert [statuses_of(batch) for batch in batches] == [[OK]] * 2
        assert rig.get([7], [3]) == [MISSING]
        batches = [rig.put([7], [3], length=length, wait=False) for length in (100, 5000, PAYLOAD_BYTES)]
        batches.append(rig.store.erase([7], timeout_ms=SECONDS))
        batches.append(rig.store.put([7], [0], keys_of([3]), 700, tag=TAG, timeout_ms=SECONDS))
        assert [statuses_of(batch) for batch in batches] == [[OK]] * 5
        assert rig.get([7], [3], length=700) == [block(3, 0, PAYLOAD_BYTES)[:700]]
