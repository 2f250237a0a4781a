"""The half in vLLM's scheduler: which blocks are in host memory, what to save and load, and who must wait for whom.

Pure policy over a `BlockIndex`; it names no engine module and touches no memory. Every array of a step goes through the
index in one call.
"""

from dataclasses import dataclass, field

import numpy as np

from kvortex import BlockIndex, ReserveStatus
from kvortex.index import NO_SLOT, CommitStatus
from kvortex.integrations.vllm.events import BlockEvents
from kvortex.integrations.vllm.keys import KEY_BYTES, as_bytes, as_keys, keys_of
from kvortex.integrations.vllm.messages import CHUNK, LOAD, SAVE, StepMetadata, Transfer

NO_KEY = bytes(KEY_BYTES)


@dataclass
class RequestState:
    """A request that has device blocks."""

    request: object  # vLLM's, for its block hashes, which grow
    block_ids: list = field(default_factory=list)
    num_offered: int = 0  # leading blocks that were offered to the index
    stop: bytes | None = None  # key of the least recently used of its blocks in the index; None: none is there
    is_cut: bool = False  # blocks that it offered are not in the index: what it saves behind them nobody finds
    outdated: bool = False  # computed, or being loaded, at a reset: its blocks must not be kept
    load_failed: bool = False  # and it has no device blocks since


@dataclass
class InFlight:
    """A transfer that not every rank has reported yet."""

    transfer: Transfer
    keys: np.ndarray  # of the blocks
    ranks: int = 0
    bad: set = field(default_factory=set)  # slots whose block one rank could not move


