from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvortex.codec._coder import BlockCoder
from kvortex.memory import PinnedPool
from kvortex.tiers.disk.segments import Segments

class DiskBatch:
    @property
    def statuses(self) -> NDArray[np.uint8]: ...
    @property
    def keys(self) -> NDArray[np.uint8]: ...
    @property
    def lengths(self) -> NDArray[np.uint32]: ...
    @property
    def groups(self) -> NDArray[np.uint32]: ...
    def wait(self, timeout_ms: int | None = None) -> NDArray[np.uint8]: ...
    def done(self) -> bool: ...
    @property
    def seconds(self) -> float | None: ...

class DiskStore:
    pool: PinnedPool
    segments: Segments
    num_slots: int
    coder: BlockCoder | None
    def __init__(
        self,
        pool: PinnedPool,
        segments: Segments,
        *,
        namespace: bytes,
        rank: int = 0,
        num_threads: int = 4,
        queue_blocks: int = 4096,
        io: str = "threads",
        coder: BlockCoder | None = None,
    ) -> None: ...
    @property
    def payload_bytes(self) -> int: ...
    @property
    def codec(self) -> str: ...
    @property
    def record_bytes(self) -> int: ...
    def put(
        self,
        slots: ArrayLike,
        pool_slots: ArrayLike,
        keys: NDArray[np.uint8],
        lengths: ArrayLike,
        *,
        tag: bytes,
        group: int = 0,
        timeout_ms: int,
    ) -> DiskBatch: ...
    def get(
        self,
        slots: ArrayLike,
        pool_slots: ArrayLike,
        keys: NDArray[np.uint8],
        lengths: ArrayLike,
        *,
        tag: bytes,
        timeout_ms: int,
    ) -> DiskBatch: ...
    def erase(self, slots: ArrayLike, *, timeout_ms: int) -> DiskBatch: ...
    def scan(self, slots: ArrayLike, *, tag: bytes, timeout_ms: int) -> DiskBatch: ...
    def flush(self, timeout_ms: int, *, durable: bool = True) -> int: ...
    def notify(self, event_fd: int | None) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self, timeout_ms: int = 5000) -> None: ...
    def __enter__(self) -> DiskStore: ...
    def __exit__(self, *exception: object) -> None: ...
