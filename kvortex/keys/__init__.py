"""Token ids to block keys, a block's hash to its key in RAM, and that to its name outside RAM."""

from kvortex.keys._block_keys import block_keys, block_keys_many, uses_sha_instructions
from kvortex.keys._persistent_names import persistent_names
from kvortex.keys._ram_keys import digest_of, ram_keys

__all__ = ["block_keys", "block_keys_many", "digest_of", "persistent_names", "ram_keys", "uses_sha_instructions"]
