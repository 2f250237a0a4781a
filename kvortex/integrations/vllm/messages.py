"""What the two halves send each other: plain data, pickled by vLLM."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1 import base

RANGE_SLOTS = 512  # tier slots that one entry of `WorkerReport.found` covers

# The kinds of messages.
SAVE, LOAD = "save", "load"  # a `Transfer`
CHUNK = "chunk"  # slots that are registered together, see `Slots.chunk`
PUT, GET, ERASE = "put", "get", "erase"  # a `TierTransfer`


class Transfer(NamedTuple):
    """Blocks to move between device and slots, one to one."""

    kind: str  # SAVE or LOAD
    number: int  # ascending, whatever the kind; names the transfer in fences and reports
    slots: np.ndarray  # uint32
    block_ids: np.ndarray  # int64
    request_id: str | None  # the request whose blocks a LOAD brings; None for a SAVE, which is of several requests


class TierTransfer(NamedTuple):
    """Blocks to move between slots of the pool and slots of a lower tier, one to one, in every rank."""

    kind: str  # PUT, GET, or ERASE (which has slots of the tier alone)
    number: int  # ascending among the `TierTransfer`s; names this one in reports
    tier_slots: np.ndarray  # uint32
    slots: np.ndarray  # uint32
    keys: np.ndarray  # (n, 32) uint8
    tag: bytes  # of the weights
    timeout_ms: int
    save: int = 0  # PUT: number of the SAVE that brings these blocks into the pool; 0: they are there
    # If blocks share objects on a server: an `Objects` of them. An ERASE then names objects alone, no slots.
    objects: object = None


class Moved(NamedTuple):
    """The outcome of a `TierTransfer`."""

    statuses: np.ndarray  # uint8, a `BlockStatus` of each block
    seconds: float  # how long its I/O took

    def merge(self, other):
        """The outcome in both ranks: of each block the worse."""
        return Moved(np.maximum(self.statuses, other.statuses), max(self.seconds, other.seconds))


class Found(NamedTuple):
    """The blocks that a rank's store has in a range of tier slots, as their headers say."""

    slots: np.ndarray  # uint32, ascending: those of the range that hold a block
    keys: np.ndarray  # (n, 32) uint8

    def merge(self, other):
        """The blocks that both ranks have in the same slot."""
        _, here, there = np.intersect1d(self.slots, other.slots, assume_unique=True, return_indices=True)
        same = (self.keys[here] == other.keys[there]).all(axis=1)
        return Found(self.slots[here[same]], self.keys[here[same]])


@dataclass
class StepMetadata(base.KVConnectorMetadata):
    """Scheduler to workers, once a step.

    Attributes
    ----------
    fences : list of int
        Transfers in flight on device blocks that this step may write; its forward must wait for them.
    transfers : list of Transfer
        What begins in this step. The last token of a block to SAVE is written by this step's forward or an earlier one.
    waits : list of int
        Transfers in flight on device blocks that another connector may fill from this step on. They must be over
        before: nothing orders that connector after vLLM's stream.
    evictions : list of Transfer
        Saves of device blocks that this step may write. They begin first, and its forward and its loads must wait for
        them.
    is_idle : bool
        The step computes nothing.
    shape : PoolShape or None
        The pool as the scheduler's half counts it, sent in its first step, before anything can be in a slot.
    tier : list of TierTransfer
        What begins on the lower tier, in this order. A PUT behind a SAVE begins when the SAVE is over and `put_lag`
        more steps have begun: if a block turned out to be wrong, an ERASE has come by then.
    """

    fences: list = field(default_factory=list)
    transfers: list = field(default_factory=list)
    waits: list = field(default_factory=list)
    is_idle: bool = False
    shape: object = None
    evictions: list = field(default_factory=list)
    tier: list = field(default_factory=list)

    def of(self, kind):
        """The transfers of one kind."""
        return [transfer for transfer in self.transfers if transfer.kind == kind]


# vLLM 0.15 has no such class, and no way to send one. There the report travels inside the statistics.
WorkerMetadata = getattr(base, "KVConnectorWorkerMetadata", object)


@dataclass
class WorkerReport(WorkerMetadata):
    """Workers to scheduler: what ended since the last report, in how many ranks, and which blocks failed.

    Attributes
    ----------
    ended : dict
        (kind, number) of a transfer, or of a chunk that is registered -> ranks.
    bad : dict
        (kind, number) of a transfer -> set of slots whose block at least one of these ranks could not move; of a chunk
        -> its last slots, if a rank (a stage with larger blocks) does not have them. No entry if there are no such
        slots.
    is_refusal : bool
        The rank's pool is not the one that the scheduler counts on; the rank keeps nothing.
    tier_slots : tuple of int
        How many ranks have opened their store, and the slots of the smallest store.
    moved : dict
        Number of a `TierTransfer` that is over -> (ranks, `Moved`).
    found : dict
        First of a range of `RANGE_SLOTS` tier slots that was read -> (ranks, the `Found` that all of them have).
    has_more : bool
        Some rank has read more ranges than it reported.
    tier_space : bytes
        The namespace of rank 0's store on a server, once the store is open.
    """

    ended: dict = field(default_factory=dict)
    bad: dict = field(default_factory=dict)
    is_refusal: bool = False
    tier_slots: tuple = (0, 0)
    moved: dict = field(default_factory=dict)
    found: dict = field(default_factory=dict)
    has_more: bool = False
    tier_space: bytes = b""

    def add(self, kind, number, bad=()):
        """Add that a transfer or chunk ended in one rank, except for the blocks in the slots `bad`."""
        name, bad = (kind, number), {int(slot) for slot in bad}
        self.aggregate(WorkerReport({name: 1}, {name: bad} if bad else {}))

    def aggregate(self, other):
        for name, ranks in other.ended.items():
            self.ended[name] = self.ended.get(name, 0) + ranks
        for name, slots in other.bad.items():
            self.bad[name] = self.bad.get(name, set()) | slots
        self.is_refusal |= other.is_refusal
        ranks, fewest = other.tier_slots
        if ranks:
            self.tier_slots = self.tier_slots[0] + ranks, min(fewest, self.tier_slots[1] or fewest)
        for number, told in other.moved.items():
            self.moved[number] = merged(self.moved.get(number), told)
        for first, told in other.found.items():
            self.found[first] = merged(self.found.get(first), told)
        self.has_more |= other.has_more
        self.tier_space = self.tier_space or other.tier_space
        return self

    def is_empty(self):
        """Whether there is nothing to report."""
        return self == WorkerReport()


def merged(one, other):
    """Merge two pairs (ranks, what they report); the first may be None."""
    return other if one is None else (one[0] + other[0], one[1].merge(other[1]))
