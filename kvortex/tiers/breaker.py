"""The breaker: a tier that does not answer, or answers with errors only, is not used for a while."""

import logging

import numpy as np

from kvortex.log import log
from kvortex.tiers.base import BlockStatus

FAILURES = 3  # batches in a row
SHORTEST_S, LONGEST_S = 1, 60
NOT_THE_TIERS = (
    BlockStatus.DROPPED, BlockStatus.READ_ONLY, BlockStatus.NO_SPACE, BlockStatus.PENDING, BlockStatus.TOO_LARGE,
)  # fmt: skip


class Breaker:
    """Count batches that went wrong; after three in a row the tier is suspended, for longer each time.

    A batch went wrong if a block was late; or if no block succeeded, and at least one met an error of the device.
    """

    def __init__(self, name):
        self.name, self.suspensions = name, 0
        self._failures, self._pause_s, self._until_s = 0, SHORTEST_S, 0.0

    def allows(self, now_s):
        """Whether the tier may be used. After a pause it may; if the next batch goes wrong, the next pause begins."""
        return now_s >= self._until_s

    def saw(self, statuses, now_s):
        """Count a batch whose blocks ended with these statuses."""
        statuses = np.asarray(statuses)
        if (statuses == BlockStatus.LATE).any():
            went_wrong = True
        elif (
            statuses < BlockStatus.LATE
        ).any():  # blocks that were moved, or whose records say what is wrong with them
            went_wrong = False
        else:
            went_wrong = (~np.isin(statuses, NOT_THE_TIERS)).any()
            if not went_wrong:
                return
        if not went_wrong:
            self._failures, self._pause_s = 0, SHORTEST_S
            return
        self._failures += 1
        if self._failures >= FAILURES and self.allows(now_s):
            self._until_s = now_s + self._pause_s
            self.suspensions += 1
            log(
                logging.WARNING,
                "tier_suspended",
                "a tier is late or fails, so it is not used for a while; its blocks count as missing",
                tier=self.name,
                seconds=self._pause_s,
            )
            self._pause_s = min(2 * self._pause_s, LONGEST_S)
