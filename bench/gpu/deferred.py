"""How long a call takes and how long its copies, where the caller submits them and where a thread of the engine does.

A long prompt: blocks of 32 pieces of 64 KiB in separate allocations, which the driver takes one by one. Also a short
load beside a long save: from its call to its end while the save is being submitted. All ways in turn, in one run;
block ids are shuffled, and after the last round the cache is compared with what was saved.
"""

import argparse
import threading
import time
from contextlib import ExitStack

import numpy as np

import kvortex
from bench.gpu.__main__ import driver_version
from bench.gpu.link import KIB, MIB, Cache, keys_of
from kvortex.slots import stride_bytes

PIECES, PIECE_BYTES = 32, 64 * KIB
WAYS = {"submitted by the caller": False, "deferred": True, '"auto"': "auto"}


class Bench:
    """An engine over a cache that holds what `holds` says, block by block."""

    def __init__(self, stack, device, stream, num_blocks, rng):
        self.stream, self.rng, self.num_blocks = stream, rng, num_blocks
        self.cache = Cache(device, "separate", PIECES, PIECE_BYTES, (num_blocks + 2) * PIECES * PIECE_BYTES, rng)
        stack.callback(self.cache.close)
        pool_bytes = (num_blocks + 8) * stride_bytes(self.cache.layout.block_bytes)
        config = kvortex.KVortexConfig(cpu_pool_size_bytes=pool_bytes, device=device.name)
        self.engine = kvortex.KVortexEngine.create(config, layout=self.cache.layout)
        stack.callback(self.engine.shutdown)
        self.engine.wait_ready()
        self.keys, self.holds = keys_of(num_blocks + 2, rng), np.arange(self.cache.num_blocks)

    def move(self, verb, keys, blocks, deferred):
        """Seconds of the call and from the call to its end."""
        start = time.perf_counter()
        job = verb(keys, blocks, stream=self.stream, deferred=deferred)
        called = time.perf_counter()
        job.wait()
        done = time.perf_counter()
        if job.num_blocks != len(keys):
            raise SystemExit(f"{job.num_blocks} of {len(keys)} blocks were moved")
        return called - start, done - start

    def round_trip(self, deferred):
        """All blocks out, and in again at other places."""
        keys = self.keys[: self.num_blocks]
        self.engine.discard_blocks(self.rng.permutation(keys))
        sources, targets = self.rng.permutation(self.num_blocks), self.rng.permutation(self.num_blocks)
        save = self.move(self.engine.save_blocks, keys, sources, deferred)
        load = self.move(self.engine.load_blocks, keys, targets, deferred)
        held = self.holds.copy()
        self.holds[targets] = held[sources]
        return save, load

    def beside_another_thread(self, deferred, rounds):
        """Seconds of each call while another thread saves a block again and again."""
        other, ended = self.keys[-1:], threading.Event()

        def work():
            while not ended.is_set():
                self.engine.discard_blocks(other)
                self.engine.save_blocks(other, [self.num_blocks], stream=self.stream).wait()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            trips = [self.round_trip(deferred) for _ in range(rounds)]
        finally:
            ended.set()
            thread.join()
        return [call for save, load in trips for call, _ in (save, load)]

    def short_load_beside(self, deferred):
        """Seconds of a load of one block, from call to end, begun while a long save is being submitted."""
        keys, short = self.keys[: self.num_blocks], self.keys[-2:-1]
        if self.engine.check_blocks(short).leading == 0:
            self.engine.save_blocks(short, [self.num_blocks], stream=self.stream).wait()
        self.engine.discard_blocks(keys)
        jobs = []
        blocks = np.arange(self.num_blocks)
        thread = threading.Thread(
            target=lambda: jobs.append(self.engine.save_blocks(keys, blocks, stream=self.stream, deferred=deferred))
        )
        thread.start()
        time.sleep(0.005)
        seconds = self.move(self.engine.load_blocks, short, [self.num_blocks + 1], deferred)[1]
        was_submitting = not (jobs and jobs[0].submitted)
        thread.join()
        jobs[0].wait()
        self.holds[self.num_blocks + 1] = self.holds[self.num_blocks]
        return seconds if was_submitting else None


def quantiles(seconds):
    return [1e6 * float(np.quantile(seconds, q)) for q in (0.5, 0.99)]


def measure(options):
    rng = np.random.default_rng(options.seed)
    with ExitStack() as stack:
        device = stack.enter_context(kvortex.Device.open(options.device))
        stream = stack.enter_context(kvortex.Stream.create(device))
        bench = Bench(stack, device, stream, options.blocks, rng)
        trips, busy, short = ({way: [] for way in WAYS} for _ in range(3))
        for deferred in WAYS.values():  # warm up
            bench.round_trip(deferred)
        for _ in range(options.rounds):
            for way, deferred in WAYS.items():
                trips[way].append(bench.round_trip(deferred))
        for _ in range(options.rounds):
            for way, deferred in WAYS.items():
                busy[way] += bench.beside_another_thread(deferred, 2)
        for _ in range(options.rounds):
            for way, deferred in WAYS.items():
                short[way].append(bench.short_load_beside(deferred))
        bench.cache.require(bench.holds, np.empty(bench.cache.nbytes // PIECES, dtype=np.uint8))
        print(f"{device.description}, {driver_version(device)}, {time.strftime('%Y-%m-%d')}, "
              f"`python -m bench.gpu.deferred --blocks {options.blocks} --rounds {options.rounds}`\n")  # fmt: skip
        print(f"{options.blocks} blocks of {PIECES} x {PIECE_BYTES // KIB} KiB, "
              f"{bench.cache.layout.block_bytes * options.blocks / MIB:.0f} MiB; us, median and p99 (largest of "
              f"{options.rounds})\n")  # fmt: skip
        print("| | save: call | to its end | load: call | to its end | call beside a thread that saves "
              "| one block loaded beside a long save |\n|---|---|---|---|---|---|---|")  # fmt: skip
        for way in WAYS:
            cells = [[trip[verb][at] for trip in trips[way]] for verb in (0, 1) for at in (0, 1)]
            cells += [busy[way], [seconds for seconds in short[way] if seconds is not None] or [float("nan")]]
            texts = ["{:.0f} / {:.0f}".format(*quantiles(seconds)) for seconds in cells]
            print(f"| {way} | {' | '.join(texts)} |")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.deferred",
        description=__doc__.partition("\n\n")[0],
        epilog="example: python -m bench.gpu.deferred --device host --blocks 16 --rounds 2   (does it run?)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--blocks", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
