"""The store of the disk tier beside fio, on the same file: `python -m bench.disk --path DIR`, about ten minutes.

Random slots of 1 and 2 MiB with their header page, read and written at depths 1, 8 and 16. Before each row every engine
of fio runs for a second, and the fastest then runs in turn with the store. Rates count headers on both sides; only the
store computes and verifies checksums. What was read last in a round is compared with what was written, and after the
rounds of a row every slot is written and compared once more.

fio's buffers lie on huge pages as the store's pool does, where enough are reserved (`sysctl vm.nr_hugepages=64`); else
both lie on pages of 4 KiB, because that decides more than all else. fio comes with Debian: `apt-get install fio`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvortex import PinnedPool
from kvortex.slots import PAGE_BYTES, stride_bytes
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.disk import DiskTier

MIB = 1 << 20
FIO_ENGINES = ("psync", "libaio", "io_uring")
BATCH, BATCHES = 16, 3  # blocks, as an engine moves them; two batches wait while one runs: there is always work
HUGE_PAGES = 64  # that fio's buffers need at the most
NAMES = {"tag": bytes(32), "timeout_ms": 600_000}
NOISE = np.random.default_rng(1).integers(0, 1 << 63, 2 * MIB // 8 + 512, np.uint64)


class Rate(NamedTuple):
    """What one side did in one round."""

    gbps: float
    cpu_us_per_mib: float


class Ours:
    """A store with a depth, and a file whose slots all hold blocks."""

    def __init__(self, path, payload_bytes, num_slots, depth, io, huge_pages):
        stride = stride_bytes(payload_bytes, PAGE_BYTES)
        self.payload_bytes, self.num_slots, self.stride, self.depth = payload_bytes, num_slots, stride, depth
        pool_bytes = BATCHES * BATCH * stride
        self.pool = PinnedPool(pool_bytes, payload_bytes, "host", header_bytes=PAGE_BYTES, huge_pages=huge_pages)
        self.pool.wait_ready(60_000)
        quota = num_slots * (stride + 128) + (64 << 20)
        tier = DiskTier(path, quota, num_threads=depth, segment_bytes=quota, io=io)
        self.tier = tier.open(self.pool, namespace=bytes(32))
        self.tier.adoption.wait()
        self.store = self.tier.store
        (self.file,) = Path(self.store.stats()["folders"][0]).glob("*.segment")
        self.keys = np.zeros((self.store.num_slots, 32), np.uint8)
        self.keys[:, :8] = np.arange(1, self.store.num_slots + 1, dtype="<u8").view(np.uint8).reshape(-1, 8)
        self._rng, self._order = np.random.default_rng(2), deque()

    def close(self):
        self.tier.close()
        self.pool.close()

    def content(self, slot):
        """Bytes that differ from those of every other slot in every page."""
        return NOISE[slot % 512 : slot % 512 + self.payload_bytes // 8] + np.uint64(slot)

    def submit(self, verb, number, slots):
        """Begin a batch in the pool slots of its number."""
        first = number % BATCHES * BATCH
        pool_slots = np.arange(first, first + len(slots))
        call = self.store.put if verb == "write" else self.store.get
        return call(slots, pool_slots, self.keys[slots], self.payload_bytes, **NAMES)

    def finish(self, batch):
        statuses = batch.wait()
        if (statuses != BlockStatus.OK).any():
            raise SystemExit(f"a block was answered {[BlockStatus(status).name for status in set(statuses)]}")

    def compare(self, number, slots):
        """End the run where a batch did not bring what these slots hold."""
        for i, slot in enumerate(slots):
            found = np.frombuffer(self.pool.view(number % BATCHES * BATCH + i), np.uint64)
            if not np.array_equal(found, self.content(slot)):
                raise SystemExit(f"slot {slot} holds another block")

    def fill(self):
        """Write every slot, then read and compare all."""
        groups = np.array_split(self._rng.permutation(self.num_slots), -(-self.num_slots // BATCH))
        for slots in groups:
            for i, slot in enumerate(slots):
                self.pool.view(i)[:] = self.content(slot).tobytes()
            self.finish(self.submit("write", 0, slots))
        for slots in groups:
            self.finish(self.submit("read", 0, slots))
            self.compare(0, slots)

    def run(self, verb, seconds):
        """Read or write random slots for so long."""
        running, number = deque(), 0
        start, cpu_s = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            if len(running) == BATCHES:
                self.finish(running.popleft()[0])
            if len(self._order) < BATCH:
                self._order.extend(self._rng.permutation(self.num_slots).tolist())
            slots = np.array([self._order.popleft() for _ in range(BATCH)])
            running.append((self.submit(verb, number, slots), number, slots))
            number += 1
        for batch, _, _ in running:
            self.finish(batch)
        elapsed_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_s
        if verb == "read":
            for _, number_of, slots in running:
                self.compare(number_of, slots)
        nbytes = number * BATCH * self.stride
        return Rate(nbytes / elapsed_s / 1e9, cpu_s * 1e6 / (nbytes / MIB))


def fio(ours, engine, verb, seconds, huge_pages):
    """Let fio do the same to the same slots; None where it cannot use this engine."""
    jobs, depth = (ours.depth, 1) if engine == "psync" else (1, ours.depth)
    command = [
        "fio", "--name=kvortex", f"--filename={ours.file}", f"--rw=rand{verb}", f"--bs={ours.stride}", "--direct=1",
        f"--offset={PAGE_BYTES}", f"--size={ours.num_slots * ours.stride}", f"--ioengine={engine}", f"--numjobs={jobs}",
        f"--iodepth={depth}", f"--iomem={'mmaphuge' if huge_pages else 'mmap'}", "--time_based", "--thread",
        f"--runtime={seconds}", "--group_reporting", "--norandommap", "--randrepeat=0", "--invalidate=0",
        "--fallocate=none", "--allow_file_create=0", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        return None
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    row = job[verb]
    busy = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] * 1000  # of all jobs together, in us
    return Rate(row["bw_bytes"] / 1e9, busy / (row["io_bytes"] / MIB))


def measure(ours, verb, args, huge_pages):
    """One row: the best engine of fio and the store in turn."""
    best = None
    if args.fio:
        first = {engine: fio(ours, engine, verb, min(1, args.seconds), huge_pages) for engine in FIO_ENGINES}
        rates = {engine: rate.gbps for engine, rate in first.items() if rate}
        if not rates:
            raise SystemExit("fio could use none of its engines; run it by hand to see why")
        best = max(rates, key=rates.get)
    mine, theirs = [], []
    for _ in range(args.rounds):
        mine.append(ours.run(verb, args.seconds))
        if best:
            theirs.append(fio(ours, best, verb, args.seconds, huge_pages))
    if verb == "write":
        ours.fill()
    row = {"verb": verb, "mib": ours.payload_bytes // MIB, "depth": ours.depth, "fio_engine": best}
    for name, rates in (("kvortex", mine), ("fio", theirs)):
        for i, field in enumerate(Rate._fields):
            row[f"{name}_{field}"] = statistics.median(rate[i] for rate in rates) if rates else None
    pairs = [a.gbps / b.gbps for a, b in zip(mine, theirs, strict=bool(best))]
    row["ratio"] = statistics.median(pairs) if pairs else None
    return row


def on_huge_pages(pool):
    """Whether the pool's memory lies on huge pages."""
    address, is_ours = pool.address(0), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            first, last = (int(part, 16) for part in line.split(" ")[0].split("-"))
            is_ours = first <= address < last
        elif is_ours and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) > 0
    return False


