"""Prometheus: the text of `get_stats()`, and an exporter that reads an engine whenever it is scraped.

`prometheus_text` needs no other package. `EngineCollector` and `start_exporter` need prometheus_client:
``pip install 'kvortex[metrics]'``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from kvortex.errors import ConfigError, EngineClosed
from kvortex.stats import EngineStats
from kvortex.version import __version__

if TYPE_CHECKING:
    from kvortex.engine import KVortexEngine

COUNTERS = {  # field of EngineStats: (metric, what it counts)
    "blocks_checked": ("blocks_checked", "Blocks asked for by check_blocks."),
    "blocks_hit": ("blocks_hit", "Blocks of leading runs that check_blocks found."),
    "blocks_saved": ("blocks_saved", "Blocks that became visible after a save."),
    "blocks_loaded": ("blocks_loaded", "Blocks loaded to the device."),
    "blocks_present": ("blocks_present", "Blocks of a save that were in host memory already."),
    "blocks_pending": ("blocks_pending", "Blocks of a save that another save was writing."),
    "blocks_refused": ("blocks_refused", "Blocks of a save that found no slot or no free job."),
    "blocks_evicted": ("blocks_evicted", "Blocks evicted from host memory."),
    "blocks_dropped": ("blocks_dropped", "Blocks evicted from host memory before the lower tier had them."),
    "blocks_discarded": ("blocks_discarded", "Blocks that the caller made KVortex forget."),
    "length_mismatches": ("length_mismatches", "Blocks found with another size than asked for; they count as misses."),
    "blocks_not_packed": ("blocks_not_packed", "Blocks not kept: the codec cannot pack one of their numbers."),
    "bytes_saved": ("saved_bytes", "Bytes of the KV cache saved to host memory."),
    "bytes_loaded": ("loaded_bytes", "Bytes loaded to the device."),
    "packed_bytes_saved": ("saved_packed_bytes", "Bytes that saved blocks took in host memory: fewer with a codec."),
    "packed_bytes_loaded": ("loaded_packed_bytes", "Bytes that loaded blocks took in host memory."),
    "jobs_failed": ("jobs_failed", "Saves and loads that failed."),
}
GAUGES = {
    "jobs_in_flight": ("jobs_in_flight", "Saves and loads under way."),
    "pool_blocks": ("pool_blocks", "Blocks that the pool has room for, or will have when all of it is registered."),
    "pool_blocks_used": ("pool_blocks_used", "Blocks in the pool, those being written included."),
    "pool_blocks_clean": ("pool_blocks_clean", "Blocks in the pool that a lower tier has too."),
    "pool_bytes": ("pool_bytes", "Bytes of the pool, those that will yet be registered included."),
    "pool_bytes_ready": ("pool_ready_bytes", "Bytes of the pool that are registered and serve."),
    "device_pool_bytes": ("device_pool_bytes", "Limit of the pool of device memory, 0 without one."),
    "device_pool_bytes_used": ("device_pool_used_bytes", "Bytes of device memory that the pool has handed out."),
    "device_pool_bytes_reserved": ("device_pool_reserved_bytes", "Bytes that the pool takes from the device."),
    "strided": ("strided_copies", "1 where strided copies are legal for the layout, else 0."),
    "failed": ("failed", "1 after an error that ended the engine, else 0."),
}
TIER_COUNTERS = {  # field of TierStats: (metric, what it counts); each with the tier's name as a label
    "blocks_scanned": ("tier_blocks_scanned", "Headers of blocks of an earlier process that were read."),
    "blocks_adopted": ("tier_blocks_adopted", "Blocks of an earlier process that were kept."),
    "blocks_admitted": ("tier_blocks_admitted", "Blocks saved that were to be written to the tier."),
    "blocks_not_admitted": ("tier_blocks_not_admitted", "Blocks saved that the write budget did not allow to write."),
    "blocks_written": ("tier_blocks_written", "Blocks written to the tier."),
    "blocks_written_beyond": (
        "tier_blocks_written_beyond",
        "Blocks written beyond the budget, by an idle engine or flush.",
    ),
    "blocks_not_written": ("tier_blocks_not_written", "Blocks that the tier could not write."),
    "blocks_too_large": ("tier_blocks_too_large", "Of them, blocks whose records have no room in a slot of the tier."),
    "blocks_evicted": ("tier_blocks_evicted", "Blocks evicted from the tier."),
    "blocks_promoted": ("tier_blocks_promoted", "Blocks read from the tier into host memory."),
    "blocks_expired_unread": ("tier_blocks_expired_unread", "Blocks read for a reader that never loaded them."),
    "bytes_written": ("tier_written_bytes", "Bytes written to the tier."),
    "bytes_read": ("tier_read_bytes", "Bytes read from the tier."),
    "suspensions": ("tier_suspensions", "How often the tier was not used for a while, because it failed."),
}
TIER_GAUGES = {
    "blocks": ("tier_blocks", "Blocks in the tier."),
    "blocks_capacity": ("tier_blocks_capacity", "Blocks that the tier has room for."),
    "is_adopting": ("tier_adopting", "1 while blocks of an earlier process are being looked for, else 0."),
    "queue_blocks": ("tier_queue_blocks", "Blocks that the tier writes or reads, or that wait for it."),
    "cleaning_blocks": ("tier_cleaning_blocks", "Blocks in host memory that are pinned while they are written."),
    "promoting_blocks": ("tier_promoting_blocks", "Blocks in host memory that are pinned for a reader."),
    "is_suspended": ("tier_suspended", "1 while the tier is not used because it failed, else 0."),
    "read_only": ("tier_read_only", "1 where the tier takes no more blocks, else 0."),
}
TIER_SECONDS = {
    "ms_reading": ("tier_reading_seconds", "Seconds that reading batches of blocks took, summed."),
    "ms_saved": ("tier_saved_seconds", "Seconds that computing these blocks would have taken, if known."),
}
LATENCIES = {
    "lookup": "Seconds from the call of check_blocks to its answer, since the engine was created.",
    "save": "Seconds from the claim of a save to its end, since the engine was created.",
    "load": "Seconds from the claim of a load to its end, since the engine was created.",
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_PLANNER_LABELS = ("direction", "backend", "piece_bytes", "rows", "pitch_bytes")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*", re.ASCII)


class Family(NamedTuple):
    """One metric: `name` without the ``_total`` that samples of a counter end in."""

    name: str
    kind: str  # "counter", "gauge" or "summary"
    help: str
    samples: list[tuple[dict[str, str], float]]  # of (labels, value)


def families(stats: EngineStats, labels: Mapping[str, str] | None = None) -> list[Family]:
    """Return the metrics of one `EngineStats` as a list of `Family`, for renderers other than `prometheus_text`.

    Parameters
    ----------
    stats : EngineStats
    labels : mapping of str to str, optional
        Added to every sample.

    Raises
    ------
    ConfigError
        A label is no label name, starts with ``__``, or is one of KVortex's own.
    """
    labels = {name: str(value) for name, value in (labels or {}).items()}
    own = {"device", "version", "quantile", "tier", "cause", *_PLANNER_LABELS}
    for name in labels:
        if not _LABEL.fullmatch(name) or name.startswith("__") or name in own:
            raise ConfigError(
                f"{name!r} cannot be a label: letters, digits and _ are allowed, no digit and no __ in front, and "
                f"{', '.join(sorted(own))} are taken"
            )
    engine = {**labels, "device": stats.device, "version": __version__}
    found = [Family("kvortex_engine_info", "gauge", "Always 1; the labels tell about the engine.", [(engine, 1)])]
    found.append(_up(1, labels))
    for kind, table in (("counter", COUNTERS), ("gauge", GAUGES)):
        for field, (name, text) in table.items():
            found.append(Family(f"kvortex_{name}", kind, text, [(labels, int(getattr(stats, field)))]))
    for what, text in LATENCIES.items():
        samples = [
            ({**labels, "quantile": str(percent / 100)}, getattr(stats, f"{what}_latency_us_p{percent}") / 1e6)
            for percent in (50, 99)
        ]
        found.append(Family(f"kvortex_{what}_latency_seconds", "summary", text, samples))
    if stats.planner:
        samples = {}  # rows with equal labels are summed
        for row in stats.planner:
            own_labels = {name: str(getattr(row, name)) for name in _PLANNER_LABELS}
            key = tuple(own_labels.values())
            samples[key] = ({**labels, **own_labels}, samples.get(key, (None, 0))[1] + row.num_groups)
        text = "Groups of pieces that a back end moves, by shape."
        found.append(Family("kvortex_planner_groups", "gauge", text, list(samples.values())))
    return found + [family for tier in stats.tiers for family in _tier_families(tier, {**labels, "tier": tier.name})]


def _up(value, labels):
    return Family("kvortex_up", "gauge", "1 while the engine serves, 0 when it is shut down.", [(labels, value)])


def _tier_families(tier, labels):
    for kind, table in (("counter", TIER_COUNTERS), ("gauge", TIER_GAUGES)):
        for field, (name, text) in table.items():
            value = getattr(tier, field)
            yield Family(f"kvortex_{name}", kind, text, [(labels, int(value if type(value) is int else bool(value)))])
    for field, (name, text) in TIER_SECONDS.items():
        yield Family(f"kvortex_{name}", "counter", text, [(labels, getattr(tier, field) / 1000)])
    samples = [({**labels, "cause": cause}, count) for cause, count in sorted(tier.misses.items())]
    if samples:
        yield Family("kvortex_tier_misses", "counter", "Blocks that a reader waited for and missed, by cause.", samples)


def prometheus_text(stats: EngineStats, labels: Mapping[str, str] | None = None) -> str:
    """Render one `EngineStats` in Prometheus' text format, to be served as `kvortex.metrics.CONTENT_TYPE`.

    Counters end in ``_total`` and never go down while the engine lives; sizes are in bytes, times in seconds.
    Percentiles are summaries without sum and count, over the life of the engine, and 0 before the first sample.

    Parameters
    ----------
    stats : EngineStats
        What `get_stats` returned.
    labels : mapping of str to str, optional
        Added to every sample, e.g. ``{"model": "llama-3-70b", "rank": "0"}``.

    Returns
    -------
    str
        One engine's page. Two pages cannot be joined, because a page may describe a metric only once.

    Raises
    ------
    ConfigError
        A label is no label name, starts with ``__``, or is one of KVortex's own.
    """
    lines = []
    for family in families(stats, labels):
        name = family.name + ("_total" if family.kind == "counter" else "")
        lines += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}"]
        for own_labels, value in family.samples:
            pairs = ",".join(f'{label}="{_escape(text)}"' for label, text in own_labels.items())
            lines.append(f"{name}{{{pairs}}} {value}" if pairs else f"{name} {value}")
    return "\n".join(lines) + "\n"


def _escape(text):
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class EngineCollector:
    """A collector for a `prometheus_client` registry. It reads the engine only when it is scraped.

    It holds the engine. ``kvortex_up`` is 1; after `shutdown` it is 0, and the only metric.

    Parameters
    ----------
    engine : KVortexEngine
        One engine a registry.
    labels : mapping of str to str, optional
        Added to every sample.
    """

    def __init__(self, engine: "KVortexEngine", labels: Mapping[str, str] | None = None) -> None:
        self._engine, self._labels = engine, labels

    def describe(self) -> Iterable[Any]:
        """Describe no metric in advance: so registering does not read the engine."""
        return []

    def collect(self) -> Iterable[Any]:
        """Yield the engine's metrics."""
        from prometheus_client.core import Metric

        try:
            found = families(self._engine.get_stats(), self._labels)
        except EngineClosed:
            found = [_up(0, self._labels or {})]
        for family in found:
            metric = Metric(family.name, family.help, family.kind)
            suffix = "_total" if family.kind == "counter" else ""
            for labels, value in family.samples:
                metric.add_sample(family.name + suffix, labels, value)
            yield metric


