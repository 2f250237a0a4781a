"""The store of a remote tier beside its bare client: `python -m bench.remote URL`, a minute or so for each depth.

Both move the same values between the same buffers, in turn, by as many threads; only the store computes and verifies
checksums. A round writes or reads every value once, and what was read is compared with what was written. With several
blocks to an object, each value has the records of so many.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvortex import ObjectTier, PinnedPool, RedisTier
from kvortex.slots import PAGE_BYTES, stride_bytes
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.remote.view import objects_of

TAG, SPACE = bytes(32), bytes(range(32))


class Sides:
    """A store and its client over one pool, whose slots all hold random blocks, `joined` to a value."""

    def __init__(self, tier, payload_bytes, num_blocks, depth, joined):
        stride = stride_bytes(payload_bytes, PAGE_BYTES)
        self.pool = PinnedPool(num_blocks * stride, payload_bytes, "host", header_bytes=PAGE_BYTES)
        self.pool.wait_ready(60_000)
        self.store = tier(depth).open_store(self.pool, namespace=SPACE)
        self.payload_bytes, self.num_blocks = payload_bytes, num_blocks
        rng = np.random.default_rng(1)
        self.content = rng.integers(0, 256, (num_blocks, payload_bytes), np.uint8)
        self.keys = rng.integers(0, 256, (num_blocks, 32), np.uint8)
        self.objects = None if joined == 1 else objects_of(self.keys.reshape(-1, joined, 32))
        self.last_keys, self.joined = self.keys[joined - 1 :: joined], joined
        self.names = [f"{name}-bare" for name in self.store.names.of(self.last_keys, TAG, joined)]
        whole = memoryview(self.pool)
        records = [whole[i * stride : i * stride + PAGE_BYTES + payload_bytes] for i in range(num_blocks)]
        self.values = [records[i : i + joined] for i in range(0, num_blocks, joined)] if joined > 1 else records
        self.threads = ThreadPoolExecutor(depth)

    def fill(self):
        for i in range(self.num_blocks):
            self.pool.view(i)[:] = self.content[i]

    def wipe(self):
        for i in range(self.num_blocks):
            self.pool.view(i)[:] = bytes(self.payload_bytes)

    def check(self):
        for i in range(self.num_blocks):
            if not np.array_equal(np.frombuffer(self.pool.view(i), np.uint8), self.content[i]):
                sys.exit(f"block {i} is not what was written")

    def ours(self, verb):
        slots = range(self.num_blocks)
        call = self.store.put if verb == "write" else self.store.get
        more = {} if self.objects is None else {"objects": self.objects}
        statuses = call(slots, slots, self.keys, self.payload_bytes, tag=TAG, timeout_ms=600_000, **more).wait()
        if (statuses != BlockStatus.OK).any():
            sys.exit(f"{verb}: {BlockStatus(statuses.max()).name}, {self.store.stats()['last_error']}")

    def bare(self, verb):
        call = self.store.client.put if verb == "write" else self.store.client.get
        list(self.threads.map(call, self.names, self.values))

    def close(self):
        for name in self.names:
            self.store.client.delete(name)
        self.store.delete(self.last_keys, TAG, timeout_ms=60_000, counts=self.joined).wait()
        self.threads.shutdown()
        del self.values
        self.store.close()
        self.pool.close()


def measure(sides, rounds):
    """Rows of verb, GB/s of store and client, and the median of their ratios, round by round."""
    for verb in ("write", "read"):
        rates = {"ours": [], "bare": []}
        for round_ in range(rounds + 1):  # the first one warms up
            for name in ("ours", "bare") if round_ % 2 else ("bare", "ours"):
                sides.fill() if verb == "write" else sides.wipe()
                begun = time.perf_counter()
                getattr(sides, name)(verb)
                seconds = time.perf_counter() - begun
                if verb == "read":
                    sides.check()
                if round_:
                    rates[name].append(sides.num_blocks * sides.payload_bytes / seconds / 1e9)
        ratios = [ours / bare for ours, bare in zip(rates["ours"], rates["bare"], strict=True)]
        yield verb, statistics.median(rates["ours"]), statistics.median(rates["bare"]), statistics.median(ratios)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.remote", description=__doc__.partition("\n")[0],
        epilog="examples:\n  python -m bench.remote redis://127.0.0.1:6379\n  python -m bench.remote file:///mnt/shared/bench"
        "\n  python -m bench.remote s3://bucket/bench --endpoint http://127.0.0.1:7480 --region default --mib 4"
        "\n  python -m bench.remote file:///mnt/shared/bench --mib 0.25 --joined 1,16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("url", help="redis://, rediss://, unix://, s3://, gs://, az:// or file://")
    parser.add_argument("--endpoint", help="of an S3 server that is not Amazon's")
    parser.add_argument("--region", help="of the bucket")
    parser.add_argument("--mib", type=float, default=1, help="bytes of a block, in MiB (default 1)")
    parser.add_argument("--blocks", type=int, default=64, help="in a round (default 64)")
    parser.add_argument("--joined", default="1", help="blocks that share a value (default 1); a row for each of 1,16")
    parser.add_argument("--depths", default="1,8", help="values in flight (default 1,8)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each row (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()

    def tier(depth):
        if args.url.partition(":")[0] in ObjectTier.SCHEMES:
            return ObjectTier(args.url, endpoint=args.endpoint, region=args.region, num_threads=depth)
        return RedisTier(args.url, num_threads=depth)

    rows = []
    print(f"{'depth':>5} {'joined':>6} {'values':>6} {'verb':<6} {'store GB/s':>10} {'client GB/s':>11} {'ratio':>6}")
    for depth, joined in itertools.product(*(map(int, each.split(",")) for each in (args.depths, args.joined))):
        num_values = args.blocks // joined
        sides = Sides(tier, int(args.mib * (1 << 20)), num_values * joined, depth, joined)
        for verb, ours, bare, ratio in measure(sides, args.rounds):
            rates = f"{ours:>10.2f} {bare:>11.2f} {ratio:>6.2f}"
            print(f"{depth:>5} {joined:>6} {num_values:>6} {verb:<6} {rates}", flush=True)
            row = {"depth": depth, "joined": joined, "values": num_values, "verb": verb}
            rows.append({**row, "store_gbps": ours, "client_gbps": bare, "ratio": ratio})
        sides.close()
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"url": args.url, "mib": args.mib, "blocks": args.blocks, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
