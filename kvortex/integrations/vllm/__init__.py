"""vLLM 0.15 to 0.33: `KVortexConnector` keeps vLLM's KV cache in pinned host memory.

``vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVortexConnector", "kv_role": "kv_both",
"kv_connector_extra_config": {"cpu_pool_size_bytes": "32GiB"}}'``

Two halves that meet only in what vLLM pickles between them: `SchedulerHalf` owns a `BlockIndex` and no memory,
`WorkerHalf` owns a `PinnedPool` and a `Carrier` and no index. The slot number is all they share.
"""

from kvortex.integrations.vllm.plugin import ask_early, register

__all__ = ["KVortexConnector", "register"]


def __getattr__(name):
    if name == "KVortexConnector":  # late: vLLM asks for `register` while its own modules are still being imported
        from kvortex.integrations.vllm.connector import KVortexConnector

        ask_early()  # named by its module's path, it may be in use without the plugin
        return KVortexConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
