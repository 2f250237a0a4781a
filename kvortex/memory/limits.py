"""What this process may take: memory, asked before any page is touched (afterwards it is a SIGKILL), and CPUs.

What other pools were admitted for and have not touched yet counts as taken: see `_claim`.
"""

import contextlib
import fcntl
import io
import math
import os
import resource
import stat
import sys
import threading
import time
from pathlib import Path

from kvortex.config import bytes_text
from kvortex.errors import PoolExhausted
from kvortex.memory._claim import NUMBER_BYTES, Claim, own_claims

CGROUP_ROOT = Path("/sys/fs/cgroup")
CLAIMS_FOLDER = Path("/dev/shm")  # memory that processes share; where there is none, a process sees its own pools only
CLAIM_WAIT_S = 1.0  # for another process that is just being admitted; then it is taken for stuck
NO_LIMIT_BYTES = 1 << 62  # cgroup v1 has no word for it, and shows 2^63 rounded down to pages
HUGE_PAGES_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
READING_ATTEMPTS = 20  # while pools are being touched; then what counts twice may refuse a pool that would fit


def _read_text(path):
    """What a small file says, without the layers of a text file: a pool reads a dozen, each 15 us sooner."""
    with open(path, "rb", buffering=0) as file:
        return file.read().decode(errors="replace")


def _read_int(path):
    try:
        return int(_read_text(path))
    except (OSError, ValueError):  # no such controller, or "max"
        return None


def _read_lines(path):
    try:
        return _read_text(path).splitlines()
    except OSError:
        return []


def _cgroup_folders(lines, controller):
    """Yield (folder, whether it is of cgroup v2) for every group that limits a controller, up to the root.

    `lines` are those of `/proc/self/cgroup`: ``id:controllers:path``.
    """
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP_ROOT / controller if controllers else CGROUP_ROOT
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, not controllers
            if folder == root:
                break


def _file_pages(folder, is_v2):
    """Bytes of a group's page cache that the kernel drops on demand: neither shared memory nor what is locked."""
    numbers = dict.fromkeys(("inactive_file", "active_file"), 0)
    for line in _read_lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        name = name if is_v2 else name.removeprefix("total_")  # v1: with the groups below, as the usage; they come last
        if name in numbers and value.isdecimal():
            numbers[name] = int(value)
    return sum(numbers.values())


def cgroup_free_bytes(lines, claims=()):
    """The smallest distance to a memory limit on the way from a cgroup to the root, or None without a limit.

    Page cache counts as free. Above `memory.high` (v2) the kernel slows a group down until it is below it again, which
    one with pinned memory never is: so it is a limit, too.

    Parameters
    ----------
    lines : list of str
        Those of `/proc/self/cgroup`.
    claims : iterable of (int, container of Path)
        Bytes that are not touched yet, and the groups that they will be counted in.
    """
    free = []
    for folder, is_v2 in _cgroup_folders(lines, "memory"):
        names = ("memory.max", "memory.high") if is_v2 else ("memory.limit_in_bytes",)
        limits = [limit for name in names if (limit := _read_int(folder / name)) is not None]
        limit = min(limits, default=NO_LIMIT_BYTES)
        if limit >= NO_LIMIT_BYTES:
            continue
        usage = _read_int(folder / ("memory.current" if is_v2 else "memory.usage_in_bytes"))
        if usage is not None:
            used = max(0, usage - _file_pages(folder, is_v2))
            free.append(max(0, limit - used - sum(nbytes for nbytes, folders in claims if folder in folders)))
    return min(free, default=None)


def cgroup_cpus(lines):
    """The smallest CPU quota on the way from a cgroup to the root, in CPUs, or None without one."""
    cpus = []
    for folder, is_v2 in _cgroup_folders(lines, "cpu"):
        if is_v2:
            quota, _, period = " ".join(_read_lines(folder / "cpu.max")).partition(" ")
        else:
            quota, period = (" ".join(_read_lines(folder / f"cpu.cfs_{what}_us")) for what in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):  # neither "max" nor "-1"
            cpus.append(int(quota) / int(period))
    return min(cpus, default=None)


def _available_bytes():
    """Memory that the machine can give without swapping, or None where /proc/meminfo does not tell."""
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def free_memory():
    """Return what a pool may take, in bytes by the name of the limit; None where there is no limit or nobody tells."""
    lines = _read_lines("/proc/self/cgroup")
    claims = list(_claims(lines))
    for _ in range(READING_ATTEMPTS):
        available, in_cgroup = _available_bytes(), cgroup_free_bytes(lines, claims)
        earlier, claims = claims, list(_claims(lines))
        if claims == earlier:  # else some of it was touched between the two readings, and counts in both
            break
    if available is not None:
        available = max(0, available - sum(nbytes for nbytes, _ in earlier))
    return {"available memory": available, "the cgroup's memory limit": in_cgroup}


def lacking_memory(nbytes):
    """Return (name of the limit, bytes free below it) of a limit that so many bytes exceed, or None."""
    for what, free in free_memory().items():
        if free is not None and nbytes > free:
            return what, free
    return None


