"""KV events that a router can use: they say of a block what vLLM says of it, and keep up with the index."""

import os
import random
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import zmq
from forms import FORMS, STATES
from rig import BLOCK_TOKENS, HAS_TRANSFER_RESULTS, HAS_WORKER_METADATA, Rig
from test_schedules import live
from vllm.distributed import kv_events
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import hash_block_tokens

from kvortex.integrations.vllm.groups import RUN, STATE, WINDOW, Group
from kvortex.integrations.vllm.keys import as_keys, digest_for

STEPS = 10_000 if os.environ.get("KVORTEX_SOAK") == "1" else 200
ADAPTERS = {name: name and LoRARequest(name, at, "nowhere") for at, name in enumerate([None, "one", "two"])}
TAGS_KEYS = hasattr(kv_cache_utils, "to_event_extra_keys")  # 0.32
HAS_GROUPS = "group_idx" in BlockStored.__struct_fields__  # 0.26
tells_again = pytest.mark.skipif(not HAS_WORKER_METADATA, reason="this vLLM shows no connector that it cleared")


@pytest.fixture(autouse=True)
def whole_hashes(monkeypatch):
    """In events, as vLLM computes them, so that they can be computed again."""
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "0")


def blocks_of(event):
    """What an event says of each of its blocks, by (group, hash)."""
    size, group = event.block_size, getattr(event, "group_idx", None)
    assert len(event.token_ids) == size * len(event.block_hashes)
    parents = [event.parent_block_hash, *event.block_hashes]
    extra = getattr(event, "extra_keys", None) or [None] * len(event.block_hashes)
    kind = [getattr(event, name, None) for name in ("kv_cache_spec_kind", "kv_cache_spec_sliding_window")]
    return {
        (group, name): (
            parents[at], list(event.token_ids[at * size :][:size]), extra[at], event.lora_name, event.lora_id, *kind
        )
        for at, name in enumerate(event.block_hashes)
    }  # fmt: skip


def require_hashes(event, step=1):
    """Every hash follows from the parent, the tokens and the extra keys; vLLM hashes `step` pieces of a block."""
    for (_, name), (parent, tokens, extra, lora_name, *_) in blocks_of(event).items():
        keys = list(extra or ())
        if lora_name and not HAS_GROUPS:
            keys = [lora_name]
        elif TAGS_KEYS:
            keys = [tagged(key, lora_name) for key in keys]
        piece = len(tokens) // step
        for at in range(step):
            parent = hash_block_tokens(sha256, parent, tokens[at * piece : (at + 1) * piece], tuple(keys) or None)
        assert parent == name


def tagged(key, lora_name):
    """An extra key as vLLM hashes it from 0.32 on."""
    if key == lora_name:
        return ("lora", key, "nowhere")
    return ("cache_salt", key) if isinstance(key, str) else ("mm", *key)


def of_host(events, kind=BlockStored):
    return [event for event in events if isinstance(event, kind) and event.medium == "CPU"]


# ---- what is told of a block -----------------------------------------------------------------------------------------


def test_a_run_of_blocks_is_told_with_its_tokens_and_what_comes_before_it(make_rig, prompt):
    rig = make_rig(events=True)
    rig.serve("first", prompt("p", 100))
    rig.serve("longer", prompt("p", 140))
    hashes = rig.requests["longer"].block_hashes
    first, longer = of_host(rig.events)
    assert (first.block_hashes, first.parent_block_hash) == (hashes[:6], None)
    assert (longer.block_hashes, longer.parent_block_hash) == (hashes[6:8], hashes[5])
    assert first.token_ids + longer.token_ids == prompt("p", 128) and first.block_size == BLOCK_TOKENS


