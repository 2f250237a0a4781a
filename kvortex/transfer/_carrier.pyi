from collections.abc import Sequence

from numpy.typing import ArrayLike

from kvortex.driver import Device
from kvortex.memory import DevicePool, PinnedPool
from kvortex.transfer._layout import KVLayout
from kvortex.transfer._packing import Packings
from kvortex.transfer._signals import JobSignals
from kvortex.transfer._transfer_queue import TransferQueue

class Carrier:
    device: Device
    pool: PinnedPool
    layout: KVLayout | None
    packings: Packings | None
    signals: JobSignals
    queues: tuple[TransferQueue, ...]
    def __init__(
        self,
        device: Device,
        pool: PinnedPool,
        layout: KVLayout | None = None,
        *,
        num_savers: int = 1,
        num_loaders: int = 1,
        max_jobs: int = 256,
        signals: JobSignals | None = None,
        gather_ctas: int = 0,
        device_pool: DevicePool | None = None,
        codec: str = "exact",
        exact_layers: Sequence[int] = (),
    ) -> None: ...
    def refused_slots(self, slot_ids: ArrayLike) -> list[int]: ...
    def close(self, timeout_ms: int = 5000) -> None: ...
