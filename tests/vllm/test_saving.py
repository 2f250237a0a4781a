"""What is saved, and when: of prompts seen before alone, or of what the device is about to lose."""

import random

import numpy as np
import pytest
from forms import FORMS, RUNNERS, STATES
from rig import HAS_WORKER_METADATA
from test_per_request import asked
from test_schedules import SCHEDULES, live, refuse_some

from kvortex import ConfigError
from kvortex.integrations.vllm.options import ConnectorOptions
from kvortex.integrations.vllm.sights import MOST_COUNTED, Sights

# ---- after hits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hits", [0, 1, 3])
def test_a_prompt_is_saved_once_so_many_requests_had_it_before(make_rig, prompt, load_async, hits):
    rig = make_rig(load_async=load_async, extra={"save_after_hits": hits})
    found = []
    for number in range(6):
        found.append(rig.serve(number, prompt("p", 100)))
        rig.forget_device()
    assert found == [0] * (hits + 1) + [96] * (5 - hits)
    rig.require_clean()


def test_of_a_prompt_only_the_head_that_was_seen_before_is_saved(make_rig, prompt):
    rig = make_rig(extra={"save_after_hits": 1})
    rig.serve("first", prompt("p", 64) + prompt("a", 60))
    rig.serve("second", prompt("p", 64) + prompt("b", 60))  # it finds the head on the device
    assert rig.index.num_ready == 4
    rig.forget_device()
    assert rig.serve("third", prompt("p", 64) + prompt("c", 60)) == 64
    rig.require_clean()


def test_what_a_request_generated_counts_as_seen(make_rig, prompt):
    rig = make_rig(extra={"save_after_hits": 1})
    rig.serve("first", prompt("p", 40), 60)
    turn = prompt("p", 40) + rig.outputs("first")
    rig.serve("second", turn)
    rig.forget_device()
    assert rig.serve("third", turn) == 96
    rig.require_clean()


def test_a_request_that_is_preempted_and_comes_back_is_one(make_rig, prompt):
    rig = make_rig(num_blocks=13, extra={"save_after_hits": 1})
    for name in "abc":
        rig.add(name, prompt(name, 40), 80)
    rig.run()
    assert sum(request.num_preemptions for request in rig.requests.values()) > 0
    assert rig.index.num_ready == 0
    rig.require_clean()


def test_requests_that_are_not_to_be_saved_do_not_count(make_rig, prompt):
    rig = make_rig(extra={"save_after_hits": 1})
    for number in range(3):
        rig.serve(number, prompt("p", 100), **asked(save=False))
    rig.serve("first that counts", prompt("p", 100))
    assert rig.index.num_ready == 0
    rig.require_clean()


@pytest.mark.parametrize("name", ["full_and_window", "full_and_chunks"])
def test_of_a_window_what_the_head_needs_is_saved_with_it(make_rig, prompt, name):
    form = {**FORMS[name], "num_blocks": 613, "num_slots": 256, "load_async": HAS_WORKER_METADATA}
    rig = make_rig(**form, extra={"save_after_hits": 1})
    for number in range(4):
        found = rig.serve(number, prompt("system", 192) + prompt(number, 60))
        assert found == 0 if number < 2 else found >= 192
        rig.forget_device()
    rig.require_clean()


def test_keys_are_counted_and_those_seen_longest_ago_forgotten_tails_first():
    sights = Sights(8)
    keys = np.random.default_rng(1).integers(0, 256, (12, 32), dtype=np.uint8)
    assert sights.see(keys[:6]).tolist() == [0] * 6
    assert sights.see(keys[:6]).tolist() == [1] * 6
    assert sights.run(keys[:6], 2) == 6
    assert sights.see(keys[6:10]).tolist() == [0] * 4  # which takes two places of the first six
    assert sights.see(keys[:6]).tolist() == [3, 3, 3, 3, 0, 0]
    assert sights.see(keys[:0]).tolist() == []
    for _ in range(300):
        sights.see(keys[:1])
    assert sights.see(keys[:1]).tolist() == [MOST_COUNTED]


@pytest.mark.parametrize("hits", [-1, 1.5, True, "2", MOST_COUNTED + 1])
def test_hits_that_are_no_number_are_refused(hits):
    with pytest.raises(ConfigError, match="save_after_hits"):
        ConnectorOptions.parse({"cpu_pool_size_bytes": 1 << 20, "save_after_hits": hits})


# ---- on eviction -----------------------------------------------------------------------------------------------------

ON_EVICT = {"extra": {"save": "on_evict"}}
shows_evictions = pytest.mark.skipif(not HAS_WORKER_METADATA, reason="refused in 0.15, see the first test")


def test_it_is_refused_where_vllm_shows_no_evictions_or_has_none(make_rig):
    if HAS_WORKER_METADATA:
        rig = make_rig(**ON_EVICT)
        rig.config.cache_config.enable_prefix_caching = False
        with pytest.raises(ConfigError, match="prefix caching is off"):
            type(rig.connector)(rig.config, rig.connector.role, rig.cache_config)
    else:
        with pytest.raises(ConfigError, match="does not show a connector which blocks it evicts; use vLLM 0.26"):
            make_rig(**ON_EVICT)


@shows_evictions
@pytest.mark.parametrize("name", STATES)
def test_it_is_refused_where_vllm_writes_blocks_before_they_could_be_copied(make_rig, name):
    with pytest.raises(ConfigError, match="(?i)states"):
        make_rig(**FORMS[name], **ON_EVICT)


