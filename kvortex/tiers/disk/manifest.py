"""The manifest: which block lay where when a tier was closed, and in which order they would have gone.

It only makes a restart fast. Headers are the truth: what a row says wrong is a miss when the block is read, and a slot
without a row is scanned. Whoever opens the tier takes the manifest away, so that none outlives the state it tells of.
"""

import contextlib
import os
import sqlite3
from pathlib import Path

import numpy as np

from kvortex.log import warn_once

NAME, VERSION = "manifest.sqlite", 1
ROW_BYTES = 128  # of the quota, for each slot; a row takes half of it


def write_manifest(folder, tag, slots, keys, lengths):
    """Write the blocks of a catalogue, the first to go last. Failing is told and costs only time."""
    path = os.path.join(folder, NAME)
    with contextlib.suppress(OSError):
        os.unlink(path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = OFF")  # a torn manifest is not read, and it is no loss
            database.execute("PRAGMA synchronous = OFF")
            database.execute("BEGIN")
            database.execute("CREATE TABLE blocks (position INTEGER PRIMARY KEY, slot INT, key BLOB, length INT)")
            rows = zip(range(len(slots)), slots.tolist(), map(bytes, keys), lengths.tolist(), strict=True)
            database.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?)", rows)
            database.execute("CREATE TABLE about (version INT, tag BLOB, num_blocks INT)")
            database.execute("INSERT INTO about VALUES (?, ?, ?)", (VERSION, tag, len(slots)))
            database.execute("COMMIT")
    except (OSError, sqlite3.Error) as error:
        warn_once("manifest_not_written", "the next start of the disk tier scans all headers", reason=str(error))
        with contextlib.suppress(OSError):
            os.unlink(path)


def take_manifest(folder, tag, num_slots, payload_bytes):
    """Read the manifest and take it away.

    Returns
    -------
    slots, keys, lengths : (n,) uint32, (n, 32) uint8, (n,) uint32 arrays
        The last to go first; empty where there is no manifest, or none for this tag that can be read.
    """
    path = os.path.join(folder, NAME)
    rows = []
    if os.path.isfile(path):
        with contextlib.suppress(sqlite3.Error, ValueError, OverflowError):
            rows = _read(path, tag, num_slots, payload_bytes)
        with contextlib.suppress(OSError):
            os.unlink(path)
    if not rows:
        return np.zeros(0, np.uint32), np.zeros((0, 32), np.uint8), np.zeros(0, np.uint32)
    slots, keys, lengths = zip(*rows, strict=True)
    keys = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
    return np.array(slots, np.uint32), keys, np.array(lengths, np.uint32)


def _read(path, tag, num_slots, payload_bytes):
    """The rows of a manifest that is whole; none where a row cannot be true."""
    with contextlib.closing(
        sqlite3.connect(Path(path).absolute().as_uri() + "?mode=ro&immutable=1", uri=True)
    ) as database:
        ((version, of_tag, num_blocks),) = database.execute("SELECT version, tag, num_blocks FROM about").fetchall()
        if version != VERSION or of_tag != tag:
            return []
        rows = database.execute("SELECT slot, key, length FROM blocks ORDER BY position").fetchall()
    could_be = all(
        isinstance(slot, int) and 0 <= slot < num_slots and isinstance(key, bytes) and len(key) == 32
        and isinstance(length, int) and 0 < length <= payload_bytes
        for slot, key, length in rows
    )  # fmt: skip
    return rows if could_be and len(rows) == num_blocks == len({slot for slot, _, _ in rows}) else []
