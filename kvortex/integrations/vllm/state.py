"""What the scheduler's half knows of requests and of transfers."""

from dataclasses import dataclass, field

import numpy as np

from kvortex.integrations.vllm.messages import Transfer
from kvortex.integrations.vllm.per_request import EVERYTHING, Wishes


@dataclass
class RequestState:
    """A request that has device blocks."""

    request: object  # vLLM's, for its block hashes, which grow
    tables: list = field(default_factory=list)  # device blocks, a list for each of vLLM's groups; 0: none
    left: dict = field(default_factory=dict)  # group -> blocks at the head of its table that the request has no longer
    num_blocks: int = 0  # device blocks that it has
    offered_tokens: int = 0  # of the leading blocks that were offered to the index
    computed_tokens: int = 0  # before the last step in which it was scheduled
    loaded_tokens: int = 0  # of the leading blocks that were in the index when it loaded the last of them
    wishes: Wishes = EVERYTHING
    most_saved_tokens: int = 1 << 60
    last_save: int = 0  # the last transfer that saves blocks of it
    num_seen: int | None = None  # of its hashes, those that count as seen; None: they are not counted
    boundaries: tuple = ()  # lengths of hits to be expected
    stop: bytes | None = None  # key of the least recently used of its blocks in the index; None: none is there
    is_cut: bool = False  # blocks that it offered are not in the index: what it saves behind them nobody finds
    outdated: bool = False  # computed, or being loaded, at a reset: its blocks must not be kept
    num_preemptions: int = -1  # when it was admitted
    load_failed: bool = False  # and it has no device blocks since

    @property
    def keeps_nothing(self):
        """Whether none of what it computes is worth keeping."""
        return self.outdated or self.is_cut or not self.wishes.save or is_session(self.request)


@dataclass
class Offer:
    """What a request may have saved in a step."""

    state: RequestState
    offered_tokens: int  # before
    parts: list = field(default_factory=list)  # of (group, number of the first block, device blocks), by group


@dataclass
class InFlight:
    """A transfer that not every rank has reported yet."""

    transfer: Transfer
    keys: np.ndarray  # of the blocks
    held: np.ndarray | tuple = ()  # device blocks that nobody else may have until it is over
    ranks: int = 0
    bad: set = field(default_factory=set)  # slots whose block one rank could not move


def is_session(request):
    """Whether a request is a streaming session: up to vLLM 0.31 its hashes keep a token that it drops."""
    return getattr(request, "resumable", False)
