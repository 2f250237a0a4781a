from kvortex.memory import DevicePool
from kvortex.transfer._layout import KVLayout
from kvortex.transfer._packing import Packings

class Gather:
    layout: KVLayout
    num_ctas: int
    pool: DevicePool | None
    def __init__(self, packings: Packings, num_ctas: int, pool: DevicePool | None = None) -> None: ...

def gather_pays(layout: KVLayout, direction: str) -> bool: ...
