"""What vLLM calls before it has a connector. It names no module of vLLM until then."""

import functools


def register():
    """Let vLLM find the connector by name: the entry point of ``vllm.general_plugins``."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "KVortexConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "KVortexConnector", "kvortex.integrations.vllm.connector", "KVortexConnector"
        )
    ask_early()


def ask_early():
    """Let vLLM's executors check that there is memory for the pools before they load weights, which takes minutes.

    vLLM makes connectors only after that. An executor is made once for all ranks, in every version.
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
