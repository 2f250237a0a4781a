"""What of a trace is found on the device, in host memory or not at all, by the moment at which blocks are saved.

    python -m bench.saving TRACE --device 1000 --host 1000,3000,10000

The device's prefix cache and the host's are two indexes, which forget what was least recently used. A request finds a
leading run on the device, and what host memory has of the rest in one run; all its blocks are on the device afterwards.
`at once` saves every block then, `after N hits` those that N requests had before, `on evict` what the device forgets.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from kvortex import BlockIndex, ReserveStatus
from kvortex.integrations.vllm.sights import KEYS_PER_SLOT, Sights
from kvortex.replay import read_trace

ROWS = {"at once": 0, "after 1 hit": 1, "after 2 hits": 2, "on evict": None}


class Cache:
    """An index of so many blocks."""

    def __init__(self, num_blocks):
        self.index = BlockIndex(num_blocks)
        self.index.add_slots(0, num_blocks)

    def run(self, keys):
        """How many of these are there, up to the first that is not."""
        return self.index.lookup(keys, touch=False)[1]

    def put(self, keys):
        """Put them in, the first ones last; how many were new, and the keys of what went for them, the oldest first."""
        slots, statuses, victims = self.index.reserve(keys, 1, victims=True)
        new = slots[statuses == ReserveStatus.NEW]
        self.index.commit(new)
        self.index.touch(keys)
        return len(new), victims.keys


def replay(requests, device_blocks, host_blocks, hits):
    """Blocks that requests found on the device, and in host memory, and blocks that were saved."""
    device, host = Cache(device_blocks), Cache(host_blocks)
    sights = Sights(KEYS_PER_SLOT * host_blocks) if hits else None
    found = np.zeros(3, dtype=np.int64)
    for request in requests:
        keys = request.keys()
        of_device = device.run(keys)
        of_host = host.run(keys[of_device:])
        host.index.touch(keys)
        num_worth = sights.run(keys, hits) if sights else len(keys)
        _, evicted = device.put(keys)
        saved, _ = host.put(np.ascontiguousarray(evicted[::-1]) if hits is None else keys[:num_worth])
        found += of_device, of_host, saved
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--device", type=int, default=1000, help="blocks on the device (1000)")
    parser.add_argument("--host", default="1000,3000,10000", help="blocks in host memory (1000,3000,10000)")
    options = parser.parse_args(argv)
    requests = list(read_trace([options.trace]))
    most = max(len(request.hash_ids) for request in requests)
    if most > options.device:
        sys.exit(f"a request has {most} blocks, and the device {options.device}: vLLM would not serve it")
    touched = sum(len(request.hash_ids) for request in requests)
    sizes = [min(int(size), max(1, touched)) for size in options.host.split(",")]  # more slots would only take memory
    options.device = min(options.device, max(1, touched))
    print(f"{len(requests)} requests, {touched} blocks, {options.device} on the device")
    print("| saved |" + "".join(f" {size} blocks: found | saved |" for size in sizes))
    print("|---|" + "---|---|" * len(sizes))
    for name, hits in ROWS.items():
        row = f"| {name} |"
        for size in sizes:
            of_device, of_host, saved = replay(requests, options.device, size, hits)
            row += f" {100 * (of_device + of_host) / touched:.1f} % | {saved} |"
        print(row, flush=True)


if __name__ == "__main__":
    sys.exit(main())
