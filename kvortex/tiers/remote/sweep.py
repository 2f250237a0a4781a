"""Bound what an object tier keeps: remove blocks, the oldest first. Safe beside engines: a file gone is a miss."""

import re
import time
from dataclasses import dataclass
from operator import itemgetter

from kvortex.errors import ConfigError, KVortexError, TierError

NAME = re.compile(r"(?:.*/)?[0-9a-f]{8}/[0-9a-f]{2}/[0-9a-f]{64}", re.DOTALL)  # a block
STAGED = re.compile(NAME.pattern + r"#\d+", re.DOTALL)  # a block that obstore is writing, or left unfinished
STAGED_S = 3600  # no write takes so long
BATCH = 1000  # objects that one request removes


@dataclass
class Swept:
    """How much was found, and how much of that was removed."""

    blocks: int = 0
    bytes: int = 0
    removed_blocks: int = 0
    removed_bytes: int = 0
    removed_temp_files: int = 0


def sweep(tier, *, max_bytes=None, older_than_s=None, dry_run=False, progress=None):
    """Remove blocks until no limit is exceeded, and files that a killed writer left.

    Parameters
    ----------
    tier : ObjectTier
    max_bytes : int, optional
        What may stay, of all models and ranks together.
    older_than_s : float, optional
        Blocks that were written (on ``file://``: or read) longer ago are removed.
    dry_run : bool, default False
        Remove nothing, and return what would be removed.
    progress : callable, optional
        Called with the share that is removed, 0 to 1, and a function that returns a text about it.

    Returns
    -------
    swept : Swept

    Raises
    ------
    ConfigError
        Neither limit is given.
    TierError
        The client failed; blocks that it removed by then are gone.

    Notes
    -----
    Only files below the URL whose names are those of blocks are ever removed. By size, the oldest are removed first;
    names and times of all blocks are held in memory.
    """
    if max_bytes is None and older_than_s is None:
        raise ConfigError("say how much may stay: max_bytes, older_than_s, or both")
    try:
        return _sweep(tier.client(), time.time(), max_bytes, older_than_s, dry_run, progress)
    except KVortexError:
        raise
    except Exception as error:
        raise TierError(f"{tier.url} cannot be swept: {type(error).__name__}: {error}") from error


def _sweep(client, now_s, max_bytes, older_than_s, dry_run, progress):
    swept, found, staged = Swept(), [], []
    for name, nbytes, written_s in client.list():
        if NAME.fullmatch(name):
            found.append((written_s, nbytes, name))
            swept.blocks, swept.bytes = swept.blocks + 1, swept.bytes + nbytes
            if progress is not None and len(found) % 1000 == 0:
                progress(0, lambda: f"{len(found)} blocks found")
        elif STAGED.fullmatch(name) and now_s - written_s > STAGED_S:
            staged.append(name)
    found.sort(key=itemgetter(0))
    going, left = [], swept.bytes
    for written_s, nbytes, name in found:
        is_old = older_than_s is not None and now_s - written_s > older_than_s
        if not is_old and (max_bytes is None or left <= max_bytes):
            break
        going.append(name)
        left -= nbytes
    swept.removed_blocks, swept.removed_bytes = len(going), swept.bytes - left
    swept.removed_temp_files = len(staged)
    for first in range(0, 0 if dry_run else len(going), BATCH):
        client.remove(going[first : first + BATCH])
        if progress is not None:
            done = min(first + BATCH, len(going))
            progress(done / len(going), lambda done=done: f"{done} of {len(going)} blocks removed")
    for name in () if dry_run else staged:
        client.remove([name])
    return swept
