"""What every byte of a block should be, as a function of its key, its generation and the piece.

A piece is a slice of one large random table, at an offset mixed from those three, with the three themselves written
over its first bytes: a block swapped, shifted, torn, or left over from an earlier save of the same key differs.
"""

import numpy as np

STAMP_BYTES = 16  # key word (8), generation and piece (8)
POISON = 0xA5

_TABLE_BITS = 22  # 4 MiB: large against a coincidence, small enough to stay in cache
_MIX_KEY = np.uint64(0x9E3779B97F4A7C15)
_MIX_PIECE = np.uint64(0xC2B2AE3D27D4EB4F)


def key_words(keys):
    """First 8 bytes of each key as ``(n,)`` uint64: what stands for the key in a stamp."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]


class Oracle:
    """Writes and checks the pieces of blocks.

    Parameters
    ----------
    piece_bytes : int
        A multiple of `STAMP_BYTES`.
    seed : int
        Of the random table.
    """

    def __init__(self, piece_bytes, seed=0):
        self.piece_bytes = piece_bytes
        self._table = np.random.default_rng(seed).integers(0, 256, (1 << _TABLE_BITS) + piece_bytes, dtype=np.uint8)

    @staticmethod
    def stamps(words, generations, piece):
        """Stamps of one piece of n blocks, ``(n, 2)`` uint64."""
        stamps = np.empty((len(words), 2), dtype=np.uint64)
        stamps[:, 0] = words
        stamps[:, 1] = (generations.astype(np.uint64) << np.uint64(32)) | np.uint64(piece)
        return stamps

    def write(self, rows, words, generations, piece):
        """Fill `rows`, ``(n, piece_bytes)`` uint8, with the content of one piece of n blocks."""
        stamps = self.stamps(words, generations, piece)
        mixed = (stamps[:, 0] ^ (stamps[:, 1] * _MIX_PIECE)) * _MIX_KEY
        table, size = self._table, self.piece_bytes
        for row, offset in zip(rows, (mixed >> np.uint64(64 - _TABLE_BITS)).tolist(), strict=True):
            row[:] = table[offset : offset + size]
        rows[:, :STAMP_BYTES] = stamps.view(np.uint8)


def rows_differ(rows, expected):
    """``(n,)`` bool: which rows of two ``(n, m)`` uint8 arrays, m a multiple of 8, differ anywhere."""
    return (rows.view(np.uint64) != expected.view(np.uint64)).any(axis=1)
