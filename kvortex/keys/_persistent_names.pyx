"""Key of a block -> its name outside RAM, which says whose block it is: model, rank and weights."""

import numpy as np

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from kvortex cimport _c
from kvortex.keys._arrays cimport as_keys

from kvortex.arguments import whole_number

cdef enum:
    DIGEST_BYTES = 32
    NAMESPACE_AT = 16
    RANK_AT = 48
    TAG_AT = 52
    KEY_AT = 84
    PREIMAGE_BYTES = 116
    NUM_BLOCKS = 2
    MESSAGE_BYTES = NUM_BLOCKS * _c.KV_SHA256_BLOCK_BYTES

cdef bytes PREFIX = b"kvortex-names-v1"
cdef const uint8_t *prefix = PREFIX
cdef _c.kv_sha256_fn digest_messages = _c.kv_sha256_best()


def persistent_names(keys, namespace, rank, tag):
    """Compute the names under which blocks are kept outside RAM.

    A name is, ``||`` being concatenation and u32 a 32-bit little-endian unsigned number::

        SHA-256(b"kvortex-names-v1" || namespace || u32(rank) || tag || key)

    Parameters
    ----------
    keys : (n, 32) uint8 array
        Keys in RAM, which are the same on all ranks.
    namespace : bytes
        32 bytes that name the model as loaded, and all else that decides what the bytes of a block mean.
    rank : int
        Whose part of the blocks it is, in 0 .. 2**32 - 1.
    tag : bytes
        32 bytes that name the weights.

    Returns
    -------
    names : (n, 32) uint8 array

    Raises
    ------
    TypeError, ValueError
        An array of another type or shape, a digest of another length, or `rank` out of range.

    Notes
    -----
    Runs without the GIL.
    """
    cdef const uint8_t[:, ::1] key_view = as_keys(keys)
    cdef size_t n = key_view.shape[0]
    rank = whole_number(rank, "rank")
    if not 0 <= rank < 1 << 32:
        raise ValueError(f"rank must be in 0 .. {(1 << 32) - 1}, got {rank}")
    cdef bytes space = as_digest(namespace, "namespace"), weights = as_digest(tag, "tag")
    cdef const uint8_t *space_ptr = space
    cdef const uint8_t *tag_ptr = weights
    cdef uint32_t number = rank
    names = np.empty((n, DIGEST_BYTES), np.uint8)
    cdef uint8_t[:, ::1] name_view = names
    if n:
        with nogil:
            name_keys(space_ptr, number, tag_ptr, &key_view[0, 0], n, &name_view[0, 0])
    return names


cdef bytes as_digest(object digest, str what):
    found = bytes(memoryview(digest))
    if len(found) != DIGEST_BYTES:
        raise ValueError(f"{what} must have {DIGEST_BYTES} bytes, got {len(found)}; pass the SHA-256 of a name")
    return found


cdef void name_keys(const uint8_t *space, uint32_t rank, const uint8_t *tag, const uint8_t *keys, size_t n,
                    uint8_t *names) noexcept nogil:
    cdef uint8_t[<int>_c.KV_SHA256_MAX_MESSAGES * MESSAGE_BYTES] messages
    cdef uint8_t *message
    cdef size_t i, j, count
    rank = _c.kv_little_endian(rank)
    for j in range(<size_t>_c.KV_SHA256_MAX_MESSAGES):
        message = messages + j * MESSAGE_BYTES
        memcpy(message + NAMESPACE_AT, space, DIGEST_BYTES)
        memcpy(message + RANK_AT, &rank, 4)
        memcpy(message + TAG_AT, tag, DIGEST_BYTES)
        _c.kv_sha256_pad(message, PREIMAGE_BYTES)
    i = 0
    while i < n:
        count = min(n - i, <size_t>_c.KV_SHA256_MAX_MESSAGES)
        for j in range(count):
            message = messages + j * MESSAGE_BYTES
            memcpy(message, prefix, NAMESPACE_AT)  # a digest took the place of both
            memcpy(message + NAMESPACE_AT, space, NAMESPACE_AT)
            memcpy(message + KEY_AT, keys + (i + j) * DIGEST_BYTES, DIGEST_BYTES)
        digest_messages(messages, count, NUM_BLOCKS)
        for j in range(count):
            memcpy(names + (i + j) * DIGEST_BYTES, messages + j * MESSAGE_BYTES, DIGEST_BYTES)
        i += count
