"""What a transfer costs the kernels beside it: a matrix product (bound by arithmetic) and an addition (by memory)."""

import statistics
import time

import numpy as np

GEMM_SIZE = 8192
PART_BYTES = 64 << 20  # moved by one call while the kernels run
SECONDS = 0.2  # of kernels in one measurement
REPEATS = 5


class Kernels:
    """Enough launches of one kernel, put on a stream of torch's at once, to last for SECONDS."""

    def __init__(self, torch, name):
        self.torch, self.name = torch, name
        self.stream = torch.cuda.Stream()
        if name == "gemm":
            a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
            out = torch.empty_like(a)
            self.launch = lambda: torch.mm(a, b, out=out)
        else:
            a = torch.randn(1 << 28, device="cuda")
            out = torch.empty_like(a)
            self.launch = lambda: torch.add(a, 1.0, out=out)
        torch.cuda.synchronize()
        self.count = 20
        for _ in range(5):  # clocks and power settle meanwhile
            self.count = max(20, int(self.count * SECONDS / self.run()[0]))

    def run(self, move_part=None, pause_s=0.0):
        """Seconds of the kernels, and the bytes/s that `move_part` (moves a part, returns its bytes) reached meanwhile.

        A part begins `pause_s` after the one before at the earliest.
        """
        torch, moved = self.torch, 0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            start.record()
            for _ in range(self.count):
                self.launch()
            end.record()
        began = due = time.perf_counter()
        while move_part is not None and not end.query():
            if time.perf_counter() >= due:
                due += pause_s
                moved += move_part()
        elapsed = time.perf_counter() - began
        end.synchronize()
        return start.elapsed_time(end) / 1e3, moved / elapsed


def mover(verb, keys, blocks, block_bytes, stream, before=lambda part: None):
    """A function that moves the next part of `blocks` with an engine's verb, waits for it, and returns its bytes."""
    part_blocks = max(1, PART_BYTES // block_bytes)
    parts = [slice(first, first + part_blocks) for first in range(0, len(blocks), part_blocks)]

    def move_part():
        part = parts[0]
        parts.append(parts.pop(0))
        before(part)
        job = verb(keys[part], blocks[part], stream=stream)
        job.wait()
        return job.num_blocks * block_bytes

    return move_part


def contiguous(link, direction):
    """The same by contiguous copies."""

    def move_part():
        link.copy(direction, 0, PART_BYTES, link.streams[:1])
        link.streams[0].synchronize()
        return PART_BYTES

    return move_part


def slowdowns(torch, link, make_cache, make_engine, stream, rng):
    """A list of points: kernel, direction, way, GB/s, slowdown in percent.

    For every kernel and direction: our copies at full and at half rate, contiguous ones paced to what ours reached, and
    the opt-in gather of small pieces, each beside measurements of the kernel alone.
    """
    ways = [("strided", "even", 64, 32 << 10, 0), ("batch", "separate", 32, 64 << 10, 0)]
    ways += [(f"gather, {ctas} CTAs", "separate", 64, 16 << 10, ctas) for ctas in (4, 16)]
    points = []
    for name in ("gemm", "memory"):
        kernels = Kernels(torch, name)
        for way, shape, pieces, piece_bytes, ctas in ways:
            cache = make_cache(shape, pieces, piece_bytes)
            engine = make_engine(cache, ctas)
            keys = rng.integers(0, 256, (cache.num_blocks, 32), dtype=np.uint8)
            blocks = rng.permutation(cache.num_blocks)
            engine.save_blocks(keys, blocks, stream=stream).wait()

            def forget(part, engine=engine, keys=keys):
                engine.discard_blocks(keys[part])

            save = mover(engine.save_blocks, keys, blocks, cache.block_bytes, stream, before=forget)
            load = mover(engine.load_blocks, keys, blocks, cache.block_bytes, stream)
            for share in (1.0, 0.5)[: 1 if ctas else 2]:
                points += beside(kernels, link, name, "save", way, save, share)
                points += beside(kernels, link, name, "load", way, load, share)
            engine.load_blocks(keys, np.roll(blocks, 1), stream=stream).wait()
            holds = np.empty(cache.num_blocks, dtype=np.int64)
            holds[np.roll(blocks, 1)] = blocks
            cache.require(holds, link.host)
            engine.shutdown()
            cache.close()
    return points


def beside(kernels, link, name, direction, way, part, share):
    """The point of one way of moving, and of contiguous copies at its rate."""
    times, rates = {"alone": [], "ours": [], "contiguous": []}, {"ours": [], "contiguous": []}
    for _ in range(REPEATS):
        times["alone"].append(kernels.run()[0])
        pause_s = 0.0
        if share < 1:
            pause_s = PART_BYTES / (share * 50e9)
        for which, move in (("ours", part), ("contiguous", contiguous(link, direction))):
            if which == "contiguous":
                pause_s = max(pause_s, PART_BYTES / rates["ours"][-1])
            seconds, rate = kernels.run(move, pause_s)
            times[which].append(seconds)
            rates[which].append(rate)
        times["alone"].append(kernels.run()[0])
    alone = statistics.median(times["alone"])
    return [
        {
            "kernel": name,
            "direction": direction,
            "way": way if which == "ours" else f"contiguous beside {way}",
            "gbps": statistics.median(rates[which]) / 1e9,
            "slowdown_percent": 100 * (statistics.median(times[which]) / alone - 1),
            "noise_percent": 100 * float(np.subtract(*np.percentile(times["alone"], [75, 25]))) / alone,
        }
        for which in ("ours", "contiguous")
    ]
