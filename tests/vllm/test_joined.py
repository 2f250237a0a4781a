"""Small blocks that share an object on a server: one request for several, and never a wrong block."""

import random
import threading
import time

import pytest
from rig import HAS_WORKER_METADATA
from test_faults import refused
from test_schedules import SCHEDULES, live, refuse_some

from kvortex import ConfigError
from kvortex.integrations.vllm import joined
from kvortex.integrations.vllm.groups import RUN, STATE, Group
from kvortex.integrations.vllm.keys import as_bytes, keys_of
from kvortex.integrations.vllm.options import ConnectorOptions, PoolShape
from kvortex.slots import Slots

LONG_MS = 20_000
NUM_BLOCKS, COUNT = 10, 4  # of a prompt, of 16 tokens each; of an object


@pytest.fixture
def prompts(prompt):
    return [prompt(number, NUM_BLOCKS * 16 + 1) for number in range(6)]


@pytest.fixture
def start(make_rig, tmp_path):
    """Starts an engine over one folder."""

    def start(count=COUNT, extra=None, remote_options=None, **options):
        settings = {"lookup_timeout_ms": LONG_MS, "view_blocks": 1000, "blocks_per_object": count}
        remote = {
            "remote_url": f"file://{tmp_path}",
            "remote_options": settings | (remote_options or {}),
            "namespace": "the rig",
            "prefill_tokens_per_s": 0,
            "promote_timeout_ms": LONG_MS,
        }
        return make_rig(extra={**remote, **(extra or {})}, **options)

    return start


