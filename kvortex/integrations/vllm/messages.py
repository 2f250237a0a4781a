"""What the two halves send each other: plain data, pickled by vLLM."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1 import base


class Transfer(NamedTuple):
    """Blocks to move between device and slots, one to one."""

    number: int  # ascending; names the transfer in fences and reports
    slots: np.ndarray  # uint32
    block_ids: np.ndarray  # int64


class Load(NamedTuple):
    """A transfer for one request."""

    request_id: str
    transfer: Transfer


@dataclass
class StepMetadata(base.KVConnectorMetadata):
    """Scheduler to workers, once a step.

    Attributes
    ----------
    fences : list of int
        Transfers in flight on device blocks that this step may write; its forward must wait for them.
    loads : list of Load
    save : Transfer or None
        Blocks whose last token this step's forward writes, or an earlier one wrote.
    waits : list of int
        Transfers in flight on device blocks that another connector may fill from this step on. They must be over before
        it begins: nothing orders that connector after vLLM's stream.
    is_idle : bool
        The step computes nothing.
    shape : PoolShape or None
        What the scheduler's half takes the pool for: in its first step, before anything can be in a slot.
    """

    fences: list = field(default_factory=list)
    loads: list = field(default_factory=list)
    save: Transfer | None = None
    waits: list = field(default_factory=list)
    is_idle: bool = False
    shape: object = None


# vLLM 0.15 has no such class and no way to send one: there the report travels inside the statistics.
WorkerMetadata = getattr(base, "KVConnectorWorkerMetadata", object)


@dataclass
class WorkerReport(WorkerMetadata):
    """Workers to scheduler: what ended since the last report, and in how many ranks.

    Negative numbers name chunks of the pool that have been registered, see `PoolShape.chunk`.
    """

    done: dict = field(default_factory=dict)  # number -> ranks
    failed: dict = field(default_factory=dict)
    is_refusal: bool = False  # the rank has another pool than the scheduler counts on, and keeps nothing

    def aggregate(self, other):
        for mine, theirs in ((self.done, other.done), (self.failed, other.failed)):
            for number, ranks in theirs.items():
                mine[number] = mine.get(number, 0) + ranks
        self.is_refusal |= other.is_refusal
        return self
