"""The lower tier's half in each vLLM worker: the store of one rank, which does what the scheduler's half asks for."""

import contextlib
import os
import select
import threading
import time
from dataclasses import dataclass

import numpy as np

from kvortex.index import NO_SLOT
from kvortex.integrations.vllm.messages import ERASE, GET, PUT, RANGE_SLOTS, Found, Moved, TierTransfer
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.disk.adoption import Adoption
from kvortex.tiers.disk.tier import NO_TAG

MOST_ROWS = 16_384  # found blocks in one report


@dataclass
class Waiting:
    """A PUT behind a SAVE."""

    transfer: TierTransfer
    steps: int  # that must begin before this PUT may begin
    is_saved: bool = False


class WorkerTier:
    """The store of one rank.

    Parameters
    ----------
    store : DiskStore or RemoteStore
    block_bytes : int
        Of every block in this rank.
    put_lag : int
        Steps that begin before the scheduler can know that what a SAVE copied is wrong.

    Notes
    -----
    Called by the thread that runs the model. Only `wait_a_moment` and `close` wait for I/O. What a step saves may have
    been computed from a load that failed, which the scheduler learns when the step is over. So a PUT behind a SAVE
    begins `put_lag` steps later, unless its slots are erased by then. PUTs that wait when the server ends are dropped.
    """

    def __init__(self, store, block_bytes, put_lag=1):
        self.store, self.block_bytes, self.put_lag = store, block_bytes, put_lag
        self.waiting = {}  # number of a SAVE -> the PUT behind it, a `Waiting`
        self.running = {}  # number -> batch
        self.moved = {}  # number -> `Moved` of those that are over, for the next report
        self.is_told = False  # whether a report said that the store is open
        self.ranges = Ranges(store.num_slots)
        self.names = getattr(store, "names", None)  # on a server: there the scheduler's half itself asks what it has
        if self.names is None:
            self.adoption = Adoption(store, self.ranges, NO_TAG, store.segments.new_slots)
        else:
            self.adoption = None
            self.ranges.add_slots(0, store.num_slots)
        self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.ready = select.poll()  # takes descriptors of any number, as `select` does not
        self.ready.register(self.event, select.POLLIN)
        store.notify(self.event)

    def begin(self, transfers):
        """Start what a step asks for, before the step saves anything."""
        for waiting in self.waiting.values():
            waiting.steps -= 1
        for transfer in transfers:
            if transfer.kind == ERASE and transfer.objects is not None:
                keys, _, counts = transfer.objects
                self.store.delete(keys, transfer.tag, timeout_ms=None, counts=counts)
            elif transfer.kind == ERASE:
                self.drop_waiting(transfer.tier_slots)
                self.store.erase(transfer.tier_slots, timeout_ms=None)
            elif transfer.save:
                if self.names is not None:  # an ERASE of these slots must not delete the old blocks
                    self.store.disown(transfer.tier_slots)
                self.waiting[transfer.save] = Waiting(transfer, self.put_lag)
            else:
                self.start(transfer)
        self.start_waiting()

    def drop_waiting(self, tier_slots):
        """Drop all of each waiting PUT that has one of these slots: its other blocks may be wrong, too."""
        for save, waiting in list(self.waiting.items()):
            if np.isin(waiting.transfer.tier_slots, tier_slots).any():
                self.drop(save)

    def drop(self, save):
        transfer = self.waiting.pop(save).transfer
        self.moved[transfer.number] = Moved(np.full(len(transfer.slots), BlockStatus.DROPPED, np.uint8), 0.0)

    def saved(self, save, *, is_good):
        """Note that a SAVE is over: the PUT behind it may begin in time or, if the SAVE failed, is dropped."""
        if save in self.waiting and not is_good:
            self.drop(save)
        elif save in self.waiting:
            self.waiting[save].is_saved = True
            self.start_waiting()

    def start_waiting(self):
        for save, waiting in list(self.waiting.items()):
            if waiting.is_saved and waiting.steps <= 0:
                self.start(self.waiting.pop(save).transfer)

    def start(self, transfer):
        kind, number, tier_slots, slots, keys, tag, timeout_ms, _, objects = transfer
        move = {PUT: self.store.put, GET: self.store.get}[kind]
        more = {} if objects is None else {"objects": objects}
        self.running[number] = move(tier_slots, slots, keys, self.block_bytes, tag=tag, timeout_ms=timeout_ms, **more)

    def collect(self):
        """Note which batches are over."""
        for number, batch in list(self.running.items()):
            if batch.done():  # until then its slots belong to the store
                self.moved[number] = Moved(batch.statuses, batch.seconds)
                del self.running[number]

    def wait_a_moment(self, timeout_ms):
        """Wait until a batch is over, for a step that computes nothing."""
        if self.running:
            self.ready.poll(timeout_ms)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.event)

    def tell(self, report):
        """Add what is new since the last report."""
        if not self.is_told:
            self.is_told, report.tier_slots = True, (1, self.store.num_slots)
            if self.names is not None and self.names.rank == 0:
                report.tier_space = self.names.namespace
        report.moved.update({number: (1, moved) for number, moved in self.moved.items()})
        self.moved = {}
        found, report.has_more = self.ranges.take(MOST_ROWS)
        report.found.update(found)

    def close(self, timeout_ms):
        """Write what the store was given, and close it, within `timeout_ms`. Waiting PUTs are dropped."""
        if self.event is None:
            return
        deadline_s = time.monotonic() + timeout_ms / 1000
        if self.adoption is not None:
            self.adoption.stop()
        self.store.flush(timeout_ms, durable=False)
        self.store.notify(None)  # I/O that hangs may end when the descriptor is in other use
        self.store.close(max(0, int(1000 * (deadline_s - time.monotonic()))))
        os.close(self.event)
        self.event = None


