"""A float, a text or a bool is no whole number, wherever a caller may give one; numpy's integers are."""

import decimal

import numpy as np
import pytest

import kvortex
from kvortex.keys import digest_of, persistent_names
from kvortex.replay import ReplayOptions, read_trace, sweep
from kvortex.replay.trace import Request
from kvortex.slots import Slots
from kvortex.transfer import Carrier

KEYS = kvortex.block_keys(np.arange(2), 1)
REQUESTS = [Request(0, 512, 1, np.array([1]))]
NO_WHOLE_NUMBERS = [4.0, 4.5, "4", b"4", True, np.True_, np.float64(4), decimal.Decimal(4), np.timedelta64(4, "s"),
                    np.array([4.0]), np.array(True), 4 + 0j]  # fmt: skip


@pytest.fixture
def pool(device):
    with kvortex.PinnedPool(1 << 20, 4096, device) as pool:
        pool.wait_ready()
        yield pool


@pytest.fixture
def buffer(device):
    with kvortex.DeviceBuffer(4096, device) as buffer:
        yield buffer


def index():
    index = kvortex.BlockIndex(64)
    index.add_slots(0, 32)
    return index


def options(**changes):
    """A setting of a replay, which may be a text nowhere: the command line reads texts itself."""
    return ReplayOptions(**{"block_bytes": 4096} | changes)


# Each takes a number and returns what must not depend on its type.
TAKERS = {
    "payload_bytes": lambda n: Slots.of(1 << 20, n),
    "first_chunk_bytes": lambda n: Slots.of(1 << 20, 4096, first_chunk_bytes=n),
    "chunk_bytes": lambda n: Slots.of(1 << 20, 4096, chunk_bytes=n),
    "num_slots": lambda n: kvortex.BlockIndex(n).num_slots,
    "first of add_slots": lambda n: kvortex.BlockIndex(9).add_slots(n, 1),
    "count of add_slots": lambda n: kvortex.BlockIndex(9).add_slots(0, n),
    "admit": lambda n: index().reserve(KEYS, 1, admit=n)[1].tolist(),
    "coldest": lambda n: index().coldest(n).slots.tolist(),
    "evict": lambda n: index().evict(n),
    "slot_info": lambda n: index().slot_info(n)["state"],
    "block_size": lambda n: kvortex.block_keys(range(9), n).tolist(),
    "block_size of many": lambda n: kvortex.block_keys_many([range(9)], n)[1].tolist(),
    "group": digest_of,
    "rank": lambda n: persistent_names(KEYS, bytes(32), n, bytes(32)).tolist(),
    "max_jobs": lambda n: kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, max_jobs=n),
    "num_threads": lambda n: kvortex.DiskTier("/", 1 << 30, num_threads=n),
    "queue_blocks": lambda n: kvortex.DiskTier("/", 1 << 30, queue_blocks=n),
    "num_pieces": lambda n: options(num_pieces=n),
    "pool_blocks": lambda n: options(pool_blocks=n),
    "inflight": lambda n: options(inflight=n),
    "corrupt_slots": lambda n: options(corrupt_slots=n),
    "disk_blocks": lambda n: options(disk="/", disk_blocks=n),
    "write_bytes_per_s": lambda n: options(disk="/", disk_blocks=1, write_bytes_per_s=n),
    "sizes of a sweep": lambda n: sweep(REQUESTS, [n]),
}
SIZES = {  # where a text is a size
    "disk_bytes": lambda n: kvortex.DiskTier("/", n),
    "segment_bytes": lambda n: kvortex.DiskTier("/", 1 << 30, segment_bytes=n),
    "write_bytes_per_s": lambda n: kvortex.DiskTier("/", 1 << 30, write_bytes_per_s=n),
    "block_bytes": lambda n: kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, block_bytes=n),
}
ON_A_DEVICE = {
    "nbytes": lambda n, pool, buffer: kvortex.DeviceBuffer(n, pool.device).nbytes,
    "offset of copy_from": lambda n, pool, buffer: buffer.copy_from(bytes(16), n),
    "offset of copy_to": lambda n, pool, buffer: buffer.copy_to(bytearray(16), n),
    "byte of fill": lambda n, pool, buffer: buffer.fill(n),
    "offset of fill": lambda n, pool, buffer: buffer.fill(0, n),
    "nbytes of fill": lambda n, pool, buffer: buffer.fill(0, 0, n),
    "address": lambda n, pool, buffer: pool.address(n),
    "view": lambda n, pool, buffer: pool.view(n).nbytes,
    "slot": lambda n, pool, buffer: pool.slot(n).slot,
    "num_savers": lambda n, pool, buffer: Carrier(pool.device, pool, num_savers=n).close(),
    "num_loaders": lambda n, pool, buffer: Carrier(pool.device, pool, num_loaders=n).close(),
    "limit_bytes": lambda n, pool, buffer: kvortex.DevicePool(n, pool.device).limit_bytes,
}


