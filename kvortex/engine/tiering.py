"""Tiering: the thread that moves blocks between RAM and the tier below, and what an engine asks of it.

The thread decides a batch at a time and does no I/O itself. Saves, loads and lookups never wait for it. The state of
cleaning and promoting belongs to it alone: other threads send it messages. So a signal handler, or a finalizer of the
garbage collector, which may run anywhere, never waits for a lock.
"""

import contextlib
import hashlib
import logging
import os
import select
import threading
import time
from collections import deque

import numpy as np

from kvortex.arguments import require_ms
from kvortex.engine.prefetch import Prefetch
from kvortex.errors import EngineClosed
from kvortex.index import NO_SLOT
from kvortex.log import log
from kvortex.stats import TierStats
from kvortex.tiers.breaker import Breaker
from kvortex.tiers.cleaner import Cleaner
from kvortex.tiers.disk.tier import NO_TAG
from kvortex.tiers.plan import BreakEven, WriteBudget
from kvortex.tiers.promoter import Promoter, Promotion

WATCHED_S = 0.05  # the longest sleep of the thread while anything is under way
UNWATCHED_S = 0.5  # and while nothing is
STALLED_S = 10.0  # a flush without progress then ends; readers hold prefetched blocks for less, as a rule
PATIENCE_S = 1.0  # for the thread to end: after the deadline, or when the engine was dropped


def tag_of(weights):
    """The tag of named weights; zeros if they have no name."""
    return NO_TAG if weights is None else hashlib.sha256(weights.encode()).digest()


