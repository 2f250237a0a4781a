"""How close saves and loads come to the link: one table, JSON and two plots. About three minutes on a GPU.

Every row moves the same bytes in turn, in one run, because absolute figures drift: through an engine (from the Python
call to the end of `job.wait`; median of 5), as one contiguous pinned copy (the limit: best of 1 to 3 streams and 5
repeats), and as one cuMemcpyBatchAsync call over all pieces (what others do; median of 5). Block ids and slots are
shuffled, and after the last repeat the cache is read back by plain copies and compared: a wrong block ends the run.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import time
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

import kvortex
from bench.gpu import compute, plots, table
from bench.gpu.link import GIB, KIB, MIB, Cache, Link, keys_of, timed
from kvortex.slots import stride_bytes
from kvortex.transfer import TransferQueue, probe_layout

REPEATS = 5
HOST_COST_BLOCKS = 64  # in one call, of 2 MiB
SWEEP = [size * KIB for size in (4, 8, 16, 32, 64, 128, 256)]


class Case(NamedTuple):
    """A row of the table: a cache, and the ratios to the limit that are to be reached, where somebody set them."""

    shape: str
    pieces: int  # of a block
    piece_bytes: int
    reach: tuple = ()
    gather_ctas: int = 0


CASES = [
    Case("separate", 32, 64 * KIB, (0.93, 0.93)),
    Case("separate", 32, 32 * KIB, (0.70, 0.64)),
    Case("separate", 64, 32 * KIB, (0.62, 0.57)),
    Case("separate", 61, 18 * KIB),
    Case("separate", 64, 16 * KIB),
    Case("separate", 64, 8 * KIB),
    Case("separate", 61, 18 * KIB, (0.7, 0.7), gather_ctas=4),
    Case("separate", 64, 16 * KIB, (0.7, 0.7), gather_ctas=4),
    Case("separate", 64, 8 * KIB, (0.7, 0.7), gather_ctas=4),
    Case("even", 64, 64 * KIB, (0.93, 0.93)),
    Case("even", 64, 32 * KIB, (0.88, 0.87)),
    Case("even", 64, 16 * KIB, (0.73, 0.82)),
    Case("even", 64, 4 * KIB, (0.47, 0.60)),
    Case("apart", 64, 32 * KIB),
    Case("apart", 64, 4 * KIB),
    Case("4 GiB pitch", 4, 64 * KIB),
    Case("cross-layer", 1, 2 * MIB, (0.96, 0.96)),
]


def make_engine(cache, device, gather_ctas=0):
    config = kvortex.KVortexConfig(
        cpu_pool_size_bytes=cache.num_blocks * stride_bytes(cache.layout.block_bytes),
        device=device.name,
        gather_ctas=gather_ctas,
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


def probing(device, layout):
    """Seconds that an engine's creation spends on finding out how to move this layout."""
    with TransferQueue(device, "D2H") as saves, TransferQueue(device, "H2D") as loads:
        return timed(lambda: [probe_layout(layout, queue) for queue in (saves, loads)])


def one_direction_at_a_time(device, link, stream, case, nbytes, rng, repeats, loops=False):
    """A row: whole cache out and in again, at other places."""
    with ExitStack() as stack:
        cache = Cache(device, case.shape, case.pieces, case.piece_bytes, nbytes, rng)
        stack.callback(cache.close)
        probe_s = probing(device, cache.layout)
        engine = make_engine(cache, device, case.gather_ctas)
        stack.callback(engine.shutdown)
        keys = keys_of(cache.num_blocks, rng)
        engine.save_blocks(keys, np.arange(cache.num_blocks), stream=stream).wait()
        holds, times = np.arange(cache.num_blocks), {}
        for repeat in range(repeats + 1):  # the first one warms up
            sources, targets, slots = (rng.permutation(cache.num_blocks) for _ in range(3))
            pieces = *cache.pieces_of(sources, slots), case.piece_bytes
            engine.discard_blocks(rng.permutation(keys))  # which shuffles the free slots
            taken = {}
            for direction in ("save", "load"):  # in this order: what others took they bring back
                taken[f"{direction} batch"] = link.batches(direction, *pieces)[1]
            for direction in ("save", "load"):
                if loops:
                    taken[f"{direction} loop"] = link.piece_loop(direction, *pieces)
                else:
                    taken[f"{direction} batches"] = link.batches(direction, *pieces, at_once=128)[1]
            for direction in ("save", "load"):
                taken[f"{direction} limit"] = link.contiguous(direction, cache.nbytes)
            taken["save"] = move(engine.save_blocks, keys, sources, stream)
            taken["load"] = move(engine.load_blocks, keys, targets, stream)
            moved = holds.copy()
            moved[targets] = holds[sources]
            holds = moved
            for name, seconds in taken.items() if repeat else ():
                times.setdefault(name, []).append(seconds)
        cache.require(holds, link.host)
        planner = [row._asdict() for row in engine.get_stats().planner]
    return row(case, cache.nbytes, times) | {"probe_seconds": probe_s, "planner": planner}


