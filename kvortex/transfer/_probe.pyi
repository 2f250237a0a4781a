from typing import Any, NamedTuple

from kvortex.transfer._layout import KVLayout
from kvortex.transfer._transfer_queue import TransferQueue

class PlannerRow(NamedTuple):
    direction: str
    piece_bytes: int
    rows: int
    pitch_bytes: int
    num_groups: int
    backend: str
    strided_gbps: float | None
    batch_gbps: float | None

def probe_layout(
    layout: KVLayout, queue: TransferQueue, *, measure: bool | None = None, known: dict[Any, Any] | None = None
) -> list[PlannerRow]: ...
