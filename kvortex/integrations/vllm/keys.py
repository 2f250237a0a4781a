"""From vLLM's block hashes to keys of the index, and between lists of keys and arrays."""

import functools
import hashlib

import numpy as np

from kvortex.keys import digest_of, ram_keys

KEY_BYTES = 32
NO_DIGEST = digest_of()


def keys_of(request, first, end):
    """Keys of the request's blocks `first` to `end`, as far as it has hashes."""
    return as_keys(request.block_hashes[first:end], digest_of_adapter(request.lora_request))


def digest_of_adapter(lora):
    """What vLLM's hashes do not say of a LoRA.

    vLLM before 0.32 hashes the name of a LoRA alone, and later ones its path besides. A LoRA that is loaded anew under
    its name has another id.
    """
    return NO_DIGEST if lora is None else digest_of_name(f"{lora.lora_int_id} {lora.lora_path}")


@functools.lru_cache(1024)
def digest_of_name(name):
    return digest_of(tag=hashlib.sha256(name.encode()).digest())


def as_keys(hashes, digest=NO_DIGEST):
    """An (n, 32) array of keys; vLLM's hashes have 32 bytes, or 16 with xxhash."""
    if hashes and len(hashes[0]) < KEY_BYTES:
        hashes = [name.ljust(KEY_BYTES, b"\0") for name in hashes]
    return ram_keys(np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, KEY_BYTES), digest)


def as_bytes(keys):
    """A list of the rows of an (n, 32) array."""
    return keys.view(f"V{KEY_BYTES}")[:, 0].tolist()
