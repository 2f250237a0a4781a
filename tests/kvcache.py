"""A KV cache on the device in the shapes that engines use, written and read by plain copies, one a piece.

The oracle of every correctness test: it knows where the pieces of a block lie from its own arithmetic, and goes neither
through the planner nor through a layout.
"""

import dataclasses
import functools
import inspect
import os
import struct
import subprocess
import sys

import numpy as np
import reference

import kvortex
from kvortex.codec import CODECS, planes_of
from kvortex.slots import stride_bytes
from kvortex.transfer import packed_bytes

_NOISE = np.random.default_rng(20).bytes(1 << 20)

# "gathered" lies as "separate_allocations" does, and `make_engine` lets a kernel move it; "packed" so, packed by q8.
SHAPES = ("one_allocation", "separate_allocations", "gathered", "packed", "uneven", "cross_layer", "mla")


def content(key_id, generation, nbytes):
    """Random-looking bytes that name their key and generation and differ at every offset."""
    start = (key_id * 7919 + generation * 104729) % (len(_NOISE) - nbytes)
    return (struct.pack("<QQ", key_id, generation) + _NOISE[start : start + nbytes])[:nbytes]


def keys_of(key_ids):
    """A (n, 32) uint8 array: one arbitrary key for each number."""
    keys = np.zeros((len(key_ids), 32), dtype=np.uint8)
    keys[:, :8] = np.asarray(key_ids, dtype=np.uint64)[:, None].view(np.uint8).reshape(-1, 8)
    keys[:, 31] = 1
    return keys


class DeviceCache:
    """`num_blocks` blocks of `num_layers` layers, each a K and a V piece of `piece_bytes`."""

    def __init__(self, device, shape="one_allocation", num_blocks=32, num_layers=4, piece_bytes=256):
        self.device, self.shape, self.num_blocks = device, shape, num_blocks
        layer_bytes = num_blocks * piece_bytes
        if shape == "one_allocation":  # (kv, layers, blocks, piece)
            buffers = [kvortex.DeviceBuffer(2 * num_layers * layer_bytes, device)]
            places = [
                (0, (part * num_layers + layer) * layer_bytes, piece_bytes, piece_bytes)
                for layer in range(num_layers)
                for part in range(2)
            ]
            self.layout = kvortex.KVLayout.contiguous(
                buffers[0].address,
                num_layers=num_layers,
                num_blocks=num_blocks,
                block_size=piece_bytes // 16,
                num_heads=1,
                head_dim=8,
                itemsize=2,
            )
        elif shape in (
            "separate_allocations",
            "gathered",
            "packed",
        ):  # as vLLM: one tensor a layer, K and V packed in each block
            buffers = [kvortex.DeviceBuffer(2 * layer_bytes, device) for _ in range(num_layers)]
            places = [(layer, 0, 2 * piece_bytes, 2 * piece_bytes) for layer in range(num_layers)]
        elif shape == "uneven":  # one allocation, layers at uneven distances
            gaps = np.cumsum([0] + [256 * (1 + layer % 3) for layer in range(2 * num_layers)])
            buffers = [kvortex.DeviceBuffer(2 * num_layers * layer_bytes + int(gaps[-1]), device)]
            places = [
                (0, run * layer_bytes + int(gaps[run]), piece_bytes, piece_bytes) for run in range(2 * num_layers)
            ]
        elif shape == "cross_layer":
            buffers = [kvortex.DeviceBuffer(2 * num_layers * layer_bytes, device)]
            places = [(0, 0, 2 * num_layers * piece_bytes, 2 * num_layers * piece_bytes)]
        elif shape == "mla":  # one latent a layer, pieces of an odd size
            piece_bytes = piece_bytes + 64
            buffers = [kvortex.DeviceBuffer(num_blocks * piece_bytes, device) for _ in range(num_layers)]
            places = [(layer, 0, piece_bytes, piece_bytes) for layer in range(num_layers)]
        self.buffers, self.places = buffers, places
        self.block_bytes = sum(size for _, _, _, size in places)
        planes = planes_of_layers(num_layers, piece_bytes) if shape == "packed" else ()
        if shape != "one_allocation":
            runs = [(buffers[buffer].address + start, stride, size) for buffer, start, stride, size in places]
            self.layout = kvortex.KVLayout(runs, num_blocks, planes=planes)
        self.fill(0xEE)

    def content(self, key_id, generation=0):
        """The bytes to write for a key: what a codec can pack, where one does."""
        data = content(key_id, generation, self.block_bytes)
        return bytes(np.frombuffer(data, np.uint16) & 0xBFFF) if self.shape == "packed" else data  # magnitudes below 2

    def loaded(self, key_id, generation=0):
        """The bytes that a load brings for a key."""
        return self.back(self.content(key_id, generation))

    def back(self, data):
        """The bytes that a block of these comes back with: after a codec, what the reference makes of them."""
        return there_and_back(data, self.layout.planes) if self.shape == "packed" else data

    def write(self, block, data):
        """Put the bytes of a block record into its pieces; complete on return."""
        assert len(data) == self.block_bytes
        done = 0
        for buffer, start, stride, size in self.places:
            self.buffers[buffer].copy_from(data[done : done + size], start + block * stride)
            done += size

    def read(self, block, stream=None):
        """The bytes of a block record, read on `stream` after the work that is on it."""
        data, done = np.empty(self.block_bytes, dtype=np.uint8), 0
        for buffer, start, stride, size in self.places:
            self.buffers[buffer].copy_to(data[done : done + size], start + block * stride, stream)
            done += size
        if stream is not None:
            stream.synchronize()
        return data.tobytes()

    def scribble(self, block, byte, stream):
        """Overwrite a block on `stream`, without waiting."""
        for buffer, start, stride, size in self.places:
            self.buffers[buffer].fill(byte, start + block * stride, size, stream)

    def fill(self, byte):
        """Overwrite all of the cache; complete on return."""
        for buffer in self.buffers:
            buffer.fill(byte)

    def close(self):
        for buffer in self.buffers:
            buffer.close()