@pytest.mark.parametrize("num_groups", [1, 2])
def test_what_is_told_of_a_block_is_what_vllm_tells_of_it(make_rig, prompt, monkeypatch, num_groups):
    if num_groups == 2:  # vLLM has the layers of both groups in the same memory; nobody looks at the KV here
        make_cache = Rig.make_cache
        monkeypatch.setattr(Rig, "make_cache", lambda rig: dict.fromkeys(make_cache(rig), make_cache(rig)["layer0"]))
    rig = make_rig(events=True, num_groups=num_groups)
    rig.serve("plain", prompt("p", 100), 20)
    rig.serve("salted", prompt("p", 100), cache_salt="salt")
    rig.serve("adapted", prompt("p", 100), lora_request=ADAPTERS["two"])
    rig.serve("branch", prompt("p", 60) + prompt("q", 60), cache_salt="salt", lora_request=ADAPTERS["two"])
    device, host = {}, {}
    for event in rig.events:
        if event.medium == "CPU":
            host.update(blocks_of(event))
            if HAS_GROUPS:  # 0.15 tells no salt
                require_hashes(event)
        elif len(event.token_ids) == BLOCK_TOKENS * len(event.block_hashes):  # vLLM's tell too many, of a window
            device.update(blocks_of(event))
    both = host.keys() & device.keys()
    assert {group for group, _ in both} == set(range(num_groups) if HAS_GROUPS else [None])
    assert {name: (host[name], device[name]) for name in both if host[name] != device[name]} == {}
    assert num_groups == 2 or both == device.keys()


@pytest.mark.skipif(not HAS_TRANSFER_RESULTS, reason="before 0.32 states are refused")
@pytest.mark.parametrize("name", ["full_and_state", "six_with_states", "half_blocks_hashed"])
def test_what_is_told_of_a_state_is_what_vllm_tells_of_it(make_rig, prompt, name):
    form = {**FORMS[name], "num_blocks": 613, "num_slots": 256, "retention": None}
    rig = make_rig(events=True, max_tokens=form.get("block_tokens", BLOCK_TOKENS), **form)  # each step ends a block
    rig.serve("plain", prompt("p", 200))
    rig.serve("adapted", prompt("p", 100), lora_request=ADAPTERS["two"])
    host, device, states = {}, {}, [group.index for group in rig.half.groups if group.kind == STATE]
    for event in rig.events:
        if event.medium == "CPU":
            host |= blocks_of(event)
            require_hashes(event, step=rig.half.groups[0].hashes_per_block)
        elif len(event.token_ids) == event.block_size * len(event.block_hashes):  # vLLM's tell too many, of a window
            device |= blocks_of(event)
    both = {name for name in host.keys() & device.keys() if name[0] in states}
    assert {group for group, _ in both} == set(states)
    assert {name: (host[name], device[name]) for name in both if host[name] != device[name]} == {}
    rig.require_clean()


@tells_again
@pytest.mark.parametrize("adapter", [None, "two"])
def test_what_is_told_of_an_evicted_block_is_what_was_computed(make_rig, prompt, adapter):
    """Its request is over, and others have its device block."""
    rig = make_rig(events=True, num_blocks=13, extra={"save": "on_evict"})
    rig.serve("first", prompt("p", 100), cache_salt="salt", lora_request=ADAPTERS[adapter])
    rig.serve("second", prompt("q", 180))
    told, request = of_host(rig.events), rig.requests["first"]
    for event in told:
        require_hashes(event)
        assert event.lora_name == adapter
    assert sorted(name for event in told for name in event.block_hashes) == sorted(request.block_hashes[:6])
    tokens = {name: event[1] for one in told for name, event in blocks_of(one).items()}
    assert [tokens[0, name] for name in request.block_hashes[:6]] == [
        prompt("p", 96)[at : at + 16] for at in range(0, 96, 16)
    ]


def test_blocks_of_requests_saved_together_are_told_apart(make_rig, prompt):
    rig = make_rig(events=True, max_tokens=512)
    for name in "pqr":
        rig.add(name, prompt(name, 100))
    rig.run()
    assert [event.token_ids for event in of_host(rig.events)] == [prompt(name, 96) for name in "pqr"]


def test_between_blocks_that_are_not_kept_runs_end(make_rig, prompt):
    """Of a window not all blocks are saved, and a block may have several hashes."""
    rig = make_rig(events=True)
    window = Group(index=0, kind=WINDOW, block_tokens=32, hashes_per_block=2, reach_tokens=64)
    events = events_for(rig, window)
    request = rig.make_request("r", prompt("p", 320), 1, lora_request=ADAPTERS["one"])
    numbers, slots = np_arrays([1, 2, 5, 6, 7], [30, 3, 9, 12, 1])
    events.reserved(request, window, numbers, slots)
    events.store(slots)
    first, second = events.take()
    assert first.block_hashes == [request.block_hashes[at] for at in (3, 5)]
    assert first.parent_block_hash == request.block_hashes[1] and first.token_ids == prompt("p", 320)[32:96]
    assert second.block_hashes == [request.block_hashes[at] for at in (11, 13, 15)]
    assert second.parent_block_hash == request.block_hashes[9] and second.block_size == 32
    for event in (first, second):
        require_hashes(event, step=2)


