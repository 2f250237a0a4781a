"""Rank 3: memory of the device, and of the host that it can reach. It knows addresses and devices, never keys."""

from kvortex.memory._device_arena import DeviceArena
from kvortex.memory._device_pool import DevicePool, DevicePoolUsage, PooledBuffer
from kvortex.memory._pinned_pool import PinnedPool
from kvortex.memory._pool_slot import PoolSlot

__all__ = ["DeviceArena", "DevicePool", "DevicePoolUsage", "PinnedPool", "PoolSlot", "PooledBuffer"]
