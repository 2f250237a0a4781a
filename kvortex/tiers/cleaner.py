"""The cleaner writes blocks of RAM to the tier, coldest first, so that eviction never has to wait for a write.

It goes through all blocks in the order of eviction. If a block was admitted when it was saved, the cleaner writes it;
if the tier has the block already, the cleaner touches it there; it skips all others. A block that came from a lossy
record is never written again, nor is one whose record was too large. Blocks that the cleaner has gone through stay
colder than the rest, and keep their order. So RAM evicts in the same order as without a cleaner, and the tier's
order of eviction is the order in which blocks leave RAM.

One thread calls it. Meanwhile others clear and discard, RAM first and then the tier. So a block counts as written only
if RAM still has it in the slot that it was taken from.
"""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from kvortex.index import BlockFact, CommitStatus, ReserveStatus
from kvortex.log import warn_once
from kvortex.tiers.base import BlockStatus

WINDOW_BYTES = 16 << 20  # written as one batch
MOST_WINDOWS = 4
PUT_TIMEOUT_MS = 10_000
RETRY_S = 0.1
REFUSED = (BlockStatus.READ_ONLY, BlockStatus.NO_SPACE, BlockStatus.TOO_LARGE)  # trying again would change nothing
MUCH_TOO_LARGE, LEAST_RECORDS = 0.01, 100  # from which share on, of how many records, it is logged


@dataclass
class Cleaning:
    """One batch of blocks on its way to the tier."""

    blocks: object  # what `BlockIndex.coldest` returned
    has: np.ndarray  # positions in `blocks` of those that the tier has already
    refused: np.ndarray  # positions of those that the tier had no slot for
    written: np.ndarray  # positions of those that are being written, hottest first
    tier_slots: np.ndarray  # of those being written
    batch: object  # the store's; None if nothing is written
    deadline_s: float
    is_late: bool = False


