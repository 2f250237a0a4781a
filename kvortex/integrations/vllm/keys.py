"""From vLLM's block hashes to keys of the index, and between lists of keys and arrays."""

import functools
import hashlib
import os

import numpy as np

from kvortex.keys import digest_of, ram_keys

KEY_BYTES = 32
NO_DIGEST = digest_of()
OF_THIS_PROCESS = os.urandom(16).hex()


def keys_of(request, group, first, end):
    """Keys of the request's blocks `first` to `end` in a group, as far as it has hashes.

    vLLM's hashes are chained: the hash of a block is the one that ends where the block ends.
    """
    step = group.hashes_per_block
    hashes = request.block_hashes[(first + 1) * step - 1 : end * step : step]
    return as_keys(hashes, digest_for(request, group))


def keys_of_all(request, spans):
    """The same for several (group, first, end), one after the other."""
    keys = [keys_of(request, *span) for span in spans]
    return keys[0] if len(keys) == 1 else np.concatenate(keys)


def digest_for(request, group):
    """A digest of what vLLM's hash of a block leaves out: the group, and which LoRA was loaded.

    vLLM before 0.32 hashes only the name of a LoRA, later versions its path, too. A LoRA that is loaded anew under its
    name has another id. At its path, the next server may have another LoRA and find blocks of this one on disk: so the
    keys of blocks with a LoRA belong to this process alone.
    """
    lora = request.lora_request
    return digest_of_name(
        group.index, None if lora is None else f"{lora.lora_int_id} {lora.lora_path} {OF_THIS_PROCESS}"
    )


@functools.lru_cache(1024)
def digest_of_name(group_index, lora):
    return digest_of(group=group_index, tag=None if lora is None else hashlib.sha256(lora.encode()).digest())


def as_keys(hashes, digest=NO_DIGEST):
    """An (n, 32) array of keys; vLLM's hashes have 32 bytes, or 16 with xxhash."""
    if hashes and len(hashes[0]) < KEY_BYTES:
        hashes = [name.ljust(KEY_BYTES, b"\0") for name in hashes]
    return ram_keys(np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, KEY_BYTES), digest)


def as_bytes(keys):
    """A list of the rows of an (n, 32) array."""
    return keys.view(f"V{KEY_BYTES}")[:, 0].tolist()
