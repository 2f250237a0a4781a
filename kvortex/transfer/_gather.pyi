from kvortex.driver import Device
from kvortex.memory import DevicePool
from kvortex.transfer._layout import KVLayout

class Gather:
    layout: KVLayout
    num_ctas: int
    pool: DevicePool | None
    def __init__(self, device: Device, layout: KVLayout, num_ctas: int, pool: DevicePool | None = None) -> None: ...

def gather_pays(layout: KVLayout, direction: str) -> bool: ...
def misfit(layout: KVLayout) -> tuple[int, int, int] | None: ...
