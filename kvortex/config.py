"""Settings of an engine: frozen, validated when made, every message with value, limit and next step."""

from dataclasses import dataclass, fields

from kvortex.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class KVortexConfig:
    """What an engine is built from.

    Parameters
    ----------
    cpu_pool_size_bytes : int
        Pinned host memory for blocks; exactly ``cpu_pool_size_bytes // stride`` slots, where the stride is the block
        (and header) rounded up to 4 KiB. At least one slot.
    num_transfer_streams : int, default 3
        Streams of the engine, 1 to 32; at least two are made, since loads and saves never share one.
    device : str, default "auto"
        ``"cuda"``, ``"cuda:1"``, ``"host"``, ``"host:1"``, or ``"auto"``: CUDA where there is a GPU, else the host
        driver.
    block_bytes : int, optional
        Largest block. Taken from the layout when there is one; required for engines that use raw pointers only.
    header_bytes : {0, 4096}, default 0
        Room before each block for the record header of lower tiers.
    max_jobs : int, default 256
        Jobs in flight per stream, 1 to 65536; when all are taken a call moves 0 blocks.
    shutdown_timeout_ms : int, default 5000
        How long `shutdown` waits for jobs in flight before it fails them and leaks pinned memory on purpose.
    pool_first_chunk_bytes, pool_chunk_bytes : int, default 128 MiB and 256 MiB
        Sizes of the first registration (made before `create` returns) and of the later ones (in the background).
    pool_driver_allocated : bool, default False
        Take the pool with one `cuMemHostAlloc` instead: slower, blocking, for systems that refuse registering.
    gather_ctas : int, default 0
        Pieces below 32 KiB that strided copies cannot move are gathered on the device by a kernel of so many thread
        blocks (0: never; 4 reach the link), each of which takes a streaming multiprocessor from the model while it
        runs. Costs 16 MiB of device memory (or two blocks) a stream.
    pool_huge_pages : bool, default True
        Ask for transparent huge pages; without them pinning takes twice as long.
    enable_numa : bool, default True
        Prefer memory of the GPU's NUMA node for the pool (`engine.pool.numa_node` tells what came of it).

    Raises
    ------
    ConfigError
        A value is of the wrong type or outside its limits.
    """

    cpu_pool_size_bytes: int
    num_transfer_streams: int = 3
    device: str = "auto"
    block_bytes: int | None = None
    header_bytes: int = 0
    max_jobs: int = 256
    shutdown_timeout_ms: int = 5000
    pool_first_chunk_bytes: int = 128 * MIB
    pool_chunk_bytes: int = 256 * MIB
    pool_driver_allocated: bool = False
    pool_huge_pages: bool = True
    gather_ctas: int = 0
    enable_numa: bool = True

    _LIMITS = {
        "cpu_pool_size_bytes": (1, 1 << 50),
        "num_transfer_streams": (1, 32),
        "block_bytes": (1, (1 << 32) - 1),
        "header_bytes": (0, 4096),
        "max_jobs": (1, 65536),
        "gather_ctas": (0, 1024),
        "shutdown_timeout_ms": (0, 3_600_000),
        "pool_first_chunk_bytes": (1, 1 << 50),
        "pool_chunk_bytes": (1, 1 << 50),
    }

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in self._LIMITS:
                low, high = self._LIMITS[field.name]
                if value is None and field.name == "block_bytes":
                    continue
                if not isinstance(value, int) or isinstance(value, bool):
                    raise ConfigError(f"{field.name} must be an int, got {value!r}")
                if not low <= value <= high:
                    raise ConfigError(f"{field.name} must be {low} to {high}, got {value}")
            elif field.name == "device":
                if not isinstance(value, str):
                    raise ConfigError(f"device must be a str such as 'auto', 'cuda:0' or 'host', got {value!r}")
            elif not isinstance(value, bool):
                raise ConfigError(f"{field.name} must be True or False, got {value!r}")
        if self.header_bytes not in (0, 4096):
            raise ConfigError(f"header_bytes must be 0 or 4096, got {self.header_bytes}")