def both_directions(device, link, stream, nbytes, rng, repeats):
    """A row: half of a cross-layer cache is saved while the other half is loaded."""
    case = Case("cross-layer, both ways at once", 1, 2 * MIB, (0.9, 0.9))
    with ExitStack() as stack:
        cache = Cache(device, "cross-layer", 1, 2 * MIB, nbytes, rng)
        stack.callback(cache.close)
        engine = make_engine(cache, device)
        stack.callback(engine.shutdown)
        half = cache.num_blocks // 2
        saved, loaded = np.split(rng.permutation(2 * half), 2)
        keys = keys_of(2 * half, rng)
        engine.save_blocks(keys, np.concatenate([saved, loaded]), stream=stream).wait()
        times = {"save": [], "save limit": []}
        for repeat in range(repeats + 1):
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
    return row(case, half * 2 * MIB, times)


def row(case, nbytes, times):
    """The numbers of a row; nbytes went each way."""
    result = {**case._asdict(), "bytes": nbytes}
    for direction in ("save", "load"):
        seconds = statistics.median(times[direction])
        limit = min(times[f"{direction} limit"])
        result[f"{direction}_gbps"] = nbytes / seconds / 1e9
        result[f"{direction}_limit_gbps"] = nbytes / limit / 1e9
        result[f"{direction}_to_limit"] = limit / seconds
        for peer in ("batch", "batches", "loop"):
            others = times.get(f"{direction} {peer}")
            result[f"{direction}_to_{peer}"] = statistics.median(others) / seconds if others else None
    return result


def sweep(device, link, stream, nbytes, rng, repeats):
    """Points of the first plot: three of our ways, and what others do, over the sizes of a piece."""
    points = []
    for piece_bytes in SWEEP:
        for name, shape, ctas in [
            ("KVortex, separate allocations", "separate", 0),
            ("KVortex, one allocation", "even", 0),
            ("KVortex, separate, gather 4 CTAs", "separate", 4),
        ]:
            if ctas and piece_bytes >= 32 * KIB:
                continue
            case = Case(shape, 64, piece_bytes, gather_ctas=ctas)
            found = one_direction_at_a_time(device, link, stream, case, nbytes, rng, repeats, loops=shape == "separate")
            ours = {key: found[key] for direction in ("save", "load") for key in found if key.startswith(direction)}
            points.append({"way": name, "piece_bytes": piece_bytes, **ours})
            for way, peer in (("one batch call", "batch"), ("piece loop", "loop")):
                if shape == "separate" and not ctas:
                    theirs = {f"{d}_gbps": found[f"{d}_gbps"] / found[f"{d}_to_{peer}"] for d in ("save", "load")}
                    points.append({"way": way, "piece_bytes": piece_bytes, **ours, **theirs})
    return points


def latency(device, link, stream, rng, repeats):
    """Microseconds from call to done of one 2 MiB block in 64 pieces, saved and loaded, and of one contiguous copy."""
    with ExitStack() as stack:
        cache = Cache(device, "even", 64, 32 * KIB, 8 * 2 * MIB, rng)
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


def host_cost(device, link, stream, rng, repeats, num_blocks=HOST_COST_BLOCKS):
    """Microseconds of the calling thread for each block of a batch: ours, and the driver's own calls for as much.

    The driver's are batch calls of 256 pieces, and one cuMemcpy2DAsync a block where the pieces lie at even distances.
    """
    found = []
    for case in (Case("even", 64, 32 * KIB), Case("separate", 32, 64 * KIB), Case("separate", 64, 32 * KIB)):
        with ExitStack() as stack:
            nbytes = num_blocks * case.pieces * case.piece_bytes
            cache = Cache(device, case.shape, case.pieces, case.piece_bytes, nbytes, rng)
            stack.callback(cache.close)
            engine = make_engine(cache, device)
            stack.callback(engine.shutdown)
            keys, times = keys_of(num_blocks, rng), {}

            def ours(blocks, slots, engine=engine, keys=keys):
                engine.discard_blocks(keys)
                for direction, verb in (("save", engine.save_blocks), ("load", engine.load_blocks)):
                    start = time.perf_counter()
                    job = verb(keys, blocks, stream=stream)
                    yield direction, time.perf_counter() - start
                    job.wait()

            def by_the_driver(blocks, slots, cache=cache, case=case):
                places = cache.pieces_of(blocks, slots)
                for direction in ("save", "load"):  # in this order: what one took the other brings back
                    yield f"{direction} batches", link.batches(direction, *places, case.piece_bytes, at_once=256)[0]
                for direction in ("save", "load") if case.shape == "even" else ():
                    yield f"{direction} strided", link.strided(direction, *places, case.pieces, case.piece_bytes)

            for repeat in range(repeats + 4):  # the first ones warm up
                blocks, slots = rng.permutation(num_blocks), rng.permutation(num_blocks)
                for way in (ours, by_the_driver) if repeat % 2 else (by_the_driver, ours):
                    for name, seconds in way(blocks, slots):
                        times.setdefault(name, []).append(seconds)
            cache.require(np.arange(num_blocks), link.host)
            micros = {name: statistics.median(t[4:]) * 1e6 / num_blocks for name, t in times.items()}
            found.append({**case._asdict(), "blocks": num_blocks, **{f"{k}_us_a_block": v for k, v in micros.items()}})
    return found


