"""The index: which slot holds which block."""

from kvortex.index._block_index import NO_SLOT, BlockIndex, CommitStatus, ReserveStatus

__all__ = ["NO_SLOT", "BlockIndex", "CommitStatus", "ReserveStatus"]
