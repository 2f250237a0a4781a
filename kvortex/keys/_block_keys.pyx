"""Token ids -> block keys: SHA-256 chained over the prefix, so that a key names exactly one content."""

from operator import index

import numpy as np

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memcpy

from kvortex cimport _c

cdef enum:
    KEY_BYTES = 32
    TOKENS_AT_ONCE = 64  # encoded on the stack before they are hashed

cdef bytes ROOT_PREFIX = b"kvortex-keys-v1"
cdef int64_t MAX_TOKEN = 0xFFFFFFFF

ctypedef fused token_t:
    int32_t
    uint32_t
    int64_t


def block_keys(token_ids, block_size, salt=b""):
    """Compute the keys of a prompt's whole blocks.

    The preimages, ``||`` being concatenation and u32 a 32-bit little-endian unsigned number::

        root  = SHA-256(b"kvortex-keys-v1" || u32(block_size) || u32(len(salt)) || salt)
        key_0 = SHA-256(root      || u32(token) for each of the first block_size tokens)
        key_i = SHA-256(key_(i-1) || u32(token) for each of the next block_size tokens)

    So a key depends on every token before and in its block, on the block size and on the salt; two prompts share the
    keys of exactly their common whole blocks, and tenants with different salts share none.

    Parameters
    ----------
    token_ids : (num_tokens,) array-like of int
        Each in 0 .. 2**32 - 1. Contiguous int32, uint32 and int64 arrays are read in place.
    block_size : int
        Tokens a block, in 1 .. 2**32 - 1. Tokens behind the last whole block get no key.
    salt : bytes
        Tenant or model name; whoever has another salt has other keys.

    Returns
    -------
    keys : (num_tokens // block_size, 32) uint8 array

    Raises
    ------
    ValueError
        If a token is negative or above 2**32 - 1 (the message names it), the array is not one-dimensional, or
        `block_size` is out of range.
    TypeError
        If the tokens are not integers or `salt` is not bytes-like.

    Notes
    -----
    Runs without the GIL.
    """
    cdef uint8_t root[KEY_BYTES]
    block_size = index(block_size)
    hash_root(block_size, salt, root)
    tokens = as_tokens(token_ids, "token_ids")
    keys = np.empty((tokens.shape[0] // block_size, KEY_BYTES), np.uint8)
    hash_prompt(tokens, block_size, root, keys, "token_ids")
    return keys


def block_keys_many(prompts, block_size, salt=b""):
    """Compute the keys of several prompts in one call; each prompt's are what `block_keys` gives for it.

    Parameters
    ----------
    prompts : sequence of (num_tokens,) array-likes of int, or (num_prompts, num_tokens) array
    block_size, salt
        As for `block_keys`, the same for all prompts.

    Returns
    -------
    keys : (n, 32) uint8 array
        The keys of all prompts one behind the other.
    offsets : (num_prompts + 1,) int64 array
        The keys of prompt i are ``keys[offsets[i]:offsets[i + 1]]``.

    Raises
    ------
    ValueError, TypeError
        As `block_keys`; the message names the prompt.
    """
    cdef uint8_t root[KEY_BYTES]
    block_size = index(block_size)
    hash_root(block_size, salt, root)
    arrays = [as_tokens(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([tokens.shape[0] // block_size for tokens in arrays], out=offsets[1:])
    keys = np.empty((offsets[len(arrays)], KEY_BYTES), np.uint8)
    for i, tokens in enumerate(arrays):
        hash_prompt(tokens, block_size, root, keys[offsets[i]:offsets[i + 1]], f"prompts[{i}]")
    return keys, offsets


def sha256(data):
    """Compute the SHA-256 of `data` with the code that makes the keys.

    Parameters
    ----------
    data : bytes-like

    Returns
    -------
    digest : bytes
    """
    cdef const uint8_t[::1] view = memoryview(data).cast("B")
    cdef size_t size = view.shape[0]
    cdef uint8_t digest[KEY_BYTES]
    cdef _c.kv_sha256 sha
    with nogil:
        _c.kv_sha256_init(&sha, _c.kv_sha256_compress_portable)
        _c.kv_sha256_update(&sha, &view[0], size)
        _c.kv_sha256_final(&sha, digest)
    return digest[:KEY_BYTES]


cdef int hash_root(object block_size, object salt, uint8_t *root) except -1:
    if not 1 <= block_size <= MAX_TOKEN:
        raise ValueError(f"block_size must be in 1 .. {MAX_TOKEN} tokens, got {block_size}")
    salt = bytes(memoryview(salt))
    preimage = ROOT_PREFIX + block_size.to_bytes(4, "little") + len(salt).to_bytes(4, "little") + salt
    cdef bytes digest = sha256(preimage)
    memcpy(root, <const char *>digest, KEY_BYTES)
    return 0


cdef object as_tokens(object token_ids, str name):
    """Return them as a contiguous int32, uint32 or int64 array; the same array where it is one already."""
    tokens = np.asarray(token_ids)
    if tokens.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tokens.shape}; "
                         "block_keys_many takes several prompts")
    if tokens.size == 0:
        return np.empty(0, np.int32)
    if tokens.dtype.kind not in "iuO":
        raise TypeError(f"{name} must be integers, got dtype {tokens.dtype}")
    if tokens.dtype.kind == "O" or tokens.dtype == np.uint64:  # what int64 may not hold
        for i, token in enumerate(tokens.tolist()):
            if not isinstance(token, int):
                raise TypeError(f"{name} must be integers, got {type(token).__name__} at index {i}")
            if not 0 <= token <= MAX_TOKEN:
                raise bad_token(name, i, token)
    if tokens.dtype not in (np.int32, np.uint32):
        return np.ascontiguousarray(tokens, np.int64)
    return np.ascontiguousarray(tokens, tokens.dtype.newbyteorder("="))


cdef int hash_prompt(object tokens, size_t block_size, const uint8_t *root, object keys, str name) except -1:
    cdef int64_t bad
    if tokens.dtype == np.int32:
        bad = hash_tokens[int32_t](tokens, block_size, root, keys)
    elif tokens.dtype == np.uint32:
        bad = hash_tokens[uint32_t](tokens, block_size, root, keys)
    else:
        bad = hash_tokens[int64_t](tokens, block_size, root, keys)
    if bad >= 0:
        raise bad_token(name, bad, int(tokens[bad]))
    return 0


# -> index of the first token out of range, or -1. All tokens are checked before any is hashed.
cdef int64_t hash_tokens(const token_t[::1] tokens, size_t block_size, const uint8_t *root, uint8_t[:, ::1] keys):
    cdef int64_t i, token, bad = -1
    cdef size_t block, num_blocks = keys.shape[0]
    cdef const uint8_t *parent = root
    with nogil:
        for i in range(tokens.shape[0]):
            token = tokens[i]
            if token != <int64_t><uint32_t>token:
                bad = i
                break
        if bad < 0:
            for block in range(num_blocks):
                hash_block(parent, &tokens[block * block_size], block_size, &keys[block, 0])
                parent = &keys[block, 0]
    return bad


cdef void hash_block(const uint8_t *parent, const token_t *tokens, size_t num_tokens, uint8_t *key) noexcept nogil:
    cdef uint8_t encoded[TOKENS_AT_ONCE * 4]
    cdef size_t first, count, i
    cdef uint32_t token
    cdef _c.kv_sha256 sha
    _c.kv_sha256_init(&sha, _c.kv_sha256_compress_portable)
    _c.kv_sha256_update(&sha, parent, KEY_BYTES)
    first = 0
    while first < num_tokens:
        count = min(num_tokens - first, <size_t>TOKENS_AT_ONCE)
        for i in range(count):
            token = <uint32_t>tokens[first + i]
            encoded[4 * i] = <uint8_t>token
            encoded[4 * i + 1] = <uint8_t>(token >> 8)
            encoded[4 * i + 2] = <uint8_t>(token >> 16)
            encoded[4 * i + 3] = <uint8_t>(token >> 24)
        _c.kv_sha256_update(&sha, encoded, count * 4)
        first += count
    _c.kv_sha256_final(&sha, key)


cdef object bad_token(str name, object position, object value):
    return ValueError(f"{name}[{position}] = {value} is not in 0 .. {MAX_TOKEN}; a token id is an unsigned 32-bit one")
