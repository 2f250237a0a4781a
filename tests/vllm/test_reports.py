"""What vLLM hears of: KV events, the log line's numbers, Prometheus."""

import pickle
import random

import numpy as np
import prometheus_client
import pytest
from rig import HAS_WORKER_METADATA
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvortex.integrations.vllm import KVortexConnector
from kvortex.integrations.vllm.keys import keys_of
from kvortex.integrations.vllm.messages import CHUNK, LOAD, SAVE, StepMetadata, Transfer, WorkerReport
from kvortex.integrations.vllm.metrics import LEVELS, SUMS, KVortexStats

# ---- KV events -------------------------------------------------------------------------------------------------------


def followed(events):
    """The blocks in host memory, for somebody who knows nothing but the events."""
    held = set()
    for event in events:
        if isinstance(event, AllBlocksCleared) and HAS_WORKER_METADATA:  # 0.15 does not let us tell again what is left
            held.clear()
        if getattr(event, "medium", None) != "CPU":
            continue  # of vLLM's own device cache
        if isinstance(event, BlockStored):
            assert not held & set(event.block_hashes)
            held |= set(event.block_hashes)
        else:
            assert isinstance(event, BlockRemoved) and set(event.block_hashes) <= held
            held -= set(event.block_hashes)
    return held


def held(rig):
    """The blocks in host memory, as the index has them."""
    held = set()
    for request in rig.requests.values():
        found, _ = rig.index.lookup(keys_of(request, rig.half.groups[0], 0, len(request.block_hashes)))
        names = zip(request.block_hashes, found, strict=True)
        held |= {maybe_convert_block_hash(name) for name, is_there in names if is_there}
    return held


def test_events_tell_what_is_stored(make_rig, prompt):
    rig = make_rig(events=True)
    rig.serve("first", prompt("p", 100))
    assert len(followed(rig.events)) == 6 and followed(rig.events) == held(rig)


def test_events_name_blocks_of_an_adapter_as_vllm_does(make_rig, prompt):
    rig = make_rig(events=True)
    rig.serve("first", prompt("p", 100), lora_request=LoRARequest("adapter", 1, "nowhere"))
    hashes = rig.requests["first"].block_hashes[:6]
    assert followed(rig.events) == {maybe_convert_block_hash(name) for name in hashes}
    rig.reset()
    rig.serve("last", prompt("q", 20))
    assert not followed(rig.events) & set(map(maybe_convert_block_hash, hashes))


ADAPTERS = [None, LoRARequest("one", 1, "nowhere"), LoRARequest("two", 2, "nowhere")]


@pytest.mark.parametrize(
    "num_ranks, hash_function", [(1, sha256), (2, lambda content: sha256(content)[:16])], ids=["32", "16"]
)
def test_events_follow_the_index_through_evictions_resets_and_failures(
    make_rig, prompt, host, seed, num_ranks, hash_function
):
    draw = random.Random(seed)
    rig = make_rig(events=True, num_slots=24, num_ranks=num_ranks, hash_function=hash_function)
    host.set_delay_us(0, 500)
    for number in range(40):
        tokens = prompt(draw.randrange(12), draw.randrange(20, 120))
        rig.add(f"r{number}", tokens, 4, lora_request=draw.choice(ADAPTERS))
        for _ in range(draw.randrange(8)):
            rig.step()
        if draw.random() < 0.1:
            rig.reset()
        elif draw.random() < 0.3:
            rig.scheduler.reset_prefix_cache()
        if draw.random() < 0.1:
            host.fail_call(1, 2, field="memcpy_batch_async")
    rig.run()
    rig.serve("last", prompt("p", 20))  # events are taken with a step's output
    assert followed(rig.events) == held(rig) and any(isinstance(event, BlockRemoved) for event in rig.events)
    rig.require_clean()


def test_events_tell_that_a_reset_removed_what_was_being_loaded_too(make_rig, prompt, host):
    rig = make_rig(events=True)
    for name, adapter in zip("pqr", ADAPTERS, strict=True):
        rig.serve(name, prompt(name, 100), lora_request=adapter)
    rig.forget_device()
    host.hold()
    for name in "pq":  # two loads, of one prefix
        rig.add(f"{name} again", prompt("q", 100), lora_request=ADAPTERS[1])
    for _ in range(3):
        rig.step()
    assert rig.index.num_pinned and len(held(rig)) == 18
    rig.connector.reset_cache()
    assert not held(rig)
    host.release()
    rig.run()
    rig.serve("last", prompt("p", 20))  # events are taken with a step's output
    assert followed(rig.events) == held(rig)
    rig.require_clean()


def test_without_kv_events_none_are_kept(make_rig, prompt):
    rig = make_rig()
    rig.serve("first", prompt("p", 100))
    assert list(rig.connector.take_events()) == [] and rig.half.events is None
    rig.require_clean()


# ---- numbers ---------------------------------------------------------------------------------------------------------


def as_dict(stats):
    return stats if isinstance(stats, dict) else stats.data


