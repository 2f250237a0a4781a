"""The rig alone, without a connector: vLLM's own prefix cache is right in it, and faults are counted.

A rig that saw no fault would prove nothing of a connector.
"""

import random

import pytest
from forms import FORMS, HAS_ONE_ALLOCATION, RUNNERS
from rig import HAS_WORKER_METADATA
from test_schedules import SOAK, live

SCHEDULES = 20 if SOAK else 1


def states_alone(groups):
    """0.15 gives a state to others in the step that computes it: there only one request at a time."""
    return {"max_seqs": 1} if "state" in groups and not HAS_WORKER_METADATA else {}


def beside_another(kind):
    """Two groups, the second of this kind; 0.15 wants two that differ."""
    groups = ("window:48" if kind == "full" else "full", kind)
    return {"groups": groups, "num_blocks": 61, **states_alone(groups)}


def live_without_connector(make_rig, name, draw, **options):
    rig = make_rig(connector=False, **{**FORMS[name], **states_alone(FORMS[name]["groups"]), **options})
    live(rig, draw, resets=False, steps=50)
    return rig


@pytest.mark.parametrize("name", FORMS)
def test_vllm_alone_reads_no_wrong_token(make_rig, seed, name):
    for number in range(SCHEDULES):
        draw = random.Random(f"{seed} {number} {name}")
        options = {
            "num_ranks": draw.choice([1, 2]),
            "pipelined": draw.random() < 0.5,
            "runner": draw.choice(RUNNERS),
            "retention": draw.choice([0, None]),
        }
        rig = live_without_connector(make_rig, name, draw, **options)
        assert rig.wrong_tokens == 0 and rig.read_tokens, f"schedule {number}, {options}"
        rig.close()


@pytest.mark.parametrize("name", FORMS)
def test_vllm_alone_hits_what_it_has_computed(make_rig, prompt, name):
    rig = make_rig(connector=False, **FORMS[name])
    assert rig.serve("first", prompt("p", 200)) == 0
    assert 128 <= rig.serve("second", prompt("p", 200) + prompt("q", 20)) <= 192
    rig.forget_device()
    assert rig.serve("third", prompt("p", 200)) == 0
    rig.require_clean()


def is_counted(make_rig, seed, plant, **options):
    """Whether a fault is seen in one of a few lives."""
    for number in range(8):
        rig = make_rig(connector=False, **{**options, **states_alone(options["groups"])})
        plant(rig)
        rig.require_clean = lambda: None
        live(rig, random.Random(f"{seed} {number}"), resets=False, steps=80)
        rig.close()
        if rig.wrong_tokens:
            return True
    return False


def take_a_wrong_block(rig, group):
    """The last block of this group's table is one that somebody else may have."""
    original, draw = rig.take_tables, random.Random(1)

    def take_tables(output):
        original(output)
        for new in output.scheduled_new_reqs:
            table = rig.tables[new.req_id][group]
            if draw.random() < 0.5:
                table[-1] = table[-1] % 59 + 1

    rig.take_tables = take_tables


@pytest.mark.parametrize("kind", ["full", "mla", "window:64", "chunk:64", "state"])
def test_a_wrong_block_in_a_table_is_counted(make_rig, seed, kind):
    assert is_counted(make_rig, seed, lambda rig: take_a_wrong_block(rig, 1), **beside_another(kind))


FAULTS = [("full_and_state", "copy_states"), ("state", "copy_states"), ("mla_and_state", "copy_states")]
if HAS_WORKER_METADATA:
    FAULTS += [("full_and_state", "zero"), ("six_with_states", "zero")]
if HAS_ONE_ALLOCATION:
    FAULTS += [("half_blocks_hashed", "copy_on_write"), ("half_blocks_hashed", "zero")]


@pytest.mark.parametrize(("name", "step"), FAULTS)
def test_a_step_of_the_model_runner_left_out_is_counted(make_rig, seed, name, step):
    assert is_counted(make_rig, seed, lambda rig: setattr(rig, step, lambda *arguments: None), **FORMS[name])


@pytest.mark.parametrize(
    ("kind", "first"), [("full", 0), ("mla", 0), ("window:64", 37), ("window:1024", 0), ("chunk:64", 64)]
)
def test_attention_reads_as_far_back_as_it_reaches(make_rig, prompt, kind, first):
    for token in {max(0, first - 1), first}:
        rig = make_rig(connector=False, **beside_another(kind))
        rig.add("request", prompt("p", 100))
        rig.step()
        *_, plane = rig.groups[1].planes(rig.caches[0])
        plane[rig.tables["request"][1][token // 16], token % 16] += 1
        rig.run()
        assert bool(rig.wrong_tokens) == (token >= first)
        rig.close()


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if len(form["groups"]) > 1])
def test_a_block_is_the_same_bytes_in_every_group(make_rig, name):
    rig = make_rig(connector=False, **FORMS[name])
    (cache,) = rig.caches
    for group in filter(lambda group: group.layers, rig.groups):
        for page in group.pages(cache):
            page[17] = 5
        for other in filter(lambda other: other.layers, rig.groups):
            pages = list(other.pages(cache))
            assert any(page[17].any() for page in pages)
            assert not any(page[:17].any() or page[18:].any() for page in pages)
        for page in group.pages(cache):
            page[17] = 0
