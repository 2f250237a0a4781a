"""SHA-256 against the vectors that NIST publishes, and against hashlib at every length around the block border."""

import hashlib
import platform
from pathlib import Path

import numpy as np
import pytest

from kvortex.keys._block_keys import sha256, use_portable_sha256

# The examples of FIPS 180-4, the short messages of CAVP, and NIST's additional vectors for SHA-256.
VECTORS = [
    (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    (
        b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
    ),
    (
        b"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
        "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1",
    ),
    (bytes.fromhex("d3"), "28969cdfa74a12c82f3bad960b0b000aca2ac329deea5c2328ebc6f2ba9802c1"),
    (bytes.fromhex("11af"), "5ca7133fa735326081558ac312c620eeca9970d1e70a4b95533d956f072d1f98"),
    (bytes.fromhex("b4190e"), "dff2e73091f6c05e528896c4c831b9448653dc2ff043528f6769437bc7b975c2"),
    (bytes.fromhex("74ba2521"), "b16aa56be3880d18cd41e68384cf1ec8c17680c45a02b1575dc1518923ae8b0e"),
    (bytes.fromhex("c98c8e55"), "7abc22c0ae5af26ce93dbb94433a0e0b2e119d014f8e7f65bd56c61ccccd9504"),
    (b"\xbd", "68325720aabd7c82f30f554b313d0570c95accbb7dc4b5aae11204c08ffe732b"),
    (b"\0" * 55, "02779466cdec163811d078815c633f21901413081449002f24aa3e80f0b88ef7"),
    (b"\0" * 56, "d4817aa5497628e7c77e6b606107042bbba3130888c5f47a375e6179be789fbb"),
    (b"\0" * 57, "65a16cb7861335d5ace3c60718b5052e44660726da4cd13bb745381b235a1785"),
    (b"\0" * 64, "f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"),
    (b"\0" * 1000, "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53"),
    (b"A" * 1000, "c2e686823489ced2017f6059b8b239318b6364f6dcd835d0a519105a1eadd6e4"),
    (b"\0" * 1_000_000, "d29751f2649b32ff572b5e0a9f541ea660a50f94ff0beedfb0b692b924cc8025"),
    (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
]


@pytest.mark.parametrize(("message", "digest"), VECTORS, ids=[f"{len(m)} bytes {d[:4]}" for m, d in VECTORS])
def test_nist_vector(message, digest):
    assert sha256(message).hex() == digest


def test_every_length_around_the_block_borders_agrees_with_hashlib(seed):
    rng = np.random.default_rng(seed)
    for length in range(401):
        message = rng.bytes(length)
        assert sha256(message) == hashlib.sha256(message).digest()


def test_every_word_and_every_bit_of_a_block_counts():
    """A single bit set, anywhere: what a wrong lane or shift in the vector code would swap or lose."""
    for bit in range(8 * 128):
        message = (1 << bit).to_bytes(128, "little")
        assert sha256(message) == hashlib.sha256(message).digest()


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="asks Linux for the flags of x86-64"
)
def test_sha_instructions_are_used_where_the_processor_has_them():
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    assert use_portable_sha256(False) == ("sha_ni" in flags)