def pinning(device, nbytes):
    """Seconds until a pool serves and until it is whole.

    Ours comes first, on memory that the machine may never have used: a virtual one then pays its host for every page.
    Whoever comes later takes the pages that the one before gave back: cuMemHostAlloc, and ours once more.
    """
    result = {"bytes": nbytes}

    def ours(name, **settings):
        start = time.perf_counter()
        with kvortex.PinnedPool(nbytes, 2 * MIB, device, **settings) as pool:
            result[f"{name}first_slot_seconds"] = time.perf_counter() - start
            pool.wait_ready()
            result[f"{name}ready_seconds"] = time.perf_counter() - start
            result[f"{name}longest_call_seconds"] = pool.longest_call_ms / 1e3

    ours("cold_")
    start = time.perf_counter()
    with kvortex.PinnedPool(nbytes, 2 * MIB, device, driver_allocated=True):
        result["driver_seconds"] = time.perf_counter() - start
    ours("warm_")
    ours("small_pages_", huge_pages=False)
    return result


def driver_version(device):
    if device.is_host:
        return "host driver"
    try:
        with open("/proc/driver/nvidia/version", encoding="ascii") as file:
            return f"driver {re.search(r'[0-9]+[.][0-9.]+', file.readline())[0]}"
    except (OSError, TypeError):
        return "driver unknown"


def measure(options, command):
    nbytes, rng, repeats = options.mib * MIB, np.random.default_rng(options.seed), options.repeats
    with ExitStack() as stack:
        device = stack.enter_context(kvortex.Device.open(options.device))
        stream = stack.enter_context(kvortex.Stream.create(device))
        link = Link(device, max(nbytes, HOST_COST_BLOCKS * 2 * MIB))
        stack.callback(link.close)

        def say(what):
            print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)

        say("pinning")
        result = {
            "device": device.description,
            "driver": driver_version(device),
            "date": datetime.date.today().isoformat(),
            "command": command,
            "bytes": nbytes,
            "pinning": pinning(device, int(options.pool_gib * GIB)),
        }
        say("latency and host time")
        result["latency"] = latency(device, link, stream, rng, 60 * repeats)
        result["host_cost"] = host_cost(device, link, stream, rng, 8 * repeats)
        say("rows")
        cases = [case for case in CASES if not (device.is_host and case.shape == "4 GiB pitch")]
        result["rows"] = [one_direction_at_a_time(device, link, stream, case, nbytes, rng, repeats) for case in cases]
        result["rows"].append(both_directions(device, link, stream, nbytes, rng, repeats))
        result["sweep"] = result["compute"] = []
        if not options.no_plots:
            say("sweep")
            result["sweep"] = sweep(device, link, stream, max(nbytes // 4, 32 * MIB), rng, min(repeats, 3))
        if not (options.no_compute or device.is_host):
            say("compute beside transfers")
            import torch

            result["compute"] = compute.slowdowns(
                torch,
                link,
                lambda shape, pieces, piece_bytes: Cache(device, shape, pieces, piece_bytes, nbytes, rng),
                lambda cache, ctas: make_engine(cache, device, ctas),
                stream,
                rng,
            )
    return result


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__.partition("\n\n")[0],
        epilog="examples: python -m bench.gpu --json result.json --plots .   (all of it, on a GPU with torch)\n"
        "          python -m bench.gpu --device host --mib 16 --pool-gib 0.125 --repeats 1 --no-plots   (does it run?)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too")
    parser.add_argument("--plots", metavar="FOLDER", help="draw rate.png and slowdown.png there (needs matplotlib)")
    parser.add_argument("--from-json", metavar="FILE", help="measure nothing: print and draw an earlier result")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--mib", type=int, default=512, help="moved in each row")
    parser.add_argument("--pool-gib", type=float, default=16, help="pinned by way of trial")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each row, of which the median counts")
    parser.add_argument("--no-plots", action="store_true", help="leave out the sweep over piece sizes")
    parser.add_argument("--no-compute", action="store_true", help="leave out the kernels beside transfers (need torch)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.mib < 16 or options.mib % 4:
        parser.error(f"--mib must be a multiple of 4 and at least 16, got {options.mib}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.from_json:
        with open(options.from_json, encoding="utf-8") as file:
            result = json.load(file)
    else:
        result = measure(options, f"python -m bench.gpu --mib {options.mib}")
    table.show(result)
    if options.json:
        os.makedirs(os.path.dirname(os.path.abspath(options.json)), exist_ok=True)
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    if options.plots:
        print("\n".join(plots.draw(result, options.plots)))


if __name__ == "__main__":
    main()
