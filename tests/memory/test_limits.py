"""What a pool may take: page cache is free, and what other pools have yet to touch is not."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import kvortex
from kvortex import PinnedPool, PoolExhausted
from kvortex.memory import limits

GIB = 1 << 30
MIB = 1 << 20
PAGE = 4096

pytestmark = pytest.mark.host


# ---- cgroups ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_group(tmp_path, monkeypatch):
    """Write the files of a group; numbers are GiB."""
    monkeypatch.setattr(limits, "CGROUP_ROOT", tmp_path)

    def write(name, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, value in files.items():
            if isinstance(value, dict):
                value = "\n".join(f"{key} {gib * GIB}" for key, gib in value.items())
            text = value if isinstance(value, str) else str(value * GIB)
            (folder / file.replace("_", ".", 1 if file.startswith("memory") else 0)).write_text(text + "\n")

    return write


PAGE_CACHE = {"anon": 10, "file": 52, "shmem": 2, "inactive_file": 43, "active_file": 7, "unevictable": 2}


def test_page_cache_is_free_and_shared_memory_is_not(write_group):
    write_group("", memory_max=64, memory_current=62, memory_stat=PAGE_CACHE)
    assert limits.cgroup_free_bytes(["0::/"]) == (64 - 62 + 50) * GIB


def test_page_cache_of_the_groups_below_counts_in_v1(write_group):
    stat = {"inactive_file": 1, "active_file": 1, "total_inactive_file": 43, "total_active_file": 7}
    write_group("memory", memory_limit_in_bytes=64, memory_usage_in_bytes=62, memory_stat=stat)
    assert limits.cgroup_free_bytes(["4:memory:/"]) == 52 * GIB
    write_group("memory", memory_stat={"inactive_file": 1, "active_file": 1})  # an old kernel
    assert limits.cgroup_free_bytes(["4:memory:/"]) == 4 * GIB


@pytest.mark.parametrize(("high", "free"), [("max", 34), (60, 30), (20, 0), (70, 34)])
def test_memory_high_is_a_limit(write_group, high, free):
    write_group("", memory_max=64, memory_high=high, memory_current=40, memory_stat={"inactive_file": 10})
    assert limits.cgroup_free_bytes(["0::/"]) == free * GIB


@pytest.mark.parametrize("stat", ["", "inactive_file", "inactive_file x\nactive_file -3", "\n\n"])
def test_a_stat_that_says_nothing_frees_nothing(write_group, stat):
    write_group("", memory_max=64, memory_current=60, memory_stat=stat)
    assert limits.cgroup_free_bytes(["0::/"]) == 4 * GIB


def test_never_more_than_the_limit_is_free(write_group):
    write_group("", memory_max=64, memory_current=10, memory_stat={"inactive_file": 30})
    assert limits.cgroup_free_bytes(["0::/"]) == 64 * GIB


def test_a_claim_counts_in_its_groups_alone(write_group, tmp_path):
    write_group("", memory_max=64, memory_current=10)
    write_group("one", memory_max=32, memory_current=2)
    write_group("two", memory_max=16, memory_current=2)
    claims = [(8 * GIB, {tmp_path, tmp_path / "one"})]
    assert limits.cgroup_free_bytes(["0::/one"], claims) == (32 - 2 - 8) * GIB
    assert limits.cgroup_free_bytes(["0::/two"], claims) == (16 - 2) * GIB
    assert limits.cgroup_free_bytes(["0::/"], claims) == (64 - 10 - 8) * GIB


# ---- claims ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_of(monkeypatch):
    """Pretend that pools may touch so much memory from now on, and that there is no cgroup."""

    def pretend(nbytes):
        machine = touched_by_pools() + nbytes
        monkeypatch.setattr(limits, "_available_bytes", lambda: max(0, machine - touched_by_pools()))
        monkeypatch.setattr(limits, "cgroup_free_bytes", lambda lines, claims: None)

    return pretend


def touched_by_pools():
    """Bytes in memory of what a fork does not copy, which is the pools'.

    Not those of the process: an allocator gives memory back whenever it likes, and a pool more would seem to fit.
    """
    touched = pages = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            pages = int(line.split()[1]) * 1024
        elif line.startswith("VmFlags:") and "dc" in line.split():
            touched += pages
    return touched


@pytest.fixture(params=["seen by others", "no shared memory"])
def sharing(request, monkeypatch, tmp_path):
    """Claims in a folder of the test's own, or in none; pools of earlier tests are gone."""
    gc.collect()
    folder = tmp_path / "shm"
    if request.param == "seen by others":
        folder.mkdir()
    monkeypatch.setattr(limits, "CLAIMS_FOLDER", folder)
    return folder


