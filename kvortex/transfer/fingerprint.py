"""Fingerprints: if two layouts have the same one, blocks saved from one can be loaded into the other."""

import hashlib
import json
from itertools import groupby


def fingerprint_of_layout(name, block_bytes, pieces, kept):
    """Compute the SHA-256 of this JSON text, in ASCII and without blanks::

        ["kvortex layout 1", name, block_bytes, [[count, piece], ...], kept]

    Parameters
    ----------
    name : str
        Of the cache.
    block_bytes : int
    pieces : list
        What a block consists of, in its order. Equal neighbours are one entry with their count. A piece is a number of
        bytes, or a type and axes ``[type, [axis, length], ...]``. The axis of the blocks and axes of length 1 are left
        out; the planes (K and V) are an axis. Axes are numbered in the order of the shape and listed in the order of
        the bytes. The type is its name, or, if that is not known, the size of an element.
    kept : list of int or None
        If runs are named more than once: the numbers of those that count.

    Returns
    -------
    bytes
        32.
    """
    counted = [[len(list(equal)), piece] for piece, equal in groupby(pieces)]
    return digest(["kvortex layout 1", name, block_bytes, counted, kept])


def fingerprint_of_part(whole, spans):
    """Compute the SHA-256 of this JSON text, in ASCII and without blanks::

        ["kvortex part 1", whole, [[offset, length], ...]]

    Parameters
    ----------
    whole : bytes
        The fingerprint of the layout; in hexadecimal digits.
    spans : iterable of (int, int)
        Which bytes of its blocks the part has, in the order of the part. Those that touch are joined.

    Returns
    -------
    bytes
        32.
    """
    joined = []
    for offset, length in spans:
        if joined and sum(joined[-1]) == offset:
            joined[-1][1] += length
        else:
            joined.append([offset, length])
    return digest(["kvortex part 1", whole.hex(), joined])


def fingerprint_of_packed(layout, version, planes):
    """Compute the SHA-256 of this JSON text, in ASCII and without blanks::

        ["kvortex packed 1", version, layout, [[first_byte, num_rows, row_bytes, step_bytes, bits, offset], ...]]

    Parameters
    ----------
    layout : bytes
        The fingerprint of the layout; in hexadecimal digits.
    version : int
        Of the packed format.
    planes : list of tuple
        For each plane its place in a block, how it is coded, and its place in the packed block.

    Returns
    -------
    bytes
        32.
    """
    return digest(["kvortex packed 1", version, layout.hex(), planes])


def digest(content):
    """SHA-256 of `content` as JSON."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).digest()


def piece_of_axes(kind, axes):
    """A piece with axes in the order of its bytes: `axes` has (axis, length) pairs."""
    return [kind, *([axis, length] for axis, length in axes if length > 1)]