def serve(rig, prompts, name):
    """Blocks that each prompt finds."""
    found = [rig.serve(f"{name}{number}", prompt) // 16 for number, prompt in enumerate(prompts)]
    rig.require_clean()
    return found


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def chain_of(rig, prompt):
    """Keys of the blocks of a prompt."""
    return keys_of(rig.make_request("chain", prompt, 1), rig.half.groups[0], 0, NUM_BLOCKS)


def count_calls(client, verb):
    """The names that a client is asked for from now on."""
    calls, do = [], getattr(client, verb)
    setattr(client, verb, lambda name, *rest: calls.append(name) or do(name, *rest))
    return calls


# ---- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_objects_and_requests_are_divided_by_the_blocks_of_one(start, prompts, tmp_path, count):
    first, second = start(count), start(count)
    puts = count_calls(first.halves[0].tier.store.client, "put")
    serve(first, prompts, "a")
    assert len(puts) == len(files(tmp_path)) == 6 * NUM_BLOCKS // count
    gets = count_calls(second.halves[0].tier.store.client, "get")
    assert serve(second, prompts, "b") == [NUM_BLOCKS] * 6
    assert len(gets) == 6 * NUM_BLOCKS // count


def test_a_windows_end_does_not_part_an_object(start, prompts):
    serve(start(), prompts, "a")
    rig = start()
    rig.half.tier.promoter.window_blocks = 3
    gets = count_calls(rig.halves[0].tier.store.client, "get")
    assert serve(rig, prompts, "b") == [8] * 6
    assert len(gets) == 12


def test_a_server_is_asked_for_whole_objects_alone(start, prompts):
    rig = start()
    serve(rig, prompts[:1], "a")
    asked = count_calls(rig.half.tier.view.client, "_size")
    assert serve(rig, prompts[1:2], "b") == [0]
    assert len(asked) == 1
    assert serve(rig, [prompts[2][: 3 * 16 + 1]], "c") == [0]
    assert len(asked) == 1, "a prompt without a whole object asks nothing"


# ---- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_does_not_fill_an_object_is_computed(start, prompts, num_ranks):
    serve(start(num_ranks=num_ranks), prompts, "a")
    assert serve(start(num_ranks=num_ranks), prompts, "b") == [8] * 6


def test_what_the_pool_has_goes_on_behind_what_the_server_has(start, prompts):
    rig = start()
    serve(rig, prompts[:1], "a")
    rig.forget_device()
    rig.index.discard(chain_of(rig, prompts[0])[:8])
    assert serve(rig, prompts[:1], "b") == [NUM_BLOCKS]


@pytest.mark.parametrize("lost", [[0], [2, 3], [5], [2, 3, 4, 5], [0, 7], range(1, 7)])
def test_of_an_object_only_what_the_pool_lacks_comes_back(start, prompts, lost):
    rig = start()
    serve(rig, prompts[:1], "a")
    rig.forget_device()
    rig.index.discard(chain_of(rig, prompts[0])[list(lost)])
    assert serve(rig, prompts[:1], "b") == [NUM_BLOCKS]
    assert rig.half.tier.promoter.num_promoted == len(lost)


def test_prompts_that_part_inside_an_object_each_have_one_of_their_own(start, prompts, tmp_path):
    others = [prompts[0], prompts[0][: 6 * 16] + prompts[1][6 * 16 :]]
    serve(start(), others, "a")
    assert len(files(tmp_path)) == 3, "the first is the same"
    assert serve(start(), others, "b") == [8, 8]
    assert serve(start(), others[::-1], "c") == [8, 8]


def test_a_longer_prompt_goes_on_where_a_shorter_one_ended(start, prompts, tmp_path):
    rig = start()
    for blocks in (3, 6, 7, 10):
        rig.serve(f"a{blocks}", prompts[0][: blocks * 16 + 1])
    rig.require_clean()
    assert len(files(tmp_path)) == 2
    assert serve(start(), prompts[:1], "b") == [8]


def test_what_was_generated_is_kept_as_soon_as_it_fills_an_object(start, prompt, tmp_path):
    rig = start()
    rig.serve("a", prompt(0, 20), max_tokens=16 * 9)
    rig.require_clean()
    assert len(files(tmp_path)) == 2


def test_engines_that_join_differently_share_nothing_and_read_nothing_wrong(start, prompts):
    for count in (1, 2, 4, 5):
        assert serve(start(count), prompts, "a") == [0] * 6
    for count, found in ((1, 10), (2, 10), (4, 8), (5, 10)):
        assert serve(start(count), prompts, "b") == [found] * 6


@pytest.mark.skipif(not HAS_WORKER_METADATA, reason="this vLLM shows no evictions")
def test_with_on_evict_objects_are_written_whose_blocks_came_one_by_one(start, prompts, tmp_path):
    rig = start(extra={"save": "on_evict"}, num_blocks=41, num_slots=200)
    serve(rig, prompts, "a")
    assert len(files(tmp_path)) >= 4
    assert serve(start(), prompts[:2], "b") == [8, 8]


# ---- what is not written ---------------------------------------------------------------------------------------------


def test_an_object_of_which_the_pool_lost_a_block_is_not_written(start, prompts, tmp_path):
    rig = start()
    breaker = rig.half.tier.write_breaker
    allows, breaker.allows = breaker.allows, lambda now_s: False
    serve(rig, prompts[:1], "a")
    rig.index.discard(chain_of(rig, prompts[0])[1:2])
    breaker.allows = allows
    rig.serve("b", prompts[1][:4])
    rig.require_clean()
    assert len(files(tmp_path)) == 1, "the second one"
    assert rig.half.tier.counters()["tier_blocks_not_written"] == COUNT
    assert serve(start(), prompts[:1], "c") == [0], "of a chain nothing is found behind what is missing"


def test_an_object_waits_until_all_of_its_blocks_are_saved(start, prompts, host, tmp_path):
    rig = start(max_tokens=32)
    host.hold()
    rig.add("a", prompts[0])
    rig.step_until_served()
    assert not rig.half.tier.writer.num_pinned and not files(tmp_path)
    host.release()
    rig.run()
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_a_request_that_is_aborted_leaves_whole_objects_and_no_pin(start, prompts, num_steps):
    rig = start(max_tokens=32)
    rig.add("a", prompts[0])
    for _ in range(num_steps):
        rig.step()
    rig.abort("a")
    rig.run()
    rig.require_clean()
    found = serve(start(), prompts[:1], "b")
    assert found[0] % COUNT == 0 and found[0] <= 2 * num_steps


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("pipelined", [False, True])
def test_what_was_computed_from_a_failed_load_reaches_no_server(start, prompts, host, pipelined, goes_on):
    rig = start(num_slots=200, load_async=False, pipelined=pipelined)
    serve(rig, prompts[:1], "a")
    rig.forget_device()
    longer = [*prompts[0][:-1], *prompts[1]]
    with refused(host, rig, "H2D"):
        rig.add("b", longer)
        while not any(half.has_failed for half in rig.halves):
            rig.step()
    if goes_on:
        rig.run()
    rig.close()
    serve(start(num_slots=200), [longer], "c")


def test_what_a_server_did_not_take_is_written_when_it_does(start, prompts, tmp_path):
    rig = start()
    client = rig.halves[0].tier.store.client
    put = client.put

    def fail(name, record):
        raise OSError("planted")

    client.put = fail
    serve(rig, prompts, "a")
    assert not files(tmp_path)
    assert not rig.half.tier.write_breaker.allows(time.monotonic())
    client.put = put
    rig.half.tier.write_breaker.allows = lambda now_s: True
    rig.half.tier.writer._not_before_s = 0
    rig.serve("b", prompts[0])
    rig.require_clean()
    assert len(files(tmp_path)) == 12


def test_an_engine_rests_while_a_server_hangs_at_a_write(start, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(joined, "PUT_TIMEOUT_MS", 50)
    rig = start()
    client, answers = rig.halves[0].tier.store.client, threading.Event()
    put = client.put
    client.put = lambda *value: answers.wait(30) and put(*value)
    for number, prompt in enumerate(prompts):
        rig.add(f"a{number}", prompt)
    rig.run(most_s=20)
    assert rig.index.num_pinned == rig.half.tier.writer.num_pinned == 8, "what is being written, and no more"
    answers.set()
    while rig.half.tier.writer.num_pinned:
        rig.step()
    rig.serve("b", prompts[0])
    rig.run()
    rig.require_clean()
    assert len(files(tmp_path)) == 12


def test_writing_pins_a_part_of_the_pool_alone(start, prompts):
    rig = start(num_slots=64)
    writer, pinned = rig.half.tier.writer, []
    put = rig.half.tier.store.put
    rig.half.tier.store.put = lambda *rest, **more: pinned.append(writer.num_pinned) or put(*rest, **more)
    for number, prompt in enumerate(prompts):
        rig.add(f"a{number}", prompt)
    rig.run()
    rig.require_clean()
    assert max(pinned) <= 8
    assert rig.half.tier.counters()["tier_blocks_written"] == 6 * 8


def test_writing_leaves_the_head_of_a_chain_more_recent_than_its_tail(start, prompts):
    rig, gate = start(), threading.Event()
    client = rig.halves[0].tier.store.client
    put = client.put
    client.put = lambda *value: gate.wait(LONG_MS / 1000) and put(*value)
    for name, prompt in zip("ab", prompts, strict=False):
        rig.add(name, prompt)
    rig.step_until_served()
    while rig.half.in_flight:  # what is saved last would be the most recent if nothing were written later
        rig.step()
    gate.set()
    rig.run()
    order = as_bytes(rig.index.coldest(64).keys)
    for prompt in prompts[:2]:
        chain = as_bytes(chain_of(rig, prompt))
        assert [key for key in order if key in chain] == chain[::-1]


def test_a_reset_while_objects_are_written_takes_nothing_from_others(start, prompts, tmp_path):
    rig = start()
    client = rig.halves[0].tier.store.client
    put = client.put
    client.put = lambda *value: time.sleep(0.05) or put(*value)
    rig.add("a", prompts[0])
    rig.step_until_served()
    while not rig.half.tier.writer.num_pinned:
        rig.step()
    assert rig.reset()
    rig.run()
    rig.require_clean()
    assert len(files(tmp_path)) == 2
    assert serve(rig, prompts[:1], "b") == [0], "what was written is of the weights of before"
    assert serve(start(), prompts[:1], "c") == [8]


@pytest.mark.parametrize("place", [1, 5])
def test_what_is_discarded_while_it_is_written_is_not_kept(start, prompts, tmp_path, place):
    """One of the blocks that two prompts share: the second object of the second prompt is being written."""
    others = [prompts[0], prompts[0][: 6 * 16] + prompts[1][6 * 16 :]]
    rig = start()
    serve(rig, others[:1], "a")
    client = rig.halves[0].tier.store.client
    put = client.put
    client.put = lambda *value: time.sleep(0.05) or put(*value)
    rig.add("b", others[1])
    rig.step_until_served()
    while not rig.half.tier.writer.num_pinned:
        rig.step()
    rig.half.discard(chain_of(rig, others[0])[place : place + 1])
    rig.run()
    rig.require_clean()
    assert rig.halves[0].tier.store.flush(LONG_MS) == 0
    assert len(files(tmp_path)) == (2 if place == 1 else 1), "no object that has it"
    assert serve(start(), others[1:], "c") == [0 if place == 1 else 4]


# ---- what is wrong on the server -------------------------------------------------------------------------------------


def test_an_object_that_is_gone_is_known_to_be_gone_whole(start, prompts, tmp_path):
    rig = start()
    serve(rig, prompts[:1], "a")
    rig.forget_device()
    keys, known, tier = chain_of(rig, prompts[0]), [], rig.half.tier
    rig.index.discard(keys[:2])
    for path in files(tmp_path):
        path.unlink()
    was_wrong = tier.was_wrong
    tier.was_wrong = lambda *what: (was_wrong(*what), known.extend(tier.catalogue.lookup(keys)[0][:COUNT]))
    assert serve(rig, prompts[:1], "b") == [0]
    assert known == [False] * COUNT, "of these, two were asked for"
    assert len(files(tmp_path)) == 1, "it is written again"


@pytest.mark.parametrize("place", range(COUNT))
def test_a_damaged_record_is_computed_anew_and_its_object_written_again(start, prompts, tmp_path, place):
    serve(start(), prompts[:1], "a")
    for path in files(tmp_path):
        value = bytearray(path.read_bytes())
        value[(place + 1) * len(value) // COUNT - 4096 + 7] ^= 1
        path.write_bytes(value)
    rig = start()
    assert serve(rig, prompts[:1], "b") == [place], "what comes before it in the object serves"
    rig.close()
    assert serve(start(), prompts[:1], "c") == [8]


def harm_some(rig, draw, folder):
    """Before each step, perhaps, somebody harms an object."""
    step = rig.step

    def step_in_trouble():
        if draw.random() < 0.2 and (paths := files(folder)):
            path, other = draw.choice(paths), draw.choice(paths)
            try:
                value = bytearray(path.read_bytes())
                how = draw.choice(["flip", "cut", "swap", "turn", "remove"])
                if how == "flip":
                    value[draw.randrange(len(value))] ^= 1 << draw.randrange(8)
                elif how == "cut":
                    value = value[: draw.randrange(len(value))]
                elif how == "swap":
                    value = other.read_bytes()
                elif how == "turn":
                    value = value[8192:] + value[:8192]
                path.write_bytes(value) if how != "remove" else path.unlink()
            except FileNotFoundError:
                pass
        step()

    rig.step = step_in_trouble


@pytest.mark.timeout(7200 if SCHEDULES > 6 else 120)
@pytest.mark.parametrize("pipelined", [False, True], ids=["in_turn", "pipelined"])
def test_no_schedule_over_a_server_reads_a_wrong_token(start, host, tmp_path, seed, pipelined):
    """Engine after engine over one folder, in which somebody harms objects; two at a time live the same life."""
    num_promoted = num_written = 0
    for number in range(SCHEDULES if SCHEDULES > 6 else 4):
        draw, pair = (random.Random(f"{seed} {name} {pipelined} server") for name in (number, f"pair {number // 2}"))
        load_async = draw.random() < 0.5
        groups = pair.choice([("full",), ("full",), ("full", "window:64")]) if HAS_WORKER_METADATA else ("full",)
        rig = start(
            pair.choice([2, 3, 3]),
            load_async=load_async,
            pipelined=pipelined,
            num_blocks=draw.choice([41, 67]) if len(groups) == 1 else 67,
            num_slots=draw.choice([24, 48]),
            num_ranks=pair.choice([1, 1, 2]),
            groups=groups if len(groups) > 1 else None,
            extra={"promote_timeout_ms": draw.choice([5, 200, 200]), "flush_timeout_ms": 500},
            remote_options={
                "lookup_timeout_ms": draw.choice([0, 200, 200]),
                "negative_ttl_s": draw.choice([0, 10]),
                "view_blocks": draw.choice([20, 1000]),
            },
        )
        host.set_delay_us(0, draw.choice([100, 3000]), seed)
        rig.half.tier.breaker.allows = rig.half.tier.write_breaker.allows = lambda now_s: True
        if draw.random() < 0.3:
            refuse_some(host, rig, draw, ["D2H"])
        harm_some(rig, draw, tmp_path)
        try:
            live(rig, pair, resets=draw.random() < 0.5 and (HAS_WORKER_METADATA or not pipelined))
        except BaseException as error:
            error.add_note(f"schedule {number} of KVORTEX_SEED={seed}, {load_async=}, {pipelined=}")
            raise
        num_promoted += rig.half.tier.promoter.num_promoted
        num_written += rig.half.tier.writer.num_written
        rig.close()
    assert num_promoted and num_written


# ---- windows and states ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_WORKER_METADATA, reason="this vLLM keeps one group")
@pytest.mark.parametrize("groups", [("full", "window:64"), ("full", "chunk:64"), ("full", "window:32", "window:80")])
def test_windows_are_objects_of_a_block_where_a_hit_ends(start, prompts, groups):
    serve(start(groups=groups, num_slots=200, num_blocks=134), prompts, "a")
    rig = start(groups=groups, num_slots=200, num_blocks=134)
    rig.serve("a", prompts[0][:4])
    asked = count_calls(rig.half.tier.view.client, "_size")
    assert serve(rig, prompts[:1], "b") == [8]
    of_windows = [len(range(*group.needed(8 * 16))) for group in rig.half.groups if group.kind != RUN]
    assert len(asked) == 2 + sum(of_windows), "two objects, by bisection; and what is needed behind them"


# ---- how many --------------------------------------------------------------------------------------------------------


def shape_of(payload_bytes, kind=RUN):
    groups = (Group(index=0, kind=RUN, block_tokens=16), Group(index=1, kind=kind, block_tokens=16))
    slots = Slots.of(1 << 30, payload_bytes, header_bytes=4096, first_chunk_bytes=1 << 20, chunk_bytes=1 << 20)
    return PoolShape(num_device_blocks=10, groups=groups, num_ranks=1, num_stages=1, slots=slots)


def options_of(url, **remote_options):
    return ConnectorOptions.parse({"cpu_pool_size_bytes": "1GiB", "remote_url": url, "remote_options": remote_options})


@pytest.mark.parametrize(
    "url, payload_bytes, count",
    [
        ("s3://b/p", 4096, 32),
        ("s3://b/p", 128 << 10, 32),
        ("file:///f", 256 << 10, 16),
        ("gs://b/p", 300 << 10, 13),
        ("s3://b/p", 2 << 20, 2),
        ("s3://b/p", 3 << 20, 1),
        ("s3://b/p", 16 << 20, 1),
        ("redis://h", 4096, 1),
        ("redis://h", 256 << 10, 1),
    ],
)
def test_objects_have_as_many_blocks_as_make_4_mib(url, payload_bytes, count):
    assert options_of(url).joined_blocks(shape_of(payload_bytes)) == count


def test_how_many_may_be_told():
    assert options_of("redis://h", blocks_per_object=8, ttl_s=60).joined_blocks(shape_of(4096)) == 8
    assert options_of("s3://b/p", blocks_per_object=1).joined_blocks(shape_of(4096)) == 1
    assert options_of("s3://b/p", blocks_per_object=3).joined_blocks(shape_of(4096, STATE)) == 3


def test_where_states_say_where_hits_end_blocks_stay_alone():
    assert options_of("s3://b/p").joined_blocks(shape_of(4096, STATE)) == 1


@pytest.mark.parametrize("count", [0, -1, 257, 1.5, "4", True])
def test_numbers_that_are_none_are_refused(count):
    with pytest.raises(ConfigError, match="blocks_per_object"):
        options_of("s3://b/p", blocks_per_object=count)


def test_values_that_redis_does_not_take_are_refused():
    options = options_of("redis://h", blocks_per_object=64, max_value_bytes="8MiB")
    with pytest.raises(ConfigError, match="blocks_per_object"):
        options.joined_blocks(shape_of(256 << 10))
