"""Beside another connector, in vLLM's `MultiConnector`, in both orders."""

import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_schedules import SCHEDULES, live, refuse_some
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from kvortex import ConfigError
from kvortex.integrations.vllm import KVortexConnector, connector
from kvortex.integrations.vllm.connector import HAS_LAYOUT_NAMES, hears_of_blocks_of_others

supported = pytest.mark.skipif(not hears_of_blocks_of_others(), reason="refused with this vLLM, see the first test")


@pytest.fixture(params=[True, False], ids=["other_first", "kvortex_first"])
def other_first(request):
    """Which of the two is asked first."""
    return request.param


@pytest.fixture(params=[True, False], ids=["pulls_async", "pulls_sync"])
def other(request):
    """Options of the other one."""
    return {"load_async": request.param}


def test_it_is_refused_where_vllm_does_not_tell_which_blocks_another_connector_fills(make_rig, other, other_first):
    if hears_of_blocks_of_others():
        make_rig(other=other, other_first=other_first)
    else:
        with pytest.raises(ConfigError, match="MultiConnector of this vLLM"):
            make_rig(other=other, other_first=other_first)


# ---- blocks change hands ---------------------------------------------------------------------------------------------


def reuse_what_is_being_saved(rig, prompt, host, finish):
    """A prompt's blocks go to a request that the other connector has, before they are saved; then the prompt again.

    Fences on vLLM's stream do nothing here, as for a connector that heeds no stream. `finish` is called for every
    copy that must be over before it writes.
    """
    host.hold()
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    for half in rig.halves:
        half.compute.wait_for = lambda job: None
        half.finish = lambda running, original=half.finish: finish(running, original)
    rig.offered["second"] = 150  # ends inside a block
    rig.add("second", prompt("q", 160))
    for _ in range(3):
        rig.step()
    host.release()
    rig.run()
    rig.forget_device()
    assert rig.serve("third", prompt("p", 100)) == 96


@supported
def test_what_is_being_saved_is_over_before_another_connector_writes_there(make_rig, prompt, host, other, other_first):
    rig = make_rig(num_blocks=13, other=other, other_first=other_first)
    waits = []

    def finish(running, original):
        waits.append(running)
        host.release()
        original(running)

    reuse_what_is_being_saved(rig, prompt, host, finish)
    assert waits
    rig.require_clean()


@supported
def test_without_that_wait_the_rig_reads_wrong_tokens(make_rig, prompt, host, other, other_first):
    """The control."""
    rig = make_rig(num_blocks=13, other=other, other_first=other_first)
    reuse_what_is_being_saved(rig, prompt, host, lambda running, original: None)
    assert rig.wrong_tokens > 0


@supported
def test_nothing_is_waited_for_on_blocks_that_only_a_forward_writes_or_reads(make_rig, prompt, host, other):
    rig = make_rig(num_blocks=23, other=other)
    host.hold()
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    for half in rig.halves:
        half.finish = None  # not to be called
    rig.offered["second"] = 150
    rig.add("second", prompt("p", 160))  # six blocks are found on the device, while they are being saved
    rig.step_until_served()
    assert rig.computed_at_first["second"] == 150
    rig.open_gate_when_waited_for(host)
    rig.add("third", prompt("q", 300))  # computed, in the blocks of the others
    rig.run()
    rig.forget_device()
    rig.serve("fourth", prompt("p", 160))
    rig.require_clean()


@supported
def test_each_loads_what_it_has(make_rig, prompt, other, other_first, load_async):
    rig = make_rig(other=other, other_first=other_first, load_async=load_async)
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    assert rig.serve("ours", prompt("p", 100)) == 96
    rig.offered["other's"] = 100
    assert rig.serve("other's", prompt("q", 100)) == 99
    rig.forget_device()
    assert rig.serve("ours now", prompt("q", 100)) == 96  # what the other one has loaded is kept
    rig.forget_device()
    rig.offered["both"] = 90
    assert rig.serve("both", prompt("q", 100)) == (90 if other_first else 96)
    rig.require_clean()


# ---- what the other one fails to load --------------------------------------------------------------------------------


def copy_at_once(half):
    """No copy is so late that it finds what was computed anew."""

    def submit(queue, transfer, stream, submit=half.submit):
        job = submit(queue, transfer, stream)
        job.wait()
        return job

    half.submit = submit


@supported
@pytest.mark.parametrize("known", [0, 40])
def test_nothing_computed_from_what_another_connector_failed_to_load_is_kept(
    make_rig, prompt, other, other_first, known
):
    rig = make_rig(other=other, other_first=other_first)
    copy_at_once(*rig.halves)
    if known:
        rig.serve("first", prompt("p", known))
        rig.scheduler.reset_prefix_cache()
    rig.offered["second"] = 50
    rig.unreachable.add("second")
    rig.serve("second", prompt("p", 110), 40)  # the step of the load computes more blocks from its garbage
    rig.forget_device()
    rig.serve("third", prompt("p", 110), 40)
    rig.require_clean()


