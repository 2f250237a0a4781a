"""The lower tier as the scheduler's half sees it: which blocks it has, and what is to move there and back.

The stores are the workers', one a rank, equal in their slot numbers. What a step asks of them travels in its metadata;
what came of it is in a later step's report, and counts when every rank has told. So a block is on the tier only if all
ranks have written it, and back in the pool only if all have read it.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from kvortex.index import NO_SLOT, BlockIndex, CommitStatus, ReserveStatus
from kvortex.integrations.vllm.groups import RUN
from kvortex.integrations.vllm.joined import Homes, ObjectWriter
from kvortex.integrations.vllm.messages import ERASE, GET, PUT, RANGE_SLOTS, TierTransfer, merged
from kvortex.integrations.vllm.metrics import CAUSES
from kvortex.slots import PAGE_BYTES
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.breaker import Breaker
from kvortex.tiers.cleaner import PUT_TIMEOUT_MS, Cleaner
from kvortex.tiers.disk.tier import NO_TAG
from kvortex.tiers.plan import BreakEven, WriteBudget
from kvortex.tiers.promoter import Promoter, Promotion
from kvortex.tiers.remote.store import NOT_TO_BE_ERASED
from kvortex.tiers.remote.view import Names, Objects, View

NO_SLOTS, NO_KEYS = np.zeros(0, np.uint32), np.zeros((0, 32), np.uint8)
QUEUE_BLOCKS = 4096  # most blocks that a rank's store queues, the default of `DiskTier`
CAUSE_OF = {  # of `Promoter.misses`, those that are no `BlockStatus` of a record
    "LATE": "late", "DROPPED": "late", "FULL": "full", "SUSPENDED": "late",
    "SLOWER_THAN_COMPUTING": "slower_than_computing", "GONE": "gone", "BEING_SAVED": "gone", "DISCARDED": "gone",
}  # fmt: skip
CLEANED_A_STEP = 64  # blocks that the cleaner looks at: a whole pool would take longer than a step may
TOUCHED_LATER = 64  # most requests whose touch is repeated when a PUT is over


class RanksBatch:
    """What every rank's store was asked for; see `kvortex.tiers.base.Batch`."""

    def __init__(self, num_blocks, timeout_ms):
        self._statuses, self._is_over = np.full(num_blocks, BlockStatus.PENDING, np.uint8), False
        self.seconds = None
        self._deadline_s = time.monotonic() + timeout_ms / 1000

    def done(self):
        """Whether every rank has told of it."""
        return self._is_over

    @property
    def statuses(self):
        if not self._is_over and time.monotonic() >= self._deadline_s:
            return np.full(len(self._statuses), BlockStatus.LATE, np.uint8)
        return self._statuses

    def end(self, moved):
        self._statuses, self.seconds, self._is_over = moved.statuses, moved.seconds, True


class RanksStore:
    """The stores of all ranks as one; see `kvortex.tiers.base.Store`, of which cleaner and promoter need this much."""

    def __init__(self, num_ranks):
        self.num_ranks = num_ranks
        self.homes = None  # `Homes` of blocks that share objects
        self.unsent, self._last_number = [], 0
        self._batches, self._told = {}, {}  # by number

    def put(self, slots, pool_slots, keys, lengths, *, tag, timeout_ms, save=0, objects=None):
        """`save`: the number of the SAVE that brings these blocks into the pool, see `TierTransfer`."""
        return self._send(PUT, slots, pool_slots, keys, tag, timeout_ms, save, objects)

    def get(self, slots, pool_slots, keys, lengths, *, tag, timeout_ms):
        objects = None if self.homes is None else self.homes.of(slots)
        return self._send(GET, slots, pool_slots, keys, tag, timeout_ms, objects=objects)

    def erase(self, slots, *, timeout_ms):
        self.unsent.append(TierTransfer(ERASE, 0, np.array(slots, np.uint32), NO_SLOTS, NO_KEYS, NO_TAG, 0))

    def erase_objects(self, keys, counts, tag):
        """Remove objects, by the keys of their last blocks."""
        objects = Objects(keys, np.zeros(len(keys), np.uint8), np.full(len(keys), counts, np.uint16))
        self.unsent.append(TierTransfer(ERASE, 0, NO_SLOTS, NO_SLOTS, NO_KEYS, tag, 0, 0, objects))

    def _send(self, kind, tier_slots, slots, keys, tag, timeout_ms, save=0, objects=None):
        self._last_number += 1
        number = self._last_number
        self.unsent.append(TierTransfer(kind, number, tier_slots, slots, keys, tag, timeout_ms, save, objects))
        batch = self._batches[self._last_number] = RanksBatch(len(slots), timeout_ms)
        return batch

    def take(self):
        """What the next step is to ask for."""
        unsent, self.unsent = self.unsent, []
        return unsent

    def reported(self, moved):
        """Note what became of batches, `WorkerReport.moved`."""
        for number, told in moved.items():
            ranks, worst = self._told[number] = merged(self._told.get(number), told)
            if ranks == self.num_ranks:
                del self._told[number]
                self._batches.pop(number).end(worst)

    @property
    def num_blocks(self):
        """Blocks that the stores have been asked for, and have not told of."""
        return sum(len(batch.statuses) for batch in self._batches.values())

    @property
    def is_busy(self):
        """Whether the stores work on something that is not late, or are to be asked for something."""
        return bool(self.unsent) or any((batch.statuses != BlockStatus.LATE).any() for batch in self._batches.values())


