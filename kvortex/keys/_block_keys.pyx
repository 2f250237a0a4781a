"""Token ids -> block keys: SHA-256 chained over the prefix, so that a key names exactly one content."""

import numpy as np

cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

from kvortex cimport _c

from kvortex.arguments import whole_number

cdef enum:
    KEY_BYTES = 32
    TOKEN_BYTES = 4
    MAX_LANES = _c.KV_SHA256_MAX_MESSAGES

cdef bytes ROOT_PREFIX = b"kvortex-keys-v1"
cdef int64_t MAX_TOKEN = 0xFFFFFFFF
cdef tuple TOKEN_DTYPES = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.uint32))

cdef _c.kv_sha256_fn digest_messages = _c.kv_sha256_best()  # changed by use_portable_sha256 alone

ctypedef fused token_t:
    int32_t
    uint32_t
    int64_t


cdef struct Chain:  # the part of one prompt that has no keys yet
    const uint32_t *tokens
    uint8_t *keys
    size_t num_blocks


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
        Each in 0 .. 2**32 - 1. Contiguous int32, uint32 and int64 arrays are fastest.
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

    MemoryError
        If there is no memory for the keys and a copy of the tokens.

    Notes
    -----
    Runs without the GIL, and with the processor's SHA instructions where it has them.
    """
    block_size = whole_number(block_size, "block_size")
    root = hash_root(block_size, salt)
    tokens = as_tokens(token_ids, "token_ids")
    encoded = np.empty(tokens.shape[0], np.uint32)
    bad = encode(tokens, encoded)
    if bad >= 0:
        raise bad_token("token_ids", bad, int(tokens[bad]))
    return hash_prompts(encoded, np.array([0, encoded.shape[0]], np.int64), block_size, root)[0]


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
    ValueError, TypeError, MemoryError
        As `block_keys`; the message names the prompt.

    Notes
    -----
    Runs without the GIL but for a look at each prompt of a sequence; the rows of an array need none.
    """
    block_size = whole_number(block_size, "block_size")
    root = hash_root(block_size, salt)
    if isinstance(prompts, np.ndarray) and prompts.ndim == 2 and prompts.dtype in TOKEN_DTYPES:
        rows = np.ascontiguousarray(prompts)
        starts = np.arange(rows.shape[0] + 1, dtype=np.int64) * rows.shape[1]
        tokens = rows.reshape(-1)
    else:
        arrays = [as_tokens(prompt, "prompts", i) for i, prompt in enumerate(prompts)]
        starts = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(array) for array in arrays], out=starts[1:])
        tokens = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
    encoded = np.empty(tokens.shape[0], np.uint32)
    bad = encode(tokens, encoded)
    if bad >= 0:
        prompt = int(np.searchsorted(starts, bad, side="right")) - 1
        raise bad_token(f"prompts[{prompt}]", bad - int(starts[prompt]), int(tokens[bad]))
    return hash_prompts(encoded, starts, block_size, root)


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
    cdef size_t size = view.shape[0], num_blocks = _c.kv_sha256_blocks(size)
    cdef uint8_t *message = <uint8_t *>malloc(num_blocks * _c.KV_SHA256_BLOCK_BYTES)
    if message == NULL:
        raise MemoryError(f"no memory for a copy of {size} bytes")
    with nogil:
        if size:
            memcpy(message, &view[0], size)
        _c.kv_sha256_pad(message, size)
        digest_messages(message, 1, num_blocks)
    digest = message[:KEY_BYTES]
    free(message)
    return digest


def use_portable_sha256(bint portable):
    """Make keys with portable C, or again with the best this processor has, for tests; the keys are the same.

    Returns
    -------
    bool
        Whether the processor has anything better.
    """
    global digest_messages
    digest_messages = _c.kv_sha256_portable if portable else _c.kv_sha256_best()
    return _c.kv_sha256_best() != _c.kv_sha256_portable


def uses_sha_instructions():
    """Whether keys are made with the processor's SHA instructions; portable C is five times slower."""
    return digest_messages != _c.kv_sha256_portable


# --- What callers pass ----------------------------------------------------------------------------------------------

cdef bytes hash_root(object block_size, object salt):
    if not 1 <= block_size <= MAX_TOKEN:
        raise ValueError(f"block_size must be in 1 .. {MAX_TOKEN} tokens, got {block_size}")
    if isinstance(salt, str):
        raise TypeError(f"salt must be bytes, got the text {salt!r}; write {salt.encode()!r}")
    salt = bytes(memoryview(salt))
    return sha256(ROOT_PREFIX + block_size.to_bytes(4, "little") + len(salt).to_bytes(4, "little") + salt)


# A one-dimensional, contiguous int32, uint32 or int64 array; the same array where it is one already.
cdef object as_tokens(object token_ids, str name, object number=None):
    tokens = np.asarray(token_ids)
    if tokens.ndim == 1 and tokens.dtype in TOKEN_DTYPES:
        return np.ascontiguousarray(tokens)
    if number is not None:
        name = f"{name}[{number}]"
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
    return np.ascontiguousarray(tokens, np.int64)


