"""What is in force on this machine and why: the facts behind ``python -m kvortex info``, as data and as text."""

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

import kvortex
from kvortex.arguments import printable
from kvortex.codec import CODECS
from kvortex.config import KVortexConfig, Setting, bytes_text
from kvortex.driver import list_devices, why_no_cuda
from kvortex.keys import uses_sha_instructions
from kvortex.memory.limits import free_memory, memlock_bytes, require_memory, transparent_huge_pages, usable_cpus
from kvortex.slots import Slots, stride_bytes
from kvortex.tiers.disk.file_system import direct_io_of, file_system_of
from kvortex.transfer import packed_bytes, probe_layout

PROBE_BLOCK_BYTES = 2 << 20
PROBE_CACHE_BYTES = 32 << 20
PROBE_HEAD_DIM, PROBE_ROUNDS = 128, 3
NOT_SET = "not set"

_NVIDIA_DRIVER = Path("/sys/module/nvidia/version")


def collect(
    settings: Mapping[str, Setting],
    *,
    probe: bool = False,
    num_pieces: int = 64,
    disk_paths: Sequence[str | PathLike[str]] = (),
) -> dict[str, Any]:
    """Return what an engine of these settings would meet, as a dict that JSON can carry.

    Opens the device in force and no other; takes no memory for a pool. With `probe`, takes 64 MiB of device memory and
    32 MiB of pinned memory (or as much as two blocks need) for a moment.

    Parameters
    ----------
    settings : dict of str to Setting
        From `KVortexConfig.find_settings`; `cpu_pool_size_bytes` may be missing.
    probe : bool, default False
        Find out how the pieces of a cache in one allocation move, and what each codec reaches: blocks of `block_bytes`
        (2 MiB unless set) in `num_pieces` pieces.
    num_pieces : int, default 64
        Even: K and V of half as many layers.
    disk_paths : sequence of path-like, optional
        Folders for a disk tier, there or not: a file without a name is made in each to see how I/O goes.

    Raises
    ------
    ConfigError
        There is no such device, it cannot hold the cache of the probe, or the pieces do not divide a block.
    DriverError
        The driver failed.
    """
    values = {name: setting.value for name, setting in settings.items()}
    config = KVortexConfig(**{"cpu_pool_size_bytes": 1, **values})  # for the defaults of the others
    known = {name: Setting(getattr(config, name), "default") for name in KVortexConfig.names()}
    known["cpu_pool_size_bytes"] = Setting(None, NOT_SET)
    known.update(settings)
    block_bytes = config.block_bytes
    with kvortex.Device.open(config.device) as device:
        facts = {
            "kvortex": _software(),
            "driver": _driver(device, known["device"]),
            "device": {
                "name": device.name,
                "description": device.description,
                "numa_node": device.numa_node,
                "all": list_devices(),
            },
            "cpu": {"usable_cpus": usable_cpus(), "sha_instructions": uses_sha_instructions()},
            "memory": _memory(),
            "pool": _pool(values.get("cpu_pool_size_bytes"), block_bytes, config.header_bytes),
            "device_pool": _device_pool(device, config.gpu_pool_size_bytes),
            "settings": [{"name": name, **setting._asdict()} for name, setting in known.items()],
            "planner": None,
            "codecs": None,
            "tiers": [],
            "disks": [file_system_of(path) | direct_io_of(path) for path in disk_paths],
        }
        if probe:
            block_bytes = PROBE_BLOCK_BYTES if block_bytes is None else block_bytes
            facts |= _probe(device, block_bytes, num_pieces, config.gather_ctas)
    return facts


def _software():
    versions = {}
    for package in ("numpy", "cuda-bindings"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "version": kvortex.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
    }


def _driver(device, setting):
    return {
        "kind": "host" if device.is_host else "cuda",
        "cuda_version": device.cuda_version,
        "nvidia_driver": _NVIDIA_DRIVER.read_text().strip() if _NVIDIA_DRIVER.exists() else None,
        "device_setting": setting.value,
        "device_source": setting.source,
        "why_no_cuda": why_no_cuda() if device.is_host else None,
    }


def _memory():
    free = free_memory()
    return {
        "available_bytes": free["available memory"],
        "cgroup_free_bytes": free["the cgroup's memory limit"],
        "memlock_bytes": memlock_bytes(),
        "transparent_huge_pages": transparent_huge_pages(),
    }


def _pool(pool_bytes, block_bytes, header_bytes):
    """What `PinnedPool` would make of these sizes; None for what cannot be known yet."""
    num_slots = problem = None
    if pool_bytes is not None:
        if block_bytes is not None:
            try:
                slots = Slots.of(pool_bytes, block_bytes, header_bytes=header_bytes)
                pool_bytes, num_slots = slots.pool_bytes, slots.num_slots
            except kvortex.ConfigError as error:
                num_slots, problem = 0, str(error)
        try:
            require_memory(pool_bytes)
        except kvortex.PoolExhausted as error:
            problem = str(error)
    return {
        "pool_bytes": pool_bytes,
        "block_bytes": block_bytes,
        "stride_bytes": None if block_bytes is None else stride_bytes(block_bytes, header_bytes),
        "num_slots": num_slots,
        "problem": problem,
    }


