"""Which blocks are written to a tier, and which are worth reading back: pure arithmetic; the clock is an argument.

The engine and vLLM's scheduler use it. Replay uses it too, with a clock that counts bytes.
"""

import time

BURST_S = 10
IDLE_S = 1


class WriteBudget:
    """A credit of bytes that may be written: it grows with time, and a save that is admitted spends of it.

    Parameters
    ----------
    bytes_per_s : float
        0: no limit.
    clock : callable, default time.monotonic
        Returns seconds.
    burst_s : float, default 10
        How many seconds of credit there are at the start, and at the most.

    Notes
    -----
    It has no lock, so that a signal handler may save, too. If two threads spend within the same microsecond, the credit
    may be reduced once only.
    """

    def __init__(self, bytes_per_s, clock=time.monotonic, burst_s=BURST_S):
        self.bytes_per_s, self._burst_s = bytes_per_s, burst_s
        self.pace(clock)

    def pace(self, clock):
        """Start again with a full credit, by another clock."""
        self._clock, self._most = clock, self.bytes_per_s * self._burst_s
        self._credit, self._at_s = self._most, clock()
        self._full_since_s = self._at_s

    def admit(self, num_blocks, block_bytes):
        """Spend credit for as many of these blocks as it allows; return how many."""
        if not self.bytes_per_s:
            return num_blocks
        self._accrue()
        admitted = int(min(num_blocks, max(0, self._credit) // block_bytes))
        self.spend(admitted * block_bytes)
        return admitted

    def spend(self, nbytes):
        """Spend, even if the credit gets negative."""
        if nbytes and self.bytes_per_s:
            self._credit -= nbytes
            self._full_since_s = None

    def give_back(self, nbytes):
        """Return what was spent for blocks that were not written after all."""
        self._credit = min(self._most, self._credit + nbytes)

    def is_idle(self):
        """Whether the credit has been full for a second."""
        now_s = self._accrue()
        return self._full_since_s is not None and now_s - self._full_since_s >= IDLE_S

    def _accrue(self):
        now_s = self._clock()
        if self._full_since_s is None:
            missing_s = (self._most - self._credit) / self.bytes_per_s
            elapsed_s = now_s - self._at_s
            if elapsed_s >= missing_s:
                self._full_since_s = self._at_s + missing_s
            self._credit = min(self._most, self._credit + elapsed_s * self.bytes_per_s)
        self._at_s = now_s
        return now_s


class BreakEven:
    """Decide whether reading blocks back takes less time than computing them again.

    Parameters
    ----------
    blocks_per_s : float
        How fast the model computes; 0: not known, and all blocks are read back.
    """

    FORGOTTEN_S = 60  # age of a measured rate after which it counts as unknown, so that a slow tier is tried again

    def __init__(self, blocks_per_s):
        self.blocks_per_s = blocks_per_s
        self._bytes_per_s, self._at_s = None, 0

    def measured(self, nbytes, seconds, now_s):
        """Take note that reading `nbytes` took `seconds`."""
        rate = nbytes / max(seconds, 1e-9)
        known = self._bytes_per_s if self._bytes_per_s and now_s - self._at_s < self.FORGOTTEN_S else rate
        self._bytes_per_s, self._at_s = 0.75 * known + 0.25 * rate, now_s

    def is_known(self, now_s):
        """Whether the rates of the model and of the tier are known, the tier's from the last minute."""
        return bool(self.blocks_per_s and self._bytes_per_s) and now_s - self._at_s < self.FORGOTTEN_S

    def pays(self, num_blocks, nbytes, now_s):
        """Whether to read these blocks; `nbytes` is their size and that of all reads that wait before them."""
        if not self.is_known(now_s):
            return True
        return nbytes / self._bytes_per_s <= num_blocks / self.blocks_per_s

    def saved_s(self, num_blocks):
        """Return how long computing these blocks would take; 0 if that is not known."""
        return num_blocks / self.blocks_per_s if self.blocks_per_s else 0.0