class SchedulerHalf:
    """Decide what moves.

    Parameters
    ----------
    shape : PoolShape
    load_async : bool
        Whether requests wait for their load between steps or inside one.
    save_late : bool, default False
        Save what earlier steps wrote, not what this one writes: a drafter has yet to write its part of it.
    whole_prompts : bool, default True
        Whether all of a prompt may be loaded between steps. Not where vLLM 0.33 keeps outputs beside the KV: it refuses
        hits that leave no token.
    reload_preempted : bool, default True
        Whether a request that was preempted may load inside a step. Not with vLLM 0.15, which goes on with garbage when
        such a load fails: it looks only at blocks that were computed when the request ran first.
    events : bool, default False
        Whether to keep what vLLM is told of blocks, in `events`.

    Notes
    -----
    Called by one thread. A slot is READY only when every rank has reported its copy, and pinned from the step in which
    its load was decided until every rank has reported that one.
    """

    def __init__(self, shape, *, load_async, save_late=False, whole_prompts=True, reload_preempted=True, events=False):
        self.shape, self.load_async, self.save_late = shape, load_async, save_late
        self.shape_to_send = shape  # until the workers have it
        self.whole_prompts = whole_prompts and load_async
        self.reload_preempted = reload_preempted or load_async
        self.index = BlockIndex(shape.slots.num_slots)
        self.index.add_slots(*shape.slots.chunk(0))
        self.requests, self.matches = {}, {}
        # Request id -> keys of the blocks that it loads, until its next step, when others find them on the device.
        self.loading = {}
        self.waits_for = {}  # request id -> that of the request whose load it waits for, or has waited for
        self.landed, self.idle = set(), False  # those of them whose load is over
        self.holders = np.zeros(shape.num_device_blocks, dtype=np.int32)  # requests that have a device block
        self.num_held, self.no_room = 0, False
        self.in_flight, self.chunk_ranks = {}, {}
        self.writing = set()  # keys of blocks that are being saved
        # Per device block the last transfer that reads or writes it, 0 for none. One word is enough: a transfer that
        # meets another in flight was ordered after it by a fence, so it ends later.
        self.last_transfer = np.zeros(shape.num_device_blocks, dtype=np.int64)
        self.last_number = 0
        self.fences, self.loads = set(), []
        # Request id -> blocks found on the device, of those admitted in this step for whom nothing is loaded from here.
        self.not_ours = {}
        self.events = BlockEvents(shape.slots.num_slots) if events else None
        self.blocks_matched = 0

    # ---- a request's way in ------------------------------------------------------------------------------------------

    def match(self, request, num_computed_tokens):
        """Tokens in host memory beyond the first `num_computed_tokens`, and whether to load them between steps.

        Changes nothing in the index; a request that is asked about has no load any more. If its load failed, it
        computes, and at once: until then vLLM from 0.26 on keeps room for all its blocks, in the way of any load, its
        own too. One token is computed in any case: after a load between steps vLLM does that into the last block it
        loaded, whole as it is, so that all of a prompt may come from here; not for that block alone, whose tokens are
        computed sooner.

        None instead of a number asks vLLM to go on with the next request and to ask again in the next step:

        * the next block is just being saved, and waiting for it costs less than computing it and what follows;
        * most of what would be loaded is being loaded for another request already, and is on the device afterwards; a
          load of its own would end no earlier, because loads are done one after the other. Once that has landed, vLLM
          goes on with it before it asks, but for one with less priority (before 0.32), which may have to wait long;
        * nothing ran in the last step though a load has landed, which vLLM before 0.32 would not look at behind a
          request that finds no free blocks;
        * it would load, and admitting it would leave too few free blocks: a request that loads could not go on, or one
          that runs would be preempted as soon as it wants a block. vLLM counts the blocks to be loaded alone. Who comes
          later waits, too: otherwise small loads could overtake a large one for ever.
        """
        state = self.requests.get(request.request_id)
        if self.loading.pop(request.request_id, None):
            state.load_failed = True
        if state is not None:  # nor has it blocks: vLLM 0.15 does not tell whom a reset preempted
            self.hold(state, ())
        first, rest = divmod(num_computed_tokens, self.shape.block_tokens)
        self.matches[request.request_id] = first
        if state is not None and state.load_failed:
            return 0, False
        self.landed.discard(request.request_id)
        if self.no_room or (self.idle and self.landed):
            return None, False
        waits_for = self.waits_for.get(request.request_id)
        if waits_for in self.loading and waits_for not in self.landed:  # a thousand may wait for one: no look-up
            return None, False
        least = min((request.num_tokens - 1) // self.shape.block_tokens, len(request.block_hashes))  # a token is left
        most = (request.num_tokens if self.whole_prompts else request.num_tokens - 1) // self.shape.block_tokens
        if rest or first >= least or request.skip_reading_prefix_cache or is_session(request):
            return 0, False
        if request.num_preemptions and not self.reload_preempted:
            return 0, False
        keys = keys_of(request, first, most)
        _, leading = self.index.lookup(keys)
        if first + leading < least and keys[leading].tobytes() in self.writing:
            return None, False
        load_async = self.load_async and leading > 0
        if load_async and self.loading:
            middle = keys[(leading - 1) // 2].tobytes()  # those before it are in whatever prefix it is in
            for name, others in self.loading.items():
                if middle in others and name not in self.landed:
                    self.waits_for[request.request_id] = name
                    return None, False
        # What cannot fit at all vLLM refuses itself, and then asks nobody else: a look at each of a long queue is dear.
        could_fit = leading < self.shape.num_device_blocks - self.num_held
        if load_async and could_fit and not self.has_room(request, first):
            self.no_room = True
            return None, False
        return leading * self.shape.block_tokens, load_async

    def has_room(self, request, num_hits):
        """Whether a request fits beside the device blocks that are held, and those that their holders need next.

        It finds `num_hits` blocks on the device; those that nobody holds count as well, they are free until then. True,
        whatever is held, when nothing runs that would give blocks back.
        """
        if not self.num_held or (self.idle and not self.loading):
            return True
        count, shared = self.blocks_to_go_on(request), 0
        for state in self.requests.values():
            if state.block_ids:  # else it was preempted, and waits as well
                count += max(1, self.blocks_to_go_on(state.request) - len(state.block_ids))
                hashes = state.request.block_hashes
                while shared < min(num_hits, len(hashes)) and hashes[shared] == request.block_hashes[shared]:
                    shared += 1
        return count - shared < self.shape.num_device_blocks - self.num_held  # one is vLLM's null block

    def hold(self, state, block_ids):
        """From now on the request has these device blocks, instead of those it had."""
        self.count_holders(state.block_ids, -1)
        self.count_holders(block_ids, 1)
        state.block_ids = list(block_ids)

    def count_holders(self, block_ids, change):
        ids = np.asarray(block_ids, dtype=np.int64)
        self.num_held -= np.count_nonzero(self.holders[ids])
        self.holders[ids] += change
        self.num_held += np.count_nonzero(self.holders[ids])

    def blocks_to_go_on(self, request):
        """Device blocks for all tokens of a request and the next one."""
        return request.num_tokens // self.shape.block_tokens + 1

    def allocated(self, request, block_ids, num_external_tokens):
        """Note the device blocks of a request, and start loading `num_external_tokens` into them.

        Called in the step of the match, before anything is reserved: what was found is still there.
        """
        state = self.requests.setdefault(request.request_id, RequestState(request))
        state.request, state.load_failed = request, False
        self.hold(state, block_ids)
        first = self.matches.pop(request.request_id, None)  # None: its load between steps is over
        self.landed.discard(request.request_id)
        count = num_external_tokens // self.shape.block_tokens
        self.loading.pop(request.request_id, None)
        if request.num_computed_tokens == 0:  # admitted anew; a request whose load has landed has more, and goes on
            state.outdated, state.is_cut, state.stop = False, False, None
        if first:  # hits on the device are hits
            self.index.touch(keys_of(request, 0, first))
        if first or count:  # both are used now, the tail of each before its head, and what is loaded last
            state.stop = keys_of(request, (first or count) - 1, first or count).tobytes() or None
            state.is_cut = False
        if not count:
            if first is not None:
                self.not_ours[request.request_id] = first
            return
        keys, targets = keys_of(request, first, first + count), block_ids[first : first + count]
        if self.load_async:
            self.loading[request.request_id] = frozenset(as_bytes(keys))
        slots = self.index.acquire(keys, self.shape.block_bytes)
        assert len(slots) == count, "nothing leaves the index between a match and its allocation"
        self.blocks_matched += count
        self.fence(targets)
        self.loads.append(self.start(LOAD, slots, targets, keys, request.request_id))

    # ---- once a step -------------------------------------------------------------------------------------------------

    def build(self, output):
        """The metadata of the step that vLLM has just scheduled."""
        block_tokens = self.shape.block_tokens
        for request_id in output.preempted_req_ids or ():
            if request_id in self.requests and request_id not in self.loading:  # or it is back already, with others
                self.hold(self.requests[request_id], ())
        for new in output.scheduled_new_reqs:
            self.replace_blocks(new.req_id, new.block_ids[0], new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for request_id, ids, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self.replace_blocks(request_id, ids[0], num_computed)
            elif ids is not None:
                state = self.requests[request_id]
                self.count_holders(ids[0], 1)
                state.block_ids.extend(ids[0])
                self.fence(ids[0])
        offers = []
        for request_id, num_scheduled in output.num_scheduled_tokens.items():
            state = self.requests[request_id]
            # KV is written for the tokens computed after this step; a token just sampled has a hash, and no KV yet.
            if self.save_late:
                num_scheduled = 0
            written = (state.request.num_computed_tokens + num_scheduled) // block_tokens
            full = min(written, len(state.request.block_hashes))
            # Fewer are computed than before when a load failed, and what was computed on top of it.
            state.num_offered = min(state.num_offered, state.request.num_computed_tokens // block_tokens)
            if full > state.num_offered:
                if not (state.outdated or state.is_cut or is_session(state.request)):
                    offers.append((state, state.num_offered, full))
                state.num_offered = full
        self.idle = not output.num_scheduled_tokens
        step = StepMetadata(
            sorted(self.fences), self.loads, waits=self.take_waits(), is_idle=self.idle, shape=self.shape_to_send
        )
        self.shape_to_send = None
        self.fences, self.loads, self.no_room = set(), [], False
        save = self.save(offers) if offers else None
        if save is not None:
            step.transfers.append(save)
        return step

    def replace_blocks(self, request_id, block_ids, num_computed_tokens):
        """The request starts anew, with these blocks; those with computed tokens are shared, or its own by a load."""
        state = self.requests[request_id]
        self.hold(state, block_ids)
        state.num_offered = 0
        self.fence(state.block_ids[num_computed_tokens // self.shape.block_tokens :])

    def take_waits(self):
        """Transfers in flight on device blocks that another connector fills: what is computed and was not found.

        It may do so from this step on, on any stream or on none: the copies must be over, a fence would not do.
        """
        waits = set()
        for request_id, first in self.not_ours.items():
            state = self.requests[request_id]
            last = -(-state.request.num_computed_tokens // self.shape.block_tokens)  # its tokens may end inside a block
            waits |= self.in_flight_on(state.block_ids[first:last])
        self.not_ours = {}
        return sorted(waits)

    def save(self, offers):
        """Reserve slots for blocks that requests offer and that are not there yet; the transfer of them, or None.

        An offer is a request's state with the first of its blocks and the one behind the last. No request evicts what
        its blocks continue: eviction for it ends at the least recently used block of its chain, as long as no other
        request uses that one too.
        """
        keys, block_ids, stops, parts = [], [], [], []
        slots = self.index.slots_of(as_keys([state.stop or NO_KEY for state, _, _ in offers])).tolist()
        for (state, first, end), stop in zip(offers, slots, strict=True):
            if stop == NO_SLOT:  # none yet; or it was evicted for others, the tail of a chain first
                state.stop = None
                state.is_cut = NO_SLOT in self.index.slots_of(keys_of(state.request, 0, first))
            if not state.is_cut:
                parts.append((state, slice(len(stops), len(stops) + end - first)))
                keys.append(keys_of(state.request, first, end))
                block_ids += state.block_ids[first:end]
                stops += [stop] * (end - first)
        if not parts:
            return None
        keys = np.concatenate(keys)
        slots, statuses, *victims = self.index.reserve(
            keys, self.shape.block_bytes, stops=stops, victims=self.events is not None
        )
        for blocks in victims:
            self.events.remove(blocks.slots, blocks.keys)
        for state, part in parts:
            state.is_cut = bool((statuses[part] == ReserveStatus.FULL).any())
            if state.stop is None:  # the tail of what was there was used first; what is new will be used later
                kept = np.flatnonzero(statuses[part] == ReserveStatus.PRESENT)
                kept = kept if kept.size else np.flatnonzero(statuses[part] != ReserveStatus.FULL)
                state.stop = keys[part.start + kept[-1]].tobytes() if kept.size else None
            if self.events is not None:
                self.events.reserved(state.request, slots[part][statuses[part] == ReserveStatus.NEW])
        new = np.flatnonzero(statuses == ReserveStatus.NEW)
        if not new.size:
            return None
        keys = keys[new]
        self.writing.update(as_bytes(keys))
        return self.start(SAVE, slots[new], np.asarray(block_ids, dtype=np.int64)[new], keys)

    def start(self, kind, slots, block_ids, keys, request_id=None):
        self.last_number += 1
        block_ids = np.asarray(block_ids, dtype=np.int64)
        self.last_transfer[block_ids] = self.last_number
        transfer = Transfer(kind, self.last_number, slots, block_ids, request_id)
        self.in_flight[self.last_number] = InFlight(transfer, keys)
        return transfer

    def fence(self, block_ids):
        """This step may write these device blocks: transfers in flight on them come first."""
        self.fences |= self.in_flight_on(block_ids)

    def in_flight_on(self, block_ids):
        """Transfers in flight on these device blocks."""
        if not self.in_flight or not len(block_ids):
            return set()
        met = np.unique(self.last_transfer[np.asarray(block_ids, dtype=np.int64)])
        return {number for number in met.tolist() if number in self.in_flight}

    # ---- a transfer's way out ----------------------------------------------------------------------------------------

    def reported(self, report):
        """Finish the transfers that every rank has reported; a block that went wrong in one rank has gone wrong."""
        for (kind, number), bad in report.bad.items():
            moving = self.in_flight[number]
            moving.bad |= bad
            if kind == LOAD:
                self.failed(moving, bad)
        for (kind, number), ranks in report.ended.items():
            if kind == CHUNK:
                self.chunk_ranks[number] = self.chunk_ranks.get(number, 0) + ranks
                if self.chunk_ranks[number] == self.shape.num_ranks:
                    self.index.add_slots(*self.shape.slots.chunk(number))
                continue
            moving = self.in_flight[number]
            moving.ranks += ranks
            if moving.ranks == self.shape.num_ranks:
                del self.in_flight[number]
                self.finish(moving)

    def failed(self, moving, bad):
        """Some rank could not load the blocks in the slots `bad`: vLLM asks again at once, and must not find them."""
        self.discard(moving.keys[is_in(moving.transfer.slots, bad)])

    def distrust_saves(self):
        """A load failed, ours or another connector's: what steps computed from garbage is being saved.

        Which of the saves, vLLM does not tell. To be called before `reported`, which may end them.
        """
        for moving in self.in_flight.values():
            if moving.transfer.kind == SAVE:
                self.discard(moving.keys)

    def discard(self, keys):
        """Forget these blocks."""
        if self.events is not None:
            there = keys[self.index.lookup(keys)[0]]
            self.events.remove(self.index.slots_of(there), there)
        self.index.discard(keys)

    def finish(self, moving):
        """Every rank has reported it."""
        kind, _, slots, _, request_id = moving.transfer
        if kind == LOAD:
            self.index.release(slots)
            if request_id in self.requests and self.load_async:
                self.landed.add(request_id)
            return
        self.writing.difference_update(as_bytes(moving.keys))
        bad = is_in(slots, moving.bad)
        self.index.abort(slots[bad])
        ready = self.index.commit(slots[~bad]) == CommitStatus.READY
        if self.events is not None:
            self.events.store(slots[~bad][ready], moving.keys[~bad][ready])

    def finished(self, request):
        """A request left the engine. Its prefix becomes most recent, tail-first, so that heads outlive their tails."""
        self.matches.pop(request.request_id, None)
        self.landed.discard(request.request_id)
        self.loading.pop(request.request_id, None)
        self.waits_for.pop(request.request_id, None)
        state = self.requests.pop(request.request_id, None)
        if state is not None:
            self.hold(state, ())
        if state is not None and state.num_offered:
            self.index.touch(keys_of(request, 0, state.num_offered))

    def reset(self):
        """Forget every block, saves in flight included, and what running requests computed before."""
        if self.events is not None:
            self.tell_all_removed()
        self.index.clear()
        self.matches.clear()
        self.writing.clear()
        for state in self.requests.values():
            state.outdated = True

    def tell_all_removed(self):
        """Every block that is there is about to be forgotten: those that nothing pins, and those that loads do."""
        self.index.offer_again()
        blocks = self.index.coldest(self.shape.slots.num_slots)
        self.index.release(blocks.slots)
        self.events.remove(blocks.slots, blocks.keys)
        loads = [moving.keys for moving in self.in_flight.values() if moving.transfer.kind == LOAD]
        if loads:
            self.discard(np.unique(np.concatenate(loads), axis=0))


def is_in(slots, some):
    """Per slot whether it is one of the set `some`."""
    return np.isin(slots, list(some)) if some else np.zeros(len(slots), dtype=bool)


def is_session(request):
    """Whether a request is a streaming session: up to vLLM 0.31 its hashes keep a token that it drops."""
    return getattr(request, "resumable", False)
