"""KVortex keeps the KV cache of LLM inference engines in pinned host memory and brings it back on a prefix hit."""

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
from kvortex.keys import block_keys
from kvortex.memory import PinnedPool
from kvortex.metrics import prometheus_text
from kvortex.stats import EngineStats
from kvortex.transfer import Job, KVLayout, TransferQueue

__version__ = "0.1.0"

__all__ = [
    "BlockHits",
    "BlockIndex",
    "ConfigError",
    "CorruptBlock",
    "Device",
    "DeviceBuffer",
    "DriverError",
    "EngineClosed",
    "EngineStats",
    "Event",
    "Job",
    "KVLayout",
    "KVortexConfig",
    "KVortexEngine",
    "KVortexError",
    "PinnedPool",
    "PoolExhausted",
    "ReserveStatus",
    "Stream",
    "TierError",
    "TransferQueue",
    "block_keys",
    "prometheus_text",
]
