"""Rank 4: movement between a device and pinned slots. It knows addresses and streams, never keys."""

from kvortex.transfer._carrier import Carrier
from kvortex.transfer._gather import gather_pays
from kvortex.transfer._job import Job
from kvortex.transfer._layout import KVLayout
from kvortex.transfer._packing import packed_block, packed_bytes, slot_block
from kvortex.transfer._probe import PlannerRow, probe_layout
from kvortex.transfer._signals import JobSignals
from kvortex.transfer._submitter import Submitter
from kvortex.transfer._transfer_queue import TransferQueue

__all__ = [
    "Carrier",
    "Job",
    "JobSignals",
    "KVLayout",
    "PlannerRow",
    "Submitter",
    "TransferQueue",
    "gather_pays",
    "packed_block",
    "packed_bytes",
    "probe_layout",
    "slot_block",
]
