"""Hash of a block -> its key in RAM, and back: what the hash does not say of the block's bytes is in a digest."""

import numpy as np

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from kvortex.keys._arrays cimport as_keys

from kvortex.arguments import whole_number
from kvortex.keys._block_keys import sha256

cdef enum:
    KEY_BYTES = 32
    KEY_WORDS = KEY_BYTES // 8


def digest_of(group=0, codec=None, tag=None):
    """Compute the digest of what a block's hash does not say.

    The xor of these, ``||`` being concatenation and u32 a 32-bit little-endian unsigned number; 32 zero bytes where
    there is none of them::

        SHA-256(b"group" || u32(group))   where group is not 0
        SHA-256(b"codec" || codec)        where there is a codec
        tag                               where there is one

    Parameters
    ----------
    group : int, default 0
        The KV cache group whose bytes the block has, in 0 .. 2**32 - 1.
    codec : bytes-like, optional
        Name and parameters of what encodes the block, where the bytes that come back are not those that were saved.
        None: they are, whatever happens to them in between.
    tag : bytes-like, optional
        32 bytes that name the weights.

    Returns
    -------
    digest : bytes

    Raises
    ------
    ValueError
        `group` is out of range, or `tag` has another length.
    TypeError
        `group` is no whole number; `codec` or `tag` is not bytes-like.
    """
    group = whole_number(group, "group")
    if not 0 <= group < 1 << 32:
        raise ValueError(f"group must be in 0 .. {(1 << 32) - 1}, got {group}")
    parts = []
    if group:
        parts.append(sha256(b"group" + group.to_bytes(4, "little")))
    if codec is not None:
        parts.append(sha256(b"codec" + bytes(memoryview(codec))))
    if tag is not None:
        parts.append(bytes(memoryview(tag)))
        if len(parts[-1]) != KEY_BYTES:
            raise ValueError(f"tag must have {KEY_BYTES} bytes, got {len(parts[-1])}; pass the SHA-256 of a name")
    digest = 0
    for part in parts:
        digest ^= int.from_bytes(part, "little")
    return digest.to_bytes(KEY_BYTES, "little")


def ram_keys(hashes, digest):
    """Compute the keys in RAM of blocks: ``hash xor digest``, so that the same call with a key gives the hash back.

    Blocks whose digests differ share no key, however equal their hashes are.

    Parameters
    ----------
    hashes : (n, 32) uint8 array
        Of the blocks, from `block_keys` or the engine's own.
    digest : bytes, or (n, 32) uint8 array
        From `digest_of`: one for all, or one for each.

    Returns
    -------
    keys : (n, 32) uint8 array

    Raises
    ------
    TypeError, ValueError
        An array of another type or shape, or a digest of another length.

    Notes
    -----
    Runs without the GIL.
    """
    cdef const uint8_t[:, ::1] hash_view = as_keys(hashes), digest_view
    cdef size_t n = hash_view.shape[0], digest_step = 0
    cdef const uint8_t *digest_ptr
    if isinstance(digest, bytes):
        if len(<bytes>digest) != KEY_BYTES:
            raise ValueError(f"digest must have {KEY_BYTES} bytes, got {len(digest)}; digest_of makes one")
        digest_ptr = digest
    else:
        digest_view = as_keys(digest)
        if <size_t>digest_view.shape[0] != n:
            raise ValueError(f"digest must be one for all, or {n}, one a hash; got {digest_view.shape[0]}")
        digest_ptr = &digest_view[0, 0] if n else NULL
        digest_step = KEY_BYTES
    keys = np.empty((n, KEY_BYTES), np.uint8)
    cdef uint8_t[:, ::1] key_view = keys
    if n:
        with nogil:
            xor_keys(&hash_view[0, 0], digest_ptr, digest_step, n, &key_view[0, 0])
    return keys


cdef void xor_keys(const uint8_t *hashes, const uint8_t *digests, size_t digest_step, size_t n,
                   uint8_t *keys) noexcept nogil:
    cdef uint64_t hashed[KEY_WORDS]
    cdef uint64_t digest[KEY_WORDS]
    cdef size_t i, word
    for i in range(n):
        memcpy(hashed, hashes + i * KEY_BYTES, KEY_BYTES)
        memcpy(digest, digests + i * digest_step, KEY_BYTES)
        for word in range(<size_t>KEY_WORDS):
            hashed[word] ^= digest[word]
        memcpy(keys + i * KEY_BYTES, hashed, KEY_BYTES)
