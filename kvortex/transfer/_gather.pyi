from kvortex.driver import Device
from kvortex.transfer._layout import KVLayout

class Gather:
    layout: KVLayout
    num_ctas: int
    def __init__(self, device: Device, layout: KVLayout, num_ctas: int) -> None: ...

def gather_pays(layout: KVLayout, direction: str) -> bool: ...
def misfit(layout: KVLayout) -> tuple[int, int, int] | None: ...
