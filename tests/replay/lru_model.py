"""What a replay must find, told by 30 lines that share nothing with the engine."""

from collections import OrderedDict
from dataclasses import dataclass


@dataclass
class Found:
    touched: int = 0
    loaded: int = 0
    saved: int = 0
    evicted: int = 0
    tokens: int = 0
    tokens_loaded: int = 0


def simulate(requests, pool_blocks):
    """Replay (input_length, ids) pairs, one at a time, through a pool of so many blocks."""
    cache, found = OrderedDict(), Found()
    for input_length, ids in requests:
        leading = 0
        while leading < len(ids) and ids[leading] in cache:
            leading += 1
        found.touched += len(ids)
        found.loaded += leading
        found.tokens += input_length
        found.tokens_loaded += min(512 * leading, input_length)
        for key in reversed(ids[:leading]):  # the load used them
            cache.move_to_end(key)
        new = []
        for key in ids[leading:]:
            if key in cache or key in new:
                continue
            if len(cache) + len(new) == pool_blocks:
                if not cache:  # everything is being written: no room
                    continue
                cache.popitem(last=False)
                found.evicted += 1
            new.append(key)
        found.saved += len(new)
        for key in reversed(new):
            cache[key] = True
        for key in reversed(ids):
            if key in cache:
                cache.move_to_end(key)
    return found
