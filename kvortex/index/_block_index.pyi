from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

NO_SLOT: int

class ReserveStatus(IntEnum):
    NEW = 0
    PRESENT = 1
    PENDING = 2
    FULL = 3

class CommitStatus(IntEnum):
    READY = 0
    DISCARDED = 1

class BlockFact(IntFlag):
    ADMITTED = 1
    CLEAN = 2
    OFFERED = 4
    RAM_ONLY = 8

class Blocks(NamedTuple):
    slots: NDArray[np.uint32]
    keys: NDArray[np.uint8]
    lengths: NDArray[np.uint32]
    facts: NDArray[np.uint8]

class BlockIndex:
    num_slots: int
    memory_bytes: int
    def __init__(self, num_slots: int) -> None: ...
    def add_slots(self, first: int, count: int) -> None: ...
    def adopt(self, slots: ArrayLike, keys: NDArray[np.uint8], lengths: ArrayLike) -> NDArray[np.bool_]: ...
    def reserve(
        self,
        keys: NDArray[np.uint8],
        lengths: ArrayLike,
        *,
        after: NDArray[np.uint8] | None = None,
        stops: ArrayLike | None = None,
        admit: int = 0,
        victims: bool = False,
    ) -> Any: ...  # (slots, statuses), or (slots, statuses, victims)
    def commit(
        self,
        slots: ArrayLike,
        pin: bool = False,
        *,
        pins: ArrayLike | None = None,
        clean: bool = False,
        ram_only: bool = False,
    ) -> NDArray[np.uint8]: ...
    def abort(self, slots: ArrayLike) -> None: ...
    def lookup(self, keys: NDArray[np.uint8], touch: bool = False) -> tuple[NDArray[np.bool_], int]: ...
    def acquire(
        self, keys: NDArray[np.uint8], lengths: ArrayLike | None = None, *, gaps: bool = False
    ) -> NDArray[np.uint32]: ...
    def release(
        self,
        slots: ArrayLike,
        *,
        offered: ArrayLike | None = None,
        clean: ArrayLike = False,
        ram_only: ArrayLike = False,
    ) -> None: ...
    def coldest(self, n: int) -> Blocks: ...
    def offer_again(self) -> None: ...
    def touch(self, keys: NDArray[np.uint8]) -> int: ...
    def slots_of(self, keys: NDArray[np.uint8]) -> NDArray[np.uint32]: ...
    def lengths_of(self, slots: ArrayLike) -> NDArray[np.uint32]: ...
    def evict(self, n: int) -> int: ...
    def discard(self, keys: NDArray[np.uint8]) -> int: ...
    def clear(self) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def slot_info(self, slot: int) -> dict[str, Any]: ...
    def probe_lengths(self) -> tuple[float, int]: ...
    @property
    def slots_added(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_writing(self) -> int: ...
    @property
    def num_ready(self) -> int: ...
    @property
    def num_pinned(self) -> int: ...
