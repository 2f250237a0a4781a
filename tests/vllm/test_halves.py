"""What the two halves must agree on, where vLLM tells them different things; and whose KV cache a worker's half has."""

import gc
from dataclasses import replace

import pytest
import torch

import kvortex
from kvortex import KVortexConfig
from kvortex.integrations.vllm import connector

# ---- layers whose pages differ: vLLM gives the scheduler the spec of one layer for all ------------------------------


@pytest.mark.parametrize("heads", [(1, 40), (40, 1), (1, 40, 3)], ids=str)
def test_layers_with_pages_of_their_own_have_one_pool(make_rig, prompt, load_async, heads):
    rig = make_rig(heads=heads, num_slots=48, load_async=load_async)
    (worker,) = rig.workers
    assert rig.half.shape == worker.worker.shape
    assert worker.worker.layout.block_bytes == rig.half.shape.block_bytes == sum(heads) * 128
    assert rig.half.shape.slots.num_slots == 48 // 2 == worker.worker.pool.num_slots  # two pages a slot
    for name in "pqrs":
        rig.serve(name, prompt(name, 150), 10)
    assert rig.index.num_ready == rig.half.shape.slots.num_slots  # every slot is used, and none is missed
    rig.forget_device()
    assert rig.serve("again", prompt("s", 150), 10) == 144
    assert rig.outputs("again") == rig.outputs("s")
    rig.require_clean()


def test_a_header_page_is_known_to_both_halves(make_rig, prompt, monkeypatch):
    """As with tiers below the pool, which are not there yet."""
    monkeypatch.setattr(KVortexConfig, "header_bytes", 4096)
    rig = make_rig(num_slots=48, extra={"pool_first_chunk_bytes": 5 * 8192, "pool_chunk_bytes": 7 * 8192})
    (worker,) = rig.halves
    worker.pool.wait_ready(10_000)
    assert worker.pool.header_bytes == 4096 and worker.pool.num_slots == rig.half.shape.slots.num_slots == 24
    rig.serve("early", prompt("q", 20))
    assert rig.index.slots_added == 24  # the chunks that the worker reported are those that the scheduler expects
    rig.serve("first", prompt("p", 150), 10)
    rig.forget_device()
    assert rig.serve("second", prompt("p", 150), 10) == 144
    rig.require_clean()


@pytest.mark.parametrize("odd_rank", [0, 1])
def test_a_rank_with_another_pool_ends_offloading_and_nothing_else(make_rig, prompt, load_async, monkeypatch, odd_rank):
    rig = make_rig(num_ranks=2, load_async=load_async)
    part = rig.workers[odd_rank].worker
    part.shape = replace(part.shape, slots=replace(part.shape.slots, num_slots=part.shape.slots.num_slots // 2))
    errors = []
    monkeypatch.setattr(connector.logger, "error", lambda text, *values: errors.append(text % values))
    for name in ("first", "second"):
        rig.serve(name, prompt("p", 200), 10)
        rig.forget_device()
    assert rig.wrong_tokens == 0 and rig.computed_at_first["second"] == 0
    assert rig.connector.scheduler is None and rig.workers[odd_rank].worker is None
    (error,) = errors
    assert "keeps nothing" in error and "num_slots=64" in error and "num_slots=32" in error


# ---- a second KV cache: vLLM keeps one connector for all engines of a process ---------------------------------------


def test_a_second_kv_cache_is_refused_while_the_first_is_there(make_rig, prompt):
    rig = make_rig()
    rig.serve("first", prompt("p", 100))
    (worker,) = rig.workers
    half, layout = worker.worker, worker.worker.layout
    with pytest.raises(kvortex.ConfigError, match=r"another engine .* shut that engine down .*shutdown\(\)"):
        worker.register_kv_caches(rig.make_cache())
    assert worker.worker is half and half.layout is layout
    rig.forget_device()
    assert rig.serve("second", prompt("p", 100)) == 96
    rig.require_clean()


def test_a_second_kv_cache_is_refused_while_one_tensor_of_the_first_is_there(make_rig):
    rig = make_rig()
    kept = rig.caches[0]["layer1"]
    rig.caches.clear()
    with pytest.raises(kvortex.ConfigError, match="another engine"):
        rig.workers[0].register_kv_caches(rig.make_cache())
    del kept
    rig.workers[0].register_kv_caches(rig.make_cache())


def test_the_same_kv_cache_registered_again_stays(make_rig, prompt):
    """By a later vLLM after sleep, perhaps through other views."""
    rig = make_rig()
    rig.serve("first", prompt("p", 100))
    (worker,), (cache,) = rig.workers, rig.caches
    half = worker.worker
    worker.unregister_kv_caches()
    worker.register_kv_caches(cache)
    worker.register_kv_caches({name: tensor.view(tensor.shape) for name, tensor in cache.items()})
    worker.restore_kv_caches()
    assert worker.worker is half
    rig.forget_device()
    assert rig.serve("second", prompt("p", 100)) == 96
    rig.require_clean()


@pytest.mark.parametrize("verify", [False, True])
def test_after_the_first_kv_cache_is_gone_the_second_starts_anew(make_rig, prompt, host, verify):
    rig = make_rig(extra={"verify": verify})
    old = rig.workers[0].worker
    host.set_delay_us(50_000, 100_000)
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    assert old.running  # copies that nobody will ask for any more
    del rig.caches[0]
    gc.collect()
    assert old.tensors[0]() is not None  # they still read it
    cache = rig.make_cache()
    rig.workers[0].register_kv_caches(cache)
    assert rig.workers[0].worker is not old and rig.workers[0].worker.layout is not None
    assert all(running.job.done() for running in old.running.values())
    assert old.tensors[0]() is None


def test_without_copies_a_connector_does_not_keep_the_kv_cache(make_rig, prompt):
    rig = make_rig(extra={"verify": True})
    rig.serve("first", prompt("p", 100))
    del rig.caches[0]
    gc.collect()
    assert [tensor() for tensor in rig.workers[0].worker.tensors] == [None, None]


def test_a_second_kv_cache_of_another_size_is_refused(make_rig):
    rig = make_rig()
    del rig.caches[0]
    with pytest.raises(kvortex.ConfigError, match="another engine of this process"):
        rig.workers[0].register_kv_caches({"layer0": torch.zeros(2, 31, 16, 1, 1)})
