"""Save and load rates of engines with codecs beside one without: the same blocks, in turn, in one run.

K and V of each layer are separate allocations with 64 KiB a block. Data are random bfloat16 numbers; after the first
and the last round they are compared with what was saved, and what differs is printed as the root of the mean square.
"""

import argparse
import statistics
import time
from contextlib import ExitStack

import numpy as np

import kvortex
from bench.gpu.__main__ import driver_version
from bench.gpu.link import keys_of
from kvortex.codec import CODECS, planes_of
from kvortex.slots import stride_bytes
from kvortex.transfer import packed_bytes

LAYERS, TOKENS, HEADS, DIM = 32, 16, 16, 128
PIECE_BYTES = TOKENS * HEADS * DIM * 2
WAYS = [("exact", 0), ("q8", 4), ("q8", 8), *((codec, 12) for codec in CODECS if codec != "exact")]


class Bench:
    """A cache of `2 * num_blocks` blocks; the first half is saved, and loaded into the other."""

    def __init__(self, stack, device, num_blocks):
        self.num_blocks, self.stream = num_blocks, stack.enter_context(kvortex.Stream.create(device))
        rng = np.random.default_rng(1)
        self.keys, self.buffers, self.numbers = keys_of(num_blocks, rng), [], []
        for _ in range(2 * LAYERS):
            numbers = rng.standard_normal(num_blocks * PIECE_BYTES // 2, np.float32).view(np.uint32) >> 16
            self.numbers.append(numbers.astype(np.uint16))
            self.buffers.append(stack.enter_context(kvortex.DeviceBuffer(2 * num_blocks * PIECE_BYTES, device)))
            self.buffers[-1].copy_from(self.numbers[-1].view(np.uint8))
        self.engines = {}
        for codec, ctas in WAYS:
            layout = self.layout()
            pool_bytes = num_blocks * stride_bytes(packed_bytes(layout, codec))
            config = kvortex.KVortexConfig(
                cpu_pool_size_bytes=pool_bytes, device=device.name, codec=codec, gather_ctas=ctas
            )
            self.engines[codec, ctas] = stack.enter_context(kvortex.KVortexEngine.create(config, layout=layout))
            self.engines[codec, ctas].wait_ready()

    def layout(self):
        planes = [
            plane
            for part in range(2 * LAYERS)
            for plane in planes_of("kv"[part % 2], part * PIECE_BYTES, TOKENS * HEADS, 2 * DIM, 2 * DIM, part // 2)
        ]
        runs = [(buffer, PIECE_BYTES, PIECE_BYTES) for buffer in self.buffers]
        return kvortex.KVLayout(runs, 2 * self.num_blocks, planes=planes)

    def round(self, engine):
        """GB/s of the cache's bytes, saved and loaded."""
        blocks, rates = np.arange(self.num_blocks), []
        engine.clear()
        for verb, ids in ((engine.save_blocks, blocks), (engine.load_blocks, blocks + self.num_blocks)):
            start = time.perf_counter()
            job = verb(self.keys, ids, stream=self.stream)
            job.wait()
            rates.append(self.num_blocks * 2 * LAYERS * PIECE_BYTES / 1e9 / (time.perf_counter() - start))
            if job.num_blocks != self.num_blocks:
                raise SystemExit(f"{job.num_blocks} of {self.num_blocks} blocks were moved")
        return rates

    def errors(self):
        """Of K and of V, of the layer where it is largest: loaded against saved. Spoils the targets."""
        found = []
        for buffer, numbers in zip(self.buffers, self.numbers, strict=True):
            back = np.empty(self.num_blocks * PIECE_BYTES, np.uint8)
            buffer.copy_to(back, len(back))
            buffer.fill(7, len(back), len(back))
            was, now = ((words.astype(np.uint32) << 16).view(np.float32) for words in (numbers, back.view(np.uint16)))
            found.append(float(np.sqrt(((now - was) ** 2).mean() / (was**2).mean())))
        return [max(found[0::2]), max(found[1::2])]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.packed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--blocks", type=int, default=128, help="blocks of 4 MiB (128)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count, after a first one (7)")
    args = parser.parse_args(argv)
    device = kvortex.Device.open(args.device)
    with device, ExitStack() as stack:
        bench = Bench(stack, device, args.blocks)
        rates, errors = {way: [] for way in WAYS}, {way: [0.0, 0.0] for way in WAYS}
        for number in range(args.rounds + 1):
            for way, engine in bench.engines.items():
                rates[way].append(bench.round(engine))
                if number in (0, args.rounds):
                    errors[way] = [max(both) for both in zip(errors[way], bench.errors(), strict=True)]
        rows = {way: [statistics.median(both) for both in zip(*found[1:], strict=True)] for way, found in rates.items()}
        print(f"{device.name}, {driver_version(device)}: {args.blocks} blocks of {2 * LAYERS} x "
              f"{PIECE_BYTES // 1024} KiB, medians of {args.rounds}, GB/s of the cache's bytes\n")  # fmt: skip
        print("| codec | thread blocks | save | load | of exact | error of K, V, % | blocks a GiB |")
        print("|---|---|---|---|---|---|---|")
        for (codec, ctas), (save, load) in rows.items():
            ratios = [rate / exact for rate, exact in zip((save, load), rows["exact", 0], strict=True)]
            error = ", ".join(f"{100 * one:.2f}" for one in errors[codec, ctas])
            per_gib = (1 << 30) / bench.engines[codec, ctas].pool.stride_bytes
            print(f"| {codec} | {ctas or '-'} | {save:.1f} | {load:.1f} | {ratios[0]:.2f}, {ratios[1]:.2f} | {error} | "
                  f"{per_gib:.0f} |")  # fmt: skip
        exact = errors["exact", 0]
    if exact != [0.0, 0.0]:
        raise SystemExit("exact blocks came back with other bytes")


if __name__ == "__main__":
    main()
