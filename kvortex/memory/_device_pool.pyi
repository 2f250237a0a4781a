from typing import Any, NamedTuple, Self

from kvortex.driver import Device, DeviceBuffer

class DevicePoolUsage(NamedTuple):
    limit_bytes: int
    used_bytes: int
    used_high_bytes: int
    reserved_bytes: int
    reserved_high_bytes: int

class DevicePool:
    device: Device
    limit_bytes: int
    release_threshold_bytes: int
    closed: bool
    def __init__(
        self, limit_bytes: int, device: Device | str = "auto", *, release_threshold_bytes: int | None = None
    ) -> None: ...
    def alloc(self, nbytes: int, stream: Any) -> PooledBuffer: ...
    def arena(self, reserve_bytes: int) -> DeviceArena: ...
    def usage(self) -> DevicePoolUsage: ...
    def trim(self, keep_bytes: int = 0) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: Any) -> None: ...

class PooledBuffer(DeviceBuffer):
    pool: DevicePool
    def free(self, stream: Any) -> None: ...

class DeviceArena(DeviceBuffer):
    pool: DevicePool
    reserve_bytes: int
    mapped_bytes: int
    def grow(self, nbytes: int) -> int: ...
    def close(self) -> None: ...
