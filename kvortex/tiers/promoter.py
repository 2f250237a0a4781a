"""The promoter brings blocks of a prefix from the tier into RAM, and pins them for their reader.

The blocks that RAM has of the prefix are pinned first: none of them is evicted for a later one. If several readers wait
for one block, it is read once, and each of them gets its own pin when the block is in RAM.

One thread calls it. Meanwhile others clear and discard, RAM first and then the tier (`clear` RAM once more). So when
a block was read, it becomes visible only if the tier still has it, under the tag that was asked for.
"""

import concurrent.futures
import contextlib
import queue
import time
from collections import Counter, deque

import numpy as np

from kvortex.index import NO_SLOT, CommitStatus, ReserveStatus
from kvortex.tiers.base import BlockStatus

WINDOW_BYTES = 16 << 20  # read as one batch
MOST_WINDOWS = 4
GET_TIMEOUT_MS = 60_000  # of the store; readers have deadlines of their own
NOT_READ = (BlockStatus.LATE, BlockStatus.DROPPED, BlockStatus.PENDING)  # the block in the tier may be good
LATE_S = 1  # a batch that takes longer counts against the tier


class Promotion:
    """What one reader waits for and holds. Only the thread of the `Promoter` changes it."""

    def __init__(self, keys, deadline_s, hold_s):
        self.keys, self.deadline_s, self.hold_s, self.expires_s = keys, deadline_s, hold_s, float("inf")
        self.slots = np.full(len(keys), NO_SLOT, np.uint32)  # pinned slots; NO_SLOT: not in RAM yet
        self.end = self.held = 0  # `end`: of the run, as known so far; `held`: blocks counted as pinned for it
        self.num_landed = 0
        self.landings = []
        self.is_begun = self.is_over = self.is_closed = False
        self.future = concurrent.futures.Future()
        self.future.set_running_or_notify_cancel()  # nobody else can cancel it
        self.progress = queue.SimpleQueue()  # (num_landed, is_over), for a load that goes on block by block

    def count(self):
        """Count the leading blocks of the run that are in RAM."""
        self.num_landed = int(np.argmax(np.append(self.slots[: self.end], NO_SLOT) == NO_SLOT))
        return self.num_landed

    def tell(self):
        """Tell the waiting reader how many blocks have come."""
        self.progress.put((self.num_landed, self.is_over))

    def finish(self):
        """Note that no more blocks will come. More than one call does no harm."""
        self.is_over = True
        self.count()
        self.tell()
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.future.set_result(None)


class Landing:
    """A block that is being read; `readers` has each waiting promotion with the block's position in its run."""

    def __init__(self, key, window):
        self.key, self.window, self.readers = key, window, []


class Window:
    """Blocks that are read as one batch."""

    def __init__(self, tag):
        self.tag, self.landings, self.batch, self.is_late = tag, [], None, False
        self.begun_s = self.deadline_s = 0.0

    def fill(self, keys, lengths, tier_slots, slots):
        """Set the blocks of the window."""
        self.keys, self.lengths, self.tier_slots, self.slots = keys, lengths, tier_slots, slots


