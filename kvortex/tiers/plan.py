"""What is written to a tier, and what is worth bringing back: pure arithmetic, with a clock that is an argument.

The engine and vLLM's scheduler decide by it, and replay drives it by bytes.
"""

import time

BURST_S = 10
IDLE_S = 1


class WriteBudget:
    """How much may be written, spent when a save is admitted.

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
    Without a lock, so that a signal handler may save, too: of two threads that spend within the same microsecond one
    may do so for nothing.
    """

    def __init__(self, bytes_per_s, clock=time.monotonic, burst_s=BURST_S):
        self.bytes_per_s, self._burst_s = bytes_per_s, burst_s
        self.pace(clock)

    def pace(self, clock):
        """Begin anew, by another clock."""
        self._clock, self._most = clock, self.bytes_per_s * self._burst_s
        self._credit, self._at_s = self._most, clock()
        self._full_since_s = self._at_s

    def admit(self, num_blocks, block_bytes):
        """Spend what so many blocks take, as far as the credit goes; return how many blocks that is."""
        if not self.bytes_per_s:
            return num_blocks
        self._accrue()
        admitted = int(min(num_blocks, max(0, self._credit) // block_bytes))
        self.spend(admitted * block_bytes)
        return admitted

    def spend(self, nbytes):
        """Spend, beyond the credit too."""
        if nbytes and self.bytes_per_s:
            self._credit -= nbytes
            self._full_since_s = None

    def give_back(self, nbytes):
        """What was spent in vain."""
        self._credit = min(self._most, self._credit + nbytes)

    def is_idle(self):
        """Whether nothing has been spent for so long that the credit has been full for a second."""
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
    """Whether bringing blocks back takes less time than computing them again.

    Parameters
    ----------
    blocks_per_s : float
        What the model computes; 0: not known, and everything is brought back.
    """

    FORGOTTEN_S = 60  # a tier that was slow is tried again

    def __init__(self, blocks_per_s):
        self.blocks_per_s = blocks_per_s
        self._bytes_per_s, self._at_s = None, 0

    def measured(self, nbytes, seconds, now_s):
        """So many bytes came in so long."""
        rate = nbytes / max(seconds, 1e-9)
        known = self._bytes_per_s if self._bytes_per_s and now_s - self._at_s < self.FORGOTTEN_S else rate
        self._bytes_per_s, self._at_s = 0.75 * known + 0.25 * rate, now_s

    def is_known(self, now_s):
        """Whether both are known, and lately, what the model computes and what the tier brings."""
        return bool(self.blocks_per_s and self._bytes_per_s) and now_s - self._at_s < self.FORGOTTEN_S

    def pays(self, num_blocks, nbytes, now_s):
        """Whether to bring so many blocks, which with what waits before them are so many bytes."""
        if not self.is_known(now_s):
            return True
        return nbytes / self._bytes_per_s <= num_blocks / self.blocks_per_s

    def saved_s(self, num_blocks):
        """How long so many blocks would have taken to compute; 0 where that is not known."""
        return num_blocks / self.blocks_per_s if self.blocks_per_s else 0.0
