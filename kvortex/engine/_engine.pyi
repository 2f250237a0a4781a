from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvortex.driver import Device
from kvortex.engine.prefetch import Prefetch
from kvortex.index import BlockIndex
from kvortex.memory import DevicePool, PinnedPool
from kvortex.stats import EngineStats
from kvortex.transfer import Carrier, Job, KVLayout, TransferQueue

class BlockHits(NamedTuple):
    leading: int
    mask: NDArray[np.bool_]
    where: NDArray[np.uint8]
    leading_anywhere: int

class EngineCore:
    device: Device
    pool: PinnedPool
    device_pool: DevicePool | None
    index: BlockIndex
    layout: KVLayout | None
    queues: tuple[TransferQueue, ...]
    tiering: Any
    @property
    def layouts(self) -> tuple[KVLayout, ...]: ...
    def __init__(
        self,
        device: Device,
        pool: PinnedPool,
        index: BlockIndex,
        carrier: Carrier,
        device_pool: DevicePool | None = None,
        deferred: bool | Literal["auto"] = False,
    ) -> None: ...
    def save_blocks(
        self,
        keys: NDArray[np.uint8],
        block_ids: ArrayLike | None = None,
        *,
        data_ptrs: ArrayLike | Sequence[Any] | None = None,
        sizes: ArrayLike | None = None,
        stream: Any = None,
        after: NDArray[np.uint8] | None = None,
        deferred: bool | Literal["auto"] | None = None,
        layout: KVLayout | None = None,
    ) -> Job: ...
    def load_blocks(
        self,
        keys: NDArray[np.uint8],
        block_ids: ArrayLike | None = None,
        *,
        data_ptrs: ArrayLike | Sequence[Any] | None = None,
        sizes: ArrayLike | None = None,
        stream: Any = None,
        deferred: bool | Literal["auto"] | None = None,
        layout: KVLayout | None = None,
        prefetched: Prefetch | None = None,
        promote_timeout_ms: int | None = None,
    ) -> Job: ...
    def check_blocks(self, keys: NDArray[np.uint8], *, layout: KVLayout | None = None) -> BlockHits: ...
    def touch_blocks(self, keys: NDArray[np.uint8], *, layout: KVLayout | None = None) -> int: ...
    def discard_blocks(self, keys: NDArray[np.uint8], *, layout: KVLayout | None = None) -> int: ...
    def clear(self, weights: str | None = None) -> None: ...
    def get_stats(self) -> EngineStats: ...
    @property
    def is_closed(self) -> bool: ...
    @property
    def failed(self) -> bool: ...
