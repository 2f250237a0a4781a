"""The sums of a payload against the xxhash wheel and against a sum in Python, with vectors and without."""

import numpy as np
import pytest
import xxhash

from kvortex.tiers._record import payload_sums


def weighted_sum(data):
    words = np.frombuffer(data + bytes(-len(data) % 4), "<u4").tolist()
    return sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64


@pytest.mark.parametrize("vectors", [0, 1, 2])
def test_every_length_up_to_1100_agrees_with_xxhash(seed, vectors):
    data = np.random.default_rng(seed).bytes(1100)
    for length in range(len(data) + 1):
        found = payload_sums(data[:length], vectors=vectors)
        assert found == (xxhash.xxh3_64_intdigest(data[:length]), weighted_sum(data[:length])), length


@pytest.mark.parametrize("vectors", [0, 1, 2])
def test_lengths_around_the_borders_of_blocks_and_pieces_agree_with_xxhash(seed, vectors):
    """A piece is 64 KiB; the block that ends the message is summed apart, so each border is a case of its own."""
    rng = np.random.default_rng(seed)
    borders = [2048, 1 << 16, (1 << 16) + 1024, 3 << 16]
    lengths = [border + step for border in borders for step in (-65, -64, -1, 0, 1, 3, 64, 65)]
    lengths += rng.integers(1 << 17, 1 << 20, 5).tolist()
    data = rng.bytes(2 << 20)
    for length in lengths:
        at = int(rng.integers(0, len(data) - length + 1))
        piece = data[at : at + length]
        assert payload_sums(piece, vectors=vectors) == (xxhash.xxh3_64_intdigest(piece), weighted_sum(piece)), length


def test_large_words_and_weights_do_not_overflow_differently():
    data = b"\xff" * ((5 << 20) + 3)
    assert payload_sums(data) == payload_sums(data, vectors=0)
    assert payload_sums(data) == (xxhash.xxh3_64_intdigest(data), weighted_sum(data))
