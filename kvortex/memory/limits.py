"""How much memory this process may still take, asked before any page is touched: afterwards the answer is a SIGKILL."""

from pathlib import Path

from kvortex.errors import PoolExhausted


def _read_int(path):
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such controller, or "max"
        return None


def _cgroup_free_bytes():
    """The smallest distance to a limit on the way from this process's cgroup to the root, or None without a limit."""
    free = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit_file, usage_file = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_file, usage_file = (
                Path("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
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


def _available_bytes():
    for line in Path("/proc/meminfo").read_text().splitlines():
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
    for what, free in (("available memory", _available_bytes()), ("the cgroup's memory limit", _cgroup_free_bytes())):
        if free is not None and nbytes > free:
            raise PoolExhausted(
                f"a pool of {nbytes} bytes exceeds what {what} leaves ({free} bytes); "
                f"lower cpu_pool_size_bytes or raise the limit"
            )
