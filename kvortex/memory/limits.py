"""How much memory this process may still take, asked before any page is touched: afterwards the answer is a SIGKILL."""

from pathlib import Path

from kvortex.errors import PoolExhausted

CGROUP_ROOT = Path("/sys/fs/cgroup")


def _read_int(path):
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such controller, or "max"
        return None


def cgroup_free_bytes(lines):
    """The smallest distance to a memory limit on the way from a cgroup to the root, or None without a limit.

    `lines` are those of `/proc/self/cgroup`: ``id:controllers:path``, of cgroup v1 or v2.
    """
    free = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit_file, usage_file = CGROUP_ROOT, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_file, usage_file = CGROUP_ROOT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            limit, usage = _read_int(folder / limit_file), _read_int(folder / usage_file)
            if limit is not None and usage is not None:
                free.append(max(0, limit - usage))
            if folder == root:
                break
    return min(free, default=None)


def _read_lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _available_bytes():
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
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
    limits = {
        "available memory": _available_bytes(),
        "the cgroup's memory limit": cgroup_free_bytes(_read_lines("/proc/self/cgroup")),
    }
    for what, free in limits.items():
        if free is not None and nbytes > free:
            raise PoolExhausted(
                f"a pool of {nbytes} bytes exceeds what {what} leaves ({free} bytes); "
                f"lower cpu_pool_size_bytes or raise the limit"
            )
