"""Token ids to block keys."""

from kvortex.keys._block_keys import block_keys, block_keys_many, uses_sha_instructions

__all__ = ["block_keys", "block_keys_many", "uses_sha_instructions"]
