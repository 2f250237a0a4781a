"""What an engine moves, and what it is compared with: contiguous copies, batch calls, a loop over the pieces."""

import ctypes
import os
import subprocess
import sysconfig
import tempfile
import time

import numpy as np

import kvortex
from kvortex.driver._device import entry_points

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# A loop in Python would measure Python.
LOOP_SOURCE = """
#include "kvortex/driver.h"

int loop(int (*copy)(size_t, size_t, size_t, void *), const size_t *targets, const size_t *sources, size_t count,
         size_t bytes, void *stream)
{
    int code = 0;
    for (size_t i = 0; i < count && !code; i++)
        code = copy(targets[i], sources[i], bytes, stream);
    return code;
}

/* One strided copy a block: `rows` rows of `bytes`, `pitch` apart on the device and side by side on the host. */
int strided(int (*copy)(const kv_memcpy_2d *, void *), int to_host, const size_t *on_device, const size_t *on_host,
            size_t count, size_t rows, size_t bytes, size_t pitch, void *stream)
{
    int code = 0;
    for (size_t i = 0; i < count && !code; i++) {
        kv_memcpy_2d block = {.width_bytes = bytes, .height = rows};
        block.source_memory_type = to_host ? KV_MEMORY_TYPE_DEVICE : KV_MEMORY_TYPE_HOST;
        block.target_memory_type = to_host ? KV_MEMORY_TYPE_HOST : KV_MEMORY_TYPE_DEVICE;
        block.source_pitch = to_host ? pitch : bytes;
        block.target_pitch = to_host ? bytes : pitch;
        if (to_host) {
            block.source_device = on_device[i];
            block.target_host = (void *)on_host[i];
        } else {
            block.source_host = (const void *)on_host[i];
            block.target_device = on_device[i];
        }
        code = copy(&block, stream);
    }
    return code;
}
"""
INCLUDE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "include")


def timed(run, *arguments):
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def keys_of(count, rng):
    return rng.integers(0, 256, (count, 32), dtype=np.uint8)