class Promoter:
    """Parameters: the index and the pool, the open tier, its breaker, the break-even, and a function that takes the
    slots whose blocks are evicted.
    """

    def __init__(self, index, pool, tier, breaker, break_even, *, evicted=None):
        self.index, self.tier, self.breaker, self.break_even = index, tier, breaker, break_even
        self.evicted = evicted
        self.begins_value = None  # function: tier slots -> where a value begins; windows end only there
        self._stride_bytes = pool.stride_bytes
        self.window_blocks = max(1, min(WINDOW_BYTES // pool.stride_bytes, tier.queue_blocks // MOST_WINDOWS))
        self.most_pinned = pool.num_slots // 2
        self.is_lossy = tier.codec != "exact"
        self.num_pinned = self.num_writing = self._num_reading = 0
        self.num_promoted = self.num_expired = 0
        self.spent_s, self._landed_at_s = 0.0, 0.0
        # Of the windows that ended in this step: number of blocks, begin of the first, end of the last.
        self._num_landed, self._since_s, self._until_s = 0, float("inf"), 0.0
        self.misses = Counter()  # blocks that a reader waited for and did not get, by cause
        self._landings = {}  # by key
        self._promotions = []  # those that are not over, or hold blocks
        self._waiting, self._reading, self._late = deque(), [], []  # windows
        self._asking = []  # (promotion, question, until_s): the tier is asked first what it has
        self._unanswered = []  # questions whose promotion does not wait for the answer any more

    @property
    def is_busy(self):
        """Whether anything is asked for, being read, waited for, or held."""
        return bool(self._asking or self._waiting or self._reading or self._late or self._promotions)

    def step(self, now_s):
        """End windows and readers whose time is over, and begin windows. Return whether anything changed."""
        changed = self._end_questions(now_s)
        has_landed = False
        for window in [each for each in self._reading if each.batch.done() or now_s >= each.deadline_s]:
            self._reading.remove(window)
            self._land(window, now_s)
            changed = True
            has_landed = True
        if has_landed:
            self._measure(now_s)
        for promotion in list(self._promotions):
            if not promotion.is_over and now_s >= promotion.deadline_s:
                self.misses["LATE"] += promotion.end - promotion.count()
                self._end(promotion, now_s, promotion.num_landed)
            elif promotion.is_over and now_s >= promotion.expires_s:
                self.num_expired += promotion.num_landed
                self._give_back(promotion)
        for window in [each for each in self._late if each.batch.done()]:
            self._late.remove(window)
            self._give_back_slots(window.slots, window.tier_slots)
        for window in self._reading + self._late:
            if not window.is_late and now_s - window.begun_s >= LATE_S:
                window.is_late = True
                self.breaker.saw([BlockStatus.LATE], now_s)
        return self._begin_windows(now_s) or changed

    def is_bringing(self, keys):
        """For each key, whether its block is being read or will be."""
        return np.array([key.tobytes() in self._landings for key in keys], bool)

    @property
    def num_late(self):
        """Slots of the pool that no reader holds, and into which the tier still writes or will write."""
        left = (landing for window in (*self._reading, *self._waiting) for landing in window.landings)
        return sum(len(window.slots) for window in self._late) + sum(not landing.readers for landing in left)

    @property
    def num_ahead(self):
        """Blocks that are being read or will be."""
        return self._num_reading + sum(len(window.slots) for window in self._waiting)

    def next_s(self):
        """When `step` has to be called at the latest."""
        times = [until_s for _, _, until_s in self._asking]
        times += [each.expires_s if each.is_over else each.deadline_s for each in self._promotions]
        return min(times + [window.deadline_s for window in self._reading], default=float("inf"))

    def shut(self):
        """End all readers with the blocks that they have."""
        for promotion, _, _ in self._asking:
            promotion.finish()
        self._asking = []
        for promotion in list(self._promotions):
            if not promotion.is_over:
                self._end(promotion, time.monotonic(), promotion.count())
            self._give_back(promotion)

    def begin(self, promotion):
        """Bring the leading run of a promotion's keys into RAM, unless its reader has left already.

        If the tier does not know whether it has them, it is asked first: that takes its `lookup_s` at the most.
        """
        now_s, leading = time.monotonic(), self.index.lookup(promotion.keys)[1]
        if leading < len(promotion.keys) and self.breaker.allows(now_s) and not promotion.is_closed:
            question = self.tier.ask(promotion.keys[leading:])
            if question is not None:
                until_s = min(now_s + self.tier.lookup_s, promotion.deadline_s)
                self._asking.append((promotion, question, until_s))
                return
        self._begin(promotion)

    def _end_questions(self, now_s):
        """Begin promotions whose question is answered, or whose time is over. Return whether there were any."""
        over = [each for each in self._asking if each[1].is_over or now_s >= each[2]]
        for promotion, question, until_s in over:
            self._asking.remove((promotion, question, until_s))
            self._unanswered.append(question)
            if not question.is_over:
                self.misses["UNANSWERED"] += 1
            self._begin(promotion)
        for question in [each for each in self._unanswered if each.is_over]:
            self._unanswered.remove(question)
            if question.has_failed:
                self.breaker.saw([BlockStatus.IO_ERROR], now_s)
        return bool(over)

    def _begin(self, promotion):
        if promotion.is_closed:
            return
        promotion.is_begun = True
        keys, now_s = promotion.keys, time.monotonic()
        is_there, leading = self.index.lookup(keys)
        if leading < len(keys) and self.breaker.allows(now_s):
            is_there = is_there | self.tier.catalogue.lookup(keys)[0]
        elif leading < len(keys):
            self.misses["SUSPENDED"] += 1
        run = int(np.argmin(np.append(is_there, False)))
        most = max(0, self.most_pinned - self.num_pinned - self.num_late)
        if run > most:
            self.misses["FULL"] += run - most
            run = most
        promotion.slots[:run] = self.index.acquire(keys[:run], gaps=True)
        missing = np.flatnonzero(promotion.slots[:run] == NO_SLOT)
        ahead = self.num_ahead
        if len(missing) and not self.break_even.pays(
            run - missing[0], (ahead + len(missing)) * self._stride_bytes, now_s
        ):
            self.misses["SLOWER_THAN_COMPUTING"] += run - int(missing[0])
            missing, run = missing[:0], int(missing[0])
        promotion.end = promotion.held = run
        self.num_pinned += run
        self._promotions.append(promotion)
        if len(missing):
            self._fetch(promotion, missing)
        self._hold(promotion, promotion.end)
        if promotion.count() == promotion.end:
            self._end(promotion, now_s, promotion.end)

    def close(self, promotion):
        """Give back what a reader holds, and wait for nothing more."""
        if not promotion.is_begun:
            promotion.is_closed = True
            promotion.finish()
            return
        if not promotion.is_over:
            self._end(promotion, time.monotonic(), 0)
        self._give_back(promotion)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _fetch(self, promotion, missing):
        """Reserve a slot for each missing block, or join a read of it. The run ends at a block that gets neither."""
        keys, tier, tag = promotion.keys[missing], self.tier.catalogue, self.tier.tag
        tier_slots = tier.acquire(keys, gaps=True)
        count = int(np.argmax(np.append(tier_slots, NO_SLOT) == NO_SLOT))
        lengths = tier.lengths_of(tier_slots[:count])
        slots, statuses, *victims = self.index.reserve(  # admitted, so that the tier keeps them
            keys[:count], lengths, admit=count, victims=self.evicted is not None
        )
        for blocks in victims:
            self.evicted(blocks.slots)
        may_part = np.ones(count, bool) if self.begins_value is None else self.begins_value(tier_slots[:count])
        window, windows, cause = None, [], "GONE"
        for i, status in enumerate(statuses[:count].tolist()):  # ints: numpy needs 12 us to compare with an enum
            key, position = keys[i].tobytes(), int(missing[i])
            if status == ReserveStatus.NEW:
                if window is None or (len(window.landings) >= self.window_blocks and may_part[i]):
                    window = Window(tag)
                    windows.append((window, []))
                landing = self._landings[key] = Landing(key, window)
                window.landings.append(landing)
                windows[-1][1].append(i)
            elif status == ReserveStatus.FULL:
                cause, count = "FULL", i
                break
            else:
                landing = self._landings.get(key)
                if landing is None:  # a save was writing it, and may be over
                    promotion.slots[position : position + 1] = self.index.acquire(keys[i : i + 1], gaps=True)
                    if promotion.slots[position] != NO_SLOT:
                        continue
                    cause, count = "BEING_SAVED", i
                    break
            landing.readers.append((promotion, position))
            promotion.landings.append(landing)
            landing.window.deadline_s = max(landing.window.deadline_s, promotion.deadline_s)
        if count < len(missing):
            self.misses[cause] += promotion.end - int(missing[count])
            promotion.end = int(missing[count])
        self.index.abort(slots[count:][statuses[count:] == ReserveStatus.NEW])
        is_ours = np.zeros(len(missing), bool)
        for window, numbers in windows:
            is_ours[numbers] = True
            window.fill(keys[numbers], lengths[numbers], tier_slots[numbers], slots[numbers])
            self.num_writing += len(numbers)
            self._waiting.append(window)
        tier.release(tier_slots[~is_ours & (tier_slots != NO_SLOT)])
        self._begin_windows(time.monotonic())

    def _begin_windows(self, now_s):
        """Give windows to the store, a few at a time. A window that no reader waits for any more is dropped."""
        begun = False
        while self._waiting and len(self._reading) < MOST_WINDOWS:
            window = self._waiting.popleft()
            begun = True
            if window.deadline_s <= now_s or not any(landing.readers for landing in window.landings):
                self._drop(window, now_s)
                continue
            window.begun_s = now_s
            try:
                window.batch = self.tier.store.get(
                    window.tier_slots,
                    window.slots,
                    window.keys,
                    window.lengths,
                    tag=window.tag,
                    timeout_ms=GET_TIMEOUT_MS,
                )
            except BaseException:
                self._drop(window, now_s)
                raise
            self._num_reading += len(window.slots)
            self._reading.append(window)
        return begun

    def _drop(self, window, now_s):
        self._give_back_slots(window.slots, window.tier_slots)
        self._settle(window, np.zeros(len(window.slots), bool), now_s)

    def _land(self, window, now_s):
        """Commit the blocks of a window that were read, pinned for each reader; abort the others."""
        batch, keys, slots = window.batch, window.keys, window.slots
        is_done, statuses = batch.done(), batch.statuses
        is_ok = statuses == BlockStatus.OK
        is_known = (self.tier.catalogue.slots_of(keys) == window.tier_slots) & (window.tag == self.tier.tag)
        ok = np.flatnonzero(is_ok & is_known)
        pins = np.array([len(window.landings[i].readers) for i in ok], np.uint32)
        answers = self.index.commit(slots[ok], pins=pins, clean=True, ram_only=self.is_lossy)
        has_landed = np.zeros(len(slots), bool)
        has_landed[ok] = answers == CommitStatus.READY
        for i in np.flatnonzero(~has_landed):
            late = statuses[i] == BlockStatus.PENDING
            self.misses["DISCARDED" if is_ok[i] else "LATE" if late else BlockStatus(statuses[i]).name] += 1
        is_wrong = ~is_ok & ~np.isin(statuses, NOT_READ) & is_known  # damaged, of another block, or unreadable
        if is_wrong.any():
            self.tier.was_wrong(keys[is_wrong], statuses[is_wrong])
        self._num_reading -= len(slots)
        self.num_promoted += int(has_landed.sum())
        self._num_landed += len(ok)
        self._since_s = min(self._since_s, max(window.begun_s, self._landed_at_s))
        took_s = batch.seconds  # this step may come later than its end
        self._until_s = max(self._until_s, now_s if took_s is None else min(now_s, window.begun_s + took_s))
        if is_done and not window.is_late:
            self.breaker.saw(statuses, now_s)
        rest = np.ones(len(slots), bool)
        rest[ok] = False
        if is_done:
            self._give_back_slots(slots[rest], window.tier_slots)
        else:  # the disk may still write into these slots, so only their keys are free
            is_ours = rest & (self.index.slots_of(keys) == slots)
            self.index.discard(keys[is_ours])
            window.slots = slots[rest]
            self._late.append(window)
        self.num_writing -= len(ok)
        self._settle(window, has_landed, now_s, slots)

    def _measure(self, now_s):
        """Measure the tier's rate. Windows that ended in one step count as one."""
        seconds = max(0.0, self._until_s - self._since_s)
        self.spent_s += seconds
        if self._num_landed and seconds:  # else they overlap with others, and count with the next step's
            self._landed_at_s = self._until_s
            self.break_even.measured(self._num_landed * self._stride_bytes, seconds, now_s)
            self._num_landed = 0
        self._since_s, self._until_s = float("inf"), 0.0

    def _settle(self, window, has_landed, now_s, slots=None):
        """Give each reader its blocks, or end its run before the first block that was not read."""
        readers = {}
        for i, landing in enumerate(window.landings):
            if self._landings.get(landing.key) is landing:  # else it was discarded meanwhile, and is read again
                del self._landings[landing.key]
            for reader, position in landing.readers:
                readers[id(reader)] = reader
                if has_landed[i]:
                    reader.slots[position] = slots[i]
                else:
                    reader.end = min(reader.end, position)
        for reader in readers.values():
            if reader.count() >= reader.end and not reader.is_over:
                self._end(reader, now_s, reader.end)
            else:
                reader.tell()

    def _give_back_slots(self, slots, tier_slots):
        self.index.abort(slots)
        self.num_writing -= len(slots)
        self.tier.catalogue.release(tier_slots)

    def _end(self, promotion, now_s, num_blocks):
        """End a reader's run after `num_blocks`: it gets no more."""
        promotion.end = num_blocks
        for landing in promotion.landings:
            landing.readers = [(reader, at) for reader, at in landing.readers if reader is not promotion]
        promotion.landings = []
        self._hold(promotion, num_blocks)
        promotion.expires_s = now_s + promotion.hold_s
        promotion.finish()

    def _hold(self, promotion, end):
        """Unpin the blocks that a reader has behind `end`."""
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
