"""KV events: which blocks came into host memory and which left it, for whoever routes requests by them."""

import numpy as np

from kvortex.integrations.vllm.keys import KEY_BYTES, NO_DIGEST, as_bytes, digest_of_adapter
from kvortex.keys import ram_keys


class BlockEvents:
    """What vLLM is told of blocks in host memory, under its own hashes.

    Parameters
    ----------
    num_slots : int
    """

    def __init__(self, num_slots):
        self.hash_bytes = KEY_BYTES
        # A key alone does not tell by which digest it was made. There is one for each adapter.
        self.numbers = {NO_DIGEST: 0}
        self.number_of = np.zeros(num_slots, dtype=np.uint32)  # of the digest, by slot
        self.stored, self.removed = [], []

    def reserved(self, request, slots):
        """These slots are for blocks of this request."""
        self.hash_bytes = len(request.block_hashes[0])
        digest = digest_of_adapter(request.lora_request)
        self.number_of[slots] = self.numbers.setdefault(digest, len(self.numbers))

    def store(self, slots, keys):
        self.stored += self.hashes_of(slots, keys)

    def remove(self, slots, keys):
        self.removed += self.hashes_of(slots, keys)

    def hashes_of(self, slots, keys):
        digests = np.frombuffer(b"".join(self.numbers), dtype=np.uint8).reshape(-1, KEY_BYTES)
        hashes = as_bytes(ram_keys(keys, digests[self.number_of[slots]]))
        return [name[: self.hash_bytes] for name in hashes]

    def take(self):
        """The hashes of the blocks stored, and of those removed, since the last call."""
        events = self.stored, self.removed
        self.stored, self.removed = [], []
        return events