cdef int64_t encode(object tokens, uint32_t[::1] target) except -2:
    if tokens.dtype == np.int32:
        return encode_tokens[int32_t](tokens, target)
    if tokens.dtype == np.uint32:
        return encode_tokens[uint32_t](tokens, target)
    return encode_tokens[int64_t](tokens, target)


# Copies the tokens as 32-bit ones -> index of the first out of range, or -1.
@cython.boundscheck(False)
@cython.wraparound(False)
cdef int64_t encode_tokens(const token_t[::1] tokens, uint32_t[::1] target) except -2:
    cdef int64_t i, token, n = tokens.shape[0]
    with nogil:
        for i in range(n):
            token = tokens[i]
            if token != <int64_t><uint32_t>token:
                return i
            target[i] = <uint32_t>token
    return -1


cdef object bad_token(str name, object position, object value):
    return ValueError(f"{name}[{position}] = {value} is not in 0 .. {MAX_TOKEN}; a token id is an unsigned 32-bit one")


# --- Hashing --------------------------------------------------------------------------------------------------------

cdef bint chain_keys(const uint32_t *tokens, size_t num_tokens, size_t block_size, const uint8_t *parent,
                     uint8_t *keys) noexcept nogil:
    cdef int64_t starts[2]
    cdef int64_t firsts[2]
    starts[0] = firsts[0] = 0
    starts[1] = num_tokens
    firsts[1] = num_tokens // block_size
    return hash_chains(tokens, starts, firsts, 1, block_size, parent, keys)


# Prompt i is tokens[starts[i]:starts[i + 1]] -> keys of all prompts, and where each prompt's begin.
cdef tuple hash_prompts(const uint32_t[::1] tokens, const int64_t[::1] starts, size_t block_size, bytes root):
    cdef size_t i, num_prompts = starts.shape[0] - 1
    cdef const uint8_t *root_bytes = root
    cdef bint done
    offsets = np.zeros(num_prompts + 1, np.int64)
    cdef int64_t[::1] firsts = offsets
    for i in range(num_prompts):
        firsts[i + 1] = firsts[i] + (starts[i + 1] - starts[i]) // <int64_t>block_size
    keys = np.empty((firsts[num_prompts], KEY_BYTES), np.uint8)
    cdef uint8_t[:, ::1] key_view = keys
    if keys.shape[0]:
        with nogil:
            done = hash_chains(&tokens[0], &starts[0], &firsts[0], num_prompts, block_size, root_bytes, &key_view[0, 0])
        if not done:
            raise MemoryError(f"no memory for a block of {block_size} tokens")
    return keys, offsets


# One chain waits for its own last key; so MAX_LANES prompts go side by side. False if there is no memory.
cdef bint hash_chains(const uint32_t *tokens, const int64_t *starts, const int64_t *firsts, size_t num_prompts,
                      size_t block_size, const uint8_t *root, uint8_t *keys) noexcept nogil:
    cdef Chain lanes[MAX_LANES]
    cdef size_t tokens_bytes = block_size * TOKEN_BYTES, num_blocks = _c.kv_sha256_blocks(KEY_BYTES + tokens_bytes)
    cdef size_t message_bytes = num_blocks * _c.KV_SHA256_BLOCK_BYTES
    cdef size_t i, j, num_lanes = 0, prompt = 0
    cdef uint32_t *encoded
    cdef uint8_t *messages = <uint8_t *>malloc(MAX_LANES * message_bytes)
    cdef uint8_t *message
    if messages == NULL:
        return False
    for i in range(<size_t>MAX_LANES):  # parent || tokens || padding, of which only the parent and the tokens change
        _c.kv_sha256_pad(messages + i * message_bytes, KEY_BYTES + tokens_bytes)
    while True:
        while num_lanes < MAX_LANES and prompt < num_prompts:
            lanes[num_lanes].tokens = tokens + starts[prompt]
            lanes[num_lanes].keys = keys + firsts[prompt] * KEY_BYTES
            lanes[num_lanes].num_blocks = firsts[prompt + 1] - firsts[prompt]
            prompt += 1
            if lanes[num_lanes].num_blocks > 0:
                memcpy(messages + num_lanes * message_bytes, root, KEY_BYTES)
                num_lanes += 1
        if num_lanes == 0:
            break
        for i in range(num_lanes):
            encoded = <uint32_t *>(messages + i * message_bytes + KEY_BYTES)
            for j in range(block_size):  # on little-endian machines the compiler makes it a memcpy
                encoded[j] = _c.kv_little_endian(lanes[i].tokens[j])
        digest_messages(messages, num_lanes, num_blocks)  # each key is where the next block wants its parent
        for i in range(num_lanes, 0, -1):
            message = messages + (i - 1) * message_bytes
            memcpy(lanes[i - 1].keys, message, KEY_BYTES)
            lanes[i - 1].tokens += block_size
            lanes[i - 1].keys += KEY_BYTES
            lanes[i - 1].num_blocks -= 1
            if lanes[i - 1].num_blocks == 0:  # the last lane takes its place
                num_lanes -= 1
                lanes[i - 1] = lanes[num_lanes]
                memmove(message, messages + num_lanes * message_bytes, KEY_BYTES)
    free(messages)
    return True