class Exporter:
    """An HTTP server that answers ``GET /metrics``. `start_exporter` makes it; `close` or ``with`` ends it.

    Attributes
    ----------
    port : int
    """

    port: int

    def __init__(self, server: Any, thread: Any) -> None:
        self._server, self._thread = server, thread
        self.port = server.server_port

    def close(self) -> None:
        """Stop serving; blocks until the thread has ended. Idempotent."""
        if self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def start_exporter(
    engine: "KVortexEngine", port: int = 9400, *, host: str = "127.0.0.1", labels: Mapping[str, str] | None = None
) -> Exporter:
    """Serve the metrics of an engine over HTTP, from a daemon thread.

    Parameters
    ----------
    engine : KVortexEngine
        The exporter holds it until `close`. Each engine of a process needs its own port.
    port : int, default 9400
        0 takes a free one: see `Exporter.port`.
    host : str, default "127.0.0.1"
        Address to listen on; ``"0.0.0.0"`` for scrapers on other machines.
    labels : mapping of str to str, optional
        Added to every sample.

    Returns
    -------
    Exporter

    Raises
    ------
    ConfigError
        prometheus_client is missing, `port` is no port, or a label is not allowed.
    OSError
        The port is taken.
    """
    try:
        import prometheus_client
    except ImportError as error:
        raise ConfigError(
            f"the exporter needs prometheus_client ({error}); pip install 'kvortex[metrics]', or serve "
            "kvortex.prometheus_text yourself"
        ) from error
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise ConfigError(f"port must be 0 (any that is free) to 65535, got {port!r}")
    families(engine.get_stats(), labels)  # raises for a wrong label now, not at the first scrape
    registry = prometheus_client.CollectorRegistry()
    registry.register(EngineCollector(engine, labels))
    return Exporter(*prometheus_client.start_http_server(port, host, registry))
