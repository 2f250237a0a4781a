"""How large should a pool be? Hit ratio against pool size for a trace, without moving a byte.

LRU is the real `BlockIndex`, asked and told what a replay with one request in flight asks and tells it. Beside it
stands Belady's bound: what the best of all policies would find, one that knows the future and may leave a block out.
"""

import heapq
import time
from dataclasses import dataclass

import numpy as np

import kvortex
from kvortex.arguments import whole_number
from kvortex.config import bytes_text
from kvortex.memory.limits import lacking_memory
from kvortex.replay.oracle import key_words

CHUNK = 1 << 16  # touches that are Python numbers at once
PROGRESS_S = 0.1
SLOT_BYTES = 128  # more than what an index takes for a slot


@dataclass(frozen=True)
class SweepPoint:
    """What pools of one size find: blocks of leading runs, and the tokens in them."""

    pool_blocks: int
    lru_blocks: int
    lru_tokens: int
    belady_blocks: int
    belady_tokens: int


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes
    ----------
    requests, blocks_touched, tokens : int
        Of the trace.
    distinct_blocks : int
        A pool of so many never evicts.
    unbounded_blocks, unbounded_tokens : int
        What such a pool finds.
    points : list of SweepPoint
        In order of size.
    """

    requests: int
    blocks_touched: int
    tokens: int
    distinct_blocks: int
    unbounded_blocks: int
    unbounded_tokens: int
    points: list


def sweep(requests, sizes, progress=None):
    """Find what pools of several sizes would hit.

    Parameters
    ----------
    requests : sequence of Request
    sizes : iterable of int
        Pool sizes in blocks, 1 or more each.
    progress : callable, optional
        Called with the share that is done, 0 to 1, and what is being done; about every tenth of a second.

    Returns
    -------
    SweepResult

    Raises
    ------
    kvortex.ConfigError
        A size is below 1, or there is none; the indexes of all sizes do not fit into memory.
    """
    sizes = sorted({whole_number(size, "a pool size") for size in sizes})
    if not sizes or sizes[0] < 1:
        raise kvortex.ConfigError(f"pool sizes must be 1 block or more, got {sizes or 'none'}")
    requests = list(requests)
    steps = _Steps(progress, 1 + len(sizes))
    words, lru = _replay_lru(requests, sizes, steps)
    next_uses, distinct = next_use(words)
    belady = [_found(requests, belady_hits(next_uses, size, steps)) for size in sizes]
    seen_before = np.zeros(len(words), bool)
    seen_before[next_uses[next_uses < len(words)]] = True
    unbounded = _found(requests, seen_before)
    return SweepResult(
        len(requests),
        len(words),
        sum(request.input_length for request in requests),
        distinct,
        *unbounded,
        [SweepPoint(size, *lru_hits, *best) for size, lru_hits, best in zip(sizes, lru, belady, strict=True)],
    )


class _Index:
    """A `BlockIndex` without a pool: its slots are numbers."""

    def __init__(self, num_slots):
        self._index = kvortex.BlockIndex(num_slots)
        self._index.add_slots(0, num_slots)

    def serve(self, keys):
        """Load the leading run, save the rest, touch all; return the length of the run."""
        found = self._index.acquire(keys)
        self._index.release(found)
        slots, statuses = self._index.reserve(keys[len(found) :], 1, after=keys[: len(found)])
        self._index.commit(slots[statuses == kvortex.ReserveStatus.NEW])
        self._index.touch(keys)
        return len(found)


def _replay_lru(requests, sizes, steps):
    """All sizes in one pass -> a word for each block touched, and (blocks, tokens) of each size."""
    touched = sum(len(request.hash_ids) for request in requests)
    slots = [max(1, min(size, touched)) for size in sizes]  # one of billions would only take memory
    nbytes = SLOT_BYTES * sum(slots)
    lacking = lacking_memory(nbytes)
    if lacking is not None:
        raise kvortex.ConfigError(
            f"the indexes of {len(sizes)} pools need {bytes_text(nbytes)}, and {lacking[0]} leaves "
            f"{bytes_text(lacking[1])}; ask for fewer or smaller pools at once"
        )
    indexes = [_Index(num_slots) for num_slots in slots]
    hits = [[0, 0] for _ in sizes]
    words, done = np.empty(touched, np.uint64), 0
    for request in requests:
        keys = request.keys()
        words[done : done + len(keys)] = key_words(keys)
        done += len(keys)
        if len(keys):
            for index, sums in zip(indexes, hits, strict=True):
                leading = index.serve(keys)
                sums[0] += leading
                sums[1] += request.tokens(leading)
        steps.at(done, touched or 1, "LRU")
    steps.end()
    return words, hits


def next_use(words):
    """When each touch's block is touched next.

    Returns
    -------
    next_uses : (n,) int64 array
        Position of the next touch of the same block; n where there is none.
    distinct : int
        How many blocks there are.
    """
    n = len(words)
    order = np.argsort(words, kind="stable")
    same = words[order[1:]] == words[order[:-1]]
    next_uses = np.full(n, n, np.int64)
    next_uses[order[:-1][same]] = order[1:][same]
    return next_uses, n - int(same.sum())


def belady_hits(next_uses, pool_blocks, steps=None):
    """Which touches hit in a pool of so many blocks from which the block that is needed last is left out.

    No policy hits more often (Belady 1966, with bypass). It keeps whole prefixes, too: a block is not needed later than
    the blocks that extend it, so it goes after them. Hence the hits of a request are a leading run, and the bound
    holds for leading runs.

    Parameters
    ----------
    next_uses : (n,) int64 array
        From `next_use`.
    pool_blocks : int

    Returns
    -------
    hits : (n,) bool array
    """
    n = len(next_uses)
    # A block in the pool is known by the moment of its next use, which no two blocks share; so what is here when its
    # moment comes is a hit, and is here under a later moment from then on.
    here = bytearray(n)
    heap = []  # of -moment; those that are over are below all that are to come, so they are never popped
    size = moment = 0
    for first in range(0, n, CHUNK):
        for following in next_uses[first : first + CHUNK].tolist():
            size -= here[moment]
            moment += 1
            if following == n:  # never again
                continue
            here[following] = 1
            if size < pool_blocks:
                size += 1
                heapq.heappush(heap, -following)
            else:
                here[-heapq.heappushpop(heap, -following)] = 0
        if steps is not None:
            steps.at(moment, n, "Belady")
    if steps is not None:
        steps.end()
    return np.frombuffer(here, np.uint8).astype(bool)


def _found(requests, hits):
    """Blocks and tokens of the leading runs, from one bool a touch."""
    before = np.concatenate(([0], np.cumsum(hits)))
    ends = np.cumsum([len(request.hash_ids) for request in requests], dtype=np.int64)
    runs = np.diff(before[ends], prepend=0).tolist()
    return sum(runs), sum(request.tokens(run) for request, run in zip(requests, runs, strict=True))


class _Steps:
    """Shares of a work of several steps, told from time to time."""

    def __init__(self, tell, num_steps):
        self._tell = tell
        self._num_steps = num_steps
        self._done = 0
        self._next_s = 0.0

    def at(self, done, total, what):
        if self._tell is not None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + PROGRESS_S
            self._tell((self._done + done / total) / self._num_steps, what)

    def end(self):
        self._done += 1
        if self._tell is not None and self._done == self._num_steps:
            self._tell(1.0, "done")
