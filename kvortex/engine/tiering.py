"""Tiering: the thread that moves blocks between RAM and the tier below, and what an engine asks of it.

It decides a batch at a time and does no I/O itself. It may be late, and is never in the way: saves, loads and lookups
of what is in RAM touch nothing of it but a counter.
"""

import contextlib
import hashlib
import logging
import os
import select
import threading
import time

import numpy as np

from kvortex.engine.cleaner import Cleaner
from kvortex.engine.promoter import Promoter
from kvortex.errors import EngineClosed
from kvortex.index import NO_SLOT
from kvortex.log import log
from kvortex.stats import TierStats
from kvortex.tiers.breaker import Breaker
from kvortex.tiers.plan import BreakEven, WriteBudget

NO_TAG = bytes(32)
WATCHED_S = 0.05  # how long something may go unnoticed while batches are out: deadlines, saves that were committed
IDLE_S = 0.5


def tag_of(weights):
    """The tag of named weights; of none, where nothing was ever said about them: zeros."""
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
        What may be written; 0: no limit.
    blocks_per_s : float
        What the model computes; 0: not known.
    """

    def __init__(self, pool, index, tier, *, bytes_per_s=0, blocks_per_s=0.0):
        self.index, self.tier = index, tier
        self.lock = threading.Lock()  # held over no I/O and no code of others
        self._budget_lock = threading.Lock()
        self._stride_bytes = pool.stride_bytes
        self._clock = time.monotonic  # of the budget alone
        self._budget = WriteBudget(bytes_per_s, self._clock())
        self._breaker, self._break_even = Breaker(tier.name), BreakEven(blocks_per_s)
        self._num_refused = self._num_admitted = 0
        self._waking = threading.RLock()  # the collector may wake it from within a call that does
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_closing = self._gives_up = self._is_over = False
        self._may_have_work = True
        self._cleaner = Cleaner(index, tier, self, self._breaker, self.lock, pool)
        self._promoter = Promoter(index, tier, self._breaker, self._break_even, self.lock, pool, self.wake)
        tier.store.notify(self._event)
        self._thread = threading.Thread(target=self._run, name="kvortex-tiering", daemon=True)
        self._thread.start()

    # ---- for saves --------------------------------------------------------------------------------------------------

    def admit(self, num_blocks):
        """How many blocks of a save the tier is to have, from the first on."""
        with self._budget_lock:
            return self._budget.admit(num_blocks, self._stride_bytes, self._clock())

    def saved(self, num_admitted, num_new):
        """A save that was admitted had so many new blocks."""
        with self._budget_lock:
            spent = min(num_admitted, num_new)
            self._num_admitted += spent
            self._num_refused += num_new - spent
            if spent < num_admitted and self._budget.bytes_per_s:
                self._budget.spend((spent - num_admitted) * self._stride_bytes)
        if num_new and not self._may_have_work:
            self._may_have_work = True
            self.wake()

    def spend(self, nbytes):
        """As `WriteBudget.spend`."""
        if nbytes and self._budget.bytes_per_s:
            with self._budget_lock:
                self._budget.spend(nbytes)

    def is_idle(self):
        """As `WriteBudget.is_idle`."""
        with self._budget_lock:
            return self._budget.is_idle(self._clock())

    def pace(self, clock):
        """Begin the write budget anew, by another clock than the machine's: replay lets saved blocks be its time."""
        with self._budget_lock:
            self._clock = clock
            self._budget = WriteBudget(self._budget.bytes_per_s, clock())

    # ---- for the other verbs ----------------------------------------------------------------------------------------

    def answers(self):
        """Whether what the tier has can be had: it is not closed, nor left alone."""
        return not self._is_closing and self._breaker.allows(time.monotonic())

    def prefetch(self, keys, timeout_ms, hold_ms):
        """A `Prefetch` of the leading run of `keys`, which nobody may change any more."""
        self._require_open()
        return self._promoter.prefetch(keys, timeout_ms, hold_ms)

    def discard(self, keys):
        """Forget keys on both levels at once; return how many were there."""
        keys = np.array(keys)
        with self.lock:
            was_there = self.index.slots_of(keys) != NO_SLOT
            was_there |= self.tier.catalogue.slots_of(keys) != NO_SLOT
            self.index.discard(keys)
            self.tier.discard(keys)
        return int(was_there.sum())

    def clear(self, weights):
        """Forget everything on both levels at once. What was saved before is of other weights than what comes."""
        tag = os.urandom(32) if weights is None else tag_of(weights)
        with self.lock:
            self.tier.clear(tag)
            self.index.clear()

    def flush(self, timeout_ms):
        """Write all that is in RAM, and make it durable; return how many blocks are left at the end."""
        self._require_open()
        deadline_s = float("inf") if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        while True:
            any_writing = self.index.num_writing > 0  # saves in flight: this pass may come too early for them
            with self.lock:
                over = self._cleaner.begin_flush()
            self.wake()
            while not over.wait(min(WATCHED_S, max(0, deadline_s - time.monotonic()))):
                self._require_open()
                if time.monotonic() >= deadline_s:
                    with self.lock:
                        self._cleaner.give_up_flush(over)
                    break
            counts = self.index.counters()
            left = counts["num_ready"] - counts["num_clean"] + counts["num_writing"]
            any_writing |= counts["num_writing"] > 0
            if not left or not any_writing or time.monotonic() >= deadline_s:
                break
            time.sleep(0.001)
        rest_ms = None if timeout_ms is None else max(0, int(1000 * (deadline_s - time.monotonic())))
        return max(left, self.tier.store.flush(rest_ms))

    def stats(self):
        """A `TierStats`."""
        store, catalogue = self.tier.store.stats(), self.tier.catalogue.counters()
        cleaner, promoter = self._cleaner, self._promoter
        now_s = time.monotonic()
        return TierStats(
            name=self.tier.name,
            blocks=catalogue["num_ready"],
            blocks_most=self.tier.catalogue.num_slots,
            blocks_scanned=self.tier.adoption.num_scanned,
            blocks_adopted=self.tier.adoption.num_adopted,
            is_adopting=not self.tier.adoption.is_over,
            blocks_admitted=self._num_admitted,
            blocks_not_admitted=self._num_refused,
            blocks_written=cleaner.num_written,
            blocks_written_idle=cleaner.num_written_unasked,
            blocks_not_written=cleaner.num_failed,
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
            is_resting=not self._breaker.allows(now_s),
            rests=self._breaker.trips,
            read_only=store["read_only"],
            last_error=store["last_error"],
            io=store["io"],
            io_reason=store["io_reason"],
        )

    # ---- the thread -------------------------------------------------------------------------------------------------

    def wake(self):
        """Let the thread look again. Nothing happens once it has ended."""
        with self._waking:  # else the descriptor may be another's by now
            if not self._is_over:
                os.eventfd_write(self._event, 1)

    def _run(self):
        ready = select.poll()
        ready.register(self._event, select.POLLIN)
        while True:
            try:
                timeout_s = self._step()
            except Exception as error:  # the tier is lost, the engine is not
                if self._gives_up and isinstance(error, EngineClosed):
                    return
                log(
                    logging.ERROR, "tiering_failed", "blocks go to the tier no longer, nor come back", error=repr(error)
                )
                self._is_closing = True
                self._promoter.shut()
                return
            if timeout_s is None:
                return
            ready.poll(1000 * timeout_s)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._event)

    def _step(self):
        """Do what can be done now; return for how long there may be nothing, or None at the end."""
        now_s = time.monotonic()
        self._may_have_work = False
        while self._promoter.step(now_s) | self._cleaner.step(now_s):
            now_s = time.monotonic()
        if self._gives_up or (self._is_closing and not (self._cleaner.is_busy or self.index.num_writing)):
            return None
        if self._cleaner.is_busy or self._promoter.is_busy or self.index.num_writing:
            self._may_have_work = True
        wake_s = min(now_s + (WATCHED_S if self._may_have_work else IDLE_S), self._promoter.next_s() or float("inf"))
        return max(0.0, wake_s - time.monotonic())

    # ---- end --------------------------------------------------------------------------------------------------------

    def _require_open(self):
        if self._is_closing:
            raise EngineClosed("the engine is shut down, or its tier failed; create another one")

    def close(self, timeout_ms):
        """Write what was admitted, end the thread, close the tier: within about `timeout_ms`. Idempotent."""
        deadline_s = time.monotonic() + timeout_ms / 1000
        self._is_closing = True
        self._promoter.shut()
        if threading.current_thread() is not self._thread:  # else the collector found the engine there
            self.wake()
            self._thread.join(timeout_ms / 2000)
        self._gives_up = True
        if threading.current_thread() is not self._thread:
            self.wake()
            self._thread.join()
        self.tier.close(max(0, int(1000 * (deadline_s - time.monotonic()))))
        self.tier.store.notify(None)
        with self._waking:
            if not self._is_over:
                self._is_over = True
                os.close(self._event)
