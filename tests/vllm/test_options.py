"""What a user may write, what is refused and how, and that vLLM finds the connector by its name."""

import subprocess
import sys

import pytest
from rig import Rig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

import kvortex
from kvortex.integrations.vllm import KVortexConnector, register
from kvortex.integrations.vllm.options import ENGINE_OPTIONS, NAMES_OF_OTHERS, TIER_SIZES, ConnectorOptions


def test_what_is_not_given_has_a_default():
    options = ConnectorOptions.parse({"cpu_pool_size_bytes": "1GiB"})
    assert options.load_async and not options.verify
    assert options.engine.cpu_pool_size_bytes == 1 << 30
    assert options.engine.max_jobs == kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 30).max_jobs


def test_what_is_given_is_taken():
    options = ConnectorOptions.parse(
        {"cpu_pool_size_bytes": 1 << 30, "load_async": False, "verify": True, "max_jobs": 7, "enable_numa": False}
    )
    assert (options.load_async, options.verify, options.engine.max_jobs) == (False, True, 7)
    assert not options.engine.enable_numa


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"cpu_pool_size_byte": 1 << 30}, "'cpu_pool_size_byte'; did you mean 'cpu_pool_size_bytes'?"),
        ({"cpu_pool_size_bytes": 1 << 30, "loadasync": True}, "did you mean 'load_async'?"),
        ({"cpu_pool_size_bytes": 1 << 30, "xyzzy": 1}, "known are codec, cpu_pool_size_bytes, "),
        ({"cpu_bytes_to_use": 1 << 30}, "another connector's name; here it is cpu_pool_size_bytes"),
        ({"cpu_pool_size_bytes": 1 << 30, "num_cpu_blocks": 9}, "here it is cpu_pool_size_bytes, in bytes"),
        ({"cpu_pool_size_bytes": 1 << 30, "lazy_offload": True}, 'here it is save, with "on_evict"'),
        ({}, "needs cpu_pool_size_bytes"),
        (None, "needs cpu_pool_size_bytes"),
        ({"cpu_pool_size_bytes": 1 << 30, "verify": "yes"}, "verify must be true or false, got 'yes'"),
        ({"cpu_pool_size_bytes": 1 << 30, "load_async": 1}, "load_async must be true or false, got 1"),
        ({"cpu_pool_size_bytes": "32 gigabytes"}, "bytes are expected, like 65536"),
        ({"cpu_pool_size_bytes": -1}, "cpu_pool_size_bytes"),
        ({"cpu_pool_size_bytes": 1 << 30, "max_jobs": 0}, "max_jobs"),
    ],
)
def test_what_is_unfit_is_refused_with_a_hint(extra, message):
    with pytest.raises(kvortex.ConfigError) as caught:
        ConnectorOptions.parse(extra)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, ours", NAMES_OF_OTHERS.items())
def test_what_another_connector_calls_otherwise_is_an_option_here(name, ours):
    known = {*ConnectorOptions.__dataclass_fields__, *ENGINE_OPTIONS, *TIER_SIZES}
    assert name not in known and ours.split(",")[0] in known


def test_a_pool_smaller_than_a_block_is_refused_with_the_least_size():
    with pytest.raises(kvortex.ConfigError, match="set it to at least 8192"):
        Rig(num_ranks=2, extra={"cpu_pool_size_bytes": 4096})


def test_each_rank_has_an_equal_part_of_the_pool(make_rig):
    rig = make_rig(num_ranks=2, num_slots=10)
    assert [worker.worker.pool.num_slots for worker in rig.workers] == [10, 10]
    assert rig.index.num_slots == 10


def test_vllm_finds_a_registered_connector_by_its_name(make_rig):
    register()
    register()  # once a process is enough, but vLLM loads plug-ins in each
    rig = make_rig()
    rig.config.kv_transfer_config.kv_connector_module_path = None
    found = KVConnectorFactory.create_connector(rig.config, KVConnectorRole.WORKER, rig.cache_config)
    assert type(found) is KVortexConnector is type(rig.connector)
    found.shutdown()


def test_importing_kvortex_imports_neither_vllm_nor_torch():
    code = "import sys, kvortex, kvortex.integrations.vllm; print([n for n in ('torch', 'vllm') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
