"""The record of a block for Python: tools and tests. Stores write and check theirs in C, in their I/O threads."""

from enum import IntEnum
from typing import NamedTuple

from libc.stdint cimport uint8_t, uint32_t

cimport kvortex._c as _c
from kvortex.keys._persistent_names cimport as_digest, name_keys

HEADER_BYTES = _c.KV_RECORD_HEADER_BYTES


class BlockStatus(IntEnum):
    """What a store answers for a block. Anything but OK is a miss, or a block that is not kept."""

    OK = _c.KV_RECORD_OK                                    #: it is there, verified; or it is kept
    MISSING = _c.KV_RECORD_MISSING                          #: no record was written here, or it was erased
    VERSION_DIFFERS = _c.KV_RECORD_VERSION_DIFFERS          #: the record has a format that is not read
    HEADER_DAMAGED = _c.KV_RECORD_HEADER_DAMAGED            #: the header does not have its sum
    NAMESPACE_DIFFERS = _c.KV_RECORD_NAMESPACE_DIFFERS      #: the record is of another model, ...
    RANK_DIFFERS = _c.KV_RECORD_RANK_DIFFERS                #: ... another rank, ...
    CODEC_DIFFERS = _c.KV_RECORD_CODEC_DIFFERS              #: ... another codec, ...
    TAG_DIFFERS = _c.KV_RECORD_TAG_DIFFERS                  #: ... other weights, ...
    KEY_DIFFERS = _c.KV_RECORD_KEY_DIFFERS                  #: ... another block
    NAME_DIFFERS = _c.KV_RECORD_NAME_DIFFERS                #: the name does not follow from the rest
    LENGTH_DIFFERS = _c.KV_RECORD_LENGTH_DIFFERS            #: the block has another length
    PAYLOAD_DAMAGED = _c.KV_RECORD_PAYLOAD_DAMAGED          #: the payload does not have its sum
    LATE = _c.KV_BLOCK_LATE                                 #: the deadline passed
    DROPPED = _c.KV_BLOCK_DROPPED                           #: the queue was full, or the store is closed
    READ_ONLY = _c.KV_BLOCK_READ_ONLY                       #: the store takes no more blocks
    NO_SPACE = _c.KV_BLOCK_NO_SPACE                         #: there was no room; the store is read-only from now on
    IO_ERROR = _c.KV_BLOCK_IO_ERROR                         #: reading or writing failed
    SHORT = _c.KV_BLOCK_SHORT                               #: the file ends before the block does
    PENDING = _c.KV_BLOCK_PENDING                           #: not answered yet
    TOO_LARGE = _c.KV_BLOCK_TOO_LARGE                       #: coded, the block takes more than a slot of the tier has


class Header(NamedTuple):
    """What the header page of a record says."""

    namespace: bytes
    rank: int
    codec: int
    tag: bytes
    key: bytes
    name: bytes
    group: int
    stored_bytes: int
    block_bytes: int
    payload_xxh3: int
    payload_weighted: int


cdef class Names:  # keeps what a kv_record points to
    cdef bytes space, tag, key
    cdef uint8_t[_c.KV_DIGEST_BYTES] name
    cdef _c.kv_record record

    def __init__(self, key, namespace, uint32_t rank, tag, uint32_t stored_bytes, uint32_t group, uint32_t codec,
                 block_bytes):
        self.space, self.tag = as_digest(namespace, "namespace"), as_digest(tag, "tag")
        self.key = as_digest(key, "key")
        self.record.space, self.record.tag, self.record.key = self.space, self.tag, self.key
        self.record.name = self.name
        self.record.rank, self.record.group, self.record.codec = rank, group, codec
        self.record.stored_bytes = stored_bytes
        self.record.block_bytes = stored_bytes if block_bytes is None else block_bytes
        name_keys(self.record.space, rank, self.record.tag, self.record.key, 1, self.name)


