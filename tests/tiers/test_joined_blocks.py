"""Blocks that share a value on a server: their records lie there one after the other, each verified for itself."""

import numpy as np
import pytest
from tier_rig import PAYLOAD_BYTES, SECONDS, SPACE, TAG, block, keys_of, statuses_of

from kvortex.tiers._record import HEADER_BYTES
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.remote.view import Objects

OK, MISSING = BlockStatus.OK, BlockStatus.MISSING
COUNT = 4
RECORD_BYTES = HEADER_BYTES + PAYLOAD_BYTES


def objects_of(ids, count=COUNT):
    """Of blocks 0, 1, ... that are a chain, `count` to an object."""
    ids = np.asarray(ids)
    return Objects(keys_of(ids // count * count + count - 1), ids % count, np.full(len(ids), count))


def put(remote, ids, *, count=COUNT, tag=TAG, **settings):
    """Statuses of blocks that are put from slots of the pool, the first into the last."""
    slots = list(range(len(ids)))[::-1]  # records do not lie in the pool as they do in the value
    for slot, key_id in zip(slots, ids, strict=True):
        remote.pool.view(slot)[:] = block(key_id)
    options = {"tag": tag, "timeout_ms": SECONDS, "objects": objects_of(ids, count), **settings}
    return statuses_of(remote.store.put(slots, slots, keys_of(ids), PAYLOAD_BYTES, **options))


def get(remote, ids, *, count=COUNT, tag=TAG):
    """Statuses of blocks that are read; those that are OK are what was put."""
    slots = list(range(20, 20 + len(ids)))
    for slot in slots:
        remote.pool.view(slot)[:] = bytes(PAYLOAD_BYTES)
    options = {"tag": tag, "timeout_ms": SECONDS, "objects": objects_of(ids, count)}
    found = statuses_of(remote.store.get(slots, slots, keys_of(ids), PAYLOAD_BYTES, **options))
    for slot, key_id, status in zip(slots, ids, found, strict=True):
        assert status != OK or bytes(remote.pool.view(slot)) == block(key_id)
    return found


def value_of(remote, last, count=COUNT):
    """The name of the object whose last block this is, and its bytes."""
    (name,) = remote.store.names.of(keys_of([last]), TAG, count)
    value = bytearray(remote.raw.sizes([name], True)[0])
    remote.raw.get(name, memoryview(value))
    return name, value


def test_blocks_come_back_from_the_objects_that_they_share(remote):
    assert put(remote, range(3 * COUNT)) == [OK] * 12
    assert get(remote, range(3 * COUNT)) == [OK] * 12
    assert len(value_of(remote, COUNT - 1)[1]) == COUNT * RECORD_BYTES


def test_an_object_is_one_request_each_way(remote):
    calls, client = [], remote.store.client
    write, read = client.put, client.get
    client.put = lambda name, value: calls.append(name) or write(name, value)
    client.get = lambda name, value: calls.append(name) or read(name, value)
    put(remote, range(3 * COUNT))
    assert len(calls) == 3
    get(remote, range(3 * COUNT))
    assert len(calls) == 6


@pytest.mark.parametrize("ids", [[2, 3, 4], [1], [3, 6, 1, 4]])
def test_some_blocks_of_an_object_are_read_alone(remote, ids):
    put(remote, range(2 * COUNT))
    assert get(remote, ids) == [OK] * len(ids)


@pytest.mark.parametrize("place", range(COUNT))
@pytest.mark.parametrize("offset", [0, HEADER_BYTES - 1, HEADER_BYTES, RECORD_BYTES - 1])
def test_a_damaged_record_is_a_miss_and_the_others_are_not(remote, place, offset):
    put(remote, range(COUNT))
    name, value = value_of(remote, COUNT - 1)
    value[place * RECORD_BYTES + offset] ^= 1
    remote.raw.put(name, bytes(value))
    found = get(remote, range(COUNT))
    assert [status == OK for status in found] == [i != place for i in range(COUNT)]


def test_records_that_were_exchanged_are_not_served(remote):
    put(remote, range(COUNT))
    name, value = value_of(remote, COUNT - 1)
    first, rest = value[:RECORD_BYTES], value[RECORD_BYTES:]
    remote.raw.put(name, bytes(rest + first))
    assert get(remote, range(COUNT)) == [BlockStatus.KEY_DIFFERS] * COUNT


def test_an_object_under_the_name_of_another_is_not_served(remote):
    put(remote, range(2 * COUNT))
    (a, of_a), (b, of_b) = value_of(remote, COUNT - 1), value_of(remote, 2 * COUNT - 1)
    remote.raw.put(a, bytes(of_b))
    remote.raw.put(b, bytes(of_a))
    assert get(remote, range(2 * COUNT)) == [BlockStatus.KEY_DIFFERS] * 2 * COUNT


@pytest.mark.parametrize(
    "nbytes", [COUNT * RECORD_BYTES - 1, 2 * RECORD_BYTES, RECORD_BYTES, 1, COUNT * RECORD_BYTES + 1]
)
def test_an_object_of_another_length_is_a_miss_whole(remote, nbytes):
    put(remote, range(COUNT))
    name, value = value_of(remote, COUNT - 1)
    remote.raw.put(name, bytes((value * 2)[:nbytes]))
    assert get(remote, range(COUNT)) == [BlockStatus.LENGTH_DIFFERS] * COUNT


def test_objects_of_another_number_of_blocks_are_others(remote):
    put(remote, range(COUNT))
    assert get(remote, [3], count=1) == [MISSING]
    assert get(remote, [2, 3], count=2) == [MISSING] * 2
    put(remote, [3], count=1)
    assert remote.store.get([0], [0], keys_of([3]), PAYLOAD_BYTES, tag=TAG, timeout_ms=SECONDS).wait() == [OK]
    assert get(remote, range(COUNT)) == [OK] * COUNT


def test_an_object_that_is_removed_is_gone_whole(remote):
    put(remote, range(2 * COUNT))
    remote.store.delete(keys_of([COUNT - 1]), TAG, timeout_ms=SECONDS, counts=COUNT).wait()
    assert get(remote, range(2 * COUNT)) == [MISSING] * COUNT + [OK] * COUNT


def test_a_slot_stands_for_no_object(remote):
    put(remote, range(COUNT))
    assert statuses_of(remote.store.erase(range(COUNT), timeout_ms=SECONDS)) == [OK] * COUNT
    assert get(remote, range(COUNT)) == [OK] * COUNT


@pytest.mark.parametrize("ids", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3, 5]])
def test_a_part_of_an_object_is_never_written(remote, ids):
    with pytest.raises(ValueError, match="object of 4"):
        put(remote, ids)
    assert get(remote, range(COUNT)) == [MISSING] * COUNT


def test_what_was_read_in_part_is_refreshed_whole(remote):
    put(remote, range(COUNT))
    before, refreshed = value_of(remote, COUNT - 1), []
    remote.store.client.refresh = lambda name, value, age_s: refreshed.append((name, b"".join(value)))
    assert get(remote, [1, 2]) == [OK] * 2
    assert refreshed == [(before[0], bytes(before[1]))]


def test_an_object_whose_deadline_has_passed_is_late_whole(remote):
    assert put(remote, range(COUNT), timeout_ms=0) == [BlockStatus.LATE] * COUNT
    assert remote.store.flush(SECONDS) == 0
    assert remote.store.stats()["waiting"] == remote.store.stats()["running"] == 0


def test_names_of_single_blocks_are_as_before(remote):
    """What older engines wrote is found."""
    names = remote.store.names
    assert names.of(keys_of([1, 2]), TAG) == names.of(keys_of([1, 2]), TAG, [1, 1])
    assert names._space_of(1) == SPACE
    mixed = names.of(keys_of([1, 2, 3]), TAG, [1, COUNT, 1])
    assert mixed == [names.of(keys_of([i]), TAG, count)[0] for i, count in ((1, 1), (2, COUNT), (3, 1))]
