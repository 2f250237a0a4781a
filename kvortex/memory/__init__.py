"""Rank 3: host memory that the device can reach. It knows addresses and devices, never keys."""

from kvortex.memory._pinned_pool import PinnedPool, PoolSlot

__all__ = ["PinnedPool", "PoolSlot"]