def write_record(uint8_t[::1] record not None, key, *, namespace, rank, tag, stored_bytes, group=0, codec=0,
                 block_bytes=None):
    """Fill the header page in front of a payload.

    Parameters
    ----------
    record : writable buffer
        A page, then at least `stored_bytes` of payload.
    key, namespace, tag : bytes
        32 bytes each.
    rank, stored_bytes, group, codec : int
    block_bytes : int, optional
        Of the decoded block; by default `stored_bytes`.

    Raises
    ------
    ValueError
        The buffer is shorter, or a digest has another length.
    """
    cdef Names names = Names(key, namespace, rank, tag, stored_bytes, group, codec, block_bytes)
    require_bytes(record.shape[0], names.record.stored_bytes)
    cdef _c.kv_record_header *header = <_c.kv_record_header *>&record[0]
    with nogil:
        _c.kv_record_write(header, &names.record, _c.kv_has_vectors())


def check_record(const uint8_t[::1] record not None, key, *, namespace, rank, tag, stored_bytes, codec=0,
                 block_bytes=None):
    """Compare a record with what it is to be.

    Parameters
    ----------
    record : buffer
        A page, then at least `stored_bytes` of payload.
    key, namespace, tag : bytes
        32 bytes each.
    rank, stored_bytes, codec : int
        With a codec other than 0, `stored_bytes` are the most that it may have.
    block_bytes : int, optional
        As for `write_record`.

    Returns
    -------
    status : int
        A `BlockStatus`: OK, or the first that differs.

    Raises
    ------
    ValueError
        The buffer is shorter, or a digest has another length.
    """
    cdef Names names = Names(key, namespace, rank, tag, stored_bytes, 0, codec, block_bytes)
    require_bytes(record.shape[0], names.record.stored_bytes)
    cdef const _c.kv_record_header *header = <const _c.kv_record_header *>&record[0]
    cdef int status
    with nogil:
        status = _c.kv_record_check(header, &names.record, _c.kv_has_vectors())
    return status


def read_header(const uint8_t[::1] page not None):
    """Read the header page of a record, whosever it is.

    Returns
    -------
    status : int
        A `BlockStatus`: OK, MISSING, VERSION_DIFFERS or HEADER_DAMAGED.
    header : Header or None
        None where the status is not OK.

    Raises
    ------
    ValueError
        The buffer is shorter than a page.
    """
    require_bytes(page.shape[0], 0)
    cdef const _c.kv_record_header *header = <const _c.kv_record_header *>&page[0]
    cdef int status = _c.kv_record_check_page(header, _c.kv_has_vectors())
    if status:
        return status, None
    return status, Header(header.space[:_c.KV_DIGEST_BYTES], header.rank, header.codec,
                          header.tag[:_c.KV_DIGEST_BYTES], header.key[:_c.KV_DIGEST_BYTES],
                          header.name[:_c.KV_DIGEST_BYTES], header.group, header.stored_bytes, header.block_bytes,
                          header.payload_xxh3, header.payload_weighted)


def payload_sums(const uint8_t[::1] data not None, *, int vectors=2):
    """Compute the sums of a payload: its XXH3-64, and the weighted sum that a GPU can compute.

    Parameters
    ----------
    data : buffer
    vectors : {2, 1, 0}, default 2
        With the processor's vectors up to 512 bits, up to 256, or with none; the sums are the same.

    Returns
    -------
    xxh3, weighted : int

    Notes
    -----
    Runs without the GIL.
    """
    cdef const uint8_t *start = &data[0] if data.shape[0] else NULL
    cdef size_t nbytes = data.shape[0]
    cdef _c.kv_sums sums
    with nogil:
        sums = _c.kv_sums_of(start, nbytes, min(vectors, _c.kv_has_vectors()))
    return sums.xxh3, sums.weighted


cdef int require_bytes(size_t nbytes, size_t payload_bytes) except -1:
    if nbytes < _c.KV_RECORD_HEADER_BYTES + payload_bytes:
        raise ValueError(f"a record of {payload_bytes} bytes needs a buffer of "
                         f"{_c.KV_RECORD_HEADER_BYTES + payload_bytes}, got {nbytes}")
    return 0
