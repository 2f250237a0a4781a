"""Tiers on servers and shared folders: Redis, Valkey, S3, and whatever else several engines reach."""

from kvortex.tiers.remote.tier import ObjectTier, RedisTier, RemoteTier, tier_at

__all__ = ["ObjectTier", "RedisTier", "RemoteTier", "tier_at"]
