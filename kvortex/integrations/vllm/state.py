"""What the scheduler's half knows of requests and of transfers."""

from dataclasses import dataclass, field

import numpy as np

from kvortex.integrations.vllm.messages import Transfer
from kvortex.integrations.vllm.per_request import EVERYTHING, Wishes


@dataclass
class RequestState:
    """A request that has device blocks."""

    request: object  # vLLM's request, for its block hashes (which grow)
    tables: list = field(default_factory=list)  # device blocks, a list for each of vLLM's groups; 0: none
    left: dict = field(default_factory=dict)  # group -> how many blocks at the head of its table the request has lost
    num_blocks: int = 0  # device blocks that it has
    offered_tokens: int = 0  # tokens of the leading blocks that were offered to the index
    computed_tokens: int = 0  # computed tokens before the last step that scheduled it
    loaded_tokens: int = 0  # tokens of the leading blocks that it found in the index when it loaded
    wishes: Wishes = EVERYTHING
    most_saved_tokens: int = 1 << 60
    last_save: int = 0  # number of the last transfer that saves blocks of it
    num_seen: int | None = None  # how many of its hashes were counted as seen; None: none are counted
    boundaries: tuple = ()  # where hits of later requests will probably end
    stop: bytes | None = None  # key of its least recently used block in the index; None: there is none
    is_cut: bool = False  # an offered block is not in the index: no hit reaches the blocks behind it
    outdated: bool = False  # it had computed tokens, or a load, at a reset: its blocks must not be kept
    num_preemptions: int = -1  # vLLM's count when the request was admitted
    load_failed: bool = False  # it has had no device blocks since then

    @property
    def keeps_nothing(self):
        """Whether none of what it computes is worth keeping."""
        return self.outdated or self.is_cut or not self.wishes.save or is_session(self.request)


@dataclass
class Offer:
    """The blocks of a request that may be saved in a step."""

    state: RequestState
    offered_tokens: int  # `offered_tokens` of the state before this offer
    parts: list = field(default_factory=list)  # of (group, number of the first block, device blocks), by group


@dataclass
class InFlight:
    """A transfer that not every rank has reported yet."""

    transfer: Transfer
    keys: np.ndarray  # of the blocks
    held: np.ndarray | tuple = ()  # device blocks that vLLM must not reuse until it is over
    ranks: int = 0
    bad: set = field(default_factory=set)  # slots whose block one rank could not move


def is_session(request):
    """Whether a request is a streaming session. Up to vLLM 0.31, its hashes keep a token that the session drops."""
    return getattr(request, "resumable", False)