def _device_pool(device, limit_bytes):
    """The limit of the pool of device memory, and why there can be none."""
    problem = None
    if limit_bytes:
        try:
            kvortex.DevicePool(limit_bytes, device).close()  # takes no memory
        except kvortex.KVortexError as error:
            problem = str(error)
    return {"limit_bytes": limit_bytes, "problem": problem}


def _probe(device, block_bytes, num_pieces, gather_ctas):
    piece_bytes, rest = divmod(block_bytes, num_pieces)
    if rest or piece_bytes % 16 or num_pieces % 2:
        raise kvortex.ConfigError(
            f"a block of {block_bytes} bytes cannot lie in {num_pieces} pieces: their number must be even, and each "
            f"must have a multiple of 16 bytes; try --pieces 64 --block-bytes 2MiB"
        )
    num_blocks = max(2, PROBE_CACHE_BYTES // block_bytes)
    with ExitStack() as stack:
        if device.is_host:
            require_memory(num_blocks * block_bytes)
        try:
            cache = kvortex.DeviceBuffer(num_blocks * block_bytes, device)
        except (kvortex.DriverError, kvortex.PoolExhausted) as error:
            raise kvortex.ConfigError(
                f"{device.name} cannot hold a cache of {num_blocks * block_bytes} bytes for the probe ({error}); lower "
                f"--block-bytes"
            ) from error
        stack.callback(cache.close)
        head_dim = PROBE_HEAD_DIM if piece_bytes % (2 * PROBE_HEAD_DIM) == 0 else piece_bytes // 2
        layout = kvortex.KVLayout.contiguous(
            cache.address,
            kv=2,
            num_layers=num_pieces // 2,
            num_blocks=num_blocks,
            block_size=piece_bytes // 2 // head_dim,
            num_heads=1,
            head_dim=head_dim,
            itemsize=2,
            dtype="bfloat16",
        )
        for direction in ("D2H", "H2D"):
            queue = kvortex.TransferQueue(device, direction)
            stack.callback(queue.close)
            probe_layout(layout, queue)
        planner = [row._asdict() for row in layout.planner]
        numbers = np.random.default_rng(0).standard_normal(block_bytes // 2, np.float32).view(np.uint32) >> 16
        for block in range(num_blocks):  # whatever lay in the memory may be Inf or NaN
            cache.copy_from(numbers.astype(np.uint16), block * block_bytes)
        return {"planner": planner, "codecs": [_rates_of(codec, layout, device, gather_ctas) for codec in CODECS]}


def _rates_of(codec, layout, device, gather_ctas):
    """How much smaller a codec makes the blocks, and GB/s of their own bytes; None where it can pack nothing."""
    found = {"codec": codec, "ratio": None, "save_gbps": None, "load_gbps": None}
    try:
        slot_bytes = packed_bytes(layout, codec)
    except kvortex.ConfigError:
        return found
    found["ratio"] = layout.block_bytes / slot_bytes
    blocks, seconds = np.arange(layout.num_blocks), {"save": [], "load": []}
    keys = np.zeros((layout.num_blocks, 32), np.uint8)
    keys.view(np.uint64)[:, 0] = blocks
    config = kvortex.KVortexConfig(
        cpu_pool_size_bytes=layout.num_blocks * stride_bytes(slot_bytes),
        device=device.name,
        codec=codec,
        gather_ctas=gather_ctas,
    )
    with kvortex.KVortexEngine.create(config, layout=layout) as engine:
        engine.wait_ready()
        for _ in range(PROBE_ROUNDS):
            engine.clear()
            for name, move in (("save", engine.save_blocks), ("load", engine.load_blocks)):
                start = time.perf_counter()
                move(keys, blocks, stream=0).wait()
                seconds[name].append(time.perf_counter() - start)
    nbytes = layout.num_blocks * layout.block_bytes
    return found | {f"{name}_gbps": nbytes / 1e9 / min(times) for name, times in seconds.items()}


def table(facts: Mapping[str, Any]) -> str:
    """Return the facts that `collect` gathered as text for people."""
    software, driver, device = facts["kvortex"], facts["driver"], facts["device"]
    memory, cpu, pool = facts["memory"], facts["cpu"], facts["pool"]
    because = f"device = {driver['device_setting']!r} ({driver['device_source']})"
    if driver["why_no_cuda"] and driver["device_setting"] == "auto":
        because += f", and {driver['why_no_cuda']}"
    node = device["numa_node"]
    rows = [
        ("kvortex", software["version"]),
        ("python", f"{software['python']} on {software['platform']}"),
        ("packages", ", ".join(f"{name} {software[name] or 'missing'}" for name in ("numpy", "cuda-bindings"))),
        ("driver", _driver_text(driver)),
        ("  because", because),
        ("device", f"{device['name']} ({device['description']}), of {', '.join(device['all'])}"),
        ("NUMA node", "unknown: the pool goes where the kernel puts it" if node is None else str(node)),
        ("CPUs", str(cpu["usable_cpus"])),
        ("keys", "SHA instructions" if cpu["sha_instructions"] else "portable C (this CPU has no SHA instructions)"),
        ("memory", f"{_size(memory['available_bytes'], 'unknown')} available"),
        ("  cgroup", _size(memory["cgroup_free_bytes"], "no limit")),
        ("  memlock", _size(memory["memlock_bytes"], "no limit")),
        ("huge pages", _huge_pages(memory["transparent_huge_pages"], facts["settings"])),
        ("pool", _pool_text(pool)),
        ("device pool", _size(facts["device_pool"]["limit_bytes"] or None, "none: gpu_pool_size_bytes is 0")),
        ("tiers", ", ".join(facts["tiers"]) or "none: evicted blocks are forgotten"),
    ]
    if pool["problem"]:
        rows.insert(-2, ("  problem", pool["problem"]))
    if facts["device_pool"]["problem"]:
        rows.insert(-1, ("  problem", facts["device_pool"]["problem"]))
    for disk in facts["disks"]:
        free = _size(disk["free_bytes"], "")
        rows.append(("disk", f"{disk['path']}: {disk['file_system'] or 'unknown file system'}, {free} free"))
        rows.append(("  I/O", _io_text(disk)))
        if disk["warning"]:
            rows.append(("  warning", disk["warning"]))
    lines = [f"  {name:<12}{value}" for name, value in rows]
    lines += ["", "settings"]
    for setting in facts["settings"]:
        value = "-" if setting["value"] is None else str(setting["value"])
        if setting["name"].endswith("_bytes"):
            value = _size(setting["value"], "-")
        lines.append(f"  {setting['name']:<24}{value:<16}{setting['source']}")
    if facts["planner"] is not None:
        lines += ["", "planner, a cache in one allocation (GB/s; - where nothing was measured)"]
        lines.append(f"  {'':<5}{'pieces':>16}{'pitch':>14}{'groups':>8}{'strided':>9}{'batch':>9}  moved by")
        for row in facts["planner"]:
            pieces = f"{row['rows']} x {_size(row['piece_bytes'], '')}"
            rates = "".join(f"{'-' if rate is None else f'{rate:.1f}':>9}" for rate in _rates(row))
            pitch = _size(row["pitch_bytes"], "")
            lines.append(
                f"  {row['direction']:<5}{pieces:>16}{pitch:>14}{row['num_groups']:>8}{rates}  {row['backend']}"
            )
    if facts["codecs"] is not None:
        lines += ["", "codecs, the same cache in bfloat16 (GB/s of its bytes; all but exact are lossy)"]
        lines.append(f"  {'':<8}{'smaller by':>12}{'save':>9}{'load':>9}")
        for row in facts["codecs"]:
            numbers = [row["ratio"], row["save_gbps"], row["load_gbps"]]
            ratio, save, load = ("-" if number is None else f"{number:.2f}" for number in numbers)
            lines.append(f"  {row['codec']:<8}{ratio:>12}{save:>9}{load:>9}")
    return "\n".join(map(printable, lines))


def _io_text(disk):
    if disk["io"] != "direct":
        return ": ".join(filter(None, [disk["io"] or "unknown", disk["io_reason"]]))
    align = disk["align_bytes"]
    return "direct, " + (f"aligned to {align} bytes" if align else "though the kernel tells no alignment")


def _rates(row):
    return row["strided_gbps"], row["batch_gbps"]


def _driver_text(driver):
    if driver["kind"] == "host":
        return f"host memory plays the device, as CUDA {driver['cuda_version']} would serve it"
    return f"CUDA {driver['cuda_version']}, NVIDIA {driver['nvidia_driver'] or 'unknown'}"


def _huge_pages(setting, settings):
    wanted = next(row["value"] for row in settings if row["name"] == "pool_huge_pages")
    if not wanted:
        return "not asked for (pool_huge_pages is False)"
    return {
        None: "unknown: the kernel does not tell",
        "never": "never: pinning takes twice as long; write madvise into /sys/kernel/mm/transparent_hugepage/enabled",
    }.get(setting, f"{setting}: the pool gets them")


def _pool_text(pool):
    if pool["pool_bytes"] is None:
        return "no size: set cpu_pool_size_bytes (--pool-bytes here)"
    size = _size(pool["pool_bytes"], "")
    if pool["num_slots"] is None:
        return f"{size}; how many slots depends on the block size (--block-bytes here)"
    return f"{size}: {pool['num_slots']} slots of {_size(pool['stride_bytes'], '')}"


def _size(nbytes, without):
    return without if nbytes is None else bytes_text(nbytes)
