"""Loads that the driver refuses, of models with windows: computed instead, or an error that names the way out."""

import pytest
from forms import FORMS
from rig import HAS_TRANSFER_RESULTS, HAS_WORKER_METADATA
from test_faults import refused
from test_groups import options_of
from vllm.v1.request import RequestStatus

from kvortex import ConfigError
from kvortex.integrations.vllm.keys import as_bytes, keys_of

WINDOWS = ["window", "full_and_window", "full_and_chunks", "six"]
STATES = ["full_and_state", "state"]
CAN_BE_TOLD = pytest.mark.skipif(not HAS_TRANSFER_RESULTS, reason="vLLM before 0.32 cannot be told, see below")


def keys_in(rig, request_id, tokens):
    """Which blocks for a hit of so many tokens are in the index, by key."""
    request, there = rig.requests[request_id], set()
    for group in rig.half.groups:
        keys = keys_of(request, group, *group.needed(tokens))
        there.update(key for key, found in zip(as_bytes(keys), rig.index.lookup(keys)[0], strict=True) if found)
    return there


@CAN_BE_TOLD
@pytest.mark.parametrize("pipelined", [False, True], ids=["in_turn", "pipelined"])
@pytest.mark.parametrize("name", WINDOWS + STATES)
def test_a_load_that_fails_is_computed_and_what_it_wanted_is_gone(make_rig, prompt, host, name, pipelined):
    rig = make_rig(pipelined=pipelined, num_slots=256, num_ranks=2, **options_of(name, True))
    rig.serve("first", prompt("p", 200), 10)
    rig.forget_device()
    gone = []
    failed, rig.half.failed = (
        rig.half.failed,
        lambda *load: (failed(*load), gone.append(keys_in(rig, "first", 192))),
    )
    with refused(host, rig, "H2D", rank=1) as loads:
        rig.serve("second", prompt("p", 200), 10)
    assert len(loads) == 1 and gone == [set()]
    assert rig.outputs("second") == rig.outputs("first")
    rig.forget_device()
    assert rig.serve("third", prompt("p", 200), 10) == 192  # kept again
    rig.require_clean()


@CAN_BE_TOLD
@pytest.mark.parametrize("name", WINDOWS)
def test_a_failed_load_may_fail_its_request_where_vllm_is_told_so(make_rig, prompt, host, name):
    rig = make_rig(failure_policy="fail", num_slots=256, **options_of(name, True))
    rig.serve("first", prompt("p", 200))
    rig.forget_device()
    with refused(host, rig, "H2D"):
        rig.add("second", prompt("p", 200))
        rig.run()
    assert rig.requests["second"].status == RequestStatus.FINISHED_ERROR
    rig.require_clean()


@pytest.mark.parametrize("name", WINDOWS)
def test_where_vllm_cannot_hear_of_a_failed_load_the_error_names_the_way_out(make_rig, prompt, host, load_async, name):
    if HAS_TRANSFER_RESULTS and load_async:
        load_async = False  # between steps it can, see above
    rig = make_rig(num_slots=256, **options_of(name, load_async))
    rig.serve("first", prompt("p", 200))
    rig.forget_device()
    with refused(host, rig, "H2D"), pytest.raises(RuntimeError, match="Use vLLM 0.32 or later with load_async"):
        rig.serve("second", prompt("p", 200))


@pytest.mark.skipif(not HAS_TRANSFER_RESULTS, reason="states are refused whatever the options")
def test_states_are_not_loaded_inside_a_step(make_rig):
    with pytest.raises(ConfigError, match="leave out load_async, or set it to true"):
        make_rig(**{**FORMS["full_and_state"], "load_async": False})


@pytest.mark.skipif(HAS_TRANSFER_RESULTS or not HAS_WORKER_METADATA, reason="0.32 computes it, 0.15 loads inside steps")
def test_where_vllm_cannot_hear_of_it_a_load_that_is_refused_is_tried_again(make_rig, prompt, host):
    rig = make_rig(num_slots=256, **options_of("full_and_window", True))
    rig.serve("first", prompt("p", 200))
    rig.forget_device()
    with refused(host, rig, "H2D"):
        rig.add("second", prompt("p", 200))
        for _ in range(5):
            rig.step()
    rig.run()
    assert rig.computed_at_first["second"] == 192 and rig.outputs("second") == rig.outputs("first")
    rig.require_clean()
