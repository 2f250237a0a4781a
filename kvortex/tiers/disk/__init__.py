"""Blocks on local disks."""

from kvortex.tiers.disk.tier import DiskTier, OpenDiskTier

__all__ = ["DiskTier", "OpenDiskTier"]
