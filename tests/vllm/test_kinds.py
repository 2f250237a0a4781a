"""Every kind of KV cache in a real engine on the CPU: what a connector restores is what was computed.

One process for each kind, see engine_kinds.py: an engine without connector, which yields the truth, then vLLM's own
connector, then ours. kinds.py has the models. A kind is worth something only where KV that is wrong shows in the
tokens, which is tested with each of them.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import vllm
from engine_kinds import whole_prompts
from kinds import KINDS

SCRIPT = Path(__file__).resolve().parent / "engine_kinds.py"
SOAK = os.environ.get("KVORTEX_SOAK") == "1"
QUICK = ("gemma3", "llama4", "lfm2", "fp8")  # two windows, a state, and layers with pages of their own
NAMES = [*KINDS] if SOAK else [*QUICK]
MODES = ("native", "custom")
LAST = MODES[-1]  # the one with the controls and the stress

pytestmark = [
    pytest.mark.skipif(not vllm.__version__.startswith("0.32."), reason="these kinds run on a CPU in vLLM 0.32 alone"),
    pytest.mark.timeout(900),  # the first test waits for the first engines, which may share their cores with others
]


def run(name, folder):
    """What the run printed; it must end with 0."""
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--kind", name, "--mode", "none", "disk", *MODES]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    tail = "\n".join(process.stderr.splitlines()[-40:])
    assert process.returncode == 0, f"{name} ended with {process.returncode}:\n{tail}"
    return json.loads(next(line for line in process.stdout.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What came of a kind, by its name. Two at a time, in the order of `NAMES`."""
    with ThreadPoolExecutor(2) as threads:
        futures = {name: threads.submit(run, name, tmp_path_factory.mktemp("run")) for name in NAMES}
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def report(name, reports):
    return reports(name)


def expected_hits(name):
    """All of a prompt but its last token, which is left to compute."""
    return [len(prompt) - 1 for prompt in whole_prompts(KINDS[name])]


def all_differ(one, other):
    return all(first != second for first, second in zip(one["tokens"], other["tokens"], strict=True))


# ---- what the other tests stand on -----------------------------------------------------------------------------------


def test_vllm_makes_the_groups_that_the_kind_stands_for(name, report):
    assert sorted(report["groups"]) == sorted(KINDS[name].groups)
    assert max(report["block_tokens"]) == KINDS[name].unit


def test_without_connector_nothing_hits_but_in_the_cache_of_the_device(name, report):
    none = report["none"]
    assert none["cold"]["cached"] == [0, 0, 0] and none["partial"]["cached"] == [0] * 7
    assert none["warm"]["cached"] == (expected_hits(name) if KINDS[name].hits_on_device else [0, 0, 0])
    assert none["warm"]["tokens"] == none["cold"]["tokens"]


def test_zeros_in_the_cache_of_the_device_change_all_tokens(name, report):
    if KINDS[name].hits_on_device:
        assert all_differ(report["none"]["zeroed"], report["none"]["cold"])


def test_zeros_in_what_was_restored_change_all_tokens(report):
    zeroed, back = report[LAST]["zeroed"]["all"], report[LAST]["back"]
    assert zeroed["external"] == back["external"]
    assert all_differ(zeroed, back)


def test_zeros_in_what_was_restored_of_any_one_group_change_all_tokens(report):
    zeroed, back = report[LAST]["zeroed"], report[LAST]["back"]
    assert len(zeroed) == 1 + len(report["groups"])
    assert [group for group, spoiled in zeroed.items() if not all_differ(spoiled, back)] == []


def test_the_comparison_of_bytes_sees_two_blocks_that_changed_places(name, report):
    """Tokens do not always: attention takes the keys of one load in any order."""
    different = dict(zip(enumerate(report["groups"]), report[LAST]["swapped"]["different"], strict=True))
    if KINDS[name].hits_on_device:  # blocks are known by the hash that they have there
        assert [group for group, count in different.items() if not count and group[1] != "MambaSpec"] == []


# ---- restored --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_restored_kv_gives_the_tokens_of_an_engine_without_connector(name, report, mode):
    truth, run = report["none"]["cold"]["tokens"], report[mode]
    assert run["cold"] == {"tokens": truth, "cached": [0, 0, 0], "external": [0, 0, 0]}
    hits = expected_hits(name)
    assert run["back"] == {"tokens": truth, "cached": hits, "external": hits}


def test_blocks_of_an_earlier_engine_come_from_disk_with_the_same_tokens(name, report):
    truth, run, hits = report["none"]["cold"]["tokens"], report["disk"], expected_hits(name)
    assert run["cold"] == {"tokens": truth, "cached": [0, 0, 0], "external": [0, 0, 0]}
    assert run["back"] == {"tokens": truth, "cached": hits, "external": hits}
    assert run["back_blocks"]["tier_blocks_read"] >= run["back_blocks"]["blocks_loaded"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_restored_blocks_are_byte_for_byte_those_that_were_computed(name, report, mode):
    assert report[mode]["bytes"]["different"] == [0] * len(report["groups"])
    # A block is known by its hash, which vLLM does not keep where its own cache is off.
    assert all(report[mode]["bytes"]["same"]) == KINDS[name].hits_on_device


@pytest.mark.parametrize("mode", MODES)
def test_prompts_that_go_on_or_part_or_end_early_yield_the_same_tokens(report, mode):
    for part in ("partial", "before_branch", "branch"):
        assert report[mode][part]["tokens"] == report["none"][part]["tokens"]
    longer, _, _, _, joined, *_ = report[mode]["partial"]["external"]
    first, second, _ = report[mode]["back"]["external"]
    assert (longer, joined) == (first, second)  # all that was kept of the prompt that they begin with


def test_every_hit_is_at_least_as_long_as_that_of_vllms_connector(report):
    for part in ("back", "partial", "before_branch", "branch"):
        native, custom = (report[mode][part]["external"] for mode in ("native", "custom"))
        assert [(one, other) for one, other in zip(native, custom, strict=True) if other < one] == [], part


def test_every_block_that_moved_was_right(report):
    run = report["custom"]
    assert run["verify_blocks"] == run["blocks_saved"] + run["blocks_loaded"] > 0
    assert run["verify_mismatches"] == run["verify_skipped"] == run["transfers_failed"] == 0


# ---- many requests at once -------------------------------------------------------------------------------------------


def test_requests_were_preempted_in_small_pools(reports):
    """Not in every kind: vLLM waits for blocks that are held, and for requests that load."""
    stress = [run for name in NAMES if (run := reports(name)[LAST].get("stress"))]
    assert sum(run["preemptions"] for run in stress) > 0
    assert sum(run["blocks_loaded"] for run in stress) > 0  # in a kind with few blocks it may be none


def test_a_small_pool_with_preemptions_and_aborts_leaves_the_tokens_as_they_are(name, report):
    if not KINDS[name].survives_full_pool:
        assert "stress" not in report[LAST]
        return
    stress, truth = report[LAST]["stress"], report["none"]["stress"]["output"]
    assert stress["aborted"] > 0
    assert stress["requests"] + stress["aborted"] == len(truth)
    assert stress["blocks_evicted"] > 0
    assert stress["verify_blocks"] == stress["blocks_saved"] + stress["blocks_loaded"]
    assert stress["verify_mismatches"] == stress["verify_skipped"] == stress["transfers_failed"] == 0
    assert {number: tokens for number, tokens in stress["output"].items() if tokens != truth[number]} == {}
