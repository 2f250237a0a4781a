"""The promoter: brings blocks of a prefix from the tier into RAM, pinned for their reader until it has them.

What RAM has of the prefix is pinned first, in the same step: no block of it is evicted for a later one. A block that
several readers wait for is read once; each of them has a pin of its own from the moment it is there.
"""

import concurrent.futures
import os
import threading
import time
from collections import Counter, deque

import numpy as np

from kvortex.engine.prefetch import Prefetch
from kvortex.index import NO_SLOT, CommitStatus, ReserveStatus
from kvortex.tiers.base import BlockStatus

WINDOW_BYTES = 16 << 20  # read as one batch
MOST_WINDOWS = 4
LATE_S = 1  # a reader in a greater hurry than that says nothing about the tier


class Promotion:
    """What one reader waits for and holds. All of it is under the lock of tiering."""

    def __init__(self, keys, deadline_s, hold_s):
        self.keys, self.deadline_s, self.hold_s, self.expires_s = keys, deadline_s, hold_s, None
        self.slots = np.full(len(keys), NO_SLOT, np.uint32)  # pinned by us, where they are there
        self.end = self.held = 0  # where the run ends, as far as is known; blocks that count as pinned for it
        self.num_landed = 0
        self.landings = []
        self.is_over = self.is_closed = False
        self.future = concurrent.futures.Future()
        self.future.set_running_or_notify_cancel()  # nobody else can cancel it

    def look(self):
        """Count what has come of the run."""
        self.num_landed = int(np.argmax(np.append(self.slots[: self.end], NO_SLOT) == NO_SLOT))
        return self.num_landed


class Landing:
    """A block that is being read: who waits for it, and for which of its blocks that is."""

    def __init__(self, key):
        self.key, self.readers = key, []


class Window:
    """Blocks that are read as one batch."""

    def __init__(self, tag, keys, lengths, tier_slots, slots, landings):
        self.tag, self.keys, self.lengths = tag, keys, lengths
        self.tier_slots, self.slots, self.landings = tier_slots, slots, landings
        self.batch, self.begun_s, self.deadline_s = None, 0.0, 0.0


