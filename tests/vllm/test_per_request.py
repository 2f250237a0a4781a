"""What a client asks for one request: not to keep it, not to look for it, to keep its head, to keep it longer."""

import pytest

from kvortex import ConfigError
from kvortex.integrations.vllm import per_request
from kvortex.integrations.vllm.per_request import Wishes


def asked(**wishes):
    """Arguments of a request that has these wishes."""
    return {"sampling": {"extra_args": {"kv_transfer_params": {"kvortex": wishes}}}}


def test_what_is_not_to_be_saved_is_not_found_again(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 100), **asked(save=False))
    rig.forget_device()
    assert rig.serve("again", prompt("p", 100)) == 0
    assert rig.index.counters()["num_ready"] == 6  # of the second one
    rig.require_clean()


def test_what_is_not_to_be_loaded_is_computed_and_kept_for_others(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    assert rig.serve("again", prompt("p", 100), **asked(load=False)) == 0
    rig.forget_device()
    assert rig.serve("another", prompt("p", 100)) == 96
    rig.require_clean()


def test_only_whole_blocks_of_the_tokens_that_may_be_saved_are(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 100), **asked(max_save_tokens=50))
    rig.forget_device()
    assert rig.serve("again", prompt("p", 100)) == 48
    rig.require_clean()


@pytest.mark.parametrize("pin_s", [0, 1000])
def test_a_pinned_prompt_outlives_others_that_would_evict_it(make_rig, prompt, pin_s):
    rig = make_rig(num_slots=24)
    rig.serve("first", prompt("p", 96), **asked(pin_s=pin_s))
    for number in range(4):
        rig.serve(number, prompt(number, 100))
    assert rig.half.pins.count == (6 if pin_s else 0)
    rig.forget_device()
    assert rig.serve("again", prompt("p", 100)) == (96 if pin_s else 0)
    rig.half.pins.end(every=True)
    rig.require_clean()


def test_a_pin_ends_with_its_time(make_rig, prompt, monkeypatch):
    rig, now = make_rig(num_slots=24), [0.0]
    monkeypatch.setattr(per_request.time, "monotonic", lambda: now[0])
    rig.add("first", prompt("p", 96), **asked(pin_s=5))
    rig.run()
    now[0] = 4.9
    rig.add("second", prompt("q", 20))
    rig.step_until_served()
    assert rig.half.pins.count == 6
    now[0] = 5.1
    rig.add("third", prompt("r", 20))
    rig.step_until_served()
    assert rig.half.pins.count == 0
    while rig.half.in_flight:
        rig.step()
    rig.require_clean()


def test_what_is_still_being_saved_at_its_end_is_pinned_when_it_is_there(make_rig, prompt, host):
    rig = make_rig(num_slots=24)
    host.hold()
    rig.add("first", prompt("p", 96), **asked(pin_s=1000))
    rig.step_until_served()
    assert rig.half.pins.count == 0
    host.release()
    rig.run()
    assert rig.half.pins.count == 6 == rig.index.num_pinned
    rig.half.pins.end(every=True)
    rig.require_clean()


def test_pins_take_a_quarter_of_the_pool_and_what_is_beyond_is_counted(make_rig, prompt):
    rig = make_rig(num_slots=24)
    rig.serve("first", prompt("p", 160), **asked(pin_s=1000))
    assert rig.half.pins.count == 6 and rig.half.pins.blocks_refused == 4
    rig.forget_device()
    assert rig.serve("again", prompt("p", 160)) >= 96
    rig.half.pins.end(every=True)
    rig.require_clean()


def test_a_reset_forgets_what_is_pinned_too(make_rig, prompt):
    rig = make_rig(num_slots=24)
    rig.serve("first", prompt("p", 96), **asked(pin_s=1000))
    assert rig.reset() and rig.index.num_pinned == 0
    assert rig.serve("again", prompt("p", 96)) == 0
    rig.require_clean()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"sav": False}, "did you mean 'save'"),
        ({"save": "no"}, "save must be true or false"),
        ({"max_save_tokens": -1}, "max_save_tokens must be a whole number"),
        ({"max_save_tokens": 1.5}, "max_save_tokens must be a whole number"),
        ({"pin_s": True}, "pin_s must be a number of seconds"),
        ({"pin_s": float("inf")}, "pin_s must be a number of seconds"),
        ([], "must have a dictionary"),
    ],
)
def test_a_wrong_wish_is_refused_by_name(wrong, why):
    with pytest.raises(ConfigError, match=why):
        Wishes.parse(wrong)


def test_a_request_with_a_wrong_wish_is_served_and_not_kept_and_the_log_says_so_once(make_rig, prompt, caplog):
    rig = make_rig(extra={})
    assert rig.serve("first", prompt("p", 100), **asked(priority=3)) == 0
    assert rig.index.counters()["num_ready"] == 0
    assert caplog.text.count("unknown name 'priority'") == 1
    rig.require_clean()


def test_what_others_ask_of_other_connectors_is_no_concern(make_rig, prompt):
    rig = make_rig()
    rig.serve("first", prompt("p", 100), sampling={"extra_args": {"kv_transfer_params": {"do_remote_decode": False}}})
    rig.forget_device()
    assert rig.serve("again", prompt("p", 100)) == 96
    rig.require_clean()
