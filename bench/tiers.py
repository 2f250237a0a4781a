"""What a disk tier, or a server, costs and keeps: eight measurements, each a short table.

    python -m bench.tiers --dir /mnt/nvme            all of them, about five minutes and 8 GiB of the disk
    python -m bench.tiers --dir /mnt/nvme store hung those two

Whatever is compared is measured in turn, in one run, and medians are shown: the disk of a virtual machine is too
unsteady for absolute figures. Data is random, and every block that comes back is compared. `--small` only tries that
it works.
"""

import argparse
import contextlib
import os
import socket
import statistics
import sys
import tempfile
import threading
import time

import numpy as np

from kvortex import DiskTier, KVLayout, KVortexConfig, KVortexEngine, RedisTier
from kvortex.slots import PAGE_BYTES, stride_bytes
from kvortex.tiers.base import HIT, BlockStatus
from kvortex.tiers.disk.segments import disk_bytes_of

KIB, MIB = 1 << 10, 1 << 20
A_MINUTE = 60_000


def make_engine(path, block_bytes, pool_blocks, disk_blocks=None, *, wait=True, tier=None, **settings):
    """An engine with a disk tier of so many blocks, or with `tier`; without either one that has no tier."""
    stride = stride_bytes(block_bytes, PAGE_BYTES)
    if disk_blocks is not None:
        settings = {"disk_bytes": disk_bytes_of(disk_blocks, stride), "write_bytes_per_s": 0} | settings
        tier = DiskTier(path, **settings)
    tiers = {"tiers": (tier,), "namespace": "bench"} if tier is not None else {}
    config = KVortexConfig(cpu_pool_size_bytes=pool_blocks * stride, block_bytes=block_bytes, device="host", **tiers)
    engine = KVortexEngine.create(config)
    if wait:
        engine.wait_ready(A_MINUTE)
    return engine


def keys_of(first, count):
    """Keys as hashes are: any bytes, and others for every number."""
    return np.random.default_rng(first).integers(0, 256, (count, 32), np.uint8)


def save(engine, keys, rows):
    engine.save_blocks(keys, data_ptrs=list(rows)).wait(A_MINUTE)


def load(engine, keys, targets, **settings):
    job = engine.load_blocks(keys, data_ptrs=list(targets), **settings)
    job.wait(A_MINUTE)
    return job.num_blocks


def require_same(engine, keys, rows, batch=64):
    """Load all blocks, from wherever they are, and compare them."""
    targets = np.zeros((batch, rows.shape[1]), np.uint8)
    for first in range(0, len(keys), batch):
        part = keys[first : first + batch]
        assert load(engine, part, targets[: len(part)], promote_timeout_ms=A_MINUTE) == len(part)
        assert (targets[: len(part)] == rows[first : first + batch]).all(), "a wrong block"


@contextlib.contextmanager
def timed(seconds):
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


def show(title, header, rows):
    """Print a small table, the first column to the left."""
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  " + "  ".join([row[0].ljust(widths[0]), *cells[1:]]), flush=True)


# ---- through the engine, and the store alone -------------------------------------------------------------------------


