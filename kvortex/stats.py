"""The snapshot that `get_stats()` returns; the counters themselves are C fields of the engine and the index."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters since the engine was created; those of engine, index and pool are read one after the other.

    Blocks are counted once per key of a call; a save counts when its slot became READY, a load when its slot was
    released. Latencies are in microseconds from the claim of the job to its retirement (lookups: to the answer), each
    at most 25 % above the true percentile, 0 without samples. `pool_blocks` and `pool_bytes` count what will yet be
    registered; where registering failed, they are what was registered before. `planner` has a `PlannerRow` for each
    direction and shape of group: which back end moves it, and what the probe measured. The `device_pool` is that of
    `gpu_pool_size_bytes`, zeros without one: its limit, what is handed out, and what it takes from the device.
    """

    blocks_checked: int
    blocks_hit: int
    blocks_saved: int
    blocks_loaded: int
    blocks_present: int
    blocks_pending: int
    blocks_refused: int
    blocks_evicted: int
    blocks_discarded: int
    length_mismatches: int
    bytes_saved: int
    bytes_loaded: int
    jobs_failed: int
    jobs_in_flight: int
    pool_blocks: int
    pool_blocks_used: int
    pool_bytes: int
    pool_bytes_ready: int
    device_pool_bytes: int
    device_pool_bytes_used: int
    device_pool_bytes_reserved: int
    strided: bool
    planner: tuple
    device: str
    failed: bool
    lookup_latency_us_p50: float
    lookup_latency_us_p99: float
    save_latency_us_p50: float
    save_latency_us_p99: float
    load_latency_us_p50: float
    load_latency_us_p99: float

    @property
    def cache_hit_rate(self):
        """Blocks of leading runs that `check_blocks` found, over all blocks it was asked for; 0.0 before the first."""
        return self.blocks_hit / self.blocks_checked if self.blocks_checked else 0.0