def planes_of_layers(num_layers, piece_bytes, dim=64):
    """K and V of each layer, one after the other, as vectors of `dim` numbers of 16 bits."""
    rows = piece_bytes // (2 * dim)
    return [
        plane
        for part in range(2 * num_layers)
        for plane in planes_of("kv"[part % 2], part * piece_bytes, rows, 2 * dim, 2 * dim, part // 2)
    ]


@functools.lru_cache(maxsize=4096)
def there_and_back(data, planes, codec="q8"):
    """What the slow reference makes of a block: each plane encoded and decoded."""
    block = np.frombuffer(data, np.uint8).copy()
    for plane in planes:
        rows = np.lib.stride_tricks.as_strided(
            block[plane.first_byte :], (plane.num_rows, plane.row_bytes), (plane.step_bytes, 1)
        )
        vectors = rows.copy().view(np.uint16)
        bits = CODECS[codec]["kv".index(plane.role)]
        rows[:] = reference.decode(*reference.encode(vectors, bits)[:2]).view(np.uint8)
    return block.tobytes()


class ConfigWithTiers(kvortex.KVortexConfig):
    """As with tiers below the pool, which are not there yet: they want a header page."""

    header_bytes = 4096


def make_engine(cache, num_slots, make_config=kvortex.KVortexConfig, **settings):
    """An engine over `cache` with exactly `num_slots` slots, all of them registered."""
    settings.setdefault("gather_ctas", 4 if cache.shape in ("gathered", "packed") else 0)
    settings.setdefault("codec", "q8" if cache.shape == "packed" else "exact")
    settings = {"cpu_pool_size_bytes": 1, "shutdown_timeout_ms": 20_000, **settings}
    config = make_config(device=cache.device.name, **settings)
    slot_bytes = packed_bytes(cache.layout, config.codec, config.exact_layers)
    stride = stride_bytes(slot_bytes, config.header_bytes)
    config = dataclasses.replace(config, cpu_pool_size_bytes=num_slots * stride)
    engine = kvortex.KVortexEngine.create(config, layout=cache.layout)
    if settings.get("pool_chunk_bytes") is None:
        engine.wait_ready(60_000)
    return engine


def is_mapped(address):
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps]
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


def leaves_its_engine_behind(test):
    """Run the test in a process of its own: an engine that loses patience keeps its device, and all that is on it."""

    @functools.wraps(test)
    def run(*args, **fixtures):
        if os.environ.get("KVORTEX_TEST_ALONE"):
            return test(*args, **fixtures)
        name = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].rpartition(" ")[0]  # with its parameters
        node = f"{inspect.getsourcefile(test)}::{name}"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", node],
            env={**os.environ, "KVORTEX_TEST_ALONE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr

    return run
