from typing import Any

from kvortex.driver import Device

class DeviceLimit:
    device: Device
    limit_bytes: int
    closed: bool
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
