"""What is saved, and when: of prompts seen before alone, or of what the device is about to lose."""

import numpy as np
import pytest
from forms import FORMS
from rig import HAS_WORKER_METADATA
from test_per_request import asked

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
