"""The oracle: every kind of wrong byte it exists to see."""

import numpy as np
import pytest

from kvortex.replay.oracle import POISON, STAMP_BYTES, Oracle, key_words, rows_differ

PIECE_BYTES = 256
WORDS = np.array([11, 22, 33], dtype=np.uint64)
GENERATIONS = np.array([1, 1, 2], dtype=np.uint32)


def content(words=WORDS, generations=GENERATIONS, piece=0, seed=0):
    rows = np.zeros((len(words), PIECE_BYTES), dtype=np.uint8)
    Oracle(PIECE_BYTES, seed).write(rows, words, generations, piece)
    return rows


def test_content_is_a_function_of_key_generation_and_piece():
    assert not rows_differ(content(), content()).any()
    body = slice(STAMP_BYTES, None)
    for other in (
        content(words=WORDS + np.uint64(1)),
        content(generations=GENERATIONS + 1),
        content(piece=1),
        content(seed=1),
    ):
        assert rows_differ(content()[:, body].copy(), other[:, body].copy()).all()


def test_blocks_with_equal_random_bytes_still_differ_by_their_stamps():
    stamps = {
        tuple(Oracle.stamps(np.array([word], np.uint64), np.array([generation], np.uint32), piece)[0].tolist())
        for word in range(5)
        for generation in range(5)
        for piece in range(5)
    }
    assert len(stamps) == 125


@pytest.mark.parametrize("position", [0, 7, STAMP_BYTES, 100, PIECE_BYTES - 1])
def test_one_flipped_bit_is_seen_anywhere(position):
    rows = content()
    rows[1, position] ^= 1
    assert rows_differ(rows, content()).tolist() == [False, True, False]


def test_shifted_swapped_torn_and_poisoned_blocks_are_seen():
    good = content()
    torn = good.copy()
    torn[:, PIECE_BYTES // 2 :] = content(generations=GENERATIONS + 1)[:, PIECE_BYTES // 2 :]
    for bad in (np.roll(good, 1, axis=1), np.roll(good, 8, axis=1), np.roll(good, 1, axis=0), torn,
                np.full_like(good, POISON)):  # fmt: skip
        assert rows_differ(bad, good).all()


def test_bytes_look_random():
    rows = content(np.arange(2000, dtype=np.uint64), np.ones(2000, dtype=np.uint32))
    counts = np.bincount(rows[:, STAMP_BYTES:].ravel(), minlength=256)
    assert counts.min() > 0.9 * counts.mean() and counts.max() < 1.1 * counts.mean()


def test_key_words_are_the_first_eight_bytes():
    keys = np.arange(64, dtype=np.uint8).reshape(2, 32)
    assert key_words(keys).tolist() == [int.from_bytes(bytes(key[:8]), "little") for key in keys]