def free_huge_pages():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("HugePages_Free:")), 0)


def show_head(ours, args, huge_pages):
    stats, pages = ours.store.stats(), "huge pages" if on_huge_pages(ours.pool) else "pages of 4 KiB"
    print(f"{stats['folders'][0]}: {stats['io']} I/O by {stats['io_engine']}; medians of {args.rounds} rounds of")
    print(f"{args.seconds:g} s; the store's buffers on {pages}, fio's on {'huge pages' if huge_pages else '4 KiB'}")
    print()
    print("| | block | depth | KVortex GB/s | fio GB/s | best engine | ratio | CPU us/MiB | fio's |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)


def show(row):
    def text(value, form):
        return "-" if value is None else format(value, form)

    cells = [row["verb"], f"{row['mib']} MiB", row["depth"], text(row["kvortex_gbps"], ".2f")]
    cells += [text(row["fio_gbps"], ".2f"), row["fio_engine"] or "-", text(row["ratio"], ".2f")]
    cells += [text(row[f"{side}_cpu_us_per_mib"], ".0f") for side in ("kvortex", "fio")]
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.disk", description=__doc__.split("\n\n")[0])
    parser.add_argument("--path", type=Path, help="a folder on the disk, best an empty one (default: of its own)")
    parser.add_argument("--mib", type=int, default=2048, help="MiB of the file (default 2048)")
    parser.add_argument("--depths", default="1,8,16", help="blocks in flight (default 1,8,16)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3, help="of a round (default 3)")
    parser.add_argument("--io", choices=("threads", "aio"), default="threads", help="how the store does I/O")
    parser.add_argument("--without-fio", dest="fio", action="store_false", help="the store alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.fio and not shutil.which("fio"):
        raise SystemExit("fio is missing: apt-get install fio, or run with --without-fio")
    huge_pages = not args.fio or free_huge_pages() >= HUGE_PAGES
    rows, folder = [], tempfile.mkdtemp(prefix="kvortex-disk-", dir=args.path)
    try:
        for mib in (1, 2):
            path = os.path.join(folder, f"{mib}MiB")
            for depth in map(int, args.depths.split(",")):
                ours = Ours(path, mib * MIB, max(args.mib // mib, BATCHES * BATCH), depth, args.io, huge_pages)
                try:
                    if not rows:
                        show_head(ours, args, huge_pages)
                    ours.fill()
                    for verb in ("read", "write"):
                        rows.append(measure(ours, verb, args, huge_pages))
                        show(rows[-1])
                finally:
                    ours.close()
            shutil.rmtree(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