def test_images_are_told_where_they_lie(make_rig, prompt):
    rig = make_rig(events=True)
    run = Group(index=0, kind=RUN, block_tokens=16)
    places = {"cat": PlaceholderRange(offset=10, length=30), "dog": PlaceholderRange(offset=60, length=5)}
    images = [
        MultiModalFeatureSpec(data=None, modality="image", identifier=name, mm_position=place)
        for name, place in places.items()
    ]
    events, request = events_for(rig, run), rig.make_request("r", prompt("p", 96), 1, mm_features=images)
    for numbers in ([0, 1], [2, 3, 5]):
        numbers, slots = np_arrays(numbers, numbers)
        events.reserved(request, run, numbers, slots)
        events.store(slots)
    told = events.take()
    assert [event.parent_block_hash for event in told] == [None, *(request.block_hashes[at] for at in (1, 4))]
    if HAS_GROUPS:
        for event in told:
            require_hashes(event)


def events_for(rig, group):
    """Events of one group, for a test that saves by itself."""
    return type(rig.half.events)((group,), rig.cache_config, 40)


def np_arrays(*lists):
    return [np.array(numbers, dtype=np.int64) for numbers in lists]


# ---- what is told when vLLM empties the device's cache ---------------------------------------------------------------


@tells_again
def test_what_is_left_is_told_again_when_vllm_has_cleared_its_cache(make_rig, prompt):
    rig = make_rig(events=True)
    rig.serve("long", prompt("p", 180))
    rig.serve("branch", prompt("p", 60) + prompt("q", 60))
    rig.serve("adapted", prompt("p", 60), lora_request=ADAPTERS["one"])
    before = {name: told for event in of_host(rig.events) for name, told in blocks_of(event).items()}
    rig.events.clear()
    rig.forget_device()
    rig.serve("last", prompt("z", 20))  # events are taken with a step's output
    at = next(at for at, event in enumerate(rig.events) if isinstance(event, AllBlocksCleared))
    assert not of_host(rig.events[:at])
    known, again = {None}, {}
    for event in of_host(rig.events[at:]):
        assert event.parent_block_hash in known  # what comes before is told before
        known.update(event.block_hashes)
        again.update(blocks_of(event))
    again = {name: told for name, told in again.items() if name in before}
    assert again == before and len(of_host(rig.events)) == 4  # the last request's, too


@tells_again
def test_a_reset_that_vllm_refuses_tells_nothing_again(make_rig, prompt):
    rig = make_rig(events=True)
    rig.serve("first", prompt("p", 100))
    rig.add("running", prompt("q", 100), 20)
    rig.step()
    rig.halves[0].drain()  # its blocks are told before
    for _ in range(2):
        rig.step()
    rig.events.clear()
    assert not rig.scheduler.reset_prefix_cache()
    rig.run()
    assert all(len(event.block_hashes) < 6 for event in of_host(rig.events))


def test_a_reset_of_the_connector_leaves_nothing_to_be_told_again(make_rig, prompt):
    rig = make_rig(events=True)
    rig.serve("first", prompt("p", 100))
    told = of_host(rig.events)
    rig.events.clear()
    assert rig.reset()
    rig.serve("last", prompt("z", 20))
    assert any(isinstance(event, AllBlocksCleared) for event in rig.events)
    assert [event.token_ids for event in of_host(rig.events)] == [prompt("z", 16)]
    if not HAS_WORKER_METADATA:
        (removed,) = of_host(rig.events, BlockRemoved)
        assert sorted(removed.block_hashes) == sorted(told[0].block_hashes)


# ---- who knows nothing but the events --------------------------------------------------------------------------------


