from enum import IntEnum
from typing import NamedTuple

from typing_extensions import Buffer

HEADER_BYTES: int

class BlockStatus(IntEnum):
    OK = 0
    MISSING = 1
    VERSION_DIFFERS = 2
    HEADER_DAMAGED = 3
    NAMESPACE_DIFFERS = 4
    RANK_DIFFERS = 5
    CODEC_DIFFERS = 6
    TAG_DIFFERS = 7
    KEY_DIFFERS = 8
    NAME_DIFFERS = 9
    LENGTH_DIFFERS = 10
    PAYLOAD_DAMAGED = 11
    LATE = 16
    DROPPED = 17
    READ_ONLY = 18
    NO_SPACE = 19
    IO_ERROR = 20
    SHORT = 21
    PENDING = 22
    TOO_LARGE = 23

class Header(NamedTuple):
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

def write_record(
    record: Buffer,
    key: bytes,
    *,
    namespace: bytes,
    rank: int,
    tag: bytes,
    stored_bytes: int,
    group: int = 0,
    codec: int = 0,
    block_bytes: int | None = None,
) -> None: ...
def check_record(
    record: Buffer,
    key: bytes,
    *,
    namespace: bytes,
    rank: int,
    tag: bytes,
    stored_bytes: int,
    codec: int = 0,
    block_bytes: int | None = None,
) -> int: ...
def read_header(page: Buffer) -> tuple[int, Header | None]: ...
def payload_sums(data: Buffer, *, vectors: int = 2) -> tuple[int, int]: ...