class Promoter:
    """Parameters: the engine's index, the open tier, its breaker, the break-even, the lock of all tiering, the pool,
    and what wakes the thread that calls `step`.
    """

    def __init__(self, index, tier, breaker, break_even, lock, pool, wake):
        self.index, self.tier, self.breaker, self.lock, self._wake = index, tier, breaker, lock, wake
        self.break_even = break_even
        self._landed = threading.Condition(lock)
        self._window_blocks = max(1, WINDOW_BYTES // pool.stride_bytes)
        self._most_reading = max(1, min(MOST_WINDOWS * self._window_blocks, tier.queue_blocks // 2))
        self._stride_bytes = pool.stride_bytes
        self.most_pinned = pool.num_slots // 2
        self.num_pinned = self._num_reading = 0
        self.num_promoted = self.num_expired = 0
        self.spent_s = 0.0
        self.misses = Counter()  # blocks that a reader waited for in vain, by cause
        self._landings = {}  # by key
        self._promotions = []  # those that are not over, or hold blocks
        self._waiting, self._reading = deque(), []  # windows
        self._late = []  # batches whose I/O has not returned, and their slots
        self._let_go = deque()  # by the garbage collector, which may run anywhere: no lock is taken there
        self._is_closed = False
        self._pid = os.getpid()

    # ---- for callers ------------------------------------------------------------------------------------------------

    def prefetch(self, keys, timeout_ms, hold_ms):
        """Begin to bring the leading run of `keys` into RAM. Blocks for no I/O."""
        now_s = time.monotonic()
        with self.lock:
            promotion = Promotion(keys, now_s + timeout_ms / 1000, hold_ms / 1000)
            told = self._begin(promotion, now_s)
        self._tell(told)
        self._wake()
        return Prefetch(self, promotion)

    def wait_for_more(self, promotion, num_blocks):
        """As `Prefetch.wait_for_more`."""
        with self._landed:
            self._landed.wait_for(lambda: promotion.is_over or promotion.look() >= num_blocks + self._window_blocks)
            return promotion.num_landed, promotion.is_over

    def close(self, promotion):
        """Give back what a reader holds, and wait for nothing more. Idempotent."""
        if os.getpid() != self._pid:
            return  # in a forked child, where somebody may hold the lock for ever
        with self.lock:
            told = [] if promotion.is_over else self._end(promotion, time.monotonic(), 0)
            self._give_back(promotion)
        self._tell(told)

    def let_go(self, promotion):
        """The same, soon; without a lock."""
        self._let_go.append(promotion)
        self._wake()

    # ---- for the thread ---------------------------------------------------------------------------------------------

    @property
    def is_busy(self):
        """Whether something is read, or waits for that."""
        return bool(self._waiting or self._reading or self._late)

    def step(self, now_s):
        """End windows that are over, readers whose time is over; begin others. Return whether anything changed."""
        told, changed = [], False
        while self._let_go:
            self.close(self._let_go.popleft())
        for window in [window for window in self._reading if self._is_over(window, now_s)]:
            with self.lock:
                self._reading.remove(window)
                told += self._land(window, now_s)
            changed = True
        with self.lock:
            for promotion in list(self._promotions):
                if not promotion.is_over and now_s >= promotion.deadline_s:
                    self.misses["LATE"] += promotion.end - promotion.look()
                    told += self._end(promotion, now_s, promotion.num_landed)
                elif promotion.is_over and now_s >= promotion.expires_s:
                    self.num_expired += promotion.num_landed
                    self._give_back(promotion)
            for late in [late for late in self._late if late[0].done()]:
                self._late.remove(late)
                self._give_back_slots(*late[1:])
            changed |= self._begin_windows(now_s)
        self._tell(told)
        return changed or bool(told)

    def next_s(self):
        """When `step` has to be called at the latest, or None."""
        with self.lock:
            times = [each.expires_s if each.is_over else each.deadline_s for each in self._promotions]
            times += [window.deadline_s for window in self._reading]
        return min(times, default=None)

    def shut(self):
        """End all that is under way, where it is; from now on every prefetch has only what is in RAM."""
        with self.lock:
            self._is_closed = True
            told = []
            for promotion in list(self._promotions):
                if not promotion.is_over:
                    told += self._end(promotion, time.monotonic(), promotion.look())
                self._give_back(promotion)
        self._tell(told)

    # ---- under the lock ---------------------------------------------------------------------------------------------

    def _begin(self, promotion, now_s):
        keys = promotion.keys
        is_there, leading = self.index.lookup(keys)
        if leading < len(keys) and not self._is_closed and self.breaker.allows(now_s):
            is_there = is_there | self.tier.catalogue.lookup(keys)[0]
        elif leading < len(keys):
            self.misses["RESTING"] += 1
        run = int(np.argmin(np.append(is_there, False)))
        most = max(0, self.most_pinned - self.num_pinned)
        if run > most:
            self.misses["FULL"] += run - most
            run = most
        promotion.slots[:run] = self.index.acquire(keys[:run], gaps=True)
        missing = np.flatnonzero(promotion.slots[:run] == NO_SLOT)
        ahead = self._num_reading + sum(len(window.slots) for window in self._waiting)
        if len(missing) and not self.break_even.pays(
            run - missing[0], (ahead + len(missing)) * self._stride_bytes, now_s
        ):
            self.misses["SLOWER_THAN_COMPUTING"] += run - int(missing[0])
            missing, run = missing[:0], int(missing[0])
        promotion.end = run
        promotion.held = run
        self.num_pinned += run
        self._promotions.append(promotion)
        if len(missing):
            self._fetch(promotion, missing)
        self._hold(promotion, promotion.end)
        return self._end(promotion, now_s, promotion.end) if promotion.look() == promotion.end else []

    def _fetch(self, promotion, missing):
        """Reserve a slot for each missing block, or join whoever reads it; the run ends at the first without either."""
        keys, tier = promotion.keys[missing], self.tier.catalogue
        tier_slots = tier.acquire(keys, gaps=True)
        count = int(np.argmax(np.append(tier_slots, NO_SLOT) == NO_SLOT))
        lengths = tier.lengths_of(tier_slots[:count])
        slots, statuses = self.index.reserve(keys[:count], lengths, admit=count)  # the tier is to go on having them
        ours, landings, cause = [], [], "GONE"
        for i in range(count):
            key, position = keys[i].tobytes(), int(missing[i])
            if statuses[i] == ReserveStatus.NEW:
                landing = self._landings[key] = Landing(key)
                ours.append(i)
                landings.append(landing)
            elif statuses[i] == ReserveStatus.FULL:
                cause = "FULL"
                count = i
                break
            else:
                landing = self._landings.get(key)
                if landing is None:  # a save's: it may be there by now
                    promotion.slots[position : position + 1] = self.index.acquire(keys[i : i + 1], gaps=True)
                    if promotion.slots[position] != NO_SLOT:
                        continue
                    cause = "BEING_SAVED"
                    count = i
                    break
            landing.readers.append((promotion, position))
            promotion.landings.append(landing)
        if count < len(missing):
            self.misses[cause] += promotion.end - int(missing[count])
            promotion.end = int(missing[count])
        self.index.abort(slots[count:][statuses[count:] == ReserveStatus.NEW])
        mine = np.array(ours, np.intp)
        is_mine = np.zeros(len(missing), bool)
        is_mine[mine] = True
        tier.release(tier_slots[~is_mine & (tier_slots != NO_SLOT)])
        for first in range(0, len(mine), self._window_blocks):
            part = mine[first : first + self._window_blocks]
            window = Window(
                self.tier.tag,
                keys[part],
                lengths[part],
                tier_slots[part],
                slots[part],
                landings[first : first + self._window_blocks],
            )
            self._waiting.append(window)
        self._begin_windows(time.monotonic())

    def _begin_windows(self, now_s):
        """Give windows to the store, as many as it should have at once; one that nobody waits for is dropped."""
        begun = False
        while self._waiting and (not self._reading or self._num_reading < self._most_reading):
            window = self._waiting.popleft()
            readers = [reader for landing in window.landings for reader, _ in landing.readers]
            deadline_s = max([reader.deadline_s for reader in readers], default=now_s)
            begun = True
            if deadline_s <= now_s or self._is_closed:
                self._drop(window)
                continue
            window.begun_s, window.deadline_s = now_s, deadline_s
            try:
                window.batch = self.tier.store.get(
                    window.tier_slots,
                    window.slots,
                    window.keys,
                    window.lengths,
                    tag=window.tag,
                    timeout_ms=max(1, int(1000 * (deadline_s - now_s))),
                )
            except BaseException:
                self._drop(window)
                raise
            self._num_reading += len(window.slots)
            self._reading.append(window)
        return begun

    def _drop(self, window):
        self._give_back_slots(window.slots, window.tier_slots)
        for landing in window.landings:
            self._forget(landing)
            for reader, position in landing.readers:
                reader.end = min(reader.end, position)

    def _forget(self, landing):
        if self._landings.get(landing.key) is landing:  # else forgotten meanwhile, and read anew
            del self._landings[landing.key]

    @staticmethod
    def _is_over(window, now_s):
        """Whether each block has its answer. One that is late may still be in its I/O."""
        if now_s < window.deadline_s:
            return window.batch.done()
        return (window.batch.statuses != BlockStatus.PENDING).all()

    def _land(self, window, now_s):
        """Show what came, pinned for each reader; forget what did not. Return the readers that are over by that."""
        batch, statuses, landings = window.batch, window.batch.statuses, window.landings
        is_done, is_ok = batch.done(), statuses == BlockStatus.OK
        ok, bad = np.flatnonzero(is_ok), np.flatnonzero(~is_ok)
        pins = np.array([len(landings[i].readers) for i in ok], np.uint32)
        answers = self.index.commit(window.slots[ok], pins=pins, clean=True)
        concerned = {}
        for i, answer in zip(ok, answers, strict=True):
            for reader, position in landings[i].readers:
                concerned[id(reader)] = reader
                if answer == CommitStatus.READY:
                    reader.slots[position] = window.slots[i]
                else:  # forgotten while it was read
                    self.misses["DISCARDED"] += 1
                    reader.end = min(reader.end, position)
        for i in bad:
            self.misses[BlockStatus(statuses[i]).name] += 1
            for reader, position in landings[i].readers:
                concerned[id(reader)] = reader
                reader.end = min(reader.end, position)
        for landing in landings:
            self._forget(landing)
        is_wrong = ~is_ok & (statuses < BlockStatus.LATE)  # its record is damaged, or another's
        is_wrong &= self.tier.catalogue.slots_of(window.keys) == window.tier_slots
        if is_wrong.any():
            self.tier.discard(window.keys[is_wrong])
        self._num_reading -= len(window.slots)
        self.num_promoted += len(ok)
        self.spent_s += now_s - window.begun_s
        if now_s - window.begun_s >= LATE_S or not (statuses == BlockStatus.LATE).any():
            self.breaker.saw(statuses, now_s)
        if len(ok):
            self.break_even.measured(len(ok) * self._stride_bytes, now_s - window.begun_s, now_s)
        if is_done:
            self._give_back_slots(window.slots[bad], window.tier_slots)
        else:  # the disk may still write into these slots: their keys are free, they are not
            is_ours = self.index.slots_of(window.keys[bad]) == window.slots[bad]
            self.index.discard(window.keys[bad][is_ours])
            self._late.append((batch, window.slots[bad], window.tier_slots))
        self._landed.notify_all()
        told = []
        for reader in concerned.values():
            if not reader.is_over and reader.look() >= reader.end:
                told += self._end(reader, now_s, reader.end)
        return told

    def _give_back_slots(self, slots, tier_slots):
        self.index.abort(slots)
        self.tier.catalogue.release(tier_slots)

    def _end(self, promotion, now_s, num_blocks):
        """A reader has what it gets: the first so many blocks. Return it in a list, to be told without the lock."""
        promotion.end, promotion.is_over = num_blocks, True
        for landing in promotion.landings:
            landing.readers = [(reader, at) for reader, at in landing.readers if reader is not promotion]
        promotion.landings = []
        self._hold(promotion, num_blocks)
        promotion.look()
        promotion.expires_s = now_s + promotion.hold_s
        self._landed.notify_all()
        return [promotion]

    def _hold(self, promotion, end):
        """Unpin what a reader has behind `end`: it holds so many fewer."""
        behind = promotion.slots[end:]
        self.index.release(behind[behind != NO_SLOT])
        promotion.slots[end:] = NO_SLOT
        self.num_pinned -= promotion.held - end
        promotion.held = end

    def _give_back(self, promotion):
        if not promotion.is_closed:
            promotion.is_closed = True
            self._promotions.remove(promotion)
            self._hold(promotion, 0)

    @staticmethod
    def _tell(told):
        for promotion in told:
            promotion.future.set_result(None)
