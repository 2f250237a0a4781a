from kvortex.driver import DeviceBuffer
from kvortex.memory._device_limit import DeviceLimit

class DeviceArena(DeviceBuffer):
    pool: DeviceLimit
    reserve_bytes: int
    mapped_bytes: int
    def grow(self, nbytes: int) -> int: ...
    def close(self) -> None: ...
