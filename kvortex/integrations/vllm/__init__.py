"""vLLM 0.15 to 0.33: `KVortexConnector` keeps vLLM's KV cache in pinned host memory.

``vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVortexConnector", "kv_role": "kv_both",
"kv_connector_extra_config": {"cpu_pool_size_bytes": "32GiB"}}'``

Two halves that meet only in what vLLM pickles between them: `SchedulerHalf` owns a `BlockIndex` and no memory,
`WorkerHalf` owns a `PinnedPool` and two `TransferQueue` and no index. The slot number is all they share.
"""

__all__ = ["KVortexConnector", "register"]


def register():
    """Let vLLM find the connector by name: the entry point of ``vllm.general_plugins``."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "KVortexConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "KVortexConnector", "kvortex.integrations.vllm.connector", "KVortexConnector"
        )


def __getattr__(name):
    if name == "KVortexConnector":  # late: vLLM asks for `register` while its own modules are still being imported
        from kvortex.integrations.vllm.connector import KVortexConnector

        return KVortexConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