def slow_pool(nbytes=64 * MIB):
    return PinnedPool(nbytes, PAGE, "host", first_chunk_bytes=PAGE, chunk_bytes=MIB)


def test_a_pool_sees_what_another_has_yet_to_touch(memory_of, sharing):
    memory_of(96 * MIB)
    with slow_pool(), pytest.raises(PoolExhausted, match="64 MiB exceeds .* lower cpu_pool_size_bytes"):
        slow_pool()
    slow_pool().close()  # what a closed pool would have touched is free again


def test_a_pool_that_is_touched_counts_once(memory_of, sharing):
    memory_of(160 * MIB)
    with slow_pool() as first:
        first.wait_ready(20_000)
        assert limits.own_claims()[0][0] == 0
        with slow_pool() as second:
            second.wait_ready(20_000)


def test_of_threads_that_ask_together_as_many_are_admitted_as_fit(memory_of, sharing):
    memory_of(3 * 64 * MIB + 32 * MIB)
    pools, errors, start = [], [], threading.Barrier(6)

    def ask():
        start.wait()
        try:
            pools.append(slow_pool())
        except PoolExhausted as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(pools), len(errors)) == (3, 3)
    for pool in pools:
        pool.close()


@pytest.mark.parametrize("failing", [1, 5])
def test_a_pool_that_could_not_be_registered_claims_nothing(memory_of, sharing, host, failing):
    memory_of(96 * MIB)
    host.fail_call(failing, 2, field="mem_host_register")
    with contextlib.ExitStack() as stack:
        try:
            pool = stack.enter_context(slow_pool())
            with pytest.raises(PoolExhausted):
                pool.wait_ready(20_000)
        except PoolExhausted:
            assert failing == 1
        for _ in range(400):
            if claimed() == 0:
                break
            threading.Event().wait(0.005)
        assert claimed() == 0


def test_a_pool_of_the_driver_claims_nothing_once_it_is_there_and_stays_in_sight(sharing):
    with PinnedPool(MIB, PAGE, "host", driver_allocated=True):
        assert claimed() == 0 and limits.has_pools()
    assert not limits.has_pools()


def test_a_claim_made_while_others_are_read_stays(sharing, monkeypatch):
    """Its process could lock the file, and would take it for that of a dead one."""
    own_claims, pools = limits.own_claims, []

    def and_another():
        found = own_claims()
        monkeypatch.setattr(limits, "own_claims", own_claims)
        pools.append(slow_pool())
        return found

    monkeypatch.setattr(limits, "own_claims", and_another)
    limits.free_memory()
    with pools[0]:
        assert [path for _, path in own_claims() if path is not None and not os.path.exists(path)] == []


@pytest.mark.parametrize("odd", ["", "garbage", "0:", "\udcff:memory:/"])
def test_odd_lines_about_groups_are_passed_over(monkeypatch, tmp_path, odd):
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text("0\n")
    (tmp_path / "memory.stat").write_bytes(b"inactive_file 5\n\xff\xfe 1\n")
    (tmp_path / "cpu.max").write_text("100000 0\n")
    monkeypatch.setattr(limits, "CGROUP_ROOT", tmp_path)
    assert limits.cgroup_free_bytes([odd, "0::/"]) == GIB
    assert limits.cgroup_cpus([odd, "0::/"]) is None


def test_a_full_folder_or_a_lack_of_descriptors_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(limits, "CLAIMS_FOLDER", Path("/proc/self"))  # where nothing can be made
    with slow_pool() as pool:
        pool.wait_ready(20_000)


# ---- other processes -------------------------------------------------------------------------------------------------

