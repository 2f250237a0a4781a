"""The half in vLLM's scheduler: which blocks are in host memory, what to save and load, and who must wait for whom.

Pure policy over a `BlockIndex`; it names no engine module and touches no memory. Every array of a step goes through the
index in one call.
"""

import math
import os

import numpy as np

from kvortex import BlockIndex, ReserveStatus
from kvortex.index import NO_SLOT, CommitStatus
from kvortex.integrations.vllm.evictions import Evictions
from kvortex.integrations.vllm.groups import RUN, STATE, longest_hit
from kvortex.integrations.vllm.holds import Holds
from kvortex.integrations.vllm.keys import KEY_BYTES, as_bytes, as_keys, digest_for, keys_of, keys_of_all
from kvortex.integrations.vllm.messages import CHUNK, LOAD, SAVE, StepMetadata, Transfer
from kvortex.integrations.vllm.per_request import EVERYTHING, Pins, wishes_of
from kvortex.integrations.vllm.room import Room, flat
from kvortex.integrations.vllm.sights import KEYS_PER_SLOT, Sights
from kvortex.integrations.vllm.state import InFlight, Offer, RequestState, is_session
from kvortex.integrations.vllm.tier import Tier

NO_KEY = bytes(KEY_BYTES)
LOOKED_BACK = 256  # blocks of a group that a server may be asked for before the end of a hit


