from collections.abc import Sequence
from typing import Any, Literal, Self

from numpy.typing import ArrayLike

from kvortex.driver import Device
from kvortex.memory import DevicePool, PinnedPool
from kvortex.transfer._gather import Gather
from kvortex.transfer._job import Job
from kvortex.transfer._layout import KVLayout
from kvortex.transfer._signals import JobSignals

class TransferQueue:
    device: Device
    signals: JobSignals
    max_jobs: int
    jobs_in_flight: int
    num_waiting: int
    gather: Gather | None
    def __init__(
        self,
        device: Device,
        direction: Literal["D2H", "H2D"],
        *,
        max_jobs: int = 256,
        signals: JobSignals | None = None,
    ) -> None: ...
    def submit(
        self,
        layout: KVLayout,
        block_ids: ArrayLike,
        pool: PinnedPool,
        slot_ids: ArrayLike,
        *,
        stream: Any,
        deferred: bool = False,
    ) -> Job | None: ...
    def withdraw(self, job: Job) -> bool: ...
    def poll(self) -> int: ...
    def use_gather(
        self,
        layout: KVLayout,
        num_ctas: int,
        pool: DevicePool | None = None,
        *,
        codec: str = "exact",
        exact_layers: Sequence[int] = (),
    ) -> None: ...
    @property
    def direction(self) -> Literal["D2H", "H2D"]: ...
    def close(self, timeout_ms: int = 5000) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: Any) -> None: ...
