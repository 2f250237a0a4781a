"""Names of blocks outside RAM beside hashlib."""

import hashlib

import numpy as np
import pytest

from kvortex.keys import persistent_names

SPACE, TAG = (hashlib.sha256(text).digest() for text in (b"space", b"tag"))


def test_names_are_the_digests_that_the_docstring_says(seed):
    for count in (0, 1, 2, 5):
        keys = np.frombuffer(np.random.default_rng(seed).bytes(32 * count), np.uint8).reshape(count, 32)
        names = persistent_names(keys, SPACE, 0xFFFFFFFF, TAG)
        preimage = b"kvortex-names-v1" + SPACE + b"\xff\xff\xff\xff" + TAG
        assert names.shape == (count, 32)
        assert [name.tobytes() for name in names] == [hashlib.sha256(preimage + key.tobytes()).digest() for key in keys]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((b"short", 0, TAG), "namespace must have 32 bytes, got 5"),
        ((SPACE, 0, b"short"), "tag must have 32 bytes, got 5"),
        ((SPACE, -1, TAG), r"rank must be in 0 \.\. 4294967295, got -1"),
        ((SPACE, 1 << 32, TAG), r"rank must be in 0 \.\. 4294967295, got 4294967296"),
    ],
)
def test_names_of_nobody_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        persistent_names(np.zeros((1, 32), np.uint8), *arguments)