def test_numbers_of_a_step_reach_vllm_as_plain_data(make_rig, prompt):
    rig = make_rig()
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    rig.serve("second", prompt("p", 100))
    rig.serve("third", prompt("q", 20))  # vLLM 0.15 hears of the scheduler's numbers with the next of a worker
    total = KVortexStats()
    for stats in rig.stats:
        total.aggregate(KVortexConnector.build_kv_connector_stats(data=dict(as_dict(stats))))
    block_bytes = rig.workers[0].worker.layout.block_bytes
    assert total.data["save_blocks"] == 7 and total.data["save_bytes"] == 7 * block_bytes
    assert total.data["load_blocks"] == total.data["blocks_matched"] == 6
    assert total.data["load_bytes"] == 6 * block_bytes and total.data["load_seconds"] > 0
    assert total.data["pool_blocks"] == 64 and total.data["pool_blocks_used"] >= 6
    assert set(total.data) <= {*SUMS, *LEVELS}
    assert all(type(value) in (int, float) for value in total.data.values())
    assert total.reduce()["save_blocks"] == 7


def test_sums_add_up_and_levels_do_not():
    stats = KVortexStats(data={"save_blocks": 2, "pool_blocks_used": 5})
    stats.aggregate(KVortexStats(data={"save_blocks": 3, "load_blocks": 1, "pool_blocks_used": 7}))
    assert stats.data == {"save_blocks": 5, "load_blocks": 1, "pool_blocks_used": 7}
    assert not stats.is_empty()
    stats.reset()
    assert stats.is_empty() and stats.take_report() is None


def test_reports_of_ranks_add_up_inside_the_numbers():
    """vLLM 0.15 has no other way for them."""
    one, two = (KVortexStats(report=WorkerReport()) for _ in range(2))
    for stats, bad in ((one, [7]), (two, [8])):
        stats.report.add(CHUNK, 1)
        stats.report.add(SAVE, 1, bad)
    two.report.add(LOAD, 2)
    one, two = pickle.loads(pickle.dumps((one, two)))
    report = KVortexStats().aggregate(one).aggregate(two).take_report()
    assert report.ended == {(CHUNK, 1): 2, (SAVE, 1): 2, (LOAD, 2): 1}
    assert report.bad == {(SAVE, 1): {7, 8}}


def test_reports_of_one_rank_that_wait_for_the_next_step_add_up_too():
    report = WorkerReport()
    report.add(SAVE, 1, bad=np.array([3], np.uint32))
    report.add(SAVE, 2)
    assert (report.ended, report.bad) == ({(SAVE, 1): 1, (SAVE, 2): 1}, {(SAVE, 1): {3}})


def test_a_step_that_saves_and_loads_much_is_a_small_message():
    """It is pickled in every step, for every rank."""
    slots, block_ids = np.arange(2048, dtype=np.uint32), np.arange(2048)
    loads = [Transfer(LOAD, number, slots[:8], block_ids[:8], f"request {number}") for number in range(1, 11)]
    step = StepMetadata(transfers=[*loads, Transfer(SAVE, 11, slots, block_ids, None)])
    payload = sum(one.slots.nbytes + one.block_ids.nbytes for one in step.transfers)
    assert len(pickle.dumps(step)) < payload + 200 * len(step.transfers) + 500
    step = pickle.loads(pickle.dumps(step))
    assert [one.number for one in step.of(LOAD)] == list(range(1, 11)) and step.of(SAVE)[0].number == 11


def test_nothing_new_is_not_told(make_rig, prompt):
    rig = make_rig()
    rig.serve("first", prompt("p", 100))
    rig.connector.get_kv_connector_stats()
    assert rig.connector.get_kv_connector_stats() is None
    assert rig.workers[0].get_kv_connector_stats() is None


def test_prometheus_counts_what_is_observed(make_rig):
    rig = make_rig()
    registry = prometheus_client.CollectorRegistry()

    def registered(metric):
        return lambda **options: metric(registry=registry, **options)

    base = (prometheus_client.Gauge, prometheus_client.Counter, prometheus_client.Histogram)
    metrics = KVortexConnector.build_prom_metrics(
        rig.config, {metric: registered(metric) for metric in base}, ["model_name", "engine"], {0: ["tiny", "0"]}
    )
    metrics.observe({"save_blocks": 3, "pool_blocks_used": 5})
    metrics.observe({"save_blocks": 4, "pool_blocks_used": 2})
    labels = {"model_name": "tiny", "engine": "0"}
    assert registry.get_sample_value("vllm:kvortex_save_blocks_total", labels) == 7
    assert registry.get_sample_value("vllm:kvortex_pool_blocks_used", labels) == 2
    assert registry.get_sample_value("vllm:kvortex_load_blocks_total", labels) == 0


@pytest.mark.parametrize("name", [*SUMS, *LEVELS])
def test_a_metrics_name_has_a_description(name):
    assert {**SUMS, **LEVELS}[name].strip()
