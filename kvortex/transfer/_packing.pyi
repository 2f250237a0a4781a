from collections.abc import Sequence

from kvortex.codec import PackedBlock
from kvortex.driver import Device
from kvortex.transfer._layout import KVLayout

def misfit(layout: KVLayout) -> tuple[int, int, int] | None: ...
def packed_block(layout: KVLayout, codec: str, exact_layers: Sequence[int] = ()) -> PackedBlock: ...
def slot_block(layout: KVLayout, codec: str, exact_layers: Sequence[int] = ()) -> PackedBlock: ...
def packed_bytes(layout: KVLayout, codec: str, exact_layers: Sequence[int] = ()) -> int: ...

class Packing:
    num_planes: int
    block_bytes: int
    packed_bytes: int
    fingerprint: bytes
    def __init__(self, device: Device, layout: KVLayout, packed: PackedBlock | None = None) -> None: ...

class Packings:
    layout: KVLayout
    codec: str
    exact_layers: tuple[int, ...]
    whole: Packing
    def __init__(
        self, device: Device, layout: KVLayout, codec: str = "exact", exact_layers: Sequence[int] = ()
    ) -> None: ...
