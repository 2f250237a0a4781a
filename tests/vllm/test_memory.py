"""Host memory of all ranks: asked for before anything is loaded, together, in words of the setting."""

import copy
import logging
from types import SimpleNamespace

import pytest
from rig import SLOT_BYTES
from vllm.config import KVTransferConfig, ParallelConfig
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from kvortex import ConfigError, PoolExhausted
from kvortex.integrations import vllm as integration
from kvortex.memory import limits

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def available(monkeypatch):
    """Pretend that the machine has so much memory left."""

    def pretend(nbytes):
        monkeypatch.setattr(limits, "_available_bytes", lambda: nbytes)
        monkeypatch.setattr(limits, "cgroup_free_bytes", lambda lines, claims: None)

    return pretend


def transfer(size, connector="KVortexConnector"):
    return KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config={"cpu_pool_size_bytes": size}
    )


def multi(*sizes):
    ours = [{"kv_connector": "KVortexConnector", "kv_role": "kv_both",
             "kv_connector_extra_config": {"cpu_pool_size_bytes": size}} for size in sizes]  # fmt: skip
    config = copy.copy(transfer("1GiB", "MultiConnector"))
    config.kv_connector_extra_config = {"connectors": [{"kv_connector": "ExampleConnector"}, *ours]}
    return config


def parallel(num_ranks=1, **more):
    config = ParallelConfig()
    config.tensor_parallel_size = num_ranks
    for name, value in more.items():
        setattr(config, name, value)
    return config


class Loading(UniProcExecutor):
    """An executor whose workers would load weights now."""

    loaded = False

    def _init_executor(self):
        self.loaded = Loading.loaded = True


def make_executor(transfer_config, parallel_config):
    Loading.loaded = False
    names = ("model", "cache", "lora", "load", "scheduler", "device", "speculative", "observability", "compilation")
    config = SimpleNamespace(
        kv_transfer_config=transfer_config,
        parallel_config=parallel_config,
        **{f"{name}_config": None for name in names},
    )
    return Loading(config)


@pytest.mark.parametrize(("num_ranks", "num_mib"), [(1, 300), (2, 150), (4, 150)])
def test_the_pools_of_all_ranks_are_refused_before_the_first(make_rig, available, num_ranks, num_mib):
    available(200 * MIB)
    with pytest.raises(PoolExhausted, match=r"cpu_pool_size_bytes is 0\.\d+ GiB .* leaves 0\.20 GiB"):
        make_rig(num_slots=num_mib * MIB // SLOT_BYTES, num_ranks=num_ranks)
    assert not limits.own_claims()


def test_pools_that_fit_together_are_made(make_rig, available):
    available(200 * MIB)
    make_rig(num_slots=8 * MIB // SLOT_BYTES, num_ranks=4)


@pytest.mark.parametrize("config", [transfer("32GiB"), multi("32GiB"), multi("16GiB", "16GiB")])
def test_an_executor_asks_before_it_loads(available, config):
    integration.register()
    integration.register()
    available(31 * GIB)
    for num_ranks in (1, 8):
        with pytest.raises(
            PoolExhausted, match=rf"pools of {num_ranks} .* take 32\.00 GiB .* leaves 31\.00 GiB; lower"
        ):
            make_executor(config, parallel(num_ranks))
        assert not Loading.loaded
    available(32 * GIB)
    assert make_executor(config, parallel(8)).loaded


def test_an_executor_asks_for_the_ranks_of_its_node_alone(available):
    integration.register()
    available(17 * GIB)
    here = SimpleNamespace(tensor_parallel_size=16, pipeline_parallel_size=1, nnodes_within_dp=2)
    assert make_executor(transfer("32GiB"), here).loaded
    here.nnodes_within_dp = 1
    with pytest.raises(PoolExhausted, match="pools of 16 on this node"):
        make_executor(transfer("32GiB"), here)
    here.use_ray = True  # who knows where its ranks are
    assert make_executor(transfer("32GiB"), here).loaded


@pytest.mark.parametrize("config", [None, transfer("32GiB", "ExampleConnector"), multi()])
def test_executors_without_our_connector_are_left_alone(available, config):
    integration.register()
    available(0)
    assert make_executor(config, parallel()).loaded


def test_an_unfit_option_is_told_before_weights_are_loaded():
    integration.register()
    with pytest.raises(ConfigError, match="cpu_pool_size_bytes"):
        make_executor(transfer("much"), parallel())
    assert not Loading.loaded


def test_a_pool_that_could_not_be_registered_is_told_as_what_it_is(make_rig, host, prompt, monkeypatch):
    """Blocks there are, not blocks asked for; and once, why."""
    host.fail_call(3, 2, field="mem_host_register")
    sizes = {"pool_first_chunk_bytes": SLOT_BYTES, "pool_chunk_bytes": 8 * SLOT_BYTES}
    rig = make_rig(num_slots=64, extra=sizes)
    with pytest.raises(PoolExhausted):
        rig.workers[0].worker.pool.wait_ready(20_000)
    records, handler = [], logging.Handler()
    handler.emit = records.append
    monkeypatch.setattr(logging.getLogger("vllm.kvortex"), "handlers", [handler])
    rig.serve("one", prompt("one", 100))
    rig.serve("two", prompt("two", 100))
    told = [stats if isinstance(stats, dict) else stats.data for stats in rig.stats]
    levels = [stats["pool_blocks"] for stats in told if "pool_blocks" in stats]
    assert levels[-1] == rig.index.slots_added == 9
    assert [record.args for record in records if "could not be registered" in record.msg] == [(9, 64)]
