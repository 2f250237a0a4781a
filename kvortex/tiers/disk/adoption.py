"""Adoption: what an earlier process left on the disk becomes known, in the background, from the headers alone."""

import threading

import numpy as np

from kvortex.errors import EngineClosed
from kvortex.index import NO_SLOT
from kvortex.tiers.base import BlockStatus

WINDOW_SLOTS = 64  # headers read at once: others' blocks wait behind them no longer than that
TIMEOUT_MS = 5000
RETRY_S = 0.02
STOP_MS = 20  # how long `stop` may wait for a disk that hangs
NOT_READ = (BlockStatus.LATE, BlockStatus.DROPPED, BlockStatus.PENDING)


class Adoption:
    """Scan the slots of a store and adopt into its catalogue what they hold.

    The tier serves from the start: slots of new segments are free at once, every other key is a miss until its header
    has been read. What is written meanwhile takes a free slot, else that of a block already adopted. A header is
    believed for its key and length; the payload is verified when it is read.

    Parameters
    ----------
    store : Store
    catalogue : BlockIndex
        Of as many slots, none of them added.
    tag : bytes
        Of the weights whose blocks are adopted; what has another is free room.
    new_slots : sequence of (first, count)
        What need not be read.
    known : (slots, keys, lengths), optional
        What a manifest says of other slots, the last to go first. It is adopted at once.

    Attributes
    ----------
    num_scanned, num_adopted : int
        Slots so far.
    """

    def __init__(self, store, catalogue, tag, new_slots=(), known=None):
        self.store, self.catalogue, self.tag = store, catalogue, tag
        self.num_scanned = self.num_adopted = 0
        self._lock = threading.Lock()  # held over no I/O: what is forgotten during the scan is never adopted
        self._forgotten = set()
        self._stopping = threading.Event()
        is_added = np.zeros(store.num_slots, bool)
        for first, count in new_slots:
            catalogue.add_slots(first, count)
            is_added[first : first + count] = True
        if known is not None:
            slots, keys, lengths = (rows[~is_added[known[0]]] for rows in known)
            self.num_adopted = int(catalogue.adopt(slots, keys, lengths).sum())
            is_added[slots] = True
        self._left = np.flatnonzero(~is_added)
        self._thread = threading.Thread(target=self._run, name="kvortex-adoption", daemon=True)
        self._thread.start()

    @property
    def is_over(self):
        """Whether every slot has been read."""
        return not self._thread.is_alive()

    def wait(self, timeout_ms=None):
        """Block until it is over, or for `timeout_ms`; return whether it is."""
        self._thread.join(None if timeout_ms is None else timeout_ms / 1000)
        return self.is_over

    def wait_forgotten(self, timeout_ms=None):
        """Block until what was discarded during the scan has been erased, or for `timeout_ms`; return whether it is."""
        return not self._forgotten or self.wait(timeout_ms)

    def discard(self, keys):
        """Adopt none of these keys any more; to be called before the catalogue's `discard`."""
        with self._lock:
            if not self.is_over:
                self._forgotten.update(key.tobytes() for key in keys)

    def clear(self, tag):
        """Adopt only blocks with this tag any more; to be called before the catalogue's `clear`."""
        with self._lock:
            self.tag = tag

    def stop(self):
        """End the scan where it is. Idempotent."""
        self._stopping.set()
        self._thread.join()

    def _run(self):
        try:
            while len(self._left) and not self._stopping.is_set():
                run = self._left[:WINDOW_SLOTS]
                tag = self.tag
                batch = self.store.scan(run, tag=tag, timeout_ms=TIMEOUT_MS)
                statuses = batch.statuses
                while (statuses == BlockStatus.PENDING).any() and not self._stopping.is_set():
                    statuses = batch.wait(STOP_MS)
                read = int(np.argmax(np.append(np.isin(statuses, NOT_READ), True)))
                self._adopt(run[:read], statuses[:read], batch, tag)
                self._left = self._left[read:]
                if read < len(run):
                    self._stopping.wait(RETRY_S)
        except EngineClosed:
            return

    def _adopt(self, slots, statuses, batch, tag):
        n = len(slots)
        if not n:
            return
        keys = batch.keys[:n]
        is_record = statuses == BlockStatus.OK
        with self._lock:
            wanted = is_record & (tag == self.tag) & (self.catalogue.slots_of(keys) == NO_SLOT)
            for i in np.flatnonzero(wanted) if self._forgotten else ():
                wanted[i] = keys[i].tobytes() not in self._forgotten
            self._erase(slots[is_record & ~wanted])  # before its slot is free, so before whatever is put there
            adopted = self.catalogue.adopt(slots, keys, np.where(wanted, batch.lengths[:n], 0))
            self._erase(slots[wanted & ~adopted])  # saved since the look: rare, and at worst a miss
        self.num_scanned += n
        self.num_adopted += int(adopted.sum())

    def _erase(self, slots):
        if len(slots):
            self.store.erase(slots, timeout_ms=None)
