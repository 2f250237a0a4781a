"""What this process may take: memory, asked before any page is touched (afterwards it is a SIGKILL), and CPUs."""

import math
import os
import resource
from pathlib import Path

from kvortex.errors import PoolExhausted

CGROUP_ROOT = Path("/sys/fs/cgroup")
NO_LIMIT_BYTES = 1 << 62  # cgroup v1 has no word for it, and shows 2^63 rounded down to pages
HUGE_PAGES_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _read_int(path):
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such controller, or "max"
        return None


def _cgroup_folders(lines, controller):
    """Yield (folder, whether it is of cgroup v2) for every group that limits a controller, up to the root.

    `lines` are those of `/proc/self/cgroup`: ``id:controllers:path``.
    """
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP_ROOT / controller if controllers else CGROUP_ROOT
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, not controllers
            if folder == root:
                break


def cgroup_free_bytes(lines):
    """The smallest distance to a memory limit on the way from a cgroup to the root, or None without a limit."""
    free = []
    for folder, is_v2 in _cgroup_folders(lines, "memory"):
        limit = _read_int(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        usage = _read_int(folder / ("memory.current" if is_v2 else "memory.usage_in_bytes"))
        if limit is not None and usage is not None and limit < NO_LIMIT_BYTES:
            free.append(max(0, limit - usage))
    return min(free, default=None)


def cgroup_cpus(lines):
    """The smallest CPU quota on the way from a cgroup to the root, in CPUs, or None without one."""
    cpus = []
    for folder, is_v2 in _cgroup_folders(lines, "cpu"):
        if is_v2:
            quota, _, period = " ".join(_read_lines(folder / "cpu.max")).partition(" ")
        else:
            quota, period = (" ".join(_read_lines(folder / f"cpu.cfs_{what}_us")) for what in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal():  # neither "max" nor "-1"
            cpus.append(int(quota) / int(period))
    return min(cpus, default=None)


def _read_lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _available_bytes():
    """Memory that the machine can give without swapping, or None where /proc/meminfo does not tell."""
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def free_memory():
    """Return what a pool may take, in bytes by the name of the limit; None where there is no limit or nobody tells."""
    return {
        "available memory": _available_bytes(),
        "the cgroup's memory limit": cgroup_free_bytes(_read_lines("/proc/self/cgroup")),
    }


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
    for what, free in free_memory().items():
        if free is not None and nbytes > free:
            raise PoolExhausted(
                f"a pool of {nbytes} bytes exceeds what {what} leaves ({free} bytes); "
                f"lower cpu_pool_size_bytes or raise the limit"
            )


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
