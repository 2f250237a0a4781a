"""The snapshot that `get_stats()` returns; the counters themselves are C fields of the engine and the index."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TierStats:
    """What became of blocks on the way to a lower tier and back, since the engine was created.

    The tier has `blocks` now, and room for `blocks_capacity`. `blocks_scanned` headers of an earlier process were read,
    and `blocks_adopted` of its blocks kept. Of the blocks saved, `blocks_admitted` were to be written; the write budget
    did not allow `blocks_not_admitted`. `blocks_written` counts all writes, those of an idle engine or `flush` beyond
    the budget included (`blocks_written_beyond`); `blocks_not_written` failed, of them `blocks_too_large` because their
    records take more room than a slot of the tier has. `blocks_promoted` were read back into
    RAM; `blocks_expired_unread` were held for a reader that let `hold_ms` pass. `misses` counts blocks that a reader
    waited for and did not get, by cause: a `BlockStatus`, or FULL (promotions pin half of the pool at the most), GONE,
    BEING_SAVED, DISCARDED, SLOWER_THAN_COMPUTING, or SUSPENDED (lookups while the tier is not used, because it failed).
    `queue_blocks` wait for the store or are in it; `cleaning_blocks` and `promoting_blocks` are pinned in RAM.
    `ms_reading` sums all batches; `ms_saved` is what computing the promoted blocks would have taken, if
    `prefill_tokens_per_s` is known.
    """

    name: str
    blocks: int
    blocks_capacity: int
    blocks_scanned: int
    blocks_adopted: int
    is_adopting: bool
    blocks_admitted: int
    blocks_not_admitted: int
    blocks_written: int
    blocks_written_beyond: int
    blocks_not_written: int
    blocks_too_large: int
    blocks_evicted: int
    blocks_promoted: int
    blocks_expired_unread: int
    misses: dict[str, int]
    bytes_written: int
    bytes_read: int
    queue_blocks: int
    cleaning_blocks: int
    promoting_blocks: int
    ms_reading: float
    ms_saved: float
    is_suspended: bool
    suspensions: int
    read_only: str | None
    last_error: str | None
    codec: str
    io: str
    io_reason: str | None


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters since the engine was created; those of engine, index and pool are read one after the other.

    Blocks are counted once per key of a call: a save when its slot became READY, a load when its slot was released.
    Latencies are in microseconds from the claim of the job to its retirement (lookups: to the answer). Each is at most
    25 % above the true percentile, and 0 without samples. `pool_blocks` and `pool_bytes` include what will yet be
    registered; if registering failed, they are what was registered before. `planner` has a `PlannerRow` for each
    direction and shape of group: which back end moves it, and what the probe measured. `tiers` has a `TierStats` for
    each lower tier. With a tier, `blocks_dropped` counts blocks evicted before the tier had them, and
    `pool_blocks_clean` those in RAM that the tier has, too. `bytes_saved` and `bytes_loaded` count bytes of the KV
    cache; `packed_bytes_saved` and `packed_bytes_loaded` what these blocks take in their slots, which is less with a
    codec. `blocks_not_packed` have a number that the codec cannot pack. The `device_pool` fields describe the pool of
    `gpu_pool_size_bytes`: its limit, what it has handed out, and what it takes from the device; zeros without one.
    """

    blocks_checked: int
    blocks_hit: int
    blocks_saved: int
    blocks_loaded: int
    blocks_present: int
    blocks_pending: int
    blocks_refused: int
    blocks_evicted: int
    blocks_dropped: int
    blocks_not_packed: int
    blocks_discarded: int
    length_mismatches: int
    bytes_saved: int
    bytes_loaded: int
    packed_bytes_saved: int
    packed_bytes_loaded: int
    jobs_failed: int
    jobs_in_flight: int
    pool_blocks: int
    pool_blocks_used: int
    pool_blocks_clean: int
    pool_bytes: int
    pool_bytes_ready: int
    device_pool_bytes: int
    device_pool_bytes_used: int
    device_pool_bytes_reserved: int
    strided: bool
    planner: tuple[Any, ...]  # of PlannerRow
    tiers: tuple[TierStats, ...]
    device: str
    failed: bool
    lookup_latency_us_p50: float
    lookup_latency_us_p99: float
    save_latency_us_p50: float
    save_latency_us_p99: float
    load_latency_us_p50: float
    load_latency_us_p99: float

    @property
    def cache_hit_rate(self) -> float:
        """Blocks of leading runs that `check_blocks` found, divided by all blocks asked for; 0.0 before the first."""
        return self.blocks_hit / self.blocks_checked if self.blocks_checked else 0.0