def measure_store(path, small):
    """1 000 blocks of 1 MiB put and promoted by the engine, and the same by its store alone."""
    count, rounds = (32, 1) if small else (1000, 5)
    rows = np.random.default_rng(1).integers(0, 256, (count, MIB), np.uint8)
    engine = make_engine(path, MIB, count + 24, count)
    tier, slots = engine.tiering.tier, np.arange(count, dtype=np.uint32)
    times = {name: [] for name in ("put, engine", "put, store", "promote, engine", "get, store")}
    for number in range(rounds + 1):
        keys = keys_of(number, count)
        engine.clear()
        with timed(times["put, engine"]):
            for first in range(0, count, 50):
                save(engine, keys[first : first + 50], rows[first : first + 50])
            assert engine.flush(A_MINUTE) == 0
        engine.index.evict(count)
        with timed(times["promote, engine"]):
            for first in range(0, count, count // 4):
                with engine.prefetch(keys[first : first + count // 4], A_MINUTE) as prefetch:
                    prefetch.wait()
                    assert prefetch.num_blocks == count // 4
        require_same(engine, keys, rows)

        engine.clear()  # nobody uses slots of the pool or of the tier now
        for slot in range(count):
            engine.pool.view(slot)[:MIB] = rows[slot]
        with timed(times["put, store"]):
            batch = tier.store.put(slots, slots, keys, MIB, tag=tier.tag, timeout_ms=A_MINUTE)
            assert (batch.wait() == BlockStatus.OK).all() and tier.store.flush(A_MINUTE) == 0
        for slot in range(count):
            engine.pool.view(slot)[:MIB] = bytes(MIB)
        with timed(times["get, store"]):
            batch = tier.store.get(slots, slots, keys, MIB, tag=tier.tag, timeout_ms=A_MINUTE)
            assert (batch.wait() == BlockStatus.OK).all()
        assert all(bytes(engine.pool.view(slot)[:MIB]) == rows[slot].tobytes() for slot in range(count))
    engine.shutdown()
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    show(
        f"{count} blocks of 1 MiB, medians of {rounds}",
        ("", "engine, s", "store alone, s", "ratio", "wanted"),
        [
            (verb, f"{medians[ours]:.3f}", f"{medians[alone]:.3f}", f"{medians[alone] / medians[ours]:.2f}", ">= 0.85")
            for verb, ours, alone in (("put", "put, engine", "put, store"), ("get", "promote, engine", "get, store"))
        ],
    )


def measure_load(path, small):
    """512 blocks of 1 MiB promoted and loaded in one call, beside each of the two alone."""
    count, rounds = (32, 1) if small else (512, 7)
    rows = np.random.default_rng(1).integers(0, 256, (count, MIB), np.uint8)
    targets = np.zeros_like(rows)
    engine, keys = make_engine(path, MIB, 2 * count, count), keys_of(0, count)
    save(engine, keys, rows)
    assert engine.flush(A_MINUTE) == 0
    times = {name: [] for name in ("both in one call", "promotion alone", "load alone")}
    for _ in range(rounds + 1):
        engine.index.evict(count)
        with timed(times["promotion alone"]), engine.prefetch(keys, A_MINUTE) as prefetch:
            prefetch.wait()
        with timed(times["load alone"]):
            assert load(engine, keys, targets) == count
        engine.index.evict(count)
        targets[:] = 0
        with timed(times["both in one call"]):
            assert load(engine, keys, targets, promote_timeout_ms=A_MINUTE) == count
        assert (targets == rows).all(), "a wrong block"
    engine.shutdown()
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    slower = max(medians["promotion alone"], medians["load alone"])
    show(
        f"{count} blocks of 1 MiB promoted and loaded, medians of {rounds}",
        ("", "s", "of the slower one", "wanted"),
        [
            (name, f"{seconds:.3f}", f"{seconds / slower:.2f}", "<= 1.15" if name.startswith("both") else "")
            for name, seconds in medians.items()
        ],
    )


# ---- coded ----------------------------------------------------------------------------------------------------------


def measure_coded(path, small):
    """Blocks of 1 MiB of K and V, as they are and coded by `ecsq`: rates in bytes of the cache, and blocks a GiB."""
    (count, rounds), (num_layers, tokens, heads, dim) = (8, 1) if small else (512, 5), (16, 16, 8, 128)
    numbers = np.random.default_rng(1).standard_normal((2, tokens, heads, dim), np.float32).view(np.uint16)[..., 1::2]
    cache = np.empty((2, count, num_layers, tokens, heads, dim), np.uint16)
    for block in range(count):  # no two blocks have the same number at one place
        cache[:, block] = np.roll(numbers.reshape(2, -1), 997 * block).reshape(2, 1, tokens, heads, dim)
    layers = [np.ascontiguousarray(cache[:, :, layer]) for layer in range(num_layers)]
    before = [layer.copy() for layer in layers]
    layout = KVLayout.from_tensors(layers, block_dim=1, roles="kv")
    assert layout.block_bytes == MIB
    keys, blocks = keys_of(0, count), np.arange(count)
    engines, times = {}, {}
    for codec in ("exact", "ecsq"):
        disk = DiskTier(
            os.path.join(path, codec), disk_bytes_of(count, stride_bytes(MIB, PAGE_BYTES)), write_bytes_per_s=0,
            codec=codec,
        )  # fmt: skip
        pool_bytes = 2 * (count + 1) * stride_bytes(MIB, PAGE_BYTES)
        config = KVortexConfig(cpu_pool_size_bytes=pool_bytes, device="host", tiers=(disk,), namespace="bench")
        engines[codec], times[codec] = KVortexEngine.create(config, layout=layout), {"put": [], "promote": []}
        engines[codec].wait_ready(A_MINUTE)
    strides = {codec: engine.tiering.tier.record_bytes for codec, engine in engines.items()}
    for _ in range(rounds + 1):
        for codec, engine in engines.items():
            engine.clear()
            engine.save_blocks(keys, blocks).wait(A_MINUTE)
            with timed(times[codec]["put"]):
                assert engine.flush(A_MINUTE) == 0
            engine.index.evict(count)
            with timed(times[codec]["promote"]), engine.prefetch(keys, A_MINUTE) as prefetch:
                prefetch.wait()
                assert prefetch.num_blocks == count
            for layer in layers:
                layer[:] = 0
            engine.load_blocks(keys, blocks).wait(A_MINUTE)
            require_close(layers, before, 0 if codec == "exact" else 0.1)
            for layer, numbers in zip(layers, before, strict=True):
                layer[:] = numbers
    for engine in engines.values():
        engine.shutdown()
    rate = {codec: {verb: count * MIB / 1e9 / statistics.median(seconds[1:]) for verb, seconds in of.items()}
            for codec, of in times.items()}  # fmt: skip
    show(
        f"{count} blocks of 1 MiB, level 1, medians of {rounds}",
        ("", "exact", "ecsq", "ratio", "wanted"),
        [
            (f"{verb}, GB/s", *(f"{rate[codec][verb]:.2f}" for codec in rate),
             f"{rate['ecsq'][verb] / rate['exact'][verb]:.2f}", wanted)
            for verb, wanted in (("put", ""), ("promote", ">= 2.5 with enough cores"))
        ] + [("blocks a GiB", *(f"{(1 << 30) / stride:.0f}" for stride in strides.values()),
              f"{strides['exact'] / strides['ecsq']:.2f}", ">= 3.0")],
    )  # fmt: skip


def require_close(layers, before, limit):
    """Compare numbers of bfloat16: their difference is at most so much of their root mean square."""
    for layer, numbers in zip(layers, before, strict=True):
        is_, was = ((words.astype(np.uint32) << 16).view(np.float32) for words in (layer, numbers))
        assert np.sqrt(np.mean((is_ - was) ** 2)) <= limit * np.sqrt(np.mean(was**2)), "a wrong block"


# ---- restarts --------------------------------------------------------------------------------------------------------


def measure_restart(path, small):
    """100 000 blocks of 64 KiB: how soon an engine that starts again knows them, with a manifest and without.

    And how fast a tier that is full of as many takes more, beside a tier that is full of 2 000.
    """
    count, batch, block_bytes = (2000, 500, 64 * KIB) if small else (100_000, 2000, 64 * KIB)
    noise = np.random.default_rng(1).integers(0, 256, block_bytes + 64 * count, np.uint8)
    rows = np.lib.stride_tricks.sliding_window_view(noise, block_bytes)[::64]
    keys, pool_blocks = keys_of(0, count), 2 * batch
    engine = make_engine(path, block_bytes, pool_blocks, count)
    for first in range(0, count, batch):
        save(engine, keys[first : first + batch], rows[first : first + batch])
        assert engine.flush(A_MINUTE) == 0
    engine.shutdown()
    found = []
    sample = np.random.default_rng(2).choice(count, min(count, 512), replace=False)
    for name in ("no tier", "with manifest", "without"):
        if name == "without":
            for folder, _, files in os.walk(path):
                for file in files:
                    if not file.endswith((".segment", "lock")):
                        os.unlink(os.path.join(folder, file))
        start = time.perf_counter()
        engine = make_engine(path, block_bytes, pool_blocks, count if name != "no tier" else None, wait=False)
        created = time.perf_counter() - start
        engine.check_blocks(keys[:512])
        first_answer = time.perf_counter() - start
        if name == "no tier":  # what of it is the pool's
            engine.shutdown()
            found.append((name, f"{1000 * created:.0f}", f"{1000 * first_answer:.0f}", "", ""))
            continue
        while engine.check_blocks(keys).leading_anywhere < count:
            assert time.perf_counter() - start < 300, "blocks are missing"
            time.sleep(0.002)
        last_hit = time.perf_counter() - start
        engine.tiering.tier.adoption.wait()
        scanned = engine.get_stats().tiers[0].blocks_scanned
        engine.wait_ready(A_MINUTE)
        require_same(engine, keys[sample], rows[sample])
        if name == "without":
            rates = put_rates(engine, path, block_bytes, batch, rows, small)
        engine.shutdown()
        found.append((name, f"{1000 * created:.0f}", f"{1000 * first_answer:.0f}", f"{last_hit:.2f}", f"{scanned:,}"))
    show(
        f"{count:,} blocks of 64 KiB, started again (wanted: last hit <= 1 s with manifest, first answer <= 50 ms)",
        ("", "created, ms", "first answer, ms", "last hit, s", "headers read"),
        found,
    )
    full, few = (statistics.median(seconds[1:]) for seconds in rates)
    show(
        f"{batch:,} blocks of 64 KiB put into a tier that is full",
        ("blocks that it has", "s", "rate, of the smaller tier's", "wanted"),
        [(f"{2000:,}", f"{few:.3f}", "", ""), (f"{count:,}", f"{full:.3f}", f"{few / full:.2f}", ">= 0.9")],
    )


def put_rates(engine, path, block_bytes, batch, rows, small):
    """Seconds for a batch put into the engine's tier, and into one of 2 000 blocks; in turn, both full."""
    other = make_engine(os.path.join(path, "few"), block_bytes, 2 * batch, 2000)
    times = [], []
    for number in range(2000 // batch + 1 + (1 if small else 31)):
        keys = keys_of(1000 + number, batch)
        for each, seconds in ((engine, times[0]), (other, times[1]))[:: 1 if number % 2 else -1]:
            with timed(seconds if number >= 2000 // batch else []):
                save(each, keys, rows[:batch])
                assert each.flush(A_MINUTE) == 0
    assert all(each.get_stats().tiers[0].blocks_evicted > 0 for each in (engine, other))
    other.shutdown()
    return times


# ---- what is written -------------------------------------------------------------------------------------------------


def disk_usage(path):
    """Bytes of all files and folders below, as `du` counts them."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in (folder, *(os.path.join(folder, file) for file in files)):
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(name).st_blocks * 512
    return total


class Usage(threading.Thread):
    """The most that a folder took, looked at every 10 ms."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.path, self.most, self.looks, self._over = path, 0, 0, threading.Event()

    def run(self):
        while not self._over.wait(0.01):
            self.most = max(self.most, disk_usage(self.path))
            self.looks += 1

    def end(self):
        self._over.set()
        self.join()


def measure_budget(path, small):
    """Saves at four times the write budget: what is written in the second half, and what the folder takes."""
    seconds, rate, block_bytes = (2, 4 * MIB, 64 * KIB) if small else (40, 32 * MIB, 256 * KIB)
    batch, stride = 16, stride_bytes(block_bytes, PAGE_BYTES)
    quota = seconds * rate // 10
    rows = np.random.default_rng(1).integers(0, 256, (batch, block_bytes), np.uint8)
    os.makedirs(os.path.join(path, "tier"))
    usage = Usage(os.path.join(path, "tier"))
    usage.start()
    engine = make_engine(usage.path, block_bytes, 256, 1, disk_bytes=quota, write_bytes_per_s=rate)
    start, saved, marks = time.monotonic(), 0, []
    while (now := time.monotonic() - start) < seconds or len(marks) < 2:
        if now >= seconds * (len(marks) + 1) / 2:
            marks.append((now, engine.get_stats()))
        if saved * stride < now * 4 * rate:
            save(engine, keys_of(saved, batch), rows)
            saved += batch
        else:
            time.sleep(0.002)
    engine.shutdown()
    usage.end()
    (first_s, first), (last_s, last) = ((at, stats.tiers[0]) for at, stats in marks)
    idle = last.blocks_written_beyond - first.blocks_written_beyond
    written = (last.blocks_written - first.blocks_written - idle) * stride
    admitted = (last.blocks_admitted - first.blocks_admitted) * stride
    dropped = marks[1][1].blocks_dropped - marks[0][1].blocks_dropped
    budget = rate * (last_s - first_s)
    show(
        f"saves of {saved * stride / last_s / MIB:.0f} MiB/s against a write budget of {rate / MIB:.0f} MiB/s, "
        f"from second {first_s:.1f} to {last_s:.1f}",
        ("", "MiB", "of the budget", "wanted"),
        [
            ("budget", f"{budget / MIB:.1f}", "", ""),
            ("admitted", f"{admitted / MIB:.1f}", f"{admitted / budget:.3f}", ""),
            ("written", f"{written / MIB:.1f}", f"{written / budget:.3f}", "0.95 to 1.05"),
            ("written when idle", f"{idle * stride / MIB:.1f}", "", ""),
            ("dropped dirty", f"{dropped * stride / MIB:.1f}", "", ""),
        ],
    )
    show(
        f"what the folder took, looked at {usage.looks:,} times",
        ("", "bytes"),
        [("quota", f"{quota:,}"), ("most", f"{usage.most:,}"), ("over it", f"{max(0, usage.most - quota):,}")],
    )


def measure_idle(path, small):
    """How soon what an idle engine saved is on the disk."""
    count = 8 if small else 64
    rows = np.random.default_rng(1).integers(0, 256, (count, MIB), np.uint8)
    found = []
    for name, rate in (("256 MiB/s, the default", 256 * MIB), ("no limit", 0)):
        engine = make_engine(os.path.join(path, name[:2]), MIB, 2 * count, 8 * count, write_bytes_per_s=rate)
        times = []
        for number in range(1 if small else 5):
            time.sleep(1.2)
            keys = keys_of(number, count)
            with timed(times):
                save(engine, keys, rows)
                while (engine.tiering.tier.look_up(keys) != HIT).any():
                    time.sleep(0.001)
        engine.shutdown()
        found.append((name, f"{statistics.median(times):.2f}", f"{max(times):.2f}", "<= 2"))
    show(f"{count} blocks of 1 MiB saved by an idle engine, until they are on the disk",
         ("write budget", "median, s", "longest, s", "wanted"), found)  # fmt: skip


# ---- a disk that hangs -----------------------------------------------------------------------------------------------


class HungBatch:
    """Blocks that never come, until the store is let go."""

    def __init__(self, store, count, timeout_ms):
        self._store, self._count, self._late_at = store, count, time.monotonic() + timeout_ms / 1000

    @property
    def statuses(self):
        is_late = time.monotonic() >= self._late_at
        return np.full(self._count, BlockStatus.LATE if is_late else BlockStatus.PENDING, np.uint8)

    def done(self):
        return self._store.is_let_go


class HungStore:
    """A store all of whose puts and gets hang."""

    def __init__(self, store):
        self._store, self.is_let_go = store, False

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put(self, slots, *rest, timeout_ms, **settings):
        return HungBatch(self, len(slots), timeout_ms)

    get = put


def measure_hung(path, small):
    """RAM hits, saves and lookups with a disk that hangs, against an engine that has none."""
    for breaker in ("as it is", "held closed"):
        hung = make_engine(os.path.join(path, breaker[:2]), BESIDE_BYTES, 512, 4096)
        hung.tiering.tier.store = HungStore(hung.tiering.tier.store)
        if breaker == "held closed":
            hung.tiering._breaker.allows = lambda now_s: True
        compare_beside(f"a disk that hangs, breaker {breaker}", hung, small)


def measure_server(path, small):
    """The same with a Redis that refuses connections, and with one that accepts them and never answers."""
    for trouble in ("is down", "hangs"):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            if trouble == "hangs":
                server.listen(100)
            tier = RedisTier(f"redis://127.0.0.1:{server.getsockname()[1]}", request_timeout_ms=1000)
            compare_beside(f"a Redis that {trouble}", make_engine(None, BESIDE_BYTES, 512, tier=tier), small)


BESIDE_BYTES = 64 * KIB  # of a block


def compare_beside(title, hung, small):
    """RAM hits, saves and lookups of an engine whose tier is in trouble, against an engine that has none."""
    seconds, batch = (0.2, 8) if small else (15, 8)  # puts are late after ten
    rows = np.random.default_rng(1).integers(0, 256, (batch, BESIDE_BYTES), np.uint8)
    targets, head = np.zeros_like(rows), keys_of(0, batch)
    engines = {"no tier": make_engine(None, BESIDE_BYTES, 512), "hung": hung}
    for engine in engines.values():
        for number in range(3):  # as many batches, and after ten seconds they are late
            save(engine, keys_of(1_000_000 + number, batch), rows)
            time.sleep(0.1)
        save(engine, head, rows)
    verbs = ("RAM hit", "save", "lookup, in RAM", "lookup, missing")
    times = {(verb, name): [] for verb in verbs for name in engines}
    misses, number, until = keys_of(1, 64), 0, time.monotonic() + seconds
    while time.monotonic() < until:
        number += 1
        keys = keys_of(number + 2, batch)
        for name in list(engines)[:: 1 if number % 2 else -1]:
            engine = engines[name]
            with timed(times["save", name]):
                save(engine, keys, rows)
            targets[:] = 0
            with timed(times["RAM hit", name]):
                assert load(engine, head, targets) == batch
            assert (targets == rows).all(), "a wrong block"
            with timed(times["lookup, in RAM", name]):
                engine.check_blocks(head)
            with timed(times["lookup, missing", name]):
                engine.check_blocks(misses)
            engine.touch_blocks(head)
    suspensions = hung.get_stats().tiers[0].suspensions
    hung.tiering.tier.store.is_let_go = True
    for engine in engines.values():
        engine.shutdown()
    lines = []
    for verb in verbs:
        alone, ours = (np.percentile(times[verb, name], (50, 99)) * 1e6 for name in engines)
        lines.append((verb, *(f"{value:.1f}" for pair in zip(alone, ours, strict=True) for value in pair),
                      f"{ours[0] / alone[0]:.2f}", f"{ours[1] / alone[1]:.2f}"))  # fmt: skip
    show(
        f"{title}, {suspensions} suspensions; {number:,} rounds of {batch} blocks of "
        f"64 KiB, lookups of these and of 64 that are missing (wanted: median <= 1.10, p99 <= 2)",
        ("us", "p50, no tier", "p50, hung", "p99, no tier", "p99, hung", "p50 ratio", "p99 ratio"),
        lines,
    )


MEASURED = {
    name.removeprefix("measure_"): measure for name, measure in list(globals().items()) if name.startswith("measure_")
}


def main(argv=None):
    """Run what was asked for, each in an empty folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *MEASURED], metavar="|".join(MEASURED))
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="a folder on the disk that is meant")
    parser.add_argument("--small", action="store_true", help="little data, once: only to see that it works")
    args = parser.parse_args(argv)
    for name in args.names or MEASURED:
        with tempfile.TemporaryDirectory(prefix="kvortex-bench-", dir=args.dir) as path:
            MEASURED[name](path, args.small)


if __name__ == "__main__":
    sys.exit(main())
