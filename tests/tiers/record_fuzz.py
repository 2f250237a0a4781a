"""What a fuzzer's bytes make of a record and of a folder, held against a reader of our own in Python.

In tests hypothesis draws the bytes, in a soak atheris does: see test_record_fuzz.py.
"""

import atexit
import hashlib
import os
import shutil
import struct
import tempfile
from pathlib import Path

import xxhash

from kvortex.tiers._record import HEADER_BYTES, check_record, payload_sums, read_header, write_record
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.disk import check
from kvortex.tiers.disk.segments import segment_page

SPACE, TAG, KEY = (hashlib.sha256(text).digest() for text in (b"space", b"tag", b"key"))
PAYLOAD_BYTES, STRIDE_BYTES, RANK = 5000, 12288, 3
NAMES = {"namespace": SPACE, "rank": RANK, "tag": TAG, "stored_bytes": PAYLOAD_BYTES}
HEADER = struct.Struct("<8sIIIIII32s32s32s32sQQ")


def whole_record():
    record = bytearray(STRIDE_BYTES)
    record[HEADER_BYTES : HEADER_BYTES + PAYLOAD_BYTES] = bytes(range(250)) * 20
    write_record(record, KEY, **NAMES)
    return bytes(record)


RECORD = whole_record()
SEGMENT = segment_page(SPACE, RANK, 0, STRIDE_BYTES) + RECORD + bytes(STRIDE_BYTES) + RECORD


def edited(image, pages, data):
    """The image with edits, each two bytes of a place, one of a length, and what is written there.

    The first byte says of which pages the sum is made right again: what is behind the sum is to be reached, too.
    """
    image, choice, data = bytearray(image), data[0] if data else 0, data[1:]
    while len(data) > 3:
        at, length = struct.unpack_from("<HB", data)
        at, length = at % len(image), length % 16
        image[at : at + length] = data[3 : 3 + min(length, len(image) - at)].ljust(min(length, len(image) - at), b"\0")
        data = data[3 + length :]
    for i, page in enumerate(pages):
        if choice >> i & 1:
            body = bytes(image[page : page + HEADER_BYTES - 8])
            image[page + HEADER_BYTES - 8 : page + HEADER_BYTES] = struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
    return bytes(image)


def is_whole(record, space, rank):
    """Whether the record is one of this model and rank, by a reader that shares nothing with the one under test."""
    magic, version, codec, of_rank, _, stored, block, of_space, tag, key, name, xxh3, weighted = HEADER.unpack_from(
        record
    )
    page, payload = record[:HEADER_BYTES], record[HEADER_BYTES : HEADER_BYTES + stored]
    expected = hashlib.sha256(b"kvortex-names-v1" + of_space + struct.pack("<I", of_rank) + tag + key).digest()
    words = memoryview(payload + bytes(-len(payload) % 4)).cast("I")
    return (
        (magic, version, codec, of_rank, of_space) == (b"VORTXKR1", 1, 0, rank, space)
        and 0 < stored == block <= len(record) - HEADER_BYTES
        and name == expected
        and page[-8:] == struct.pack("<Q", xxhash.xxh3_64_intdigest(page[:-8]))
        and xxh3 == xxhash.xxh3_64_intdigest(payload)
        and weighted == sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64
    )


def fuzz_record(data):
    """A record that was changed is only taken where what was asked for did not change."""
    record = edited(RECORD, [0], data)
    status, header = read_header(record[:HEADER_BYTES])
    assert (status == BlockStatus.OK) == (header is not None)
    if header:
        magic, version, *fields = HEADER.unpack_from(record)
        codec, rank, group, stored, block, space, tag, key, name, xxh3, weighted = fields
        assert tuple(header) == (space, rank, codec, tag, key, name, group, stored, block, xxh3, weighted)
        assert (magic, version) == (b"VORTXKR1", 1)
    is_taken = check_record(record, KEY, **NAMES) == BlockStatus.OK
    asked_for = header and (header.tag, header.key, header.stored_bytes) == (TAG, KEY, PAYLOAD_BYTES)
    weighted = payload_sums(record[HEADER_BYTES : HEADER_BYTES + PAYLOAD_BYTES])[1]
    if is_taken and header.payload_weighted == weighted:  # the store verifies the other sum alone
        assert asked_for and is_whole(record, SPACE, RANK)
    elif not is_taken:
        assert not (asked_for and is_whole(record, SPACE, RANK))


class Folder:
    """A tier's folder with one segment, made once a process."""

    def __init__(self):
        self.path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        atexit.register(shutil.rmtree, self.path, ignore_errors=True)
        self.part = self.path / SPACE[:4].hex() / f"dp0-rank{RANK}"
        self.part.mkdir(parents=True)


def fuzz_folder(data, made=[]):  # noqa: B006
    """Of a segment in which anything changed, those records are counted that are whole, and nothing raises."""
    folder = made[0] if made else made.append(Folder()) or made[0]
    pages = [0, HEADER_BYTES, HEADER_BYTES + STRIDE_BYTES, HEADER_BYTES + 2 * STRIDE_BYTES]
    image = edited(SEGMENT, pages, data)
    if len(data) % 5 == 0:
        image = image[: int.from_bytes(data[-2:], "little") % (len(image) + 1)]
    (folder.part / "000000.segment").write_bytes(image)
    (facts,) = check.check(folder.path, payloads=True)
    is_ours = image[:HEADER_BYTES] == segment_page(SPACE, RANK, 0, STRIDE_BYTES)
    slots = [image[at : at + STRIDE_BYTES] for at in range(HEADER_BYTES, len(image) - STRIDE_BYTES + 1, STRIDE_BYTES)]
    if is_ours:
        assert facts["records"] == sum(is_whole(slot, SPACE, RANK) for slot in slots), facts
    elif not facts["segments"]:
        assert facts["records"] == 0 and (facts["garbage"] or facts["damaged"]), facts
    assert facts["undecided"] == facts["unreadable"] == 0
    assert image in (SEGMENT, b"") or facts["slots"] != 3 or facts["records"] == 2 or facts["findings"] or (
        facts["unknown_records"]), facts  # fmt: skip