class Cache:
    """Random blocks on a device in one of the shapes, and the place of every piece by its own arithmetic.

    The shapes: "separate" (an allocation for each piece of a block), "even" (one allocation, all pieces of a block at
    one distance), "apart" (one allocation, all K pieces before all V pieces, but K and V in turn in the slot),
    "cross-layer" (one piece) and "4 GiB pitch" ("even" at that distance).
    """

    def __init__(self, device, shape, pieces, piece_bytes, nbytes, rng):
        self.num_blocks = nbytes // (pieces * piece_bytes)
        run_bytes = self.num_blocks * piece_bytes
        pitch = 4 * GIB if shape == "4 GiB pitch" else run_bytes
        if shape == "separate":
            self.buffers = [kvortex.DeviceBuffer(run_bytes, device) for _ in range(pieces)]
            self.places = [(buffer, 0) for buffer in self.buffers]
        else:
            self.buffers = [kvortex.DeviceBuffer((pieces - 1) * pitch + run_bytes, device)]
            order = range(pieces)
            if shape == "apart":
                order = [part * pieces // 2 + layer for layer in range(pieces // 2) for part in range(2)]
            self.places = [(self.buffers[0], number * pitch) for number in order]
        self.bases = np.array([buffer.address + start for buffer, start in self.places], dtype=np.uint64)
        runs = [(int(base), piece_bytes, piece_bytes) for base in self.bases]
        self.layout = kvortex.KVLayout(runs, self.num_blocks)
        self.piece_bytes, self.block_bytes = piece_bytes, pieces * piece_bytes
        self.data = rng.integers(0, 1 << 64, pieces * run_bytes // 8, dtype=np.uint64).view(np.uint8)
        self.data = self.data.reshape(pieces, self.num_blocks, piece_bytes)
        for (buffer, start), content in zip(self.places, self.data, strict=True):
            buffer.copy_from(content, start)

    @property
    def nbytes(self):
        return self.data.nbytes

    def pieces_of(self, blocks, slots):
        """Device addresses and offsets in a dense pool of every piece of these blocks, in the order of the blocks."""
        on_device = self.bases + np.uint64(self.piece_bytes) * blocks[:, None].astype(np.uint64)
        in_slot = np.arange(self.bases.size, dtype=np.uint64) * np.uint64(self.piece_bytes)
        in_pool = in_slot + np.uint64(self.block_bytes) * slots[:, None].astype(np.uint64)
        return on_device.ravel(), in_pool.ravel()

    def require(self, holds, scratch):
        """End the run unless block b holds what block holds[b] was created with."""
        for (buffer, start), content in zip(self.places, self.data, strict=True):
            found = scratch[: content.nbytes]
            buffer.copy_to(found, start)
            wrong = (found.reshape(content.shape) != content[holds]).any(axis=1).sum()
            if wrong:
                raise SystemExit(f"{wrong} of {self.num_blocks} blocks are wrong")

    def close(self):
        for buffer in self.buffers:
            buffer.close()


class Link:
    """Pinned memory, device memory and streams of their own, on which others' ways of copying are timed."""

    def __init__(self, device, nbytes):
        self.pool = kvortex.PinnedPool(nbytes, nbytes, device)
        self.host = np.frombuffer(self.pool.view(0), dtype=np.uint8)
        self.memory = kvortex.DeviceBuffer(nbytes, device)
        self.streams = [kvortex.Stream.create(device) for _ in range(3)]
        self.table = entry_points(device)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        batch = ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 3, size, *[pointer] * 2, size, pointer, pointer)
        self.batch = batch(self.table["memcpy_batch_async"])
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "loop.c")
            with open(source, "w", encoding="utf-8") as file:
                file.write(LOOP_SOURCE)
            compiler = sysconfig.get_config_var("CC").split()
            flags = ["-O2", "-shared", "-fPIC", "-I", INCLUDE, "-o", source + ".so"]
            subprocess.run([*compiler, *flags, source], check=True)
            library = ctypes.CDLL(source + ".so")
        self.loop, self.strided_loop = library.loop, library.strided
        self.loop.argtypes = [pointer, pointer, pointer, size, size, pointer]
        self.strided_loop.argtypes = [pointer, ctypes.c_int, pointer, pointer, *[size] * 4, pointer]
        # ctypes calls need the context that torch, and the engine, use.
        context = ctypes.c_void_p()
        retain = ctypes.CFUNCTYPE(ctypes.c_int, pointer, ctypes.c_int)(self.table["device_primary_ctx_retain"])
        push = ctypes.CFUNCTYPE(ctypes.c_int, pointer)(self.table["ctx_push_current"])
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

    def batches(self, direction, on_device, in_pool, piece_bytes, at_once=None):
        """Seconds of cuMemcpyBatchAsync over all pieces, `at_once` in a call or all: (of the calls, to the end)."""
        targets, sources = in_pool + np.uint64(self.host.ctypes.data), on_device
        if direction == "load":
            targets, sources = sources, targets
        sizes = np.full(targets.size, piece_bytes, dtype=np.uint64)
        attributes = np.array([1, 0, 0, 0, 0, 0], dtype=np.int32)  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        stream, step = self.streams[0], at_once or targets.size
        places = [(a.ctypes.data, b.ctypes.data, c.ctypes.data) for a, b, c in [(targets, sources, sizes)]][0]

        def run():
            for start in range(0, targets.size, step):
                code = self.batch(
                    *(place + 8 * start for place in places), min(step, targets.size - start), attributes.ctypes.data,
                    ctypes.byref(first), 1, ctypes.byref(failed), stream.handle,
                )  # fmt: skip
                if code:
                    raise SystemExit(f"cuMemcpyBatchAsync answered {code} at copy {start + failed.value}")

        start = time.perf_counter()
        run()
        issued = time.perf_counter() - start
        stream.synchronize()
        return issued, time.perf_counter() - start

    def piece_loop(self, direction, on_device, in_pool, piece_bytes):
        """Seconds of one plain asynchronous copy a piece, in a loop in C."""
        targets, sources, row = in_pool + np.uint64(self.host.ctypes.data), on_device, "memcpy_dtoh_async"
        if direction == "load":
            targets, sources, row = sources, targets, "memcpy_htod_async"
        stream = self.streams[0]

        def run():
            code = self.loop(
                self.table[row], targets.ctypes.data, sources.ctypes.data, targets.size, piece_bytes, stream.handle
            )
            if code:
                raise SystemExit(f"a piece-wise copy answered {code}")
            stream.synchronize()

        return timed(run)

    def strided(self, direction, on_device, in_pool, pieces, piece_bytes):
        """Seconds of the calls alone: one cuMemcpy2DAsync a block, in a loop in C. Pieces lie at even distances."""
        first_on_device, first_in_pool = on_device[::pieces].copy(), in_pool[::pieces].copy()
        first_in_pool += np.uint64(self.host.ctypes.data)
        stream, start = self.streams[0], time.perf_counter()
        code = self.strided_loop(
            self.table["memcpy_2d_async"], direction == "save", first_on_device.ctypes.data, first_in_pool.ctypes.data,
            first_on_device.size, pieces, piece_bytes, int(on_device[1] - on_device[0]), stream.handle,
        )  # fmt: skip
        issued = time.perf_counter() - start
        if code:
            raise SystemExit(f"cuMemcpy2DAsync answered {code}")
        stream.synchronize()
        return issued

    def close(self):
        for stream in self.streams:
            stream.close()
        self.memory.close()
        del self.host
        self.pool.close()
