from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvortex.codec import Plane
from kvortex.memory import PinnedPool

class KVLayout:
    num_groups: int
    num_blocks: int
    block_bytes: int
    block_size: int
    name: str
    whole: KVLayout | None
    runs: tuple[tuple[int, int, int], ...]
    planes: tuple[Plane, ...]
    owners: tuple[Any, ...]
    read_only: bool
    on_gpu: bool
    planner: tuple[Any, ...]
    def __init__(
        self,
        runs: Iterable[tuple[Any, int, int]],
        num_blocks: int,
        *,
        block_size: int = 0,
        owners: Iterable[Any] = (),
        name: str = "",
        planes: Iterable[Plane] = (),
    ) -> None: ...
    @property
    def fingerprint(self) -> bytes: ...
    @property
    def piece_bytes(self) -> int: ...
    @property
    def pieces_per_block(self) -> int: ...
    @classmethod
    def contiguous(
        cls,
        base: Any,
        *,
        kv: int = 2,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        head_dim: int,
        itemsize: int,
        name: str = "",
        dtype: Any = None,
    ) -> Self: ...
    @classmethod
    def mla(
        cls,
        bases: Iterable[Any],
        *,
        num_blocks: int,
        block_size: int,
        latent_dim: int,
        itemsize: int,
        name: str = "",
        dtype: Any = None,
        rope_dim: int = 64,
    ) -> Self: ...
    @classmethod
    def cross_layer(
        cls,
        base: Any,
        *,
        num_blocks: int,
        block_bytes: int,
        block_size: int = 0,
        name: str = "",
        planes: Iterable[Plane] = (),
    ) -> Self: ...
    @classmethod
    def from_tensors(
        cls,
        tensors: Iterable[Any],
        block_dim: int = 0,
        *,
        block_size: int = 0,
        name: str = "",
        num_blocks: int | None = None,
        roles: str | Sequence[str] | None = None,
    ) -> Self: ...
    def part(self, runs: Iterable[Any], *, fingerprint: bytes | None = None) -> KVLayout: ...
    def slot_mapping(self, block_ids: ArrayLike, num_tokens: int | None = None) -> NDArray[np.int64]: ...

def plan_copies(
    layout: KVLayout, block_ids: ArrayLike, slot_ids: ArrayLike, pool: PinnedPool, strided: bool | None = None
) -> list[dict[str, int]]: ...
