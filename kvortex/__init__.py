"""KVortex keeps the KV cache of LLM inference engines in pinned host memory and brings it back on a prefix hit."""

import os as _os
import typing as _typing

from kvortex.config import KVortexConfig
from kvortex.driver import Device, DeviceBuffer, Event, Stream
from kvortex.engine import BlockHits, KVortexEngine
from kvortex.errors import (
    ConfigError,
    CorruptBlock,
    DriverError,
    EngineClosed,
    KVortexError,
    PoolExhausted,
    TierError,
)
from kvortex.index import BlockIndex, ReserveStatus
from kvortex.keys import block_keys, block_keys_many
from kvortex.memory import DevicePool, PinnedPool
from kvortex.metrics import prometheus_text
from kvortex.stats import EngineStats, TierStats
from kvortex.transfer import Job, KVLayout, TransferQueue
from kvortex.version import __version__ as __version__

__all__ = [
    "BlockHits",
    "BlockIndex",
    "ConfigError",
    "CorruptBlock",
    "Device",
    "DeviceBuffer",
    "DevicePool",
    "DiskTier",
    "DriverError",
    "EngineClosed",
    "EngineStats",
    "Event",
    "Job",
    "KVLayout",
    "KVortexConfig",
    "KVortexEngine",
    "KVortexError",
    "ObjectTier",
    "PinnedPool",
    "PoolExhausted",
    "Prefetch",
    "RedisTier",
    "ReserveStatus",
    "Stream",
    "TierError",
    "TierStats",
    "TransferQueue",
    "block_keys",
    "block_keys_many",
    "get_include",
    "prometheus_text",
]

if _typing.TYPE_CHECKING:  # which takes every name for known where a module has a __getattr__
    from kvortex.engine.prefetch import Prefetch
    from kvortex.tiers.disk import DiskTier
    from kvortex.tiers.remote import ObjectTier, RedisTier
else:

    def __getattr__(name):
        """What only some engines need is imported when it is named."""
        if name == "DiskTier":
            from kvortex.tiers.disk import DiskTier as found
        elif name in ("ObjectTier", "RedisTier"):
            from kvortex.tiers import remote

            found = getattr(remote, name)
        elif name == "Prefetch":
            from kvortex.engine.prefetch import Prefetch as found
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found


def get_include() -> str:
    """Return the folder to pass to the C compiler when a module of yours cimports `kvortex.capi`.

    The headers below it are C11 and need libc only; the ``.pxd`` files lie beside the modules, where Cython finds them.

    Returns
    -------
    path : str
    """
    package = _os.path.dirname(_os.path.abspath(__file__))
    installed = _os.path.join(package, "include")
    return installed if _os.path.isdir(installed) else _os.path.join(_os.path.dirname(package), "include")
