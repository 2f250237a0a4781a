"""ram_keys and digest_of against hashlib and the formula their docstrings give."""

import hashlib
import itertools
import struct

import numpy as np
import pytest

from kvortex.keys import block_keys, digest_of, ram_keys

TAG = hashlib.sha256(b"step-1200").digest()
GROUPS, CODECS, TAGS = (0, 1, 2, 256, (1 << 32) - 1), (None, b"", b"int8", b"int8 64"), (None, TAG, TAG[::-1])


def xor(*parts):
    return bytes(np.bitwise_xor.reduce([np.frombuffer(part, np.uint8) for part in parts], axis=0))


def expected_digest(group, codec, tag):
    """The documented formula, in plain Python."""
    parts = [bytes(32)]
    if group != 0:
        parts.append(hashlib.sha256(b"group" + struct.pack("<I", group)).digest())
    if codec is not None:
        parts.append(hashlib.sha256(b"codec" + codec).digest())
    if tag is not None:
        parts.append(tag)
    return xor(*parts)


@pytest.mark.parametrize("group, codec, tag", list(itertools.product(GROUPS, CODECS, TAGS)))
def test_a_digest_is_the_documented_one(group, codec, tag):
    assert digest_of(group=group, codec=codec, tag=tag) == expected_digest(group, codec, tag)


def test_keys_in_ram_are_the_same_in_every_release():
    """A process that knows the hash alone finds a block by these bytes."""
    keys = ram_keys(block_keys(range(8), block_size=4), digest_of(group=3, codec=b"int8", tag=TAG))
    assert keys[1].tobytes().hex() == "53e4388d9d0d0858d44dd93fbd622e304b711cfda5f48fd92573720e8b7b9ac3"


def test_an_exact_block_of_the_first_group_has_its_hash_as_key():
    hashes = block_keys(range(64), 4)
    assert digest_of() == bytes(32) and (ram_keys(hashes, digest_of()) == hashes).all()


def test_no_two_digests_are_equal():
    """Group, codec and tag each keep blocks apart, alone and together: lossy bytes never answer an exact request."""
    digests = {digest_of(*each) for each in itertools.product(GROUPS, CODECS, TAGS)}
    assert len(digests) == len(GROUPS) * len(CODECS) * len(TAGS)


@pytest.mark.parametrize("count", [0, 1, 2, 33, 5000])
def test_a_key_gives_its_hash_back(count, seed):
    draw = np.random.default_rng(seed)
    hashes = draw.integers(0, 256, (count, 32), np.uint8)
    digest = digest_of(group=7, tag=TAG)
    keys = ram_keys(hashes, digest)
    assert keys.dtype == np.uint8 and keys.shape == (count, 32)
    assert (keys == hashes ^ np.frombuffer(digest, np.uint8)).all()
    assert (ram_keys(keys, digest) == hashes).all()


def test_each_block_may_have_a_digest_of_its_own(seed):
    draw = np.random.default_rng(seed)
    hashes, digests = draw.integers(0, 256, (2, 100, 32), np.uint8)
    keys = ram_keys(hashes, digests)
    assert (keys == hashes ^ digests).all() and (ram_keys(keys, digests) == hashes).all()


def test_hashes_are_left_as_they_are():
    hashes = np.zeros((3, 32), np.uint8)
    hashes.flags.writeable = False
    assert ram_keys(hashes, TAG).any() and not hashes.any()


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_codec_and_tag_may_be_anything_bytes_like(wrap):
    assert digest_of(0, wrap(b"int8"), wrap(TAG)) == digest_of(0, b"int8", TAG)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"group": -1}, ValueError, "group must be in 0 .. 4294967295, got -1"),
        ({"group": 1 << 32}, ValueError, "group must be in 0 .. 4294967295"),
        ({"group": 1.0}, TypeError, "group must be a whole number, got 1.0"),
        ({"codec": "int8"}, TypeError, "bytes-like"),
        ({"tag": b"step-1200"}, ValueError, "tag must have 32 bytes, got 9"),
        ({"tag": "x" * 32}, TypeError, "bytes-like"),
    ],
)
def test_what_is_no_digest_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        digest_of(**arguments)


@pytest.mark.parametrize(
    "hashes, digest, error, message",
    [
        (np.zeros((2, 32), np.uint8), bytes(31), ValueError, "digest must have 32 bytes, got 31"),
        (np.zeros((2, 32), np.uint8), bytes(33), ValueError, "digest must have 32 bytes, got 33"),
        (np.zeros((2, 32), np.uint8), np.zeros((3, 32), np.uint8), ValueError, "one a hash; got 3"),
        (np.zeros((0, 32), np.uint8), np.zeros((1, 32), np.uint8), ValueError, "one a hash; got 1"),
        (np.zeros((2, 32), np.uint8), None, TypeError, "NoneType"),
        (np.zeros((2, 16), np.uint8), bytes(32), ValueError, "shape"),
        (np.zeros((2, 32), np.int8), bytes(32), TypeError, "uint8"),
        ([bytes(32)], bytes(32), TypeError, "list"),
    ],
)
def test_what_is_no_array_of_hashes_is_refused(hashes, digest, error, message):
    with pytest.raises(error, match=message):
        ram_keys(hashes, digest)
