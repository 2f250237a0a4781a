"""PinnedPool: exact sizes, chunks that no slot straddles, background registering, honest refusals."""

import contextlib
import ctypes
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import kvortex
from kvortex import ConfigError, PinnedPool, PoolExhausted

PAGE = 4096
MIB = 1 << 20


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


@contextlib.contextmanager
def no_thread_is_left():
    """No more threads after than before, give or take the moment in which the kernel buries one that was joined."""
    before = len(os.listdir("/proc/self/task"))
    yield
    for _ in range(200):
        if (after := len(os.listdir("/proc/self/task"))) <= before:
            return
        time.sleep(0.005)
    assert after <= before


def smaps_of(address):
    """The kernel's numbers, in KiB, on the mapping that an address lies in."""
    found, numbers = False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            found = int(head[1], 16) <= address < int(head[2], 16)
        elif found and line.endswith(" kB"):
            numbers[line.partition(":")[0]] = int(line.split()[1])
    return numbers


@pytest.mark.parametrize("huge_pages", [True, False])
def test_every_page_is_there_before_it_serves_and_zero(device, huge_pages):
    """The chunks are no multiples of the units in which memory is touched."""
    with PinnedPool(90 * MIB, 3 * MIB, device, first_chunk_bytes=5 * MIB, huge_pages=huge_pages) as pool:
        pool.wait_ready(20_000)
        numbers = smaps_of(pool.address(pool.num_slots // 2))
        assert numbers["Rss"] >= pool.nbytes // 1024
        assert numbers["AnonHugePages"] > 0 if huge_pages else numbers["AnonHugePages"] == 0
        assert pool.longest_call_ms > 0
        assert not np.frombuffer(pool, dtype=np.uint64).any()


@pytest.mark.host
@pytest.mark.parametrize("num_touchers", [0, 1, 16])
def test_who_registers_also_touches(device, host, monkeypatch, num_touchers):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(num_touchers))
    with PinnedPool(200 * MIB, MIB, device, first_chunk_bytes=MIB, chunk_bytes=50 * MIB) as pool:
        pool.wait_ready(20_000)
        assert smaps_of(pool.address(100))["Rss"] >= pool.nbytes // 1024


def test_a_pool_is_closed_at_any_moment_of_its_touching(device):
    for pause_ms in range(0, 20, 2):
        with no_thread_is_left():
            pool = PinnedPool(512 * MIB, MIB, device, first_chunk_bytes=MIB, chunk_bytes=64 * MIB)
            time.sleep(pause_ms / 1000)
            pool.close()


@pytest.mark.host
def test_fork_while_it_is_touched_leaves_the_child_without_a_pool(device):
    with PinnedPool(256 * MIB, MIB, device, first_chunk_bytes=MIB, chunk_bytes=8 * MIB) as pool:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(kvortex.EngineClosed):
                pool.view(0)
                os._exit(1)
            pool.close()
            del pool
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        pool.wait_ready(20_000)


def test_cpus_are_those_of_affinity_and_quota(tmp_path, monkeypatch):
    from kvortex.memory import limits

    lines = ["3:cpu,cpuacct:/pod/worker", "0::/unified"]
    monkeypatch.setattr(limits, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: set(range(12)))
    read_lines = limits._read_lines
    monkeypatch.setattr(limits, "_read_lines", lambda path: lines if path == "/proc/self/cgroup" else read_lines(path))
    assert limits.usable_cpus() == 12
    for group, quota in (("cpu/pod/worker", -1), ("cpu/pod", 350_000)):
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / group / "cpu.cfs_period_us").write_text("100000\n")
    assert limits.usable_cpus() == 4
    (tmp_path / "unified").mkdir()
    for text, cpus in (("max 100000", 4), ("150000 100000", 2), ("1000 100000", 1), ("2000000 100000", 4)):
        (tmp_path / "unified" / "cpu.max").write_text(f"{text}\n")
        assert limits.usable_cpus() == cpus


GET_MEMPOLICY, POLICY_OF_ADDRESS, PREFERRED = 239, 2, 1  # x86-64


def policy_of(address):
    mode, nodes = ctypes.c_int(-1), (ctypes.c_ulong * 16)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(
        GET_MEMPOLICY, ctypes.byref(mode), nodes, 1024, ctypes.c_void_p(address), POLICY_OF_ADDRESS
    ) == 0, os.strerror(ctypes.get_errno())  # fmt: skip
    return mode.value, nodes[0]


@pytest.mark.host
def test_memory_of_the_devices_node_is_preferred(device, host):
    host.set_numa_node(0)
    with PinnedPool(4 * MIB, MIB, device) as pool:
        assert pool.numa_node == 0
        assert policy_of(pool.address(2)) == (PREFERRED, 1)
    with PinnedPool(4 * MIB, MIB, device, numa=False) as pool:
        assert pool.numa_node is None
        assert policy_of(pool.address(2))[0] != PREFERRED


@pytest.mark.host
@pytest.mark.parametrize("node", [-1, 900, 5000])
def test_a_node_that_does_not_exist_is_no_obstacle(device, host, node):
    host.set_numa_node(node)
    with PinnedPool(4 * MIB, MIB, device) as pool:
        assert pool.numa_node is None and pool.slots_ready == 4


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
def test_pages_of_slots_that_were_never_registered_are_not_kept(device, host):
    host.fail_call(3, 2, field="mem_host_register")
    before = resident_bytes()
    with PinnedPool(64 * MIB, PAGE, device, first_chunk_bytes=MIB, chunk_bytes=16 * MIB) as pool:
        with pytest.raises(PoolExhausted):
            pool.wait_ready(20_000)
        assert pool.bytes_ready == 17 * MIB
        deadline = time.monotonic() + 20  # the thread that met the error tells of it before it ends
        while (kept := resident_bytes() - before) > 21 * MIB and time.monotonic() < deadline:
            time.sleep(0.005)
        assert kept <= 21 * MIB


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


@pytest.mark.host
@pytest.mark.parametrize("field", ["ctx_push_current", "mem_host_unregister"])
def test_one_passing_error_of_a_close_leaks_nothing(device, host, field):
    before = host.live_objects()
    pool = PinnedPool(4 << 20, 4096, device)
    pool.wait_ready(20_000)
    first, mapped = pool.address(0), mapped_bytes()
    host.fail_call(1, 2, field=field)
    pool.close()
    host.fail_call(0, 0)
    assert host.live_objects() == before and mapped_bytes() <= mapped - (4 << 20), hex(first)


def mapped_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
