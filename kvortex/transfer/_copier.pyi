from kvortex.driver import Device

class Copier:
    def __init__(self, device: Device, direction: int) -> None: ...
