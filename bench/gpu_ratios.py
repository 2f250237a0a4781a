"""How close saves and loads come to the link, as one table: `python bench/gpu_ratios.py [--json FILE]`, about 90 s.

Every row moves the same bytes three ways in turn, in one run, because absolute figures drift: through an engine (from
the Python call to the end of `job.wait`; median of 5), as one contiguous pinned copy (the limit: best of 1 to 3 streams
and 5 repeats), and as ONE cuMemcpyBatchAsync call over all pieces (what others do; median of 5). Block ids and slots
are shuffled, and after the last repeat the cache is read back by plain copies and compared: a wrong block ends the run.
"""

import argparse
import ctypes
import json
import statistics
import time
from contextlib import ExitStack

import numpy as np

import kvortex
from kvortex.driver._device import entry_points

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
REPEATS = 5
PIECES = 64  # of a block; of 32 layers, K and V
ROWS = [
    ("separate allocations", 64 * KIB),
    ("separate allocations", 32 * KIB),
    ("one allocation", 64 * KIB),
    ("one allocation", 32 * KIB),
    ("one allocation", 16 * KIB),
    ("one allocation", 4 * KIB),
    ("cross-layer", 2 * MIB),
]


class Cache:
    """Random blocks on a device in one of the shapes, and the place of every piece by its own arithmetic."""

    def __init__(self, device, shape, piece_bytes, nbytes, rng):
        pieces = 1 if shape == "cross-layer" else PIECES
        num_blocks = nbytes // (pieces * piece_bytes)
        run_bytes = num_blocks * piece_bytes
        num_buffers = pieces if shape == "separate allocations" else 1
        self.buffers = [kvortex.DeviceBuffer(pieces * run_bytes // num_buffers, device) for _ in range(num_buffers)]
        bases = [
            buffer.address + start * run_bytes for buffer in self.buffers for start in range(pieces // num_buffers)
        ]
        if shape == "one allocation":  # (kv, layers, blocks, piece)
            bases = [bases[part * pieces // 2 + layer] for layer in range(pieces // 2) for part in range(2)]
        self.layout = kvortex.KVLayout([(base, piece_bytes, piece_bytes) for base in bases], num_blocks)
        self.bases = np.array(bases, dtype=np.uint64)
        self.num_blocks, self.piece_bytes = num_blocks, piece_bytes
        self.data = rng.integers(0, 1 << 64, nbytes // 8, dtype=np.uint64).view(np.uint8)
        self.data = self.data.reshape(num_buffers, pieces // num_buffers, num_blocks, piece_bytes)
        for buffer, content in zip(self.buffers, self.data, strict=True):
            buffer.copy_from(content)

    def require(self, holds, scratch):
        """End the run unless block b holds what block holds[b] was created with."""
        for buffer, content in zip(self.buffers, self.data, strict=True):
            found = scratch[: content.nbytes]
            buffer.copy_to(found)
            wrong = (found.reshape(content.shape) != content[:, holds]).any(axis=(0, 2)).sum()
            if wrong:
                raise SystemExit(f"{wrong} of {self.num_blocks} blocks are wrong")

    def close(self):
        for buffer in self.buffers:
            buffer.close()


class Link:
    """Contiguous pinned copies, and one batch call over given pieces: what an engine is compared with."""

    def __init__(self, device, nbytes):
        self.pool = kvortex.PinnedPool(nbytes, nbytes, device)
        self.host = np.frombuffer(self.pool.view(0), dtype=np.uint8)
        self.memory = kvortex.DeviceBuffer(nbytes, device)
        self.streams = [kvortex.Stream.create(device) for _ in range(3)]
        table = entry_points(device)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        batch = ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 3, size, *[pointer] * 2, size, pointer, pointer)
        self.batch = batch(table["memcpy_batch_async"])
        # ctypes calls need the context that torch, and the engine, use.
        context = ctypes.c_void_p()
        retain = ctypes.CFUNCTYPE(ctypes.c_int, pointer, ctypes.c_int)(table["device_primary_ctx_retain"])
        push = ctypes.CFUNCTYPE(ctypes.c_int, pointer)(table["ctx_push_current"])
        if retain(ctypes.byref(context), device.ordinal) or push(context):
            raise SystemExit("the primary context could not be made current")

    def copy(self, direction, first, nbytes, streams):
        """Start a contiguous copy in one part a stream."""
        part = nbytes // len(streams) // 4096 * 4096
        for number, stream in enumerate(streams):
            start = first + number * part
            stop = first + nbytes if stream is streams[-1] else start + part
            move = self.memory.copy_to if direction == "save" else self.memory.copy_from
            move(self.host[start:stop], start, stream)

    def contiguous(self, direction, nbytes, most_streams=3):
        """Seconds of the best number of streams."""

        def run(streams):
            self.copy(direction, 0, nbytes, streams)
            for stream in streams:
                stream.synchronize()

        return min(timed(run, self.streams[: 1 + extra]) for extra in range(most_streams))

    def both_ways(self, nbytes):
        """Seconds of two contiguous copies at once, one each way."""

        def run():
            self.copy("save", 0, nbytes, self.streams[:1])
            self.copy("load", nbytes, nbytes, self.streams[1:2])
            self.streams[0].synchronize()
            self.streams[1].synchronize()

        return timed(run)

    def one_batch(self, direction, device_addresses, host_addresses, piece_bytes):
        """Seconds of one cuMemcpyBatchAsync call, arrays prepared."""
        targets, sources = host_addresses, device_addresses
        if direction == "load":
            targets, sources = sources, targets
        sizes = np.full(targets.size, piece_bytes, dtype=np.uint64)
        attributes = np.array([1, 0, 0, 0, 0, 0], dtype=np.int32)  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        stream = self.streams[0]

        def run():
            code = self.batch(
                targets.ctypes.data, sources.ctypes.data, sizes.ctypes.data, sizes.size, attributes.ctypes.data,
                ctypes.byref(first), 1, ctypes.byref(failed), stream.handle,
            )  # fmt: skip
            if code:
                raise SystemExit(f"cuMemcpyBatchAsync answered {code} at copy {failed.value}")
            stream.synchronize()

        return timed(run)

    def close(self):
        for stream in self.streams:
            stream.close()
        self.memory.close()
        del self.host
        self.pool.close()


def timed(run, *arguments):
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def keys_of(count, rng):
    return rng.integers(0, 256, (count, 32), dtype=np.uint8)


def make_engine(cache, device):
    config = kvortex.KVortexConfig(
        cpu_pool_size_bytes=cache.num_blocks * -(-cache.layout.block_bytes // 4096) * 4096, device=device.name
    )
    engine = kvortex.KVortexEngine.create(config, layout=cache.layout)
    engine.wait_ready()
    return engine


def move(verb, keys, blocks, stream):
    """Seconds from the call to the end of `wait`, every block moved."""

    def run():
        job = verb(keys, blocks, stream=stream)
        job.wait()
        if job.num_blocks != len(keys):
            raise SystemExit(f"{job.num_blocks} of {len(keys)} blocks were moved")

    return timed(run)


def one_direction_at_a_time(device, link, stream, shape, piece_bytes, nbytes, rng):
    """A row: whole cache out and in again, at other places."""
    with ExitStack() as stack:
        cache = Cache(device, shape, piece_bytes, nbytes, rng)
        stack.callback(cache.close)
        engine = make_engine(cache, device)
        stack.callback(engine.shutdown)
        keys = keys_of(cache.num_blocks, rng)
        engine.save_blocks(keys, np.arange(cache.num_blocks), stream=stream).wait()
        holds, times = np.arange(cache.num_blocks), {}
        in_slot = np.arange(cache.bases.size, dtype=np.uint64) * np.uint64(piece_bytes)
        for repeat in range(REPEATS + 1):  # the first one warms up
            sources, targets, slots = (rng.permutation(cache.num_blocks) for _ in range(3))
            on_device = cache.bases + np.uint64(piece_bytes) * sources[:, None].astype(np.uint64)
            on_host = in_slot + np.uint64(cache.layout.block_bytes) * slots[:, None].astype(np.uint64)
            pieces = on_device.ravel(), on_host.ravel() + np.uint64(link.host.ctypes.data), piece_bytes
            engine.discard_blocks(rng.permutation(keys))  # which shuffles the free slots
            taken = {  # in this order: the batch calls bring back what they took, and leave the cache as it was
                "save batch": link.one_batch("save", *pieces),
                "load batch": link.one_batch("load", *pieces),
                "save limit": link.contiguous("save", nbytes),
                "load limit": link.contiguous("load", nbytes),
                "save": move(engine.save_blocks, keys, sources, stream),
                "load": move(engine.load_blocks, keys, targets, stream),
            }
            moved = holds.copy()
            moved[targets] = holds[sources]
            holds = moved
            for name, seconds in taken.items() if repeat else ():
                times.setdefault(name, []).append(seconds)
        cache.require(holds, link.host)
    return row(shape, piece_bytes, nbytes, times)


def both_directions(device, link, stream, nbytes, rng):
    """A row: half of a cross-layer cache is saved while the other half is loaded."""
    with ExitStack() as stack:
        cache = Cache(device, "cross-layer", 2 * MIB, nbytes, rng)
        stack.callback(cache.close)
        engine = make_engine(cache, device)
        stack.callback(engine.shutdown)
        half = cache.num_blocks // 2
        saved, loaded = np.split(rng.permutation(2 * half), 2)
        keys = keys_of(2 * half, rng)
        engine.save_blocks(keys, np.concatenate([saved, loaded]), stream=stream).wait()
        times = {"save": [], "save limit": []}
        for repeat in range(REPEATS + 1):
            engine.discard_blocks(rng.permutation(keys[:half]))
            order = rng.permutation(half)
            times["save limit"].append(link.both_ways(half * 2 * MIB))

            def run(order=order):
                load = engine.load_blocks(keys[half:], loaded[order], stream=stream)
                save = engine.save_blocks(keys[:half], saved, stream=stream)
                for job in (load, save):
                    job.wait()
                    if job.num_blocks != half:
                        raise SystemExit(f"{job.num_blocks} of {half} blocks were moved")

            times["save"].append(timed(run))
            if repeat == 0:
                times = {name: [] for name in times}
        move(engine.load_blocks, keys[:half], np.roll(saved, 1), stream)
        holds = np.arange(cache.num_blocks)
        holds[np.roll(saved, 1)], holds[loaded[order]] = saved, loaded
        cache.require(holds, link.host)
    times |= {"load": times["save"], "load limit": times["save limit"]}
    return row("cross-layer, both ways at once", 2 * MIB, half * 2 * MIB, times)


def row(shape, piece_bytes, nbytes, times):
    """The numbers of a row; nbytes went each way."""
    result = {"shape": shape, "piece_bytes": piece_bytes, "bytes": nbytes}
    for direction in ("save", "load"):
        seconds = statistics.median(times[direction])
        limit = min(times[f"{direction} limit"])
        result[f"{direction}_gbps"] = nbytes / seconds / 1e9
        result[f"{direction}_limit_gbps"] = nbytes / limit / 1e9
        result[f"{direction}_to_limit"] = limit / seconds
        batch = times.get(f"{direction} batch")
        result[f"{direction}_to_batch"] = statistics.median(batch) / seconds if batch else None
    return result


def latency(device, link, stream, rng, repeats=200):
    """Microseconds from call to done of one 2 MiB block in 64 pieces, saved and loaded, and of one contiguous copy."""
    with ExitStack() as stack:
        cache = Cache(device, "one allocation", 32 * KIB, 8 * 2 * MIB, rng)
        stack.callback(cache.close)
        engine = make_engine(cache, device)
        stack.callback(engine.shutdown)
        keys, times = keys_of(1, rng), {"save": [], "load": [], "contiguous_save": [], "contiguous_load": []}
        holds = np.arange(cache.num_blocks)
        for _ in range(repeats + 10):
            source, target = rng.choice(cache.num_blocks, 2, replace=False)
            engine.discard_blocks(keys)
            times["save"].append(move(engine.save_blocks, keys, [source], stream))
            times["load"].append(move(engine.load_blocks, keys, [target], stream))
            holds[target] = holds[source]
            for direction in ("save", "load"):
                times[f"contiguous_{direction}"].append(link.contiguous(direction, 2 * MIB, most_streams=1))
        cache.require(holds, link.host)
    return {
        f"{name}_us_p{percent}": float(np.percentile(seconds[10:], percent) * 1e6)
        for name, seconds in times.items()
        for percent in (50, 99)
    }


def pinning(device, nbytes):
    """Seconds until the pool serves and until it is whole; ours first, on memory that may never have been used."""
    start = time.perf_counter()
    with kvortex.PinnedPool(nbytes, 2 * MIB, device) as pool:
        first = time.perf_counter() - start
        pool.wait_ready()
        whole = time.perf_counter() - start
    start = time.perf_counter()
    with kvortex.PinnedPool(nbytes, 2 * MIB, device, driver_allocated=True):
        by_driver = time.perf_counter() - start
    return {"bytes": nbytes, "first_slot_seconds": first, "ready_seconds": whole, "driver_seconds": by_driver}


def size(nbytes):
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes // KIB} KiB"


def print_table(result):
    print(f"{result['device']}, {size(result['bytes'])} a row, kvortex {kvortex.__version__}\n")
    print("| cache | piece | save GB/s | load GB/s | save / limit | load / limit | save / batch | load / batch |")
    print("|---|---|---|---|---|---|---|---|")
    for line in result["rows"]:
        ratios = [line[f"{direction}_to_{what}"] for what in ("limit", "batch") for direction in ("save", "load")]
        cells = [line["shape"], size(line["piece_bytes"])]
        cells += [f"{line['save_gbps']:.1f}", f"{line['load_gbps']:.1f}"]
        cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        print(f"| {' | '.join(cells)} |")
    times = result["latency"]
    print(
        "\nOne 2 MiB block of 64 pieces, call to done, us p50 / p99: "
        + ", ".join(
            f"{name.replace('_', ' ')} {times[f'{name}_us_p50']:.0f} / {times[f'{name}_us_p99']:.0f}"
            for name in ("save", "load", "contiguous_save", "contiguous_load")
        )
    )
    pool = result["pinning"]
    print(
        f"Pinned pool of {size(pool['bytes'])}: first slot after {pool['first_slot_seconds']:.2f} s, whole after "
        f"{pool['ready_seconds']:.2f} s; one cuMemHostAlloc {pool['driver_seconds']:.2f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--mib", type=int, default=512, help="moved in each row; the pinned pool has 32 times that")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.mib < 16 or options.mib % 4:
        parser.error(f"--mib must be a multiple of 4 and at least 16, got {options.mib}")
    nbytes, rng = options.mib * MIB, np.random.default_rng(options.seed)
    with ExitStack() as stack:
        device = stack.enter_context(kvortex.Device.open(options.device))
        stream = stack.enter_context(kvortex.Stream.create(device))
        link = Link(device, nbytes)
        stack.callback(link.close)
        result = {
            "device": device.description,
            "bytes": nbytes,
            "rows": [
                *(one_direction_at_a_time(device, link, stream, *shape, nbytes, rng) for shape in ROWS),
                both_directions(device, link, stream, nbytes, rng),
            ],
            "latency": latency(device, link, stream, rng),
            "pinning": pinning(device, 32 * nbytes),
        }
    print_table(result)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