HOLD = """
    import sys
    from pathlib import Path
    import kvortex
    from kvortex.memory import limits

    limits.CLAIMS_FOLDER = Path(sys.argv[1])
    claim = limits.claim_memory(64 << 20)
    if sys.argv[2:] == ["fork"]:
        import os, time

        if os.fork() == 0:
            time.sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(sharing):
    """Start a process that claims 64 MiB and touches nothing; it ends with the test."""
    started = []

    def start(*arguments):
        command = [sys.executable, "-c", textwrap.dedent(HOLD), sharing, *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   start_new_session=True)  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def claimed():
    return sum(nbytes for nbytes, _ in limits._claims(limits._read_lines("/proc/self/cgroup")))


def test_a_pool_sees_what_another_process_has_yet_to_touch(memory_of, sharing, holder):
    memory_of(96 * MIB)
    process = holder()
    if not sharing.exists():
        slow_pool().close()
        return
    assert claimed() == 64 * MIB
    with pytest.raises(PoolExhausted):
        slow_pool()
    process.communicate()
    assert claimed() == 0
    slow_pool().close()


@pytest.mark.parametrize("sharing", ["seen by others"], indirect=True)
@pytest.mark.parametrize("arguments", [(), ("fork",)])
def test_what_a_dead_process_claimed_does_not_count(sharing, holder, arguments):
    """Whatever killed it, and though a child that it had forked lives on."""
    process = holder(*arguments)
    assert claimed() == 64 * MIB
    process.kill()
    process.wait()
    assert claimed() == 0
    assert [path.name for path in sharing.iterdir() if "lock" not in path.name] == []


@pytest.mark.parametrize("sharing", ["seen by others"], indirect=True)
def test_a_forked_child_neither_takes_nor_gives_back_its_parents_claim(sharing):
    claim = limits.claim_memory(64 * MIB)
    child = os.fork()
    if child == 0:
        seen = claimed()
        del claim
        os._exit(0 if seen == 64 * MIB and limits.own_claims() == [] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ((nbytes, name),) = limits.own_claims()
    path = Path(os.fsdecode(name))
    assert nbytes == 64 * MIB
    assert path.exists() and path.stat().st_mode & 0o777 == 0o600
    del claim
    assert not path.exists() and limits.own_claims() == []


@pytest.mark.parametrize("sharing", ["seen by others"], indirect=True)
def test_a_claim_of_another_cgroup_namespace_takes_from_no_group_here(sharing, write_group, holder, monkeypatch):
    write_group("", memory_max=64, memory_current=10)
    holder()
    lines = limits._read_lines("/proc/self/cgroup")
    monkeypatch.setattr(limits, "_whereabouts", lambda lines: ["cgroup:[1]", *lines])
    assert [folders for nbytes, folders in limits._claims(lines) if nbytes] == [set()]


@pytest.mark.parametrize("sharing", ["seen by others"], indirect=True)
@pytest.mark.parametrize("content", [b"", b"\1", b"\xff" * 8, b"\0" * 8 + b"\xff\xfe", b"\1" * 8 + b"\n\nno cgroup"])
def test_files_that_are_no_claims_do_not_count(sharing, content):
    name = f"kvortex-{os.geteuid()}-1-"
    (sharing / f"{name}a").write_bytes(content)
    (sharing / f"{name}b").mkdir()
    (sharing / f"{name}c").symlink_to("/etc/passwd")
    os.mkfifo(sharing / f"{name}d")
    assert claimed() == 0
    slow_pool().close()


@pytest.mark.parametrize("sharing", ["seen by others"], indirect=True)
def test_a_process_that_is_stuck_while_it_is_admitted_delays_others_and_no_more(sharing, monkeypatch):
    monkeypatch.setattr(limits, "CLAIM_WAIT_S", 0.05)
    code = (
        "import fcntl, os, sys\n"
        f"file = os.open({str(sharing / f'kvortex-{os.geteuid()}.lock')!r}, os.O_RDWR | os.O_CREAT, 0o600)\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    stuck = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert stuck.stdout.readline() == "held\n"
    slow_pool().close()
    stuck.communicate()


# ---- what is really there --------------------------------------------------------------------------------------------


def test_numbers_tell_what_a_pool_has_that_could_not_be_registered(host):
    config = kvortex.KVortexConfig(
        cpu_pool_size_bytes=64 * PAGE, block_bytes=PAGE, device="host", pool_first_chunk_bytes=PAGE,
        pool_chunk_bytes=2 * PAGE,
    )  # fmt: skip
    host.fail_call(3, 2, field="mem_host_register")
    with kvortex.KVortexEngine.create(config) as engine:
        with pytest.raises(PoolExhausted):
            engine.wait_ready(20_000)
        stats, pool = engine.get_stats(), engine.pool
        assert (stats.pool_blocks, stats.pool_bytes, stats.pool_bytes_ready) == (3, 3 * PAGE, 3 * PAGE)
        assert (pool.slots_usable, pool.bytes_usable, pool.slots_ready) == (3, 3 * PAGE, 3)
        assert (pool.num_slots, pool.nbytes) == (64, 64 * PAGE)  # the address range, which views are cut from
        assert "kvortex_pool_blocks 3\n" in kvortex.prometheus_text(stats)


def test_a_pool_that_is_being_registered_has_the_room_it_will_have():
    with slow_pool() as pool:
        assert (pool.slots_usable, pool.bytes_usable) == (pool.num_slots, pool.nbytes)
