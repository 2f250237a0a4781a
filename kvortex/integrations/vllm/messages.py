"""What the two halves send each other: plain data, pickled by vLLM."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1 import base

# What a message is about.
SAVE, LOAD = "save", "load"  # a `Transfer`
CHUNK = "chunk"  # slots that are registered together, see `Slots.chunk`


class Transfer(NamedTuple):
    """Blocks to move between device and slots, one to one."""

    kind: str  # SAVE or LOAD
    number: int  # ascending, whatever the kind; names the transfer in fences and reports
    slots: np.ndarray  # uint32
    block_ids: np.ndarray  # int64
    request_id: str | None  # whose blocks a LOAD brings; a SAVE is of several requests


@dataclass
class StepMetadata(base.KVConnectorMetadata):
    """Scheduler to workers, once a step.

    Attributes
    ----------
    fences : list of int
        Transfers in flight on device blocks that this step may write; its forward must wait for them.
    transfers : list of Transfer
        What begins in this step. A SAVE is of blocks whose last token the step's forward writes, or an earlier one
        wrote.
    waits : list of int
        Transfers in flight on device blocks that another connector may fill from this step on. They must be over before
        it begins: nothing orders that connector after vLLM's stream.
    evictions : list of Transfer
        Saves of device blocks that this step may write: they begin before anything else does, and its forward and its
        loads must wait for them.
    is_idle : bool
        The step computes nothing.
    shape : PoolShape or None
        What the scheduler's half takes the pool for: in its first step, before anything can be in a slot.
    """

    fences: list = field(default_factory=list)
    transfers: list = field(default_factory=list)
    waits: list = field(default_factory=list)
    is_idle: bool = False
    shape: object = None
    evictions: list = field(default_factory=list)

    def of(self, kind):
        """The transfers of one kind."""
        return [transfer for transfer in self.transfers if transfer.kind == kind]


# vLLM 0.15 has no such class and no way to send one: there the report travels inside the statistics.
WorkerMetadata = getattr(base, "KVConnectorWorkerMetadata", object)


@dataclass
class WorkerReport(WorkerMetadata):
    """Workers to scheduler: what ended since the last report, in how many ranks, and which blocks went wrong.

    Attributes
    ----------
    ended : dict
        (kind, number) of a transfer, or of a chunk that is registered -> ranks.
    bad : dict
        (kind, number) of a transfer -> set of slots whose block at least one of these ranks could not move; of a chunk
        -> those at its end that one of them, a stage with larger blocks, does not have. Where there are none, there is
        no entry.
    is_refusal : bool
        The rank has another pool than the scheduler counts on, and keeps nothing.
    """

    ended: dict = field(default_factory=dict)
    bad: dict = field(default_factory=dict)
    is_refusal: bool = False

    def add(self, kind, number, bad=()):
        """This ended in one rank, all of it but the blocks in the slots `bad`."""
        name, bad = (kind, number), {int(slot) for slot in bad}
        self.aggregate(WorkerReport({name: 1}, {name: bad} if bad else {}))

    def aggregate(self, other):
        for name, ranks in other.ended.items():
            self.ended[name] = self.ended.get(name, 0) + ranks
        for name, slots in other.bad.items():
            self.bad[name] = self.bad.get(name, set()) | slots
        self.is_refusal |= other.is_refusal
        return self