# ---- random lives ----------------------------------------------------------------------------------------------------


@supported
@pytest.mark.timeout(7200 if SCHEDULES > 6 else 120)
@pytest.mark.parametrize("pipelined", [False, True], ids=["in_turn", "pipelined"])
def test_no_schedule_of_two_connectors_reads_a_wrong_token(make_rig, host, seed, other_first, pipelined):
    num_matched = num_pulled = 0
    for number in range(SCHEDULES):
        draw = random.Random(f"{seed} {number} {other_first} {pipelined}")
        pulls_async, sends = draw.random() < 0.6, draw.random() < 0.6
        rig = make_rig(
            load_async=draw.random() < 0.7,
            pipelined=pipelined,
            num_blocks=draw.choice([29, 41, 67]),
            num_slots=draw.choice([24, 64, 200]),
            num_ranks=draw.choice([1, 1, 2]),
            other={
                "load_async": pulls_async,
                "pull_steps": draw.choice([0, 3]) if pulls_async else 0,
                "send_steps": 3 if sends else 0,
            },
            other_first=other_first,
            extra={"save": draw.choice(["at_once", "at_once", "on_evict"])},
        )
        host.set_delay_us(0, draw.choice([100, 3000]), seed)
        if draw.random() < 0.5:
            refuse_some(host, rig, draw, ["D2H"])
        try:
            # Where a load inside a step fails, vLLM may serve the garbage itself, see test_schedules.py.
            live(rig, draw, resets=not sends, others=True, others_fail=pulls_async)
        except BaseException as error:
            error.add_note(f"schedule {number} of KVORTEX_SEED={seed}, {other_first=}, {pipelined=}")
            raise
        rig.close()
        num_matched += rig.half.blocks_matched
        num_pulled += rig.num_pulled
    assert num_matched > SCHEDULES and num_pulled > SCHEDULES  # otherwise these schedules show little


@supported
def test_a_request_that_the_other_one_could_not_pull_is_computed(make_rig, prompt):
    """vLLM keeps room for all its blocks until then, so that it would be in the way of a load of its own for ever."""
    rig = make_rig(num_blocks=29, other={"load_async": True, "pull_steps": 3}, other_first=True)
    rig.serve("first", prompt("p", 295))
    rig.forget_device()
    rig.offered["second"] = 256
    rig.unreachable.add("second")
    rig.add("second", prompt("p", 295))
    rig.run(15)
    assert rig.outputs("second") == rig.outputs("first")
    rig.require_clean()


# ---- what vLLM asks and hears ----------------------------------------------------------------------------------------


@supported
def test_what_is_told_stands_under_the_connectors_name(make_rig, prompt, other, other_first):
    rig = make_rig(other=other, other_first=other_first, events=True, num_ranks=2)
    rig.serve("first", prompt("p", 100))
    saved = [stats["KVortexConnector"] for stats in rig.stats if "KVortexConnector" in stats]
    saved = [stats if isinstance(stats, dict) else stats.data for stats in saved]
    assert sum(stats.get("save_blocks", 0) for stats in saved) == 2 * 6
    assert sum(getattr(event, "medium", None) == "CPU" for event in rig.events) > 0
    assert rig.reset() and rig.index.num_ready == 0


@supported
def test_a_process_that_only_reads_the_configuration_understands_the_statistics():
    """vLLM's front end looks the connector up by its name, which nobody registered where kvortex is not installed."""
    code = """
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
child = {"kv_connector": "KVortexConnector", "kv_connector_module_path": "kvortex.integrations.vllm"}
extra = {"connectors": [{**child, "kv_role": "kv_both"}]}
whole = KVTransferConfig(kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config=extra)
assert MultiConnector.all_children_support_hma(whole)  # as vLLM asks when it is configured
stats = MultiConnector.build_kv_connector_stats({"KVortexConnector": {"data": {"save_blocks": 3}}})
print(type(stats["KVortexConnector"]).__name__)
"""
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.split()[-1:] == ["KVortexStats"], done.stderr


@pytest.mark.skipif(not HAS_LAYOUT_NAMES, reason="layouts have no names in this vLLM")
def test_no_layout_is_asked_for_beside_a_connector_that_needs_another(make_rig, monkeypatch, other, other_first):
    """NIXL's does, and vLLM refuses two that differ."""
    monkeypatch.setattr(connector, "current_platform", SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False))
    assert KVortexConnector.get_required_kvcache_layout(make_rig().config) is not None
    config = make_rig(other=other, other_first=other_first).config
    assert MultiConnector.get_required_kvcache_layout(config) is None