@pytest.mark.parametrize("save", ["on_evic", True, None])
def test_another_moment_to_save_is_refused(save):
    with pytest.raises(ConfigError, match="save must be 'at_once' or 'on_evict'"):
        ConnectorOptions.parse({"cpu_pool_size_bytes": 1 << 20, "save": save})


@shows_evictions
def test_a_block_is_saved_when_its_device_block_goes_to_somebody_else(make_rig, prompt, load_async):
    rig = make_rig(num_blocks=13, load_async=load_async, **ON_EVICT)
    rig.serve("first", prompt("p", 100), 20)
    assert rig.index.num_ready == 0
    rig.serve("second", prompt("q", 180))
    assert rig.index.num_ready == 7
    assert rig.serve("third", prompt("p", 100), 20) == 96  # loaded into blocks of the second, which are saved first
    assert rig.outputs("third") == rig.outputs("first")
    assert rig.serve("fourth", prompt("q", 180)) == 176
    rig.require_clean()


@shows_evictions
@pytest.mark.parametrize("load_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("waits", [True, False])
def test_what_a_step_overwrites_is_saved_before_and_else_it_is_wrong(make_rig, prompt, host, load_async, waits):
    """The second half is the control."""
    rig = make_rig(num_blocks=13, load_async=load_async, **ON_EVICT)
    host.set_delay_us(3000, 3000)
    if not waits:
        rig.halves[0].compute.wait_for = lambda job: None
    for number in range(3):
        for name in "pq":
            rig.serve(f"{name}{number}", prompt(name, 170))
    assert rig.half.blocks_matched > 30
    assert (rig.wrong_tokens == 0) == waits


@shows_evictions
def test_what_vllm_has_forgotten_is_not_saved(make_rig, prompt):
    rig = make_rig(num_blocks=13, **ON_EVICT)
    rig.serve("first", prompt("p", 100))
    assert rig.scheduler.reset_prefix_cache()
    rig.serve("second", prompt("q", 180))
    assert rig.index.num_ready == 0
    assert rig.reset()  # new weights
    assert rig.serve("third", prompt("p", 180)) == 0
    assert rig.index.num_ready == 0
    rig.require_clean()


@shows_evictions
def test_a_block_whose_last_token_is_never_computed_is_not_saved(make_rig, prompt):
    """vLLM knows it by a hash all the same: its request was preempted in the step that was to complete it."""
    rig = make_rig(num_blocks=9, policy="priority", **ON_EVICT)
    rig.serve("before", prompt("o", 128), 1)  # completes all blocks
    low = rig.add("low", prompt("p", 62), 4, priority=9)
    rig.step()  # so that it is scheduled first
    rig.add("high", prompt("q", 64), 4, priority=0)
    while not rig.outputs("high"):
        rig.step()
    rig.halves[0].drain()
    rig.index.clear()
    given, pool = [], rig.half.evictions
    pool.given_away = lambda *what, tell=pool.given_away: (given.append(what), tell(*what))
    rig.step()
    assert low.num_preemptions == 1
    assert any(set(block_ids) & known for block_ids, known in given)
    assert rig.index.num_writing + rig.index.num_ready == 0
    rig.run()
    rig.require_clean()


@shows_evictions
def test_what_a_request_that_is_over_asked_not_to_save_is_not_saved(make_rig, prompt):
    rig = make_rig(num_blocks=13, **ON_EVICT)
    rig.serve("first", prompt("p", 100), **asked(save=False))
    rig.serve("second", prompt("q", 100), **asked(max_save_tokens=32))
    rig.serve("third", prompt("r", 180))
    assert rig.index.num_ready == 2
    rig.require_clean()


@shows_evictions
def test_heads_outlive_their_tails_when_the_device_loses_both(make_rig, prompt):
    rig = make_rig(num_blocks=13, num_slots=8, **ON_EVICT)
    rig.serve("first", prompt("p", 180))
    rig.serve("second", prompt("q", 180))
    assert rig.index.num_ready == 8
    rig.forget_device()
    assert rig.serve("third", prompt("p", 180)) == 8 * 16
    rig.require_clean()


@shows_evictions
@pytest.mark.timeout(7200 if SCHEDULES > 6 else 120)
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("name", [name for name in FORMS if name not in STATES])
def test_no_schedule_with_evictions_reads_a_wrong_token(make_rig, host, seed, name, policy):
    for number in range(max(1, SCHEDULES // 20)):
        draw = random.Random(f"{seed} {number} {name} {policy}")
        options = {
            "policy": policy,
            "pipelined": draw.random() < 0.5,
            "runner": draw.choice(RUNNERS),
            "retention": draw.choice([0, None]),
            "num_slots": draw.choice([24, 64, 400]),
            "num_ranks": draw.choice([1, 1, 2]),
            "load_async": draw.random() < 0.5,
            "extra": {"max_jobs": draw.choice([2, 64]), "save": "on_evict"},
            **FORMS[name],
        }
        rig = make_rig(**options)
        add = rig.add
        rig.add = lambda *what, add=add, draw=draw: add(*what, priority=draw.randrange(3))
        host.set_delay_us(0, draw.choice([100, 3000]), seed)
        if draw.random() < 0.3:
            refuse_some(host, rig, draw, ["D2H"])
        try:
            live(rig, draw, resets=draw.random() < 0.5, steps=60)
        except BaseException as error:
            error.add_note(f"schedule {number} of KVORTEX_SEED={seed}, {options}")
            raise
        rig.close()