class Ranges:
    """What `Adoption` finds, by ranges of slots that were read whole. `Adoption` uses it as its catalogue.

    The catalogue proper is the scheduler's, which decides when every rank has reported.
    """

    def __init__(self, num_slots):
        self._num_left = np.full(-(-num_slots // RANGE_SLOTS), RANGE_SLOTS)
        self._num_left[-1] = num_slots - RANGE_SLOTS * (len(self._num_left) - 1)
        self._parts = {}  # range -> [(slots, keys)]
        self._lock = threading.Lock()
        self._whole = []  # ranges that were read, and not taken yet

    def add_slots(self, first, count):
        """Note that these slots are empty."""
        self.adopt(np.arange(first, first + count), None, np.zeros(count, np.uint32))

    def slots_of(self, keys):
        """No slot for any key: nothing is known here."""
        return np.full(len(keys), NO_SLOT, np.uint32)

    def adopt(self, slots, keys, lengths):
        """Note what these slots have, each reported once: a key, or nothing (length 0). Return where blocks are."""
        numbers = slots // RANGE_SLOTS
        is_block = lengths != 0
        with self._lock:
            for number in np.unique(numbers).tolist():
                rows = numbers == number
                self._num_left[number] -= rows.sum()
                if (rows & is_block).any():
                    self._parts.setdefault(number, []).append((slots[rows & is_block], keys[rows & is_block]))
                if self._num_left[number] == 0:
                    self._whole.append(number)
        return is_block

    def take(self, most_rows):
        """Ranges read since the last call, about `most_rows` blocks, as `WorkerReport.found`; and whether more wait."""
        found = {}
        with self._lock:
            while self._whole and most_rows > 0:
                number = self._whole.pop(0)
                parts = self._parts.pop(number, None)
                slots, keys = (np.concatenate(rows) for rows in zip(*parts, strict=True)) if parts else (
                    np.zeros(0, np.uint32), np.zeros((0, 32), np.uint8)
                )  # fmt: skip
                order = np.argsort(slots)
                found[number * RANGE_SLOTS] = 1, Found(slots[order].astype(np.uint32), keys[order])
                most_rows -= max(1, len(slots))
            return found, bool(self._whole)