class Tiering:
    """One tier below an engine's pool.

    Parameters
    ----------
    pool : PinnedPool
    index : BlockIndex
    tier : OpenDiskTier
        Closed with this.
    bytes_per_s : int
        Write budget; 0: no limit.
    blocks_per_s : float
        How fast the model computes blocks; 0: not known.
    """

    Prefetch = Prefetch

    def __init__(self, pool, index, tier, *, bytes_per_s=0, blocks_per_s=0.0):
        self.index, self.tier, self._pid = index, tier, os.getpid()
        self._record_bytes = tier.record_bytes
        self.budget = WriteBudget(bytes_per_s)
        self._breaker, self._break_even = Breaker(tier.name), BreakEven(blocks_per_s)
        # A server that takes no writes may still serve reads.
        self._write_breaker = Breaker(f"{tier.name} (writing)") if tier.is_remote else self._breaker
        self._admissions = deque()  # of saves, until their unused credit is given back
        self._messages = deque()  # (what to do, with what); append and popleft are one step each
        self._left = deque()  # promotions whose blocks a load has pinned itself
        self.let_go = self._left.append  # one step without Python code, and without a wake-up
        self._waking = threading.RLock()  # the garbage collector may call `wake` within `wake`
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_closing = self._closes_itself = self._gives_up = self._is_closed = False
        self._has_ended = self.has_failed = False
        self._cleaner = Cleaner(index, pool, tier, self.budget, self._write_breaker)
        self._promoter = Promoter(index, pool, tier, self._breaker, self._break_even)
        tier.store.notify(self._event)
        self._thread = threading.Thread(target=self._run, name="kvortex-tiering", daemon=True)
        self._thread.start()

    # ---- for saves and loads ----------------------------------------------------------------------------------------

    def admit(self, admission):
        """Grant a save as many of the blocks that RAM lacks as the budget allows; called before the save begins.

        When ``admission.is_over``, the blocks that it did not need are given back.
        """
        num_blocks = 0 if admission.ram_only else admission.num_blocks
        admission.grant(self.budget.admit(num_blocks, self._record_bytes))
        self._admissions.append(admission)
        self.wake()

    def window_blocks(self):
        """Blocks that are read from the tier as one batch."""
        return self._promoter.window_blocks

    def pace(self, clock):
        """Begin the write budget anew with another clock: in replay, the number of saved blocks is the time."""
        self.budget.pace(clock)

    # ---- for the other verbs ----------------------------------------------------------------------------------------

    def answers(self):
        """Whether the tier can be read now."""
        return not self._is_in_trouble(self._breaker)

    def prefetch(self, keys, timeout_ms, hold_ms):
        """A `Prefetch` of the leading run of `keys`, which nobody may change any more."""
        if self._is_closing:
            raise EngineClosed("the engine is shut down; create another one")
        timeout_ms, hold_ms = require_ms("timeout_ms", timeout_ms), require_ms("hold_ms", hold_ms)
        promotion = Promotion(keys, time.monotonic() + timeout_ms / 1000, hold_ms / 1000)
        self._tell(self._promoter.begin, promotion)
        return Prefetch(promotion, self._close_promotion)

    def _close_promotion(self, promotion):
        self._tell(self._promoter.close, promotion)

    def _tell(self, do, promotion):
        """Send the thread a message. Every thread may, and signal handlers and finalizers, too."""
        self._messages.append((do, promotion))
        self.wake()
        if self._has_ended:
            promotion.finish()

    def discard(self, keys):
        """Forget keys on both levels at once; return how many were there."""
        keys = np.array(keys)
        was_there = self.index.slots_of(keys) != NO_SLOT
        was_there |= self.tier.catalogue.slots_of(keys) != NO_SLOT
        self.index.discard(keys)  # RAM first: after a write, the cleaner checks that RAM still has the block
        self.tier.discard(keys)
        return int(was_there.sum())

    def flush(self, timeout_ms):
        """Write all that is in RAM, and make it durable; return how many blocks are left at the end."""
        limit_s = float("inf") if timeout_ms is None else require_ms("timeout_ms", timeout_ms) / 1000
        deadline_s = time.monotonic() + limit_s
        least, least_at_s = float("inf"), 0.0
        while True:
            if self._is_closing:
                raise EngineClosed("the engine is shut down; create another one")
            over = threading.Event()
            is_held = self._num_held() > 0  # being saved, or pinned: this pass may come too early for these
            self._messages.append((self._cleaner.begin_flush, over))
            self.wake()
            while not over.wait(min(WATCHED_S, max(0, deadline_s - time.monotonic()))):
                if time.monotonic() >= deadline_s or self._is_in_trouble(self._write_breaker):
                    self._messages.append((self._cleaner.give_up_flush, over))
                    break
            counts = self.index.counters()
            left = max(0, counts["num_ready"] - counts["num_clean"]) + self._num_saving()
            is_held |= self._num_held() > 0
            if left < least:
                least, least_at_s = left, time.monotonic()
            if left <= self._cleaner.num_staying or not is_held:
                break  # nothing is left, or only what the tier is not to have; or nobody holds any of it
            if time.monotonic() >= deadline_s or self._is_in_trouble(self._write_breaker):
                break
            if not self._num_saving() and time.monotonic() >= least_at_s + STALLED_S:
                break  # no progress: what is left cannot be written
            time.sleep(0.005)
        rest_s = deadline_s - time.monotonic()
        if not self.tier.adoption.wait_forgotten(None if timeout_ms is None else max(0, int(1000 * rest_s))):
            left += 1  # a discarded block may still be found by the next process
        if not self.tier.is_remote:  # the tier may be smaller than RAM; the view of a server forgets blocks
            left = max(left, counts["num_ready"] - self.tier.catalogue.num_ready)
        if self._is_in_trouble(self._write_breaker):
            return max(1, left)
        rest_ms = None if timeout_ms is None else max(0, int(1000 * (deadline_s - time.monotonic())))
        return max(left, self.tier.store.flush(rest_ms))

    def _num_held(self):
        return self._num_saving() + self.index.num_pinned

    def _num_saving(self):
        return max(0, self.index.num_writing - self._promoter.num_writing)

    def _is_in_trouble(self, *breakers):
        now_s = time.monotonic()
        return self.has_failed or self._is_closing or not all(breaker.allows(now_s) for breaker in breakers)

    def stats(self, blocks_admitted, blocks_not_admitted):
        """A `TierStats`; the engine counts the admitted blocks."""
        store, catalogue = self.tier.store.stats(), self.tier.catalogue.counters()
        cleaner, promoter = self._cleaner, self._promoter
        return TierStats(
            name=self.tier.name,
            blocks=catalogue["num_ready"],
            blocks_capacity=self.tier.catalogue.num_slots,
            blocks_scanned=self.tier.adoption.num_scanned,
            blocks_adopted=self.tier.adoption.num_adopted,
            is_adopting=self.tier.is_adopting,
            blocks_admitted=blocks_admitted,
            blocks_not_admitted=blocks_not_admitted,
            blocks_written=cleaner.num_written,
            blocks_written_beyond=cleaner.num_written_beyond,
            blocks_not_written=cleaner.num_failed,
            blocks_too_large=cleaner.num_too_large,
            blocks_evicted=catalogue["evictions"],
            blocks_promoted=promoter.num_promoted,
            blocks_expired_unread=promoter.num_expired,
            misses=dict(promoter.misses),
            bytes_written=store["bytes_written"],
            bytes_read=store["bytes_read"],
            queue_blocks=store["waiting"] + store["running"],
            cleaning_blocks=cleaner.num_pinned,
            promoting_blocks=promoter.num_pinned,
            ms_reading=1000 * promoter.spent_s,
            ms_saved=1000 * self._break_even.saved_s(promoter.num_promoted),
            is_suspended=self._is_in_trouble(self._breaker, self._write_breaker),
            suspensions=sum(each.suspensions for each in {self._breaker, self._write_breaker}),
            read_only=store["read_only"],
            last_error=store["last_error"],
            codec=self.tier.codec,
            io=store["io"],
            io_reason=store["io_reason"],
        )

    # ---- the thread -------------------------------------------------------------------------------------------------

    def wake(self):
        """Wake the thread. After `close`, and in a forked child, this does nothing."""
        if os.getpid() != self._pid:
            return  # in a forked child the lock may be held for ever
        with self._waking:  # after `close` the descriptor may be in other use
            if not self._is_closed:
                os.eventfd_write(self._event, 1)

    def _run(self):
        ready = select.poll()
        ready.register(self._event, select.POLLIN)
        try:
            while (timeout_s := self._step()) is not None:
                ready.poll(1000 * timeout_s)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._event)
        except Exception as error:  # the tier is lost, the engine is not
            self.has_failed = True
            log(logging.ERROR, "tiering_failed", "blocks no longer go to the tier or are read", error=repr(error))
        finally:
            with contextlib.suppress(Exception):
                self._promoter.shut()
            self._has_ended = True
            while self._messages:
                _, subject = self._messages.popleft()
                if isinstance(subject, Promotion):
                    subject.finish()
                else:
                    subject.set()
            if self._closes_itself:
                self._close_tier(int(1000 * PATIENCE_S))

    def _step(self):
        """Do what can be done now. Return how many seconds the thread may sleep, or None at its end."""
        self._close_left()
        while self._messages:
            do, subject = self._messages.popleft()
            self._close_left()  # unpin what was loaded before this message
            do(subject)
        self._settle_admissions()
        now_s = time.monotonic()
        while self._promoter.step(now_s) | self._cleaner.step(now_s):
            now_s = time.monotonic()
        self._gives_up |= self._closes_itself and now_s >= self._ends_at_s
        if self._gives_up or (self._is_closing and not (self._cleaner.is_busy or self._num_saving())):
            return None
        is_busy = self._cleaner.is_busy or self._promoter.is_busy or self._admissions or self.index.num_writing
        wake_s = min(now_s + (WATCHED_S if is_busy else UNWATCHED_S), self._promoter.next_s())
        return max(0.0, wake_s - time.monotonic())

    def _close_left(self):
        while self._left:
            self._promoter.close(self._left.popleft())

    def _settle_admissions(self):
        """Give back what saves were granted and did not need."""
        for _ in range(len(self._admissions)):
            admission = self._admissions.popleft()
            if not admission.is_over:
                self._admissions.append(admission)
                continue
            self.budget.give_back((admission.granted - admission.num_used) * self._record_bytes)

    # ---- end --------------------------------------------------------------------------------------------------------

    def abandon(self):
        """Let the thread end by itself and close the tier, because the engine was dropped. Waits for nothing."""
        if os.getpid() == self._pid and not self._is_closing:
            self._ends_at_s = time.monotonic() + PATIENCE_S
            self._is_closing = self._closes_itself = True
            self.wake()

    def close(self, timeout_ms):
        """Write what was admitted, end the thread, close the tier: within about `timeout_ms`. Idempotent."""
        if os.getpid() != self._pid:
            return  # all of it is the parent's
        deadline_s = time.monotonic() + timeout_ms / 1000
        self._is_closing = True
        self.wake()
        self._thread.join(timeout_ms / 2000)
        self._gives_up = True
        self.wake()
        self._thread.join(max(0, deadline_s - time.monotonic()) + PATIENCE_S)
        if self._thread.is_alive():
            log(logging.WARNING, "tiering_hangs", "the tiering thread does not end, so the tier stays open")
            return
        self._close_tier(max(0, int(1000 * (deadline_s - time.monotonic()))))

    def _close_tier(self, timeout_ms):
        self.tier.close(timeout_ms)
        self.tier.store.notify(None)
        with self._waking:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._event)
