"""Token ids to block keys, and a block's hash to its key in RAM."""

from kvortex.keys._block_keys import block_keys, block_keys_many, uses_sha_instructions
from kvortex.keys._ram_keys import digest_of, ram_keys

__all__ = ["block_keys", "block_keys_many", "digest_of", "ram_keys", "uses_sha_instructions"]
