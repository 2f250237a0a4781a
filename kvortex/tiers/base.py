"""What every tier promises. A tier is two halves, equal in their slot numbers: a catalogue and a store.

The catalogue knows which block lies in which tier slot; it is a `BlockIndex`, with its states, pins and recency. The
store moves blocks between tier slots and the slots of a pinned pool, and knows nothing of which block is whose. Whoever
has both pairs their verbs::

    put   catalogue.reserve -> store.put -> catalogue.commit where OK; elsewhere store.erase, catalogue.abort
    get   catalogue.acquire -> store.get -> catalogue.release, and discard where not OK

A slot is erased when its put failed, when its commit answers DISCARDED, and when its block is discarded: else a copy of
a block that the catalogue no longer knows would be adopted by the next process.
"""

from typing import Protocol

import numpy as np

from kvortex.tiers._record import BlockStatus

__all__ = ["BUSY", "HIT", "MISS", "Batch", "BlockStatus", "Store", "look_up"]

MISS, HIT, BUSY = 0, 1, 2


def look_up(catalogue, keys):
    """Say where blocks are, without I/O.

    Parameters
    ----------
    catalogue : BlockIndex
    keys : (n, 32) uint8 array

    Returns
    -------
    answers : (n,) uint8 array
        HIT: the tier has it. BUSY: it is being written, so that it will be there or not. MISS: it is not there.
    """
    slots = catalogue.slots_of(keys)  # before the look at what is ready: what a commit in between made so is a HIT
    answers = np.where(slots == np.uint32(0xFFFFFFFF), np.uint8(MISS), np.uint8(BUSY))
    answers[catalogue.lookup(keys)[0]] = HIT
    return answers


class Batch(Protocol):
    """Blocks that a store was given in one call.

    A block's status is final as soon as it is not PENDING. A block that is LATE may still be in its I/O: its slots, of
    the tier and of the pool, are the store's until `done()`.
    """

    statuses: np.ndarray
    """(n,) uint8 array, a `BlockStatus` each, as they are now."""

    seconds: float | None
    """From the call to the end of its I/O, of which somebody may hear later; None until `done()`."""

    def wait(self, timeout_ms=None):
        """Block (GIL released) until each block has its status, or for `timeout_ms`; return `statuses`.

        The batch's own deadline ends every wait.
        """

    def done(self):
        """Whether all I/O of the batch has returned, so that its slots may be used for something else."""


class Store(Protocol):
    """Blocks in the slots of a tier.

    Every verb takes a batch, returns at once, and may be called from any thread. The queue is bounded: blocks for which
    it has no room are DROPPED, and nobody waits for room. Operations on one tier slot run in the order of the calls. A
    failure is the block's, never an exception; what is wrong in a call (an unknown slot, a length of 0) raises
    ValueError before anything is begun. `tag` has 32 bytes and names the weights. `timeout_ms` counts from the call;
    what has no status by then is LATE.

    Attributes
    ----------
    num_slots : int
    payload_bytes : int
        Of the longest block.
    codec : str
        Of the records. What is read from any but "exact" ones is close to what was written, not equal to it.
    record_bytes : int
        Of the longest record, with its header page.
    """

    num_slots: int
    payload_bytes: int
    codec: str
    record_bytes: int

    def put(self, slots, pool_slots, keys, lengths, *, tag, group=0, timeout_ms):
        """Write blocks from slots of the pool into slots of the tier.

        The caller keeps the pool's slots pinned until the batch is done. A put that fails may leave an earlier record
        or a torn one behind; neither is ever taken for this block, nor for one with another tag. TOO_LARGE: it would
        fail again.
        """

    def get(self, slots, pool_slots, keys, lengths, *, tag, timeout_ms):
        """Read blocks into slots of the pool. OK: the block that was asked for is there, all of it, verified."""

    def erase(self, slots, *, timeout_ms):
        """Make whatever record lies in these slots unreadable; `flush` makes that durable.

        Erasing always has room in the queue. A `timeout_ms` of None is no deadline.
        """

    def scan(self, slots, *, tag, timeout_ms):
        """Read which block each slot announces, without its payload.

        The batch also has `keys`, (n, 32) uint8, and `lengths` and `groups`, (n,) uint32, where the status is OK.
        """

    def flush(self, timeout_ms, *, durable=True):
        """Wait for all that was given, then make it durable; return how many blocks are left at the end.

        At least 1 where the time was over before all was durable.
        """

    def notify(self, event_fd):
        """Write to an eventfd (`os.eventfd`) whenever a batch is over, from any thread; None ends that."""

    def stats(self):
        """A dict of numbers and facts for people."""

    def close(self, timeout_ms=5000):
        """Drop what waits, end what runs, give everything back. Idempotent.

        I/O that does not return in time keeps its memory, files and lock until the process ends.
        """