class Cleaner:
    """Parameters: the engine's index and pool, the open tier, its write budget and its breaker."""

    def __init__(self, index, pool, tier, budget, breaker):
        self.index, self.tier, self.budget, self.breaker = index, tier, budget, breaker
        self._window_blocks = max(1, WINDOW_BYTES // pool.stride_bytes)
        self.most_pinned = max(1, min(pool.num_slots // 8, MOST_WINDOWS * self._window_blocks, tier.queue_blocks // 2))
        self._record_bytes = tier.record_bytes
        self.blocks_a_step, self.num_taken = float("inf"), 0  # blocks to look at in a step; blocks looked at so far
        self.num_pinned = 0
        self.num_written = self.num_written_beyond = self.num_failed = self.num_too_large = 0
        self._out = deque()  # batches in flight, in the order in which they were begun and end
        self._num_passed = 0  # blocks skipped in this pass, none of which the tier has
        self._num_staying = self.num_staying = 0  # blocks that only RAM can have, in this pass and in the last one
        self._admits_all = False  # write skipped blocks too, for the rest of this pass
        self._for_a_flush = False
        self._flushes, self._flushing = [], []  # events: whose pass has not begun, whose pass is going on
        self._not_before_s = 0.0

    @property
    def is_busy(self):
        """Whether batches are in flight or will be tried again, or a flush waits."""
        return bool(self._out or self._flushes or self._flushing) or time.monotonic() < self._not_before_s

    def begin_flush(self, over):
        """Begin a pass that writes all blocks; set the event `over` at its end."""
        self._flushes.append(over)

    def give_up_flush(self, over):
        """Forget the event of a flush: its caller no longer waits."""
        for events in (self._flushes, self._flushing):
            if over in events:
                events.remove(over)

    def step(self, now_s):
        """End batches that are over and begin others; return whether another call may find more to do at once."""
        ended = self._end_batches(now_s)
        if self._out and (self._flushes or not self.breaker.allows(now_s)):
            return ended  # a new pass begins when no batch is in flight
        if self._flushes:
            self._flushing, self._flushes = self._flushing + self._flushes, []
            self._begin_pass(True)
        elif self._num_passed and not self._out and not self._admits_all and self.budget.is_idle():
            self._begin_pass(False)
        elif self._admits_all and not self._for_a_flush and not self.budget.is_idle():
            self._admits_all = False
        begun, num_taken = False, self.num_taken
        while now_s >= self._not_before_s and self.num_pinned < self.most_pinned and self.breaker.allows(now_s):
            if self.num_taken - num_taken >= self.blocks_a_step or not self._begin_batch(now_s):
                break
            begun = True
            self._end_batches(now_s)  # a batch with nothing to write is over at once
        return ended or begun

    def _begin_pass(self, for_a_flush):
        self.index.offer_again()
        self._admits_all, self._for_a_flush, self._num_passed, self._num_staying = True, for_a_flush, 0, 0

    def _end_pass(self):
        """End the pass, which has come to the hottest block, if all its batches are over."""
        if self._out:
            return
        self._admits_all = self._for_a_flush = False
        self.num_staying = self._num_staying
        for over in self._flushing:
            over.set()
        self._flushing = []

    def _begin_batch(self, now_s):
        """Take the coldest blocks that this pass has not had, and give the store those that are to be written."""
        tag = self.tier.tag  # read before blocks are taken: no block in RAM now is older than this tag
        blocks = self.index.coldest(min(self._window_blocks, self.most_pinned - self.num_pinned))
        if not len(blocks.slots):
            self._end_pass()
            return False
        if self.tier.tag != tag:  # cleared meanwhile, so these blocks may be newer than the tag
            self.index.release(blocks.slots, offered=False)
            return True
        is_clean = (blocks.facts & BlockFact.CLEAN) != 0
        is_paid = ((blocks.facts & BlockFact.ADMITTED) != 0) & ~is_clean
        stays = (blocks.facts & BlockFact.RAM_ONLY) != 0
        is_wanted = (is_clean | is_paid | self._admits_all) & ~stays | self.tier.catalogue.lookup(blocks.keys)[0]
        wanted = np.flatnonzero(is_wanted)[::-1]  # the block that leaves RAM last becomes the tier's most recent
        tier_slots, statuses = self.tier.catalogue.reserve(blocks.keys[wanted], blocks.lengths[wanted])
        is_new = statuses == ReserveStatus.NEW
        gone = tier_slots[is_new & stays[wanted]]  # discarded since the lookup
        self._erase(gone)
        self.tier.catalogue.abort(gone)
        is_new &= ~stays[wanted]
        written, tier_slots = wanted[is_new], tier_slots[is_new]
        batch = None
        if len(written):
            try:
                batch = self.tier.store.put(
                    tier_slots,
                    blocks.slots[written],
                    blocks.keys[written],
                    blocks.lengths[written],
                    tag=tag,
                    timeout_ms=PUT_TIMEOUT_MS,
                )
            except BaseException:
                self.tier.catalogue.abort(tier_slots)
                self.index.release(blocks.slots, offered=True)
                raise
        # A block that was clean and is written again, because the tier had evicted it, costs credit. A block that was
        # paid for and is not written, because the tier has it, gives its credit back.
        self.budget.spend(int(is_clean[written].sum()) * self._record_bytes)
        self.budget.give_back(int(is_paid[wanted[statuses == ReserveStatus.PRESENT]].sum()) * self._record_bytes)
        self.num_taken += len(blocks.slots)
        self._num_passed += int((~is_wanted & ~stays).sum())
        self._num_staying += int((stays & ~is_clean).sum())
        self.num_pinned += len(blocks.slots)
        has, refused = wanted[statuses == ReserveStatus.PRESENT], wanted[statuses > ReserveStatus.PRESENT]
        self._out.append(Cleaning(blocks, has, refused, written, tier_slots, batch, now_s + PUT_TIMEOUT_MS / 1000))
        return True

    def _end_batches(self, now_s):
        """End the batches that are over, in the order in which they were begun."""
        ended = False
        while self._out and (self._out[0].batch is None or self._out[0].batch.done()):
            self._end_batch(self._out.popleft(), now_s)
            ended = True
        for cleaning in self._out:
            if cleaning.batch is not None and not cleaning.is_late and now_s >= cleaning.deadline_s:
                statuses = cleaning.batch.statuses
                if (statuses != BlockStatus.PENDING).all():
                    cleaning.is_late = True  # its slots belong to the store until it is over
                    self.breaker.saw(statuses, now_s)
        return ended

    def _end_batch(self, cleaning, now_s):
        blocks, written, batch = cleaning.blocks, cleaning.written, cleaning.batch
        statuses = np.zeros(0, np.uint8) if batch is None else batch.statuses
        is_ok = statuses == BlockStatus.OK
        passed, clean = np.ones(len(blocks.slots), bool), np.zeros(len(blocks.slots), bool)
        passed[written] = is_ok | np.isin(statuses, REFUSED)
        passed[cleaning.refused] = not self.tier.is_adopting  # while the tier scans its disk, there may be room later
        clean[cleaning.has] = True
        is_kept = is_ok & (self.index.slots_of(blocks.keys[written]) == blocks.slots[written])
        self._erase(cleaning.tier_slots[~is_kept])
        self.tier.catalogue.abort(cleaning.tier_slots[~is_kept])
        kept = cleaning.tier_slots[is_kept]
        is_there = self.tier.catalogue.commit(kept) == CommitStatus.READY
        self._erase(kept[~is_there])  # discarded meanwhile
        clean[written[is_kept]] = is_there
        too_large = np.zeros(len(blocks.slots), bool)
        too_large[written] = statuses == BlockStatus.TOO_LARGE
        is_paid = (blocks.facts & (BlockFact.ADMITTED | BlockFact.CLEAN)) == BlockFact.ADMITTED
        self.budget.give_back(int((too_large & is_paid).sum()) * self._record_bytes)
        self.index.release(blocks.slots, offered=passed, clean=clean, ram_only=too_large)
        self._num_staying += int(too_large.sum())
        self.num_pinned -= len(blocks.slots)
        is_beyond = (blocks.facts[written] & (BlockFact.ADMITTED | BlockFact.CLEAN)) == 0
        self.num_written += int(is_ok.sum())
        self.num_written_beyond += int((is_ok & is_beyond).sum())
        self.num_failed += int((~is_ok).sum())
        self.count_too_large(int(too_large.sum()))
        if batch is not None and not cleaning.is_late:
            self.breaker.saw(statuses, now_s)
        if not passed.all():
            self._not_before_s = now_s + RETRY_S

    def count_too_large(self, count, num_others=0):
        """Count records that did not fit into a slot of the tier, and say so if there are many.

        `num_others` were written by others.
        """
        self.num_too_large += count
        num_records = self.num_written + self.num_too_large + num_others
        if count and num_records >= LEAST_RECORDS and self.num_too_large > MUCH_TOO_LARGE * num_records:
            warn_once(
                "records_too_large",
                "more than 1 % of the blocks take more room than a slot of the tier has, and are not written; "
                "set slot_ratio lower, by a tenth at first",
                tier=self.tier.name,
                slot_ratio=self.tier.slot_ratio,
            )

    def _erase(self, tier_slots):
        if len(tier_slots):
            self.tier.store.erase(tier_slots, timeout_ms=None)