def refused(take, values=NO_WHOLE_NUMBERS):
    for value in values:
        with pytest.raises((TypeError, kvortex.ConfigError), match="whole number, got "):
            take(value)


@pytest.mark.parametrize("name", TAKERS)
def test_what_is_no_whole_number_is_refused(name):
    refused(TAKERS[name])
    assert TAKERS[name](np.int16(4)) == TAKERS[name](4)


def test_what_is_no_whole_number_is_no_size_of_a_pool(device):
    refused(lambda n: Slots.of(n, 4096))
    refused(lambda n: kvortex.PinnedPool(n, 4096, device))


@pytest.mark.parametrize("name", SIZES)
def test_what_is_no_whole_number_is_no_size(name):
    refused(SIZES[name], [value for value in NO_WHOLE_NUMBERS if value != "4"])
    assert SIZES[name](np.int16(4)) == SIZES[name](4) == SIZES[name]("4")


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_what_is_no_whole_number_is_refused_by_memory(name, pool, buffer):
    refused(lambda value: ON_A_DEVICE[name](value, pool, buffer))
    assert ON_A_DEVICE[name](np.int16(4), pool, buffer) == ON_A_DEVICE[name](4, pool, buffer)


def test_the_limit_of_a_trace_is_a_whole_number_or_none(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1]}\n' * 6)
    refused(lambda limit: read_trace(path, limit))
    assert [len(read_trace(path, limit)) for limit in (np.int16(4), None, 10**30)] == [4, 6, 6]


@pytest.mark.parametrize("value", [value for value in NO_WHOLE_NUMBERS if not isinstance(value, np.ndarray)])
def test_what_is_no_whole_number_is_no_stream(buffer, value):
    with pytest.raises(TypeError, match="stream must be an int handle"):
        buffer.fill(0, stream=value)


def test_a_slot_number_of_few_bits_names_its_slot(pool):
    """Numpy multiplies within the type: 20 times 4096 is 16384 in 16 bits."""
    pool.view(20)[:4] = b"here"
    assert bytes(pool.view(np.uint16(20))[:4]) == b"here"


def test_a_huge_number_is_shown_by_its_size():
    with pytest.raises(kvortex.ConfigError, match="max_jobs must be 1 to 65536, got an int of 100001 bits"):
        kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, max_jobs=1 << 100_000)
    with pytest.raises(kvortex.ConfigError, match=r"got '9{90,}\.\.\.$"):
        kvortex.KVortexConfig(cpu_pool_size_bytes="9" * 10_000)


@pytest.mark.parametrize("value", [-1, 1 << 41, *NO_WHOLE_NUMBERS[:5]])
def test_an_engine_without_a_tier_checks_its_times_too(value):
    config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, block_bytes=2048, device="host")
    with kvortex.KVortexEngine.create(config) as engine:
        with pytest.raises(ValueError, match="timeout_ms must be a whole number of milliseconds"):
            engine.flush(value)
        with pytest.raises(ValueError, match="promote_timeout_ms must be a whole number of milliseconds"):
            engine.load_blocks(KEYS[:1], data_ptrs=[np.zeros(2048, np.uint8)], promote_timeout_ms=value)
