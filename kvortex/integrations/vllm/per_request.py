"""What a client may ask for one request: ``kv_transfer_params={"kvortex": {...}}``."""

import logging
import math
import time
from dataclasses import dataclass, fields, replace

from kvortex import ConfigError
from kvortex.config import nearest
from kvortex.index import NO_SLOT
from kvortex.integrations.vllm.keys import as_bytes
from kvortex.log import Guarded

logger = Guarded(logging.getLogger("vllm.kvortex"))
MOST_PIN_S = 10**9


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What KVortex may do for a request.

    Parameters
    ----------
    save : bool, default True
        Keep its blocks.
    load : bool, default True
        Look for its blocks in host memory.
    max_save_tokens : int, optional
        How many of its tokens, from the first on, are kept.
    pin_s : float, default 0
        Seconds after its end in which its blocks are not evicted, as far as there is room for such pins.
    """

    save: bool = True
    load: bool = True
    max_save_tokens: int | None = None
    pin_s: float = 0

    @classmethod
    def parse(cls, given):
        """Wishes from the dictionary of a request.

        Raises
        ------
        ConfigError
            An unknown name (with the nearest known one), or a value of the wrong type.
        """
        if not isinstance(given, dict):
            raise ConfigError(f"kv_transfer_params has {given!r} for kvortex, and must have a dictionary")
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known:
                near = nearest(str(name), known)
                hint = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
                raise ConfigError(f"kv_transfer_params has an unknown name {name!r} for kvortex; {hint}")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in ("save", "load") and not isinstance(value, bool):
                raise ConfigError(f"{name} must be true or false, got {value!r}")
            if name == "max_save_tokens" and not (is_number and isinstance(value, int) and value >= 0):
                raise ConfigError(f"max_save_tokens must be a whole number, 0 or more, got {value!r}")
            if name == "pin_s" and not (is_number and 0 <= value <= MOST_PIN_S):
                raise ConfigError(f"pin_s must be a number of seconds, 0 to {MOST_PIN_S}, got {value!r}")
        return cls(**given)


EVERYTHING, NOTHING = Wishes(), Wishes(save=False, load=False)


def wishes_of(request, role=EVERYTHING):
    """The wishes of a request, without what the server's `role` forbids.

    If a name or value is wrong, nothing is done for the request, and the log says why.
    """
    given = request.kv_transfer_params
    if not isinstance(given, dict) or "kvortex" not in given:
        return role
    try:
        wishes = Wishes.parse(given["kvortex"])
        return replace(wishes, save=wishes.save and role.save, load=wishes.load and role.load)
    except ConfigError as error:  # to raise it in a scheduler would end the engine
        logger.warning("KVortex does nothing for request %s: %s", request.request_id, error)
        return NOTHING


class Pins:
    """Keep blocks of requests that are over from being evicted, for a time.

    Parameters
    ----------
    index : BlockIndex
        Pins for requests hold at most a quarter of its blocks; `blocks_refused` counts the blocks beyond that.
    """

    def __init__(self, index):
        self.index = index
        self.count = self.blocks_refused = 0
        self.pinned, self.waiting = [], []  # of (end time, slots), and of (end time, keys)

    @property
    def most(self):
        """Most blocks that may be pinned. Of a pipeline, the stage with the fewest slots decides."""
        return self.index.slots_added // 4

    def want(self, keys, seconds, writing):
        """Pin the blocks with these keys for `seconds` from now on, as soon as none of them is in the set `writing`."""
        self.waiting.append((time.monotonic() + seconds, keys))
        self.pin_what_is_written(writing)

    def pin_what_is_written(self, writing):
        """Pin what waited for saves that are over now."""
        waiting, self.waiting = self.waiting, []
        for until, keys in waiting:
            if writing.isdisjoint(as_bytes(keys)):
                self.pin(keys, until)
            else:
                self.waiting.append((until, keys))

    def pin(self, keys, until):
        """Pin those of these blocks that are in the index, from the first one on."""
        slots = self.index.acquire(keys[: self.most - self.count], gaps=True)
        self.blocks_refused += len(keys) - len(slots)
        slots = slots[slots != NO_SLOT]
        if len(slots):
            self.count += len(slots)
            self.pinned.append((until, slots))

    def end(self, every=False):
        """End the pins whose time has come, or every one."""
        now = math.inf if every else time.monotonic()
        self.waiting = [] if every else self.waiting
        over = [slots for end, slots in self.pinned if end <= now]
        self.pinned = [(end, slots) for end, slots in self.pinned if end > now]
        for slots in over:
            self.count -= len(slots)
            self.index.release(slots)
