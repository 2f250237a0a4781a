"""Tiers on servers and folders that several engines share: Redis, Valkey, S3, files."""

from kvortex.tiers.remote.tier import ObjectTier, RedisTier, RemoteTier, tier_at

__all__ = ["ObjectTier", "RedisTier", "RemoteTier", "tier_at"]