class Router:
    """A subscriber of vLLM's own publisher."""

    def __init__(self, rig, address):
        self.blocks = {}  # (group, hash) -> name of the adapter
        self.num_published = self.num_read = self.num_removed = 0
        self.publisher = rig.scheduler.kv_event_publisher = ZmqEventPublisher(0, endpoint=address)
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.connect(address)
        self.socket.subscribe("")
        publish = self.publisher.publish

        def count(batch):
            self.num_published += 1
            publish(batch)

        self.publisher.publish = count
        while not self.socket.poll(10):  # what was published before they met is lost
            count(KVEventBatch(ts=0, events=[]))

    def read(self):
        """All that has been published."""
        while self.num_read < self.num_published:
            _, number, payload = self.socket.recv_multipart()
            self.num_read = int.from_bytes(number, "big") + 1
            for event in msgspec.msgpack.decode(payload, type=KVEventBatch).events:
                self.hear(event)

    def hear(self, event):
        if isinstance(event, AllBlocksCleared):
            if HAS_WORKER_METADATA:
                self.blocks.clear()
        elif event.medium == kv_events.MEDIUM_GPU:
            pass
        elif isinstance(event, BlockStored):
            require_hashes(event)
            told = blocks_of(event)
            assert not told.keys() & self.blocks.keys()
            self.blocks |= dict.fromkeys(told, event.lora_name)
        else:
            for name in event.block_hashes:
                del self.blocks[getattr(event, "group_idx", None), name]
            self.num_removed += len(event.block_hashes)

    def require_equal(self, half):
        """It knows the blocks that can be loaded, and no others."""
        for group in half.groups:
            for adapter, lora in ADAPTERS.items():
                names = [
                    name for (index, name), its in self.blocks.items() if (index or 0, its) == (group.index, adapter)
                ]
                keys = as_keys(names, digest_for(SimpleNamespace(lora_request=lora), group))
                assert half.index.lookup(keys)[0].all()
        assert len(self.blocks) == half.index.num_ready

    def close(self):
        self.socket.close(linger=0)


LIVES = {"one": {}} | {name: FORMS[name] for name in ("full_and_window", "six", "full_and_state", "six_with_states")}
if not HAS_GROUPS:
    LIVES = {"one": {}}  # vLLM 0.15 has no events with several groups
elif not HAS_TRANSFER_RESULTS:
    LIVES = {name: form for name, form in LIVES.items() if name not in STATES}  # 0.26 refuses them
WHEN = ["at_once", "on_evict"] if HAS_WORKER_METADATA else ["at_once"]


@pytest.mark.timeout(7200 if STEPS > 200 else 120)
@pytest.mark.parametrize("pipelined", [False, True], ids=["in_turn", "pipelined"])
@pytest.mark.parametrize(
    "name, save", [(name, save) for name in LIVES for save in WHEN if save == "at_once" or name not in STATES]
)
def test_a_router_knows_what_is_in_host_memory_after_every_step(make_rig, host, seed, pipelined, tmp_path, name, save):
    num_compared, num_removed, number = 0, 0, 0
    while num_compared < STEPS or num_removed < STEPS / 10:  # without removals these schedules show little
        draw = random.Random(f"{seed} {number} {pipelined} {name} {save}")
        rig = make_rig(
            events=True, pipelined=pipelined, num_slots=draw.choice([24, 64, 200]), num_ranks=draw.choice([1, 2]),
            retention=draw.choice([0, None]), extra={"save": save}, **LIVES[name],
        )  # fmt: skip
        router = Router(rig, f"ipc://{tmp_path}/{number}")
        step, add = rig.step, rig.add

        def step_and_compare(step=step, rig=rig, router=router):
            nonlocal num_compared
            before = len(rig.pending)
            step()
            if len(rig.pending) <= before:  # events are taken with a step's output
                router.read()
                router.require_equal(rig.half)
                num_compared += 1

        rig.step = step_and_compare
        rig.add = lambda *what, add=add, draw=draw: add(*what, lora_request=draw.choice([*ADAPTERS.values()]))
        host.set_delay_us(0, 500, seed)
        try:
            # vLLM 0.15 loses count of tokens in flight at a reset.
            live(rig, draw, resets=HAS_WORKER_METADATA or not pipelined)
        except BaseException as error:
            error.add_note(f"schedule {number} of KVORTEX_SEED={seed}, {pipelined=}")
            raise
        finally:
            router.close()
            rig.close()
        num_removed, number = num_removed + router.num_removed, number + 1