def require_memory(nbytes):
    """Refuse a pool that the machine or its cgroup cannot hold.

    Parameters
    ----------
    nbytes : int
        Bytes the pool will touch and pin.

    Raises
    ------
    PoolExhausted
        The message names which limit is in the way and what is left of it.

    Notes
    -----
    Reads `/proc/meminfo` and the cgroup files (v1 and v2); a limit that cannot be read is taken as absent.
    """
    lacking = lacking_memory(nbytes)
    if lacking is not None:
        what, free = lacking
        raise PoolExhausted(
            f"a pool of {bytes_text(nbytes)} exceeds what {what} leaves ({bytes_text(free)}, without what other pools "
            f"have yet to touch); lower cpu_pool_size_bytes or raise the limit"
        )


# ---- claims ----------------------------------------------------------------------------------------------------------

_admitting = threading.Lock()  # held from the question whether there is memory until it is claimed


def _forget_holder():
    """In a forked child: whoever held the lock is a thread of the parent."""
    global _admitting
    _admitting = threading.Lock()


os.register_at_fork(after_in_child=_forget_holder)


def claim_memory(nbytes):
    """Claim memory for a pool; raise `PoolExhausted` as `require_memory` does.

    Returns
    -------
    Claim
        Seen by the other pools of this process, and of the user's other processes, until it is ended or dropped.
    """
    with _one_at_a_time():
        require_memory(nbytes)
        name = f"kvortex-{os.geteuid()}-{os.getpid()}-{os.urandom(8).hex()}"
        about = "\n".join(_whereabouts(_read_lines("/proc/self/cgroup"))).encode()
        # Nobody looks for a file under its first name.
        return Claim(nbytes, os.fsencode(CLAIMS_FOLDER / f".{name}"), os.fsencode(CLAIMS_FOLDER / name), about)


@contextlib.contextmanager
def _one_at_a_time():
    """Keep other threads, and the user's other processes, from being admitted meanwhile."""
    with _admitting, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no such folder: then nobody is seen, either
            file = stack.enter_context(_open(CLAIMS_FOLDER / f"kvortex-{os.geteuid()}.lock", os.O_CREAT))
            deadline = time.monotonic() + CLAIM_WAIT_S
            while not _lock(file, fcntl.LOCK_EX) and time.monotonic() < deadline:
                time.sleep(0.005)
        yield


def _open(path, flags=0):
    """A file of our own in a folder of everybody's; its end gives locks back."""
    flags |= os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    file = io.FileIO(path, "r+", opener=lambda path, _: os.open(path, flags, 0o600))
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
        raise OSError(f"{path} is another user's")
    return file


def _lock(file, kind):
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _whereabouts(lines):
    """The cgroup namespace, in which names of cgroups mean something, and the names."""
    try:
        return [os.readlink("/proc/self/ns/cgroup"), *lines]
    except OSError:
        return ["", *lines]


def _claims(lines):
    """Yield (bytes yet to be touched, folders of the cgroups that they will be counted in) for each pool in sight."""
    # First: a claim made after this is not among them, and one of ours that is among them is known as ours.
    paths = _claim_paths()
    own = own_claims()
    if own:
        yield sum(nbytes for nbytes, _ in own), {folder for folder, _ in _cgroup_folders(lines, "memory")}
    own_paths = {path for _, path in own}
    here = _whereabouts(lines)[0] if paths else ""
    for path in paths:
        if os.fsencode(path) in own_paths:
            continue
        with contextlib.suppress(OSError, ValueError):  # gone meanwhile, or no claim
            content = _read_claim(path)
            namespace, *theirs = content[NUMBER_BYTES:].decode().splitlines()
            folders = _cgroup_folders(theirs if namespace == here else (), "memory")
            yield int.from_bytes(content[:NUMBER_BYTES], sys.byteorder), {folder for folder, _ in folders}


def _claim_paths():
    """The files of the user's claims."""
    try:
        names = os.listdir(CLAIMS_FOLDER)
    except OSError:
        return []
    return [CLAIMS_FOLDER / name for name in names if name.startswith(f"kvortex-{os.geteuid()}-")]


def has_pools():
    """Whether there is a pool in this process, or in one that it started, as far as seen."""
    if own_claims():
        return True
    for path in _claim_paths():
        status = _read_lines(f"/proc/{path.name.split('-')[2]}/status")
        if f"PPid:\t{os.getpid()}" in status:
            return True
    return False


def _read_claim(path):
    """The file of another process's claim; raises, and removes it, if that process is gone."""
    with _open(path) as file:
        if _lock(file, fcntl.LOCK_SH):
            os.unlink(path)
            raise ValueError(f"nobody holds {path}")
        return file.read()


# ---- the rest --------------------------------------------------------------------------------------------------------


def memlock_bytes():
    """How much memory this process may lock (the soft limit of RLIMIT_MEMLOCK), or None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def transparent_huge_pages():
    """The kernel's setting for this process: ``"always"``, ``"madvise"``, ``"never"``, or None where it does not tell.

    A pool asks by madvise, so all but ``"never"`` give it huge pages.
    """
    if "THP_enabled:\t0" in _read_lines("/proc/self/status"):  # switched off by prctl, for this process
        return "never"
    setting = " ".join(_read_lines(HUGE_PAGES_SETTING))
    return setting.partition("[")[2].partition("]")[0] or None


def usable_cpus():
    """How many CPUs this process may keep busy: its affinity, or its cgroup's quota rounded up; at least 1.

    More threads than the quota pays for would be throttled together, those that serve among them.
    """
    quota = cgroup_cpus(_read_lines("/proc/self/cgroup"))
    cpus = len(os.sched_getaffinity(0))
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))
