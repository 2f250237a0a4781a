"""A record is refused for whatever differs, by name, and for every bit that flips."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.tiers._record import HEADER_BYTES, Header, check_record, payload_sums, read_header, write_record
from kvortex.tiers.base import BlockStatus

SPACE, TAG, KEY = (hashlib.sha256(text).digest() for text in (b"space", b"tag", b"key"))
OTHER = hashlib.sha256(b"other").digest()
LENGTH = 5000
NAMES = {"namespace": SPACE, "rank": 3, "tag": TAG}


@pytest.fixture
def record(seed):
    """A record with a payload of LENGTH bytes, and room behind it."""
    memory = bytearray(np.random.default_rng(seed).bytes(HEADER_BYTES + LENGTH + 100))
    write_record(memory, KEY, **NAMES, stored_bytes=LENGTH, group=7)
    return memory


def check(record, key=KEY, length=LENGTH, **names):
    return BlockStatus(check_record(record, key, stored_bytes=length, **{**NAMES, **names}))


def test_a_record_is_what_was_written(record):
    assert check(record) is BlockStatus.OK
    payload = record[HEADER_BYTES : HEADER_BYTES + LENGTH]
    name = hashlib.sha256(b"kvortex-names-v1" + SPACE + (3).to_bytes(4, "little") + TAG + KEY).digest()
    assert read_header(record) == (0, Header(SPACE, 3, 0, TAG, KEY, name, 7, LENGTH, LENGTH, *payload_sums(payload)))


def test_writing_it_again_changes_no_byte(record):
    before = bytes(record)
    write_record(record, KEY, **NAMES, stored_bytes=LENGTH, group=7)
    assert bytes(record) == before


@pytest.mark.parametrize(
    "expected, status",
    [
        ({"namespace": OTHER}, BlockStatus.NAMESPACE_DIFFERS),
        ({"rank": 4}, BlockStatus.RANK_DIFFERS),
        ({"tag": OTHER}, BlockStatus.TAG_DIFFERS),
        ({"key": OTHER}, BlockStatus.KEY_DIFFERS),
        ({"length": LENGTH - 1}, BlockStatus.LENGTH_DIFFERS),
        ({"length": LENGTH + 1}, BlockStatus.LENGTH_DIFFERS),
    ],
    ids=["namespace", "rank", "tag", "key", "shorter", "longer"],
)
def test_another_record_is_refused_by_what_differs(record, expected, status):
    assert check(record, **expected) is status


@pytest.mark.parametrize(
    "expected, status",
    [
        ({}, BlockStatus.OK),
        ({"length": LENGTH}, BlockStatus.OK),
        ({"length": LENGTH - 1}, BlockStatus.LENGTH_DIFFERS),
        ({"block_bytes": 20_001}, BlockStatus.LENGTH_DIFFERS),
        ({"codec": 0}, BlockStatus.CODEC_DIFFERS),
        ({"codec": 0x205}, BlockStatus.CODEC_DIFFERS),
    ],
)
def test_a_coded_record_is_no_longer_than_its_slot(record, expected, status):
    """It says itself how long it is; its block has the length that is asked for."""
    write_record(record, KEY, **NAMES, stored_bytes=LENGTH, codec=0x105, block_bytes=20_000)
    assert check(record, **{"length": LENGTH + 100, "codec": 0x105, "block_bytes": 20_000, **expected}) is status


def test_an_empty_page_is_no_record():
    assert check(bytearray(HEADER_BYTES + LENGTH)) is BlockStatus.MISSING


def test_every_bit_of_the_header_counts(record):
    for bit in range(8 * HEADER_BYTES):
        record[bit // 8] ^= 1 << bit % 8
        status = check(record)
        if bit < 64:
            expected = BlockStatus.MISSING
        elif bit < 96:
            expected = BlockStatus.VERSION_DIFFERS
        else:
            expected = BlockStatus.HEADER_DAMAGED
        assert status is expected, bit
        record[bit // 8] ^= 1 << bit % 8
    assert check(record) is BlockStatus.OK


def test_every_bit_of_the_payload_counts_and_none_behind_it(record):
    for bit in range(8 * LENGTH):
        at = HEADER_BYTES + bit // 8
        record[at] ^= 1 << bit % 8
        assert check(record) is BlockStatus.PAYLOAD_DAMAGED, bit
        record[at] ^= 1 << bit % 8
    record[HEADER_BYTES + LENGTH] ^= 1
    assert check(record) is BlockStatus.OK


def test_a_record_of_another_name_is_refused(record):
    """The name follows from the other fields, so only who writes wrong ones gets here: the page's sum is made right."""
    header = read_header(record)[1]
    record[128:160] = OTHER
    record[HEADER_BYTES - 8 : HEADER_BYTES] = payload_sums(record[: HEADER_BYTES - 8])[0].to_bytes(8, "little")
    assert read_header(record)[1] == header._replace(name=OTHER)
    assert check(record) is BlockStatus.NAME_DIFFERS


def test_a_later_version_is_not_read(record):
    record[8] = 2
    record[HEADER_BYTES - 8 : HEADER_BYTES] = payload_sums(record[: HEADER_BYTES - 8])[0].to_bytes(8, "little")
    assert check(record) is BlockStatus.VERSION_DIFFERS
    assert read_header(record) == (BlockStatus.VERSION_DIFFERS, None)


def test_a_short_buffer_is_refused():
    with pytest.raises(ValueError, match="a record of 5000 bytes needs a buffer of 9096, got 9095"):
        check(bytearray(HEADER_BYTES + LENGTH - 1))
    with pytest.raises(ValueError, match="needs a buffer of 9096, got 9095"):
        write_record(bytearray(HEADER_BYTES + LENGTH - 1), KEY, **NAMES, stored_bytes=LENGTH)
    with pytest.raises(ValueError, match="needs a buffer of 4096, got 4095"):
        read_header(bytes(HEADER_BYTES - 1))


FIELDS = [
    (0, 8),
    (8, 12),
    (12, 16),
    (16, 20),
    (24, 28),
    (28, 32),
    (32, 64),
    (64, 96),
    (96, 128),
    (128, 160),
    (160, 168),
]


@given(edits=st.lists(st.tuples(st.integers(0, 4079), st.binary(min_size=1, max_size=8)), max_size=6))
def test_whatever_a_page_says_only_the_record_that_was_asked_for_is_taken(edits):
    """Fields of every kind under a sum that is right: what a header says is compared, and used for nothing."""
    record = bytearray(HEADER_BYTES + LENGTH)
    record[HEADER_BYTES:] = bytes(range(250)) * 20
    write_record(record, KEY, **NAMES, stored_bytes=LENGTH)
    whole = bytes(record)
    for offset, data in edits:
        record[offset : offset + len(data)] = data
    record[HEADER_BYTES - 8 : HEADER_BYTES] = payload_sums(record[: HEADER_BYTES - 8])[0].to_bytes(8, "little")
    is_changed = record[:20] + record[24:168] != whole[:20] + whole[24:168]  # 20 to 24: the group
    assert (check(record) is BlockStatus.OK) == (not is_changed)
    assert len(record) == len(whole) and record[HEADER_BYTES:] == whole[HEADER_BYTES:]