class SchedulerHalf:
    """Decide what moves.

    Parameters
    ----------
    shape : PoolShape
    load_async : bool
        Whether requests wait for their load between steps or inside one.
    save_late : bool, default False
        Save what earlier steps wrote, not what this step writes: when its saves start, a drafter has not written yet.
    whole_prompts : bool, default True
        Whether all of a prompt may be loaded between steps. Where vLLM 0.33 keeps outputs beside the KV, it may not:
        there vLLM refuses a hit that leaves no token to compute.
    reload_preempted : bool, default True
        Whether a request that was preempted may load inside a step. With vLLM 0.15 it may not: if such a load fails,
        vLLM goes on with garbage, because it looks only at blocks that were computed when the request ran first.
    extends_hits : bool, default True
        Whether more may be loaded behind what a request found on the device. With several groups in vLLM 0.15 it may
        not: to make room for the blocks that one group loads, vLLM gives away blocks that another group found.
    events : BlockEvents or None, default None
        Publishes which blocks enter host memory and which leave it.
    interval : int or None, default None
        Tokens between the hits that groups that forget can serve, see `Group.worth_keeping`.
    step_tokens : int, default 0
        Most tokens that vLLM schedules before it frees the blocks that left a window.
    holds_all : bool, default False
        Hold blocks of every group: before the workers are called, vLLM zeroes blocks or copies states into them.
    save_after_hits : int, default 0
        How many requests must have used a block before it is saved.
    save_on_evict : bool, default False
        Save a block when vLLM gives it to another request, not when it is complete. Not with `holds_all`.
    tier : dict, optional
        If there is a tier below the pool: the arguments of `Tier` that do not follow from the pool and the model.
    role : Wishes, optional
        What vLLM's ``kv_role`` allows, whatever a request asks for.

    Notes
    -----
    Called by one thread. A slot becomes READY only when every rank has reported the copy into it. From the step that
    decides a load until every rank has reported it, the slots that it reads are pinned.
    """

    def __init__(
        self, shape, *, load_async, save_late=False, whole_prompts=True, reload_preempted=True, extends_hits=True,
        events=None, interval=None, step_tokens=0, holds_all=False, save_after_hits=0,
        save_on_evict=False, tier=None, role=EVERYTHING,
    ):  # fmt: skip
        self.shape, self.load_async, self.save_late = shape, load_async, save_late
        self.shape_to_send = shape  # until the workers have it
        self.groups, self.align_tokens = shape.groups, shape.align_tokens
        self.hash_tokens = shape.groups[0].hash_tokens
        self.forgetful = [group for group in shape.groups if group.kind != RUN]
        self.whole_prompts = whole_prompts and load_async and not self.forgetful
        self.interval = None if save_on_evict else interval  # blocks that vLLM does not keep are freed without a hash
        self.evictions = Evictions(shape.num_device_blocks) if save_on_evict else None
        self.runs = [group.index for group in shape.groups if group.kind == RUN]
        self.block_step = math.gcd(*(group.block_tokens for group in shape.groups))  # every block ends on a multiple
        # Tokens whose blocks must be there behind a hit, see `Group.peek_blocks`.
        self.peek_tokens = max(group.peek_blocks * group.block_tokens for group in shape.groups)
        held = {group.index for group in shape.groups if holds_all or group.kind != RUN}
        self.holds = Holds(set() if save_on_evict else held, shape.num_device_blocks // 2)
        self.reload_preempted, self.extends_hits = reload_preempted or load_async, extends_hits
        self.index = BlockIndex(shape.slots.num_slots)
        if shape.num_stages == 1:
            self.index.add_slots(*shape.slots.chunk(0))
        self.save_after_hits = save_after_hits
        num_keys = KEYS_PER_SLOT * shape.slots.num_slots * shape.groups[0].hashes_per_block
        self.sights = Sights(num_keys) if save_after_hits else None
        self.requests, self.matches, self.wishes, self.role = {}, {}, {}, role
        self.runs_found = {}  # request id -> tokens whose blocks of full attention are in the pool
        self.pins = Pins(self.index)
        # Request id -> keys of the blocks that it loads, until its next step, when others find them on the device.
        self.loading = {}
        self.waits_for = {}  # request id -> id of the request whose load it waits for, or waited for
        self.landed, self.idle = set(), False  # `landed`: ids of requests whose load is over
        self.room = Room(shape.groups, shape.num_device_blocks, step_tokens)
        self.no_room = False
        self.in_flight, self.chunk_ranks, self.chunk_lacking = {}, {}, {}
        self.writing = set()  # keys of blocks that are being saved
        # Per device block the last transfer that reads or writes it, 0 for none. One word is enough: a transfer that
        # meets another in flight was ordered after it by a fence, so it ends later.
        self.last_transfer = np.zeros(shape.num_device_blocks, dtype=np.int64)
        self.last_number = 0
        self.fences, self.loads = set(), []
        # Request id -> tokens found on the device, for each request admitted in this step that loads nothing from here.
        self.not_ours = {}
        self.events = events
        self.blocks_matched = 0
        self.tier = None
        if tier is not None:
            blocks_per_token = sum(1 / group.block_tokens for group in shape.groups if group.kind == RUN)
            self.tier = Tier(
                self.index, shape.slots, num_ranks=shape.num_ranks, evicted=events and events.remove,
                saves_late=save_on_evict,
                blocks_per_token=blocks_per_token or 1 / shape.groups[0].block_tokens, **tier,
            )  # fmt: skip

    # ---- a request's way in ------------------------------------------------------------------------------------------

    def match(self, request, num_computed_tokens):
        """Tokens in host memory beyond the first `num_computed_tokens`, and whether to load them between steps.

        Changes nothing in the index; a request that is asked about has no load in flight. If it was admitted before and
        not preempted since, a load for it failed, ours or another connector's. It then computes at once: until it does,
        vLLM from 0.26 on reserves room for all its blocks, and no load fits. Every request computes at least one token.
        After a load between steps, vLLM writes its KV into the last loaded block once more, so all of a prompt may be
        loaded. If only that block is missing, it is not loaded: computing it takes less time.

        If the number is None, vLLM goes on with the next request and asks again in the next step. It is None if:

        * the next block is being saved: waiting for it costs less than computing it and what follows;
        * most of what the request would load is being loaded for another request: afterwards it is on the device, and a
          second load would end no earlier, because loads run one after the other. When the load is over, vLLM goes on
          with its request before it asks again; before 0.32 not if that has less priority and so may wait long;
        * a lower tier has more of the prompt, which is on its way into host memory;
        * a load is over, but nothing ran in the last step: if a request finds no free blocks, vLLM before 0.32 does not
          look at those behind it, not even at one whose load is over;
        * the request would load, and admitting it would leave too few free blocks: a request that loads could not go
          on, or one that runs would be preempted as soon as it needs a block. vLLM itself counts only the blocks to be
          loaded. Later requests wait, too: otherwise small loads could overtake a large one for ever.
        """
        state = self.requests.get(request.request_id)
        self.loading.pop(request.request_id, None)
        if state is not None:  # and it has no blocks: vLLM 0.15 does not name those that a reset preempted
            state.load_failed |= state.num_preemptions == request.num_preemptions
            self.room.take(state, ())
        first = num_computed_tokens
        self.matches[request.request_id] = first
        if state is not None and state.load_failed:
            return 0, False
        self.landed.discard(request.request_id)
        if self.no_room or (self.idle and self.landed):
            return None, False
        waits_for = self.waits_for.get(request.request_id)
        if waits_for in self.loading and waits_for not in self.landed:  # no look-up: a thousand may wait for one
            return None, False
        # A token is left to compute.
        least = min(request.num_tokens - 1, len(request.block_hashes) * self.hash_tokens)
        least -= least % self.align_tokens
        if not self.wishes_of(request).load:
            return 0, False
        most = request.num_tokens if self.whole_prompts else request.num_tokens - 1
        if first % self.align_tokens or first >= least or request.skip_reading_prefix_cache or is_session(request):
            return 0, False
        if (request.num_preemptions and not self.reload_preempted) or (first and not self.extends_hits):
            return 0, False
        hit = longest_hit(self.index, self.groups, request, first, most, self.writing)
        self.runs_found[request.request_id] = hit.run
        if hit.is_growing and hit.length < least:
            return None, False
        if self.tier is not None and hit.length < least and self.waits_for_tier(request, first, most, hit):
            return None, False
        blocks = sum(end - begin for begin, end in (group.needed(hit.length, first) for group in self.groups))
        if not blocks:  # with chunks alone, no block is needed where a chunk ends, not even of a new prompt
            return 0, False
        load_async = self.load_async
        if load_async and self.loading:
            group = self.groups[-1]
            begin, end = group.needed(hit.length, first)
            middle = (begin + end - 1) // 2
            middle = keys_of(request, group, middle, middle + 1).tobytes()
            for name, others in self.loading.items():  # a prompt with this block has those before it
                if middle in others and name not in self.landed:
                    self.waits_for[request.request_id] = name
                    return None, False
        # vLLM itself refuses what cannot fit at all, and admits no other then: asking about each would cost much.
        if load_async and blocks < self.room.num_free and not self.has_room(request, first):
            self.no_room = True
            return None, False
        return hit.length - first, load_async

    def waits_for_tier(self, request, first, most, hit):
        """Whether a lower tier brings more than this hit into the pool, or will when others have made room."""
        name = request.request_id
        if self.tier.is_answered(name):
            return False
        if self.tier.is_silent:
            self.tier.expect(name)
            return True
        stages = [lambda: self.asked_chains(request, first, most)]
        if self.forgetful:
            stages.append(lambda: self.asked_ends(request, first, most))
            stages.append(lambda: self.asked_before(request, first, most))
        if self.tier.must_ask(name, stages):
            return True
        if not self.tier.answers():
            return False
        if self.tier.must_queue(name):
            return True
        if self.tier.wants(name):
            wider = longest_hit(self.tier, self.groups, request, first, most, self.writing)
            if wider.length <= hit.length:
                return False
            keys, _ = self.used(request, wider.length, first)
            if self.forgetful and len(keys) > self.tier.most_promoted:
                return False  # a part would be of no use
            return self.tier.wish(name, keys)
        return True

    def asked_chains(self, request, first, most):
        """Yield, for each group of full attention, the keys to ask a server for first, see `Tier.must_ask`."""
        for group in self.groups:
            if group.kind == RUN:
                count, end = self.tier.joined(group), most // group.block_tokens
                begin = first // group.block_tokens // count * count
                keys = keys_of(request, group, begin, end - end % count)
                _, leading = self.index.lookup(keys)
                yield keys[leading - leading % count :], True, count

    def asked_ends(self, request, first, most):
        """Yield, for each other group, the keys at the end of the hit of full attention that the pool lacks.

        If no group has full attention, any block may be of use.
        """
        runs, end = tuple(group for group in self.groups if group.kind == RUN), most
        if runs:
            end = longest_hit(self.tier, runs, request, first, most, self.writing).length
            end -= end % self.align_tokens
        for group in self.forgetful:
            begin, behind = group.needed(end, first) if runs else (first // group.block_tokens, end)
            keys = keys_of(request, group, begin, min(behind + group.peek_blocks, most // group.block_tokens))
            yield keys[~self.index.lookup(keys)[0]], False, 1

    def asked_before(self, request, first, most):
        """Of the other groups what they may have before that end, if they lack something of it.

        Where the prompt of an earlier turn of a conversation ended, windows were kept; full attention goes on with what
        was generated then.
        """
        hit = longest_hit(self.tier, self.groups, request, first, most, self.writing)
        end = hit.run - hit.run % self.align_tokens
        if hit.length < end and self.tier.remote.asks_at_once:
            for group in self.forgetful:
                behind = end // group.block_tokens
                keys = keys_of(request, group, max(first // group.block_tokens, behind - LOOKED_BACK), behind)
                yield keys[~self.index.lookup(keys)[0]], False, 1

    def wishes_of(self, request):
        """The wishes of a request, looked at once."""
        if request.request_id not in self.wishes:
            self.wishes[request.request_id] = wishes_of(request, self.role)
        return self.wishes[request.request_id]

    def has_room(self, request, hit_tokens):
        """Whether a request fits, see `Room`. If nothing runs that could give blocks back, every request fits."""
        if not self.room.num_taken or (self.idle and not self.loading):
            return True
        return self.room.has_room(request, hit_tokens, self.requests.values())

    def used(self, request, length, first_tokens=0):
        """Keys of the blocks for a hit of this length, in the order of their use, and their places in the block tables.

        The last key is the first to be evicted.
        """
        spans = [(group, *group.needed(length, first_tokens)) for group in self.groups]
        return keys_of_all(request, spans), [(group.index, begin, end) for group, begin, end in spans]

    def allocated(self, request, tables, num_external_tokens):
        """Note the device blocks of a request, and start loading `num_external_tokens` into them.

        Called in the step of the match, before anything is reserved: what was found is still there.
        """
        state = self.requests.get(request.request_id)
        if state is None:
            state = self.requests[request.request_id] = self.begin(request)
        state.request, state.load_failed, state.num_preemptions = request, False, request.num_preemptions
        self.room.take(state, tables)
        first = self.matches.pop(request.request_id, None)  # None: its load between steps is over
        self.landed.discard(request.request_id)
        self.loading.pop(request.request_id, None)
        if request.num_computed_tokens == 0:  # admitted anew; after a load it has computed tokens, and goes on
            state.outdated, state.is_cut, state.stop, state.loaded_tokens = False, False, None, 0
        if first is not None:
            state.boundaries = self.boundaries_of(state)
        if first:  # hits on the device are a use, too
            keys, _ = self.used(request, first)
            self.index.touch(keys)
        if num_external_tokens:
            keys, spans = self.used(request, first + num_external_tokens, first)
        if first or num_external_tokens:  # both are used now, the loaded blocks last
            state.stop = keys[-1].tobytes() if len(keys) else None
            state.is_cut = False
        if not num_external_tokens:
            if first is not None:
                self.not_ours[request.request_id] = first
            if self.tier is not None:
                self.tier.let_go(request.request_id)
            return
        targets = flat(tables[index][begin:end] for index, begin, end in spans)
        assert len(targets) == len(keys) and 0 not in targets, "vLLM has blocks for all that it was promised"
        state.loaded_tokens = first + num_external_tokens
        if self.load_async:
            self.loading[request.request_id] = frozenset(as_bytes(keys))
        slots = self.index.acquire(keys, self.shape.block_bytes)
        assert len(slots) == len(keys), "nothing leaves the index between a match and its allocation"
        self.blocks_matched += len(keys)
        self.fence(targets)
        self.loads.append(self.start(LOAD, slots, targets, keys, request.request_id))
        if self.tier is not None:
            self.tier.let_go(request.request_id)
            begin = 0
            for group, (_, first, end) in zip(self.groups, spans, strict=True) if self.events is not None else ():
                self.events.came_back(request, group, first, slots[begin : begin + end - first])
                begin += end - first

    def begin(self, request):
        """The state of a request that has device blocks for the first time."""
        state = RequestState(request, wishes=self.wishes_of(request))
        if state.wishes.max_save_tokens is not None:
            state.most_saved_tokens = state.wishes.max_save_tokens
        if self.sights is not None and state.wishes.save and not is_session(request):
            state.num_seen = len(request.block_hashes)
            run = self.sights.run(self.keys_seen(request, 0, state.num_seen), self.save_after_hits)
            state.most_saved_tokens = min(state.most_saved_tokens, run * self.hash_tokens)
        return state

    def keys_seen(self, request, first, end):
        """Keys of some hashes of a request, the same for all groups."""
        return as_keys(request.block_hashes[first:end], digest_for(request, self.groups[0]))

    def boundaries_of(self, state):
        """Lengths of the hits to expect for requests like this one, or with a prefix in common.

        From 0.32 on, vLLM says where a common prefix ends.
        """
        request, limit = state.request, state.most_saved_tokens
        most = request.num_tokens - 1
        lengths = (
            request.num_prompt_tokens - 1 - self.peek_tokens,
            most - self.peek_tokens,
            getattr(request, "shared_prefix_boundary", 0),
            self.runs_found.pop(request.request_id, 0),  # what other requests saved of it
            min(limit, most) - self.peek_tokens,
        )
        if self.tier is not None and self.tier.blocks_per_object > 1:  # hits on a server end where objects do
            tokens = [self.tier.joined(group) * group.block_tokens for group in self.groups if group.kind == RUN]
            whole = math.lcm(self.align_tokens, *tokens)
            lengths += tuple((length + self.peek_tokens) // whole * whole - self.peek_tokens for length in lengths)
        return tuple({length - length % self.align_tokens for length in lengths if length >= self.align_tokens})

    # ---- once a step -------------------------------------------------------------------------------------------------

    def build(self, output):
        """The metadata of the step that vLLM has just scheduled."""
        if self.pins.count:
            self.pins.end()
        for request_id in output.preempted_req_ids or ():
            if request_id in self.requests and request_id not in self.loading:  # else admitted again, with others
                self.room.take(self.requests[request_id], ())
        for new in output.scheduled_new_reqs:
            self.replace_blocks(new.req_id, new.block_ids, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for request_id, tables, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self.replace_blocks(request_id, tables, num_computed)
            elif tables is not None:
                self.room.extend(self.requests[request_id], tables)
                self.fence(flat(tables))
        self.holds.promised = 0
        offers = self.offers_of_states(output) if self.forgetful else {}
        for request_id, num_scheduled in output.num_scheduled_tokens.items():
            state = self.requests[request_id]
            computed, hashed = state.request.num_computed_tokens, len(state.request.block_hashes)
            # KV is written for the tokens computed after this step; a token just sampled has a hash, and no KV yet.
            written = computed if self.save_late else computed + num_scheduled
            written = min(written, hashed * self.hash_tokens, state.most_saved_tokens)
            # After a failed load fewer tokens are computed than before: what was computed on top of it is lost, too.
            state.offered_tokens = min(state.offered_tokens, computed)
            if written // self.block_step > state.offered_tokens // self.block_step:
                self.room.give_back(state)
                if state.keeps_nothing:
                    state.offered_tokens = written
                else:
                    self.offer(state, written, offers)
            state.computed_tokens = computed
        self.idle = not output.num_scheduled_tokens
        evictions = self.save_evicted() if self.evictions is not None else []
        step = StepMetadata(
            sorted(self.fences), self.loads, waits=self.take_waits(), is_idle=self.idle, shape=self.shape_to_send,
            evictions=evictions,
        )  # fmt: skip
        self.shape_to_send = None
        self.fences, self.loads, self.no_room = set(), [], False
        if self.evictions is not None:
            self.note_complete(offers.values())
        elif offers and (save := self.save(list(offers.values()))) is not None:
            # vLLM may give blocks that leave a window in this step to others at once.
            (step.evictions if self.save_late and self.forgetful else step.transfers).append(save)
        for load in step.of(LOAD) if step.evictions else ():  # they come after these saves
            self.last_transfer[load.block_ids] = load.number
        if self.tier is not None:
            step.tier = self.tier.build(output.total_num_scheduled_tokens)
        return step

    def replace_blocks(self, request_id, tables, num_computed_tokens):
        """Start a request anew with these blocks. Those of computed tokens are shared or loaded: they need no fence."""
        state = self.requests[request_id]
        self.room.take(state, tables)
        state.offered_tokens, state.computed_tokens = 0, num_computed_tokens
        self.fence(flat(table[num_computed_tokens // self.tokens_of(at) :] for at, table in enumerate(tables)))

    def tokens_of(self, group_index):
        """Tokens of a block of this group; of a group that is left alone, more than any request has."""
        return next((group.block_tokens for group in self.groups if group.index == group_index), 1 << 40)

    def take_waits(self):
        """Transfers in flight on device blocks that another connector fills: of computed tokens that were no hit here.

        That connector may write them from this step on, on any stream or on none: only copies that are over will do.
        """
        waits = set()
        for request_id, first in self.not_ours.items():
            state = self.requests[request_id]
            for group in self.groups if state.tables else ():  # or it was preempted meanwhile
                last = -(-state.request.num_computed_tokens // group.block_tokens)  # its tokens may end inside a block
                waits |= self.in_flight_on(state.tables[group.index][first // group.block_tokens : last])
        self.not_ours = {}
        return sorted(waits)

    def offer(self, state, written, offers):
        """Add to `offers` the blocks that the step completes for a request and that a later hit can use.

        Of a group that forgets, the request owns only the blocks that it still needs. With `save_late`, the blocks are
        saved before the step writes anything: then it also owns those that it needed in the last step.
        """
        parts, offered = [], state.offered_tokens
        owned = state.computed_tokens if self.save_late else state.request.num_computed_tokens
        for group in self.groups:
            if group.kind != STATE:
                first = offered // group.block_tokens
                if group.kind != RUN:
                    first = max(first, group.first_needed(owned))
                table = state.tables[group.index]
                spans = group.worth_keeping(first, written // group.block_tokens, state.boundaries, self.interval)
                parts += [(group, first, table[first:end]) for first, end in spans if 0 not in table[first:end]]
        if not self.holds.have_room_for(self.num_to_hold(state.request, parts)):
            return  # those that vLLM still has in the next step are offered again
        state.offered_tokens = written
        if parts:
            offers.setdefault(state.request.request_id, Offer(state, offered)).parts.extend(parts)

    def num_to_hold(self, request, parts):
        """How many blocks of these parts would be held: those of held groups that are not in the pool yet."""
        spans = [(group, first, first + len(ids)) for group, first, ids in parts if group.index in self.holds.groups]
        return np.count_nonzero(self.index.slots_of(keys_of_all(request, spans)) == NO_SLOT) if spans else 0

    def offers_of_states(self, output):
        """The states that vLLM hands over in this step, with the blocks that the forward writes them to."""
        handed_over = getattr(output, "kv_connector_block_state", None)
        offers, groups = {}, {group.index: group for group in self.groups if group.kind == STATE}
        for request_id, states in (handed_over.boundary_state_offloads if handed_over else {}).items():
            state = self.requests.get(request_id)
            if state is None or state.keeps_nothing:
                continue
            parts = [
                (groups[index], length // groups[index].block_tokens - 1, [block_id])
                for index, block_id, length in states
                if index in groups and length % groups[index].block_tokens == 0 and length <= state.most_saved_tokens
            ]
            if parts and self.holds.have_room_for(self.num_to_hold(state.request, parts)):
                offers[request_id] = Offer(state, state.offered_tokens, parts)
        return offers

    def save(self, offers):
        """Reserve slots for the offered blocks that are not in the pool; return the transfer that saves them, or None.

        A request does not evict the blocks before its own: eviction for it ends at the least recently used block of its
        chain. That holds until another request uses that block, too.
        """
        keys, block_ids, groups, stops, kept = [], [], [], [], []
        slots = self.index.slots_of(as_keys([offer.state.stop or NO_KEY for offer in offers])).tolist()
        for offer, stop in zip(offers, slots, strict=True):
            state, first_row = offer.state, len(stops)
            if stop == NO_SLOT:  # none yet; or evicted for others: tails of chains go first
                state.stop = None
                loaded = min(state.loaded_tokens, state.request.num_computed_tokens)
                state.is_cut = self.lacks_one_of(state.request, max(offer.offered_tokens, loaded))
            if state.is_cut:
                continue
            for group, first, ids in offer.parts:
                keys.append(keys_of(state.request, group, first, first + len(ids)))
                block_ids += ids
                groups += [group.index] * len(ids)
                stops += [stop] * len(ids)
            kept.append((offer, slice(first_row, len(stops))))
        if not kept:
            return None
        keys, groups = np.concatenate(keys), np.array(groups)
        slots, statuses, num_admitted = self.reserve(keys, stops=stops)
        for offer, _ in kept:
            self.join(offer)
        is_full = (statuses == ReserveStatus.FULL).any()
        is_coming = self.is_coming(keys, statuses)
        for offer, rows in kept:
            state, found = offer.state, statuses[rows]
            if is_coming[rows].any():  # the promotion may fail: in the next step these blocks are offered again
                state.offered_tokens = offer.offered_tokens
            if is_full:
                state.is_cut = bool((found == ReserveStatus.FULL)[np.isin(groups[rows], self.runs)].any())
            if state.stop is None:  # the last block that was there is the least recent
                some = np.flatnonzero(found == ReserveStatus.PRESENT)
                some = some if some.size else np.flatnonzero(found != ReserveStatus.FULL)
                state.stop = keys[rows.start + some[-1]].tobytes() if some.size else None
            if self.events is not None:
                end = rows.start
                for group, first, ids in offer.parts:
                    begin, end = end, end + len(ids)
                    new = np.flatnonzero(statuses[begin:end] == ReserveStatus.NEW)
                    self.events.reserved(state.request, group, first + new, slots[begin:end][new])
        new = np.flatnonzero(statuses == ReserveStatus.NEW)
        block_ids = np.asarray(block_ids, dtype=np.int64)[new]
        save = self.start_save(slots[new], block_ids, keys[new], num_admitted)
        if save is None:
            return None
        for offer, _ in kept:
            offer.state.last_save = save.number
        held = self.in_flight[save.number].held = self.holds.take(block_ids, groups[new])
        self.room.count(held, 1)
        return save

    def join(self, offer):
        """Tell the tier which blocks share an object on a server, for each object that an offer completes."""
        writer = self.tier and self.tier.writer
        for group, first, ids in offer.parts if writer else ():
            count = self.tier.joined(group)
            begin, end = first // count * count, (first + len(ids)) // count * count
            if begin < end:
                keys = keys_of(offer.state.request, group, begin, end)
                writer.add(keys.reshape(-1, count, KEY_BYTES))

    def note_complete(self, offers):
        """Note what the step writes into the offered blocks: they are saved when vLLM gives them to others."""
        for offer in offers:
            request = offer.state.request
            self.join(offer)
            for group, first, ids in offer.parts:
                self.evictions.completed(ids, keys_of(request, group, first, first + len(ids)))
                if self.events is not None:
                    numbers = np.arange(first, first + len(ids))
                    self.events.reserved(request, group, numbers, self.events.row_of(np.array(ids)))

    def save_evicted(self):
        """Reserve slots for the blocks that vLLM gave to others in this step; return a list of at most one transfer.

        Nothing is reserved before every load of the step has pinned its blocks. vLLM gives away the tail of a chain
        before its head: so the head is the more recent one in the index, too.
        """
        block_ids, keys = self.evictions.take()
        if not len(block_ids):
            return []
        slots, statuses, num_admitted = self.reserve(keys)
        new = np.flatnonzero(statuses == ReserveStatus.NEW)
        slots, block_ids, keys = slots[new], block_ids[new], keys[new]
        if self.events is not None:
            self.events.move(self.events.row_of(block_ids), slots)
        save = self.start_save(slots, block_ids, keys, num_admitted)
        return [] if save is None else [save]

    def reserve(self, keys, **options):
        """Slots for these blocks: what the index answers, and how many of the new ones the tier may have."""
        num_admitted = 0 if self.tier is None else self.tier.admit(len(keys))
        slots, statuses, *victims = self.index.reserve(
            keys, self.shape.block_bytes, admit=num_admitted, victims=self.events is not None, **options
        )
        for blocks in victims:
            self.events.remove(blocks.slots)
        return slots, statuses, num_admitted

    def is_coming(self, keys, statuses):
        """Per block whether it could not be reserved because the tier is just bringing it."""
        is_coming = statuses == ReserveStatus.PENDING
        if is_coming.any():
            is_coming[is_coming] = self.tier is not None and self.tier.promoter.is_bringing(keys[is_coming])
        return is_coming

    def start_save(self, slots, block_ids, keys, num_admitted):
        """Save these blocks into the slots reserved for them; None if there are no blocks."""
        save = None
        if len(slots):
            self.writing.update(as_bytes(keys))
            save = self.start(SAVE, slots, block_ids, keys)
        if self.tier is not None:
            self.tier.put_behind(save, keys, num_admitted)
        return save

    def lacks_one_of(self, request, num_tokens):
        """Whether these leading tokens lack a block of full attention: then no hit reaches the blocks behind it."""
        return any(
            NO_SLOT in self.index.slots_of(keys_of(request, group, 0, num_tokens // group.block_tokens))
            for group in self.groups
            if group.kind == RUN and num_tokens >= group.block_tokens
        )

    def start(self, kind, slots, block_ids, keys, request_id=None):
        self.last_number += 1
        block_ids = np.asarray(block_ids, dtype=np.int64)
        self.last_transfer[block_ids] = self.last_number
        transfer = Transfer(kind, self.last_number, slots, block_ids, request_id)
        self.in_flight[self.last_number] = InFlight(transfer, keys)
        return transfer

    def fence(self, block_ids):
        """Order this step, which may write these device blocks, after the transfers in flight on them."""
        self.fences |= self.in_flight_on(block_ids)

    def in_flight_on(self, block_ids):
        """Transfers in flight on these device blocks."""
        if not self.in_flight or not len(block_ids):
            return set()
        met = np.unique(self.last_transfer[np.asarray(block_ids, dtype=np.int64)])
        return {number for number in met.tolist() if number in self.in_flight}

    # ---- a transfer's way out ----------------------------------------------------------------------------------------

    def reported(self, report):
        """Finish the transfers that every rank has reported. If a block failed in one rank, it failed."""
        for (kind, number), bad in report.bad.items():
            if kind == CHUNK:
                self.chunk_lacking.setdefault(number, set()).update(bad)
                continue
            moving = self.in_flight[number]
            moving.bad |= bad
            if kind == LOAD:
                self.failed(moving, bad)
        for (kind, number), ranks in report.ended.items():
            if kind == CHUNK:
                self.chunk_ranks[number] = self.chunk_ranks.get(number, 0) + ranks
                if self.chunk_ranks[number] == self.shape.num_ranks:
                    first, count = self.shape.slots.chunk(number)
                    self.index.add_slots(first, count - len(self.chunk_lacking.pop(number, ())))
                continue
            moving = self.in_flight[number]
            moving.ranks += ranks
            if moving.ranks == self.shape.num_ranks:
                del self.in_flight[number]
                self.finish(moving)
        if self.tier is not None:
            self.tier.reported(report)

    def failed(self, moving, bad):
        """Forget the blocks in the slots `bad`, which a rank could not load: vLLM asks again at once, and must miss."""
        self.discard(moving.keys[is_in(moving.transfer.slots, bad)], on_tier=False)  # a tier checks what it reads

    def distrust_saves(self):
        """Discard all that is being saved: a load failed, ours or another's, and vLLM names no blocks computed from it.

        Call this before `reported`, which may end the saves.
        """
        for moving in self.in_flight.values():
            if moving.transfer.kind == SAVE:
                self.discard(moving.keys)
        if self.evictions is not None:
            self.evictions.forget()

    def discard(self, keys, *, on_tier=True):
        """Forget these blocks, in the pool and on a lower tier."""
        if self.events is not None:
            there = keys[self.index.lookup(keys)[0]]
            self.events.remove(self.index.slots_of(there))
        self.index.discard(keys)
        if self.tier is not None and on_tier:
            self.tier.discard(keys)

    def finish(self, moving):
        """Release or commit the slots of a transfer that every rank has reported."""
        kind, _, slots, _, request_id = moving.transfer
        self.room.count(moving.held, -1)
        self.holds.give_back(moving.held)
        if kind == LOAD:
            self.index.release(slots)
            if request_id in self.requests and self.load_async:
                self.landed.add(request_id)
            return
        self.writing.difference_update(as_bytes(moving.keys))
        bad = is_in(slots, moving.bad)
        if self.tier is not None:
            is_ready = self.tier.saved(moving, bad)
        else:
            is_ready = ~bad
            self.index.abort(slots[bad])
            is_ready[is_ready] = self.index.commit(slots[~bad]) == CommitStatus.READY
        if self.events is not None:
            self.events.store(slots[is_ready])
        if self.pins.waiting:
            self.pins.pin_what_is_written(self.writing)

    def finished(self, request):
        """A request left the engine. Its prefix becomes most recent, tail-first, so that heads outlive their tails."""
        self.matches.pop(request.request_id, None)
        self.landed.discard(request.request_id)
        self.loading.pop(request.request_id, None)
        self.waits_for.pop(request.request_id, None)
        self.wishes.pop(request.request_id, None)
        self.runs_found.pop(request.request_id, None)
        if self.tier is not None:
            self.tier.let_go(request.request_id)
        state = self.requests.pop(request.request_id, None)
        if state is not None:
            self.room.take(state, ())
            if state.num_seen is not None:  # others may ask for what it has generated
                keys = self.keys_seen(request, 0, max(state.num_seen, request.num_computed_tokens // self.hash_tokens))
                self.sights.see(keys[state.num_seen :])
                self.sights.touch(keys)
        if state is not None and state.offered_tokens:
            spans = []
            for group in self.groups:
                ends = state.boundaries if group.kind != RUN else (state.offered_tokens,)
                spans += [(group, *group.needed(end)) for end in ends if end <= state.offered_tokens]
            if spans:
                keys = keys_of_all(request, spans)
                self.index.touch(keys)
                if self.tier is not None:
                    self.tier.touch_later(state.last_save, keys)
                if state.wishes.pin_s and not state.outdated:
                    self.pins.want(keys, state.wishes.pin_s, self.writing)

    def let_go(self):
        """Give back every held block, because vLLM is about to forget its own blocks. The pool does not keep them."""
        for moving in self.in_flight.values():
            if len(moving.held):
                self.discard(moving.keys[np.isin(moving.transfer.block_ids, moving.held)])
                self.room.count(moving.held, -1)
                self.holds.give_back(moving.held)
                moving.held = ()

    def reset(self):
        """Forget every block, saves in flight included, and what running requests computed before."""
        self.pins.end(every=True)
        if self.events is not None:
            self.tell_all_removed()
        self.index.clear()
        if self.tier is not None:
            self.tier.clear(os.urandom(32))
        if self.evictions is not None:
            self.evictions.forget()
        self.matches.clear()
        self.writing.clear()
        for state in self.requests.values():
            state.outdated = True

    def tell_all_removed(self):
        """Publish that every block is gone: all are about to be forgotten, pinned or not."""
        self.events.remove(np.flatnonzero(self.events.is_told))


def is_in(slots, some):
    """Per slot whether it is one of the set `some`."""
    return np.isin(slots, list(some)) if some else np.zeros(len(slots), dtype=bool)
