"""The store of a remote tier beside its bare client: `python -m bench.remote URL`, a minute or so for each depth.

Both move the same values between the same buffers, in turn, by as many threads; only the store computes and verifies
checksums. A round writes or reads every value once, and what was read is compared with what was written. With several
blocks to an object, each value has the records of so many. Beside them, in the same rounds: `redis-benchmark`, where it
can reach the server; on a folder, the store of a disk tier in it.

On a folder the bare client is obstore, which reads into memory of its own, and that is copied into the buffer.
"""

import argparse
import contextlib
import csv
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvortex import DiskTier, PinnedPool
from kvortex.slots import PAGE_BYTES, stride_bytes
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.remote import tier_at
from kvortex.tiers.remote.objects import ObjectClient
from kvortex.tiers.remote.view import objects_of

TAG, SPACE = bytes(32), bytes(range(32))
LONGEST_S = 20  # that `redis-benchmark` may take
PUT_OR_GET = {"write": "put", "read": "get"}


class Sides:
    """A store and its client over one pool, whose slots all hold random blocks, `joined` to a value, and what else
    there is beside them."""

    def __init__(self, tier, payload_bytes, num_blocks, depth, joined):
        stride = stride_bytes(payload_bytes, PAGE_BYTES)
        self.pool = PinnedPool(num_blocks * stride, payload_bytes, "host", header_bytes=PAGE_BYTES)
        self.pool.wait_ready(60_000)
        self.store = tier.open_store(self.pool, namespace=SPACE)
        self.payload_bytes, self.num_blocks, self.depth = payload_bytes, num_blocks, depth
        rng = np.random.default_rng(1)
        self.content = rng.integers(0, 256, (num_blocks, payload_bytes), np.uint8)
        self.keys = rng.integers(0, 256, (num_blocks, 32), np.uint8)
        self.objects = None if joined == 1 else objects_of(self.keys.reshape(-1, joined, 32))
        self.last_keys, self.joined = self.keys[joined - 1 :: joined], joined
        self.names = [f"{name}-bare" for name in self.store.names.of(self.last_keys, TAG, joined)]
        whole = memoryview(self.pool)
        records = [whole[i * stride : i * stride + PAGE_BYTES + payload_bytes] for i in range(num_blocks)]
        self.values = [records[i : i + joined] for i in range(0, num_blocks, joined)] if joined > 1 else records
        self.threads, self.ends = ThreadPoolExecutor(depth), contextlib.ExitStack()
        self.sides = {"store": self.ours, "client": self.bare, **self.others(tier)}

    def others(self, tier):
        """By name: what else moves as many values, and returns its rate or None."""
        parts = urllib.parse.urlsplit(tier.url)
        if parts.scheme == "file":
            shared = Path(urllib.parse.unquote(parts.path))
            shared.mkdir(parents=True, exist_ok=True)
            folder = self.ends.enter_context(tempfile.TemporaryDirectory(dir=shared))
            quota = self.num_blocks * (self.pool.stride_bytes + 128) + (64 << 20)
            settings = DiskTier(folder, quota, num_threads=self.depth, segment_bytes=quota)
            disk = self.ends.enter_context(settings.open(self.pool, namespace=SPACE))
            disk.adoption.wait()
            return {"disk tier": lambda verb: self.move(disk.store, verb)}
        if parts.scheme not in ("redis", "valkey", "unix") or parts.username or not shutil.which("redis-benchmark"):
            return {}
        at = ["-s", parts.path] if parts.scheme == "unix" else ["-h", parts.hostname, "-p", str(parts.port or 6379)]
        number = ["-c", str(self.depth), "-n", str(len(self.values))]
        nbytes = self.joined * (PAGE_BYTES + self.payload_bytes)
        command = ["redis-benchmark", *at, *number, "-d", str(nbytes), "--csv", "-t"]
        self.ends.callback(self.store.client.delete, "key:__rand_int__")  # what it calls its value

        def run(verb):
            test = {"write": "set", "read": "get"}[verb]
            try:
                done = subprocess.run([*command, test], check=True, capture_output=True, text=True, timeout=LONGEST_S)
            except subprocess.SubprocessError as error:  # without a server it would try for ever
                sys.exit(str(error))
            lines = done.stdout.splitlines()
            (row,) = csv.DictReader(lines)
            return float(row["rps"]) * self.joined * self.payload_bytes / 1e9

        return {"redis-benchmark": run}

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
        self.move(self.store, verb, **({} if self.objects is None else {"objects": self.objects}))

    def move(self, store, verb, **more):
        slots = range(self.num_blocks)
        call = store.put if verb == "write" else store.get
        batch = call(slots, slots, self.keys, self.payload_bytes, tag=TAG, timeout_ms=600_000, **more)
        is_over = False
        while not is_over:
            is_over, statuses = batch.done(), batch.wait(1000)
            # The first that fails is enough: each of the others may take as long.
            if bad := set(statuses.tolist()) - {BlockStatus.OK, BlockStatus.PENDING}:
                sys.exit(f"{verb}: {BlockStatus(max(bad)).name}, {store.stats()['last_error']}")

    def require_answer(self):
        try:
            self.store.client.sizes(self.names[:1], True)
        except Exception as error:
            sys.exit(f"the server does not answer: {error}")

    def bare(self, verb):
        client = self.store.client
        call = getattr(ObjectClient if isinstance(client, ObjectClient) else type(client), PUT_OR_GET[verb])
        list(self.threads.map(lambda name, value: call(client, name, value), self.names, self.values))

    def close(self):
        for name in self.names:
            self.store.client.delete(name)
        self.store.delete(self.last_keys, TAG, timeout_ms=60_000, counts=self.joined).wait()
        self.ends.close()
        self.threads.shutdown()
        del self.values
        self.store.close()
        self.pool.close()