@dataclass
class Asked:
    """A request that waits for blocks of the tier, or holds some."""

    deadline_s: float
    promotion: Promotion | None = None  # None: not begun yet


@dataclass
class Asking:
    """Questions about what the server has of a request."""

    until_s: float
    questions: list = field(default_factory=list)  # of the last stage
    num_stages: int = 0  # that have been asked


@dataclass
class Behind:
    """Blocks that are written to the tier as soon as their SAVE is over."""

    rows: np.ndarray  # of these, among the blocks of the SAVE
    tier_slots: np.ndarray
    batch: RanksBatch
    keys: np.ndarray
    slots: np.ndarray
    is_pinned: np.ndarray | None = None  # by us; None: not every rank has reported the SAVE
    is_late: bool = False
    to_touch: list = field(default_factory=list)  # keys of requests that ended meanwhile


class Tier:
    """One tier below the pool.

    Parameters
    ----------
    index : BlockIndex
        Of the pool.
    slots : Slots
        Of the pool.
    num_ranks : int
    bytes_per_s : int
        What may be written, in each rank; 0: no limit.
    codec : str, default "exact"
        Of the stores' records.
    promote_timeout_ms : int
        How long a request waits for what the tier has, from its first question on.
    blocks_per_token : float
        How many blocks a token fills.
    prefill_tokens_per_s : float or None
        What the model computes; 0: blocks come back whatever that takes. None: it is learnt.
    steps_at_once : int, default 1
        Steps that are under way at the same time.
    remote : RemoteTier, optional
        The settings of a tier on a server, which is asked here what it has; by the names of rank 0, for all ranks.
    evicted : callable, optional
        Is told the slots whose blocks are evicted for what comes back.
    blocks_per_object : int, default 1
        Blocks of full attention that share an object on a server.
    saves_late : bool, default False
        See `ObjectWriter`.

    Attributes
    ----------
    catalogue : BlockIndex
        Over the slots of the tier; without one until every rank has opened its store.
    is_adopting : bool
        Whether some slots have not been read yet, in which an earlier process may have left blocks.
    writer : ObjectWriter or None
        Where blocks share objects, it writes all that is written.
    """

    name, queue_blocks = "disk", QUEUE_BLOCKS

    def __init__(self, index, slots, *, num_ranks, bytes_per_s, promote_timeout_ms, blocks_per_token,
                 prefill_tokens_per_s=None, steps_at_once=1, remote=None, evicted=None, blocks_per_object=1,
                 saves_late=False, codec="exact"):  # fmt: skip
        self.index, self.slots, self.num_ranks, self.codec = index, slots, num_ranks, codec
        self.slot_ratio = None  # only the stores know it
        self.record_bytes = slots.stride_bytes  # what it has coded takes less, which only the workers' stores know
        self.catalogue, self.tag, self.is_adopting = BlockIndex(1), NO_TAG, True
        self.store = RanksStore(num_ranks)
        self.budget = WriteBudget(bytes_per_s)
        self.remote, self.view, self.questions, self._unanswered = remote, None, {}, []
        self.breaker = self.write_breaker = Breaker(self.name)
        if remote is not None:
            self.name = remote.name
            self._client = remote.client(PAGE_BYTES + slots.payload_bytes)  # takes long the first time, for imports
            self.breaker, self.write_breaker = Breaker(self.name), Breaker(f"{self.name} (writing)")
        self.rate = PrefillRate(prefill_tokens_per_s, blocks_per_token, time.monotonic, steps_at_once)
        self.promoter = Promoter(index, slots, self, self.breaker, self.rate.break_even, evicted=evicted)
        self.cleaner = Cleaner(index, slots, self, self.budget, self.write_breaker)
        self.cleaner.blocks_a_step = CLEANED_A_STEP
        self.cleaner.most_pinned = max(1, min(self.cleaner.most_pinned, slots.num_slots // 16))
        self.most_behind = max(1, slots.num_slots // 8 - self.cleaner.most_pinned)
        self.blocks_per_object, self.homes, self.writer = blocks_per_object, None, None
        if blocks_per_object > 1:
            self.promoter.begins_value = self._begins_object
            self.writer = ObjectWriter(
                index, slots, self, self.budget, self.write_breaker,
                most_joined=blocks_per_object, saves_late=saves_late,
            )  # fmt: skip
        self.promote_timeout_s = promote_timeout_ms / 1000
        # Request id -> `Asked`; (request id, keys) that this step wishes, in vLLM's order; the sum of their blocks, and
        # of those that the pool lacks; whether one found no room.
        self.asked, self.wishes, self._num_wished, self._num_to_read, self._is_full = {}, [], 0, 0, False
        self.behind, self.num_behind = {}, 0  # by number of the SAVE; blocks
        self.num_put_behind = self.num_not_put = 0
        self._saved_s = 0.0  # that computing what came back would have taken, by the rates of then
        self._ranks, self._fewest, self._has_more, self._space = 0, 0, False, b""
        self._found, self._num_ranges = {}, 0  # ranges that some ranks have told of; those that all have

    # ---- what an earlier process left -------------------------------------------------------------------------------

    def reported(self, report):
        """Note what the workers tell of their stores."""
        ranks, fewest = report.tier_slots
        if ranks:
            self._ranks, self._fewest = self._ranks + ranks, min(fewest, self._fewest or fewest)
            self._space = report.tier_space or self._space
            if self._ranks == self.num_ranks:
                self.catalogue = BlockIndex(self._fewest)
                if self.writer is not None:
                    self.homes = self.store.homes = Homes(self._fewest)
                self._open_view()
        for first, told in report.found.items():
            ranks, found = self._found[first] = merged(self._found.get(first), told)
            if ranks == self.num_ranks:
                del self._found[first]
                self._adopt(first, found)
        self._has_more = report.has_more
        self.store.reported(report.moved)
        self._end_behind()
        self.step()

    def _open_view(self):
        if self.remote is None:
            return
        block_bytes = self.slots.payload_bytes
        names = Names(self._space, 0, self.remote.name_format(self._space))
        self.view = View(
            self._client, names, block_bytes, self.catalogue, self.tag, self.remote.negative_ttl_s, alike=True,
            noted=self.homes and self.homes.note,
        )  # fmt: skip

    def _adopt(self, first, found):
        """Let these slots be used; what all ranks have there is known from now on, unless the weights changed."""
        end = min(first + RANGE_SLOTS, self._fewest)
        self._num_ranges += 1
        self.is_adopting = self._num_ranges < -(-self._fewest // RANGE_SLOTS)
        keys, lengths = np.zeros((end - first, 32), np.uint8), np.zeros(end - first, np.uint32)
        if self.tag == NO_TAG:
            there = found.slots < end
            keys[found.slots[there] - first] = found.keys[there]
            lengths[found.slots[there] - first] = self.slots.payload_bytes
        self.catalogue.adopt(np.arange(first, end), keys, lengths)

    # ---- a request's way in -----------------------------------------------------------------------------------------

    def joined(self, group):
        """How many blocks of a group share an object: those of full attention alone do."""
        return self.blocks_per_object if group.kind == RUN else 1

    def must_ask(self, request_id, stages):
        """Whether the request waits for the server's answers, `lookup_timeout_ms` from its first look on at the most.

        Parameters
        ----------
        request_id : str
        stages : list of callables
            Each returns (keys, is_chain, blocks of an object) for some groups of the model. What to ask may follow from
            the answers to the stage before.
        """
        if self.remote is None:
            return False
        now_s = time.monotonic()
        if request_id not in self.questions:
            if not self.breaker.allows(now_s):
                return False
            self.questions[request_id] = Asking(now_s + self.remote.lookup_timeout_ms / 1000)
        asking = self.questions[request_id]
        if self.view is None:  # the stores are being opened, which is part of the time
            return now_s < asking.until_s
        if not asking.num_stages:  # late or not: whoever comes next finds the answer
            self._ask(asking, stages)
        while now_s < asking.until_s and all(question.is_over for question in asking.questions):
            if asking.num_stages == len(stages):
                return False
            self._ask(asking, stages)
        return now_s < asking.until_s

    def _ask(self, asking, stages):
        """Ask the next stage."""
        asked = stages[asking.num_stages]()
        asked = [self.view.ask(keys, is_chain=is_chain, count=count) for keys, is_chain, count in asked]
        asking.questions = [question for question in asked if question is not None]
        asking.num_stages += 1
        self._unanswered += asking.questions

    def _hear(self, now_s):
        """Note which questions came to nothing."""
        for question in [each for each in self._unanswered if each.is_over]:
            self._unanswered.remove(question)
            if question.has_failed:
                self.breaker.saw([BlockStatus.IO_ERROR], now_s)

    def answers(self):
        """Whether it has blocks, and gives them."""
        return (
            self.catalogue.num_ready > 0
            and self.breaker.allows(time.monotonic())
            and self.promoter.num_late < self.promoter.most_pinned
        )

    def lookup(self, keys):
        """As `BlockIndex.lookup`, of what is in the pool or on the tier."""
        is_there = self.index.lookup(keys)[0] | self.catalogue.lookup(keys)[0]
        return is_there, int(np.argmin(np.append(is_there, False)))

    def is_answered(self, request_id):
        """Whether nothing more will come for this request: what the pool has now is what it gets."""
        asked = self.asked.get(request_id)
        if asked is None:
            return False
        return asked.promotion.is_over if asked.promotion is not None else time.monotonic() >= asked.deadline_s

    def wants(self, request_id):
        """Whether it is not known yet what this request would have from the tier."""
        asked = self.asked.get(request_id)
        return asked is None or asked.promotion is None

    @property
    def is_silent(self):
        """Whether disks know blocks of which no step has brought news yet. A server is asked instead."""
        return self.remote is None and (self._ranks < self.num_ranks or self._has_more)

    def expect(self, request_id):
        """The request waits, `promote_timeout_ms` at the most."""
        self.asked.setdefault(request_id, Asked(time.monotonic() + self.promote_timeout_s))

    def must_queue(self, request_id):
        """Whether it waits, and in this step there is no room even for one that was asked before it."""
        return self._is_full and request_id in self.asked

    def wish(self, request_id, keys):
        """The request would have these blocks; `build` begins to bring them, where there is room for all or for half of
        the pool. Where there is not, it waits, and who is asked later waits, too: otherwise small ones could overtake a
        large one for ever.

        Returns
        -------
        waits : bool
            False where computing them is faster than waiting for them and for what is read before. While the disk's
            rate is unknown, one request is promoted to measure it; the others compute.
        """
        is_missing = ~self.index.lookup(keys)[0]
        num_missing = int(is_missing.sum())
        if not self._pays(len(keys) - int(is_missing.argmax()), num_missing):
            self.promoter.misses["SLOWER_THAN_COMPUTING"] += num_missing
            self.asked[request_id] = Asked(0.0)
            return False
        self.expect(request_id)
        self._is_full |= not self._has_room(len(keys))
        if not self._is_full:
            self.wishes.append((request_id, keys))
            self._num_wished += len(keys)
            self._num_to_read += num_missing
        return True

    @property
    def most_promoted(self):
        """Blocks that may come for one request."""
        return self.promoter.most_pinned - self.promoter.num_late

    def _pays(self, num_blocks, num_missing):
        """Whether bringing so many takes less time than computing a run of blocks."""
        even, now_s = self.rate.break_even, time.monotonic()
        ahead = self.promoter.num_ahead + self._num_to_read
        if even.blocks_per_s and not even.is_known(now_s):
            return ahead == 0
        return even.pays(num_blocks, (ahead + num_missing) * self.slots.stride_bytes, now_s)

    def _has_room(self, num_blocks):
        """Whether so many more blocks may be held in half of the pool, and have slots."""
        num_held = self.index.num_pinned + self.index.num_writing + self._num_wished
        if not num_held:
            return True
        num_blocks = min(num_blocks, self.most_promoted, self.index.slots_added // 2)
        return (
            self.promoter.num_pinned + self.promoter.num_late + self._num_wished + num_blocks
            <= self.promoter.most_pinned
            and num_held + num_blocks <= self.index.slots_added
        )

    def let_go(self, request_id):
        """The request has pinned what it found, or is gone."""
        self.questions.pop(request_id, None)
        asked = self.asked.pop(request_id, None)
        if asked is not None and asked.promotion is not None:
            self.promoter.close(asked.promotion)

    # ---- once a step ------------------------------------------------------------------------------------------------

    def build(self, num_tokens):
        """What the step, which computes so many tokens, asks of the stores."""
        self.rate.step(num_tokens)
        self._num_wished = self._num_to_read = 0
        for request_id, keys in self.wishes:
            if not self._has_room(len(keys)):  # any more: loads have pinned what they found
                break
            asked = self.asked.get(request_id)
            if asked is not None and asked.promotion is None:
                asked.promotion = Promotion(keys, asked.deadline_s, float("inf"))
                self.promoter.begin(asked.promotion)
        self.wishes, self._is_full = [], False
        self.step()
        return self.store.take()

    def step(self):
        """Show what has come, and give the stores more to do."""
        now_s, num_promoted = time.monotonic(), self.promoter.num_promoted
        self._hear(now_s)
        self.promoter.step(now_s)
        if self.writer is None:
            self.cleaner.step(now_s)
        else:
            self.writer.step(now_s)
        self._saved_s += self.rate.break_even.saved_s(self.promoter.num_promoted - num_promoted)

    # ---- a block's way out ------------------------------------------------------------------------------------------

    def admit(self, num_blocks):
        """How many of these, which are about to be saved, may be written; see `WriteBudget`. Objects ask it later."""
        if self.writer is not None:
            return 0
        return self.budget.admit(num_blocks, self.slots.stride_bytes)

    def put_behind(self, save, keys, num_admitted):
        """Write the first `num_admitted` blocks of a SAVE as soon as it is over, as far as an eighth of the pool goes.

        The cleaner writes the others that were admitted. Of those that were, but are not in this SAVE, the budget is
        given back.
        """
        num_used = min(num_admitted, len(keys))
        self.budget.give_back((num_admitted - num_used) * self.slots.stride_bytes)
        if not self.write_breaker.allows(time.monotonic()):
            return  # the cleaner writes them later
        count = min(num_used, max(0, self.most_behind - self.num_behind))
        tier_slots, statuses = self.catalogue.reserve(keys[:count], self.slots.payload_bytes)
        rows = np.flatnonzero(statuses == ReserveStatus.NEW)
        if not len(rows):  # what the tier has the cleaner touches there, and gives back what was spent for it
            return
        batch = self.store.put(
            tier_slots[rows], save.slots[rows], keys[rows], None, tag=self.tag, timeout_ms=PUT_TIMEOUT_MS,
            save=save.number,
        )  # fmt: skip
        self.behind[save.number] = Behind(rows, tier_slots[rows], batch, keys[rows], save.slots[rows])
        self.num_behind += len(rows)

    def saved(self, moving, bad):
        """Every rank has reported a SAVE: show its blocks, pinned while they are being written.

        A slot that a rank could not fill, or whose block was discarded, is not used again until its PUT is over: other
        ranks' disks still read it.

        Returns
        -------
        is_ready : (n,) bool array
        """
        slots = moving.transfer.slots
        is_behind, is_ready = np.zeros(len(slots), bool), np.zeros(len(slots), bool)
        behind = self.behind.get(moving.transfer.number)
        if self.writer is not None:
            self.writer.look_again()
        if behind is not None:
            is_behind[behind.rows] = True
        is_known = self.index.slots_of(moving.keys) == slots
        is_shown = ~bad & (is_known | ~is_behind)
        pins = (is_behind & is_shown).astype(np.uint32)
        self.index.discard(moving.keys[bad & is_behind & is_known])  # who saves or promotes it anew gets another slot
        self.index.abort(slots[bad & ~is_behind])
        is_ready[is_shown] = self.index.commit(slots[is_shown], pins=pins[is_shown]) == CommitStatus.READY
        if behind is not None:
            behind.is_pinned = is_shown[behind.rows]
        return is_ready

    def _end_behind(self):
        """Note what was written behind SAVEs; a block that the pool has lost meanwhile is not kept."""
        for number, behind in list(self.behind.items()):
            if not behind.is_late and not behind.batch.done() and (behind.batch.statuses == BlockStatus.LATE).all():
                behind.is_late = True  # its slots are the disk's until it is over
                self.write_breaker.saw(behind.batch.statuses, time.monotonic())
            if behind.is_pinned is None or not behind.batch.done():
                continue
            del self.behind[number]
            self.num_behind -= len(behind.slots)
            is_kept = (behind.batch.statuses == BlockStatus.OK) & behind.is_pinned
            is_kept &= self.index.slots_of(behind.keys) == behind.slots
            self.erase(behind.tier_slots[~is_kept])
            self.catalogue.abort(behind.tier_slots[~is_kept])
            kept = behind.tier_slots[is_kept]
            is_there = self.catalogue.commit(kept) == CommitStatus.READY
            self.erase(kept[~is_there])
            is_kept[is_kept] = is_there
            if not behind.is_late:
                self.write_breaker.saw(behind.batch.statuses, time.monotonic())
            self.num_put_behind += int(is_kept.sum())
            self.num_not_put += int((~is_kept).sum())
            pinned = behind.is_pinned
            # Never offered, so most recent now; what was not written the cleaner takes.
            too_large = behind.batch.statuses == BlockStatus.TOO_LARGE
            self.index.release(
                behind.slots[pinned][::-1],
                offered=True,
                clean=is_kept[pinned][::-1],
                ram_only=too_large[pinned][::-1],
            )
            self.cleaner.count_too_large(int(too_large.sum()), self.num_put_behind)
            self.index.abort(behind.slots[~pinned])
            for keys in behind.to_touch:
                self.index.touch(keys)

    def touch_later(self, number, keys):
        """A request has ended whose last blocks were part of this SAVE: they are to become most recent once more."""
        if self.writer is not None:
            self.writer.touch_later(keys)
        behind = self.behind.get(number)
        if behind is not None and len(behind.to_touch) < TOUCHED_LATER:
            behind.to_touch.append(keys)

    def erase(self, tier_slots):
        if len(tier_slots):
            self.store.erase(tier_slots, timeout_ms=None)

    def erase_objects(self, keys, counts):
        self.store.erase_objects(keys, counts, self.tag)

    # ---- forgetting -------------------------------------------------------------------------------------------------

    def ask(self, keys):
        """None: what the workers' disks have they tell by themselves, and a server was asked before."""

    def was_wrong(self, keys, statuses):
        """Blocks were read that are damaged, another's, or cannot be read: forget and erase them.

        On a server only those that are wrong: others may need the rest.
        """
        if self.view is not None:
            self.view.forget(self._named(keys[statuses == BlockStatus.MISSING]))
            is_lost = np.isin(statuses, NOT_TO_BE_ERASED)
            self.catalogue.discard(keys[is_lost])
            keys = keys[~is_lost]
        self.discard(keys)

    def discard(self, keys):
        """Forget blocks at once, and erase them."""
        slots = self.catalogue.slots_of(keys)
        slots = slots[slots != NO_SLOT]
        if self.homes is None:
            self.erase(slots)
        elif len(slots):
            objects = self.homes.of(slots)
            names, rows = np.unique(objects.keys, axis=0, return_index=True)
            self.erase_objects(names, objects.counts[rows])
            self.catalogue.discard(self._keys_beside(slots))
        return self.catalogue.discard(keys)

    def _named(self, keys):
        """What the server knows these blocks by. Others that lie there with them are gone, too."""
        slots = self.catalogue.slots_of(keys)
        slots = slots[slots != NO_SLOT]
        if self.homes is None or not len(slots):
            return keys
        named = np.unique(self.homes.of(slots).keys, axis=0)
        self.catalogue.discard(self._keys_beside(slots))
        return named

    def _keys_beside(self, slots):
        """Keys of the blocks that lie in the same objects as those of these slots."""
        infos = [self.catalogue.slot_info(slot) for slot in self.homes.beside(slots).tolist()]
        found = [np.frombuffer(info["key"], np.uint8) for info in infos if info["state"] in ("writing", "ready")]
        return np.array(found, np.uint8).reshape(-1, 32)

    def _begins_object(self, tier_slots):
        """Per slot whether its block lies in another object than that of the slot before."""
        keys = self.homes.of(tier_slots).keys
        return np.concatenate([[True], (keys[1:] != keys[:-1]).any(axis=1)])[: len(keys)]

    def clear(self, tag):
        """Forget everything at once: what is on the disk has another tag from now on."""
        self.tag = tag
        for behind in self.behind.values():
            self.erase(behind.tier_slots)  # what waits is not written
        if self.writer is not None:
            self.writer.clear()
        if self.view is not None:
            self.view.clear(tag)
        self.catalogue.clear()

    def close(self):
        """Ask nobody any more."""
        if self.view is not None:
            self.view.stop()

    def counters(self):
        """What has come to pass so far, by the names of `metrics.SUMS`."""
        misses = dict.fromkeys(CAUSES, 0)
        for cause, count in self.promoter.misses.items():
            misses[CAUSE_OF.get(cause, "unreadable")] += count
        writer = self.writer or self.cleaner
        return {
            "tier_blocks_written": self.num_put_behind + writer.num_written,
            "tier_blocks_not_written": self.num_not_put + writer.num_failed,
            "tier_blocks_read": self.promoter.num_promoted,
            "tier_read_seconds": self.promoter.spent_s,
            "tier_saved_seconds": self._saved_s,
            **{f"tier_misses_{cause}": count for cause, count in misses.items()},
        }

    def levels(self):
        """How things are, by the names of `metrics.LEVELS`."""
        return {
            "tier_blocks": self.catalogue.num_ready,
            "tier_blocks_capacity": self.catalogue.slots_added,
            "tier_queue_blocks": self.store.num_blocks,
        }

    @property
    def is_busy(self):
        """Whether steps must go on for it, although vLLM has nothing to compute."""
        return self.store.is_busy or (self.writer is not None and self.writer.is_busy)


class PrefillRate:
    """What the model computes a second, as far as steps that compute much tell: it learns, or is told.

    Parameters
    ----------
    tokens_per_s : float or None
        0: nothing is to be learnt. None: learn.
    blocks_per_token : float
    clock : callable
    steps_at_once : int
        How many a step has before it, itself included, when it begins: the others' tokens are not computed yet.
    """

    LEAST_TOKENS, MOST_STEPS, LONGEST_S = 256, 8, 10

    def __init__(self, tokens_per_s, blocks_per_token, clock, steps_at_once=1):
        self.learns, self._blocks_per_token, self._clock = tokens_per_s is None, blocks_per_token, clock
        self.break_even = BreakEven((tokens_per_s or 0) * blocks_per_token)
        self._steps_at_once = steps_at_once
        self._run = deque(maxlen=self.MOST_STEPS + steps_at_once)  # of steps that compute much: when they begin, tokens
        self._rates = deque(maxlen=self.MOST_STEPS)

    def step(self, num_tokens):
        """A step begins that computes so many tokens."""
        if not self.learns:
            return
        if num_tokens < self.LEAST_TOKENS:  # nothing says how long it and a pause behind it take
            self._run.clear()
            return
        now_s = self._clock()
        if self._run and now_s - self._run[-1][0] > self.LONGEST_S:  # there was nothing to do
            self._run.clear()
        self._run.append((now_s, num_tokens))
        if len(self._run) > self._steps_at_once:
            seconds = self._run[-1][0] - self._run[self._steps_at_once - 1][0]
            computed = sum(tokens for _, tokens in list(self._run)[: -self._steps_at_once])
            if seconds > 0:
                self._rates.append(computed / seconds)
                self.break_even.blocks_per_s = float(np.median(self._rates)) * self._blocks_per_token
