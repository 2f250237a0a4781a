"""What the connector tells vLLM's logger and Prometheus: sums since the last report, and how full the pool is."""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

CAUSES = {  # why a request did not get a block that was on the lower tier
    "late": "they were not read in time",
    "full": "host memory had no room for them",
    "slower_than_computing": "reading them would have taken longer than computing them",
    "gone": "meanwhile they left the tier, or were being saved anew",
    "unreadable": "the data there is damaged, or is of another block",
}
SUMS = {
    "save_blocks": "KV blocks saved to host memory",
    "save_bytes": "Bytes saved to host memory",
    "save_seconds": "Seconds from the start of a save until it was seen to be over, summed",
    "saves_dropped": "KV blocks not saved because every job record was in use",
    "load_blocks": "KV blocks loaded from host memory",
    "load_bytes": "Bytes loaded from host memory",
    "load_seconds": "Seconds from the start of a load until it was seen to be over, summed",
    "transfers_failed": "Saves and loads that the driver refused",
    "blocks_matched": "KV blocks found in host memory and requested from there",
    "blocks_evicted": "KV blocks evicted from host memory",
    "saves_not_held": "KV blocks not saved in a step because too many device blocks were held already",
    "pins_refused": "KV blocks that requests wanted to pin beyond a quarter of host memory",
    "tier_blocks_written": "KV blocks written to the lower tier",
    "tier_blocks_not_written": "KV blocks that should have been written to the lower tier and were not",
    "tier_blocks_read": "KV blocks read from the lower tier into host memory",
    "tier_read_seconds": "Seconds in which blocks were read from the lower tier",
    "tier_saved_seconds": "Seconds that computing these blocks would have taken, as far as that is known",
    **{
        f"tier_misses_{cause}": f"KV blocks on the lower tier that a request did not get: {why}"
        for cause, why in CAUSES.items()
    },
    "verify_blocks": "KV blocks compared by verify",
    "verify_mismatches": "KV blocks that verify found to differ",
    "verify_skipped": "Transfers that verify had no room for",
}
LEVELS = {
    "pool_blocks_used": "KV blocks in host memory",
    "pool_blocks": "KV blocks that host memory has room for",
    "tier_blocks": "KV blocks on the lower tier",
    "tier_blocks_capacity": "KV blocks that the lower tier has room for",
    "tier_queue_blocks": "KV blocks on their way to or from the lower tier",
}


@dataclass
class KVortexStats(KVConnectorStats):
    """Numbers by name. With vLLM 0.15, which has no other way, `report` goes from the workers to the scheduler, too."""

    report: object = None

    def reset(self):
        self.data, self.report = {}, None

    def aggregate(self, other):
        for name, value in other.data.items():
            self.data[name] = value if name in LEVELS else self.data.get(name, 0) + value
        if self.report is not None and other.report is not None:
            self.report = self.report.aggregate(other.report)
        else:
            self.report = self.report or other.report
        return self

    def reduce(self):
        return {name: round(value, 6) for name, value in self.data.items()}

    def is_empty(self):
        return not self.data

    def take_report(self):
        report, self.report = self.report, None
        return report


class KVortexPromMetrics(KVConnectorPromMetrics):
    """``vllm:kvortex_*``, a counter for each sum and a gauge for each level."""

    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self.metrics = {}
        for names, make in ((SUMS, self._counter_cls), (LEVELS, self._gauge_cls)):
            for name, documentation in names.items():
                metric = make(name=f"vllm:kvortex_{name}", documentation=documentation, labelnames=labelnames)
                self.metrics[name] = {
                    engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()
                }

    def observe(self, transfer_stats_data, engine_idx=0):
        for name, value in transfer_stats_data.items():
            metric = self.metrics[name][engine_idx]
            metric.set(value) if name in LEVELS else metric.inc(value)
