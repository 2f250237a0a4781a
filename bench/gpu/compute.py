"""What a transfer costs the kernels beside it: a matrix product (bound by arithmetic) and an addition (by memory)."""

import statistics
import time

import numpy as np

GEMM_SIZE = 8192
PART_BYTES = 64 << 20  # moved by one call while the kernels run
GATHERED_PART_BYTES = 16 << 20  # the same by a gather, which a large GEMM slows to a tenth
SECONDS = 0.1  # of kernels in one run: short, so that clocks and power hardly drift between a run and its neighbours
REPEATS = 8  # even, so that either way of moving is first as often


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


def mover(verb, keys, blocks, block_bytes, part_bytes, stream, before=lambda part: None):
    """A function that moves the next part of `blocks` with an engine's verb, waits for it, and returns its bytes."""
    part_blocks = max(1, part_bytes // block_bytes)
    parts = [slice(first, first + part_blocks) for first in range(0, len(blocks), part_blocks)]

    def move_part():
        part = parts[0]
        parts.append(parts.pop(0))
        before(part)
        job = verb(keys[part], blocks[part], stream=stream)
        job.wait()
        return job.num_blocks * block_bytes

    return move_part


def contiguous(link, direction, part_bytes):
    """The same by contiguous copies."""

    def move_part():
        link.copy(direction, 0, part_bytes, link.streams[:1])
        link.streams[0].synchronize()
        return part_bytes

    return move_part


def slowdowns(torch, link, make_cache, make_engine, stream, rng):
    """A list of points, as `beside` makes them.

    For every kernel and direction: our copies at full and at half rate, and the opt-in gather of small pieces.
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

            part_bytes = GATHERED_PART_BYTES if ctas else PART_BYTES
            moved = keys, blocks, cache.block_bytes, part_bytes, stream
            parts = {
                "save": mover(engine.save_blocks, *moved, before=forget),
                "load": mover(engine.load_blocks, *moved),
            }
            for share in (1.0, 0.5)[: 1 if ctas else 2]:
                for direction, part in parts.items():
                    others, pause_s = contiguous(link, direction, part_bytes), 0.0
                    if share < 1:
                        pause_s = part_bytes / (share * 50e9)
                    found = beside(kernels, part, others, part_bytes, pause_s)
                    points.append({"kernel": name, "direction": direction, "way": way, **found})
            engine.load_blocks(keys, np.roll(blocks, 1), stream=stream).wait()
            holds = np.empty(cache.num_blocks, dtype=np.int64)
            holds[np.roll(blocks, 1)] = blocks
            cache.require(holds, link.host)
            engine.shutdown()
            cache.close()
    return points


def beside(kernels, ours, others, part_bytes, pause_s):
    """What `ours` costs the kernels, what contiguous copies of as many bytes a second cost, and the difference.

    The kernels run alone before and after every run beside a transfer, and a slowdown is against the mean of these two;
    the one before the first warms up. Ours and the contiguous copies take turns in being first. So neither clocks nor
    power, which drift by more than what is to be seen, favour one of them. Medians; the difference is of the two
    slowdowns of one repeat, in points, with its quartiles.
    """
    kernels.run()
    before_s, pace_s = kernels.run()[0], pause_s
    slowdowns, rates = {"ours": [], "contiguous": []}, {"ours": [], "contiguous": []}
    for repeat in range(REPEATS):
        for which in ("contiguous", "ours") if repeat % 2 else ("ours", "contiguous"):
            seconds, rate = kernels.run(ours, pause_s) if which == "ours" else kernels.run(others, pace_s)
            after_s = kernels.run()[0]
            slowdowns[which].append(100 * (2 * seconds / (before_s + after_s) - 1))
            rates[which].append(rate)
            before_s = after_s
            if which == "ours":
                pace_s = max(pause_s, part_bytes / statistics.median(rates["ours"]))
    differences = np.subtract(slowdowns["ours"], slowdowns["contiguous"])
    return {
        "gbps": statistics.median(rates["ours"]) / 1e9,
        "slowdown_percent": statistics.median(slowdowns["ours"]),
        "contiguous_gbps": statistics.median(rates["contiguous"]) / 1e9,
        "contiguous_slowdown_percent": statistics.median(slowdowns["contiguous"]),
        "difference_points": statistics.median(differences.tolist()),
        "difference_quartiles": np.percentile(differences, [25, 75]).tolist(),
    }
