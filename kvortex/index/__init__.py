"""The index: which slot holds which block."""

from kvortex.index._block_index import NO_SLOT, BlockFact, BlockIndex, Blocks, CommitStatus, ReserveStatus

__all__ = ["NO_SLOT", "BlockFact", "BlockIndex", "Blocks", "CommitStatus", "ReserveStatus"]
