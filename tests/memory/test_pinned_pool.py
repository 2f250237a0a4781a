"""PinnedPool: exact sizes, chunks that no slot straddles, background registering, honest refusals."""

import threading

import numpy as np
import pytest

import kvortex
from kvortex import ConfigError, PinnedPool, PoolExhausted

PAGE = 4096


@pytest.mark.parametrize("payload_bytes", [1, 4095, 4096, 4097, 70_000])
@pytest.mark.parametrize("header_bytes", [0, 4096])
def test_slots_are_page_aligned_and_exactly_as_many_as_fit(device, payload_bytes, header_bytes):
    with PinnedPool(1 << 20, payload_bytes, device, header_bytes=header_bytes) as pool:
        assert pool.stride_bytes % PAGE == 0
        assert 0 <= pool.stride_bytes - payload_bytes - header_bytes < PAGE
        assert pool.num_slots == (1 << 20) // pool.stride_bytes
        assert pool.nbytes == pool.num_slots * pool.stride_bytes
        addresses = [pool.address(slot) for slot in range(pool.num_slots)]
        assert {b - a for a, b in zip(addresses, addresses[1:], strict=False)} <= {pool.stride_bytes}
        assert all((address - header_bytes) % PAGE == 0 for address in addresses)


def test_first_chunk_serves_at_once_and_the_rest_follows(device):
    with PinnedPool(64 * PAGE, PAGE, device, first_chunk_bytes=8 * PAGE, chunk_bytes=10 * PAGE) as pool:
        assert pool.slots_ready >= 8
        pool.wait_ready(20_000)
        assert pool.slots_ready == 64
        assert pool.bytes_ready == pool.nbytes


@pytest.mark.host
def test_no_slot_straddles_two_registrations(device, host):
    host.count_calls()
    with PinnedPool(64 * 3 * PAGE, 3 * PAGE, device, first_chunk_bytes=8 * PAGE, chunk_bytes=10 * PAGE) as pool:
        pool.wait_ready(20_000)
        assert host.num_calls("mem_host_register") == 1 + -(-(64 - 2) // 3)
        buffer = kvortex.DeviceBuffer(3 * PAGE, device)
        for slot in range(64):  # a copy that crossed a registration would be refused
            buffer.copy_from(pool.view(slot))
        buffer.close()


@pytest.mark.host
def test_closing_ends_the_background_and_gives_everything_back(device, host):
    before = host.live_objects()
    pool = PinnedPool(4000 * PAGE, PAGE, device, first_chunk_bytes=PAGE, chunk_bytes=PAGE)
    pool.close()
    pool.close()
    assert host.live_objects() == before
    with pytest.raises(kvortex.EngineClosed):
        pool.view(0)


@pytest.mark.host
def test_wait_ready_ends_with_the_error_that_ended_the_registering(device, host):
    host.fail_call(5, 2, field="mem_host_register")
    with PinnedPool(64 * PAGE, PAGE, device, first_chunk_bytes=PAGE, chunk_bytes=PAGE) as pool:
        with pytest.raises(PoolExhausted, match="ulimit -l"):
            pool.wait_ready(20_000)
        assert pool.slots_ready == 4
        pool.view(3)[:] = bytes(PAGE)
        with pytest.raises(ValueError, match="not registered yet"):
            pool.view(4)


@pytest.mark.host
def test_first_registration_refused_leaves_nothing(device, host):
    before = host.live_objects()
    host.fail_call(1, 2, field="mem_host_register")
    with pytest.raises(PoolExhausted, match="RLIMIT_MEMLOCK"):
        PinnedPool(64 * PAGE, PAGE, device)
    host.fail_call(1, 999, field="mem_host_register")
    with pytest.raises(kvortex.DriverError):
        PinnedPool(64 * PAGE, PAGE, device)
    assert host.live_objects() == before


def test_plain_mode_has_the_same_slots(device):
    with PinnedPool(64 * PAGE, 100, device, driver_allocated=True) as pool:
        pool.wait_ready(0)
        assert pool.slots_ready == 64
        pool.view(63)[:] = bytes(range(100))
        assert bytes(pool.view(63)) == bytes(range(100))


def test_views_hold_the_mapping_after_close(device):
    pool = PinnedPool(4 * PAGE, PAGE, device)
    array = np.frombuffer(pool.view(2), dtype=np.uint8)
    array[:] = 7
    pool.close()
    assert (array == 7).all()
    del array


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, PAGE), "set cpu_pool_size_bytes to at least 4096"),
        ((PAGE - 1, PAGE), "set cpu_pool_size_bytes to at least 4096"),
        ((PAGE, 0), "payload_bytes must be"),
        ((PAGE, 1 << 32), "payload_bytes must be"),
    ],
)
def test_absurd_sizes_are_refused(device, arguments, match):
    with pytest.raises(ConfigError, match=match):
        PinnedPool(*arguments, device)
    with pytest.raises(ConfigError, match="header_bytes"):
        PinnedPool(1 << 20, PAGE, device, header_bytes=512)


def test_pool_beyond_memory_is_refused_before_anything_is_touched(device):
    with pytest.raises(PoolExhausted, match="exceeds what available memory leaves"):
        PinnedPool(1 << 45, 1 << 20, device)


def test_cgroup_limits_are_read(tmp_path, monkeypatch):
    from kvortex.memory import limits

    group = tmp_path / "memory" / "pod" / "worker"
    group.mkdir(parents=True)
    for folder, limit, usage in ((group, 1 << 62, 5), (group.parent, 1000, 400), (tmp_path / "memory", 1 << 62, 9)):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    monkeypatch.setattr(limits, "CGROUP_ROOT", tmp_path)
    assert limits.cgroup_free_bytes(["4:memory:/pod/worker"]) == 600
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("77\n")
    unified = tmp_path / "unified"
    unified.mkdir()
    (unified / "memory.max").write_text("5000\n")
    (unified / "memory.current").write_text("4000\n")
    assert limits.cgroup_free_bytes(["0::/unified"]) == 1000
    assert limits.cgroup_free_bytes(["0::/elsewhere"]) is None


@pytest.mark.host
def test_waiters_are_woken_when_the_pool_is_closed(device, host):
    host.count_calls()
    pool = PinnedPool(20_000 * PAGE, PAGE, device, first_chunk_bytes=PAGE, chunk_bytes=PAGE)
    answers = []

    def wait():
        try:
            pool.wait_ready()
            answers.append("ready")
        except kvortex.EngineClosed:
            answers.append("closed")

    thread = threading.Thread(target=wait)
    thread.start()
    pool.close()
    thread.join(20)
    assert answers in (["closed"], ["ready"])
