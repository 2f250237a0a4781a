"""vLLM 0.15 to 0.33: `KVortexConnector` keeps vLLM's KV cache in pinned host memory.

``vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVortexConnector", "kv_role": "kv_both",
"kv_connector_extra_config": {"cpu_pool_size_bytes": "32GiB"}}'``

Two halves that meet only in what vLLM pickles between them: `SchedulerHalf` owns a `BlockIndex` and no memory,
`WorkerHalf` owns a `PinnedPool` and two `TransferQueue` and no index. The slot number is all they share.
"""

import functools

__all__ = ["KVortexConnector", "register"]


def register():
    """Let vLLM find the connector by name: the entry point of ``vllm.general_plugins``."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "KVortexConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "KVortexConnector", "kvortex.integrations.vllm.connector", "KVortexConnector"
        )
    ask_early()


def ask_early():
    """Let vLLM's executors ask whether there is memory for the pools before they load weights, which takes minutes.

    vLLM shows a connector its configuration after that only. An executor is made once for all ranks, in every version.
    """
    from vllm.v1.executor.abstract import Executor

    create = Executor.__init__
    if hasattr(create, "asks_for_kvortex"):
        return

    @functools.wraps(create)
    def ask_and_create(self, vllm_config, *args, **kwargs):
        from kvortex.integrations.vllm.options import require_host_memory

        require_host_memory(vllm_config.kv_transfer_config, vllm_config.parallel_config)
        create(self, vllm_config, *args, **kwargs)

    ask_and_create.asks_for_kvortex = True
    Executor.__init__ = ask_and_create


def __getattr__(name):
    if name == "KVortexConnector":  # late: vLLM asks for `register` while its own modules are still being imported
        from kvortex.integrations.vllm.connector import KVortexConnector

        ask_early()  # named by its module's path, it may be in use without the plugin
        return KVortexConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