def measure(sides, rounds):
    """For each verb: GB/s of each side, and the median of the ratios of store and client, round by round."""
    for verb in PUT_OR_GET:
        rates = {name: [] for name in sides.sides}
        for round_ in range(rounds + 1):  # the first one warms up
            for name in list(rates)[:: 1 if round_ % 2 else -1]:
                sides.fill() if verb == "write" else sides.wipe()
                begun = time.perf_counter()
                rate = sides.sides[name](verb)
                seconds = time.perf_counter() - begun
                if rate is None:
                    rate = sides.num_blocks * sides.payload_bytes / seconds / 1e9
                    if verb == "read":
                        sides.check()
                if round_:
                    rates[name].append(rate)
        ratios = [ours / bare for ours, bare in zip(rates["store"], rates["client"], strict=True)]
        yield verb, {name: statistics.median(each) for name, each in rates.items()}, statistics.median(ratios)


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

    options = {name: getattr(args, name) for name in ("endpoint", "region") if getattr(args, name)}
    rows = []
    for depth, joined in itertools.product(*(map(int, each.split(",")) for each in (args.depths, args.joined))):
        tier, num_values = tier_at(args.url, options, num_threads=depth), args.blocks // joined
        sides = Sides(tier, int(args.mib * (1 << 20)), num_values * joined, depth, joined)
        sides.require_answer()
        if not rows:
            names = "  ".join(f"{name} GB/s" for name in sides.sides)
            print(f"{'depth':>5} {'joined':>6} {'values':>6} {'verb':<6} {'ratio':>6}  {names}")
        for verb, rates, ratio in measure(sides, args.rounds):
            cells = "  ".join(f"{rate:>{len(name) + 5}.2f}" for name, rate in rates.items())
            print(f"{depth:>5} {joined:>6} {num_values:>6} {verb:<6} {ratio:>6.2f}  {cells}", flush=True)
            named = {f"{name.replace(' ', '_').replace('-', '_')}_gbps": rate for name, rate in rates.items()}
            row = {"depth": depth, "joined": joined, "values": num_values, "verb": verb}
            rows.append({**row, "ratio": ratio, **named})
        sides.close()
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"url": args.url, "mib": args.mib, "blocks": args.blocks, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
