"""The connector's counters on their way through vLLM to the engine's own /metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

_TEXTS = {
    "pulled_bytes": "Bytes of KV pulled from the region",
    "pulled_chunks": "Chunks and tail blocks pulled",
    "pull_seconds": "Seconds spent pulling and checking",
    "integrity_failures": "Pulls whose bytes did not match their digest",
    "late_chunks": "Chunks promised from a slower tier that did not come in time",
    "declined_chunks": "Chunks and tail blocks that were there and sooner computed than pulled",
    "handed_bytes": "Bytes of KV that came straight from another engine's memory",
    "handed_chunks": "Chunks and tail blocks that came straight from another engine's memory",
    "stale_offers": "Offered chunks and tail blocks that were not there any more when they were read, and came from the region",
    "offered_chunks": "Chunks and tail blocks offered to engines that wait for them",
    "published_bytes": "Bytes of KV published",
    "published_chunks": "Chunks and tail blocks published",
    "publish_seconds": "Seconds that engine steps spent publishing",
    "unpublished_chunks": "Chunks not published because the bus did not answer in time",
}


class HeadstartStats(KVConnectorStats):
    """Counts since the last report, by name."""

    data: dict[str, float]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())


class HeadstartPromMetrics(KVConnectorPromMetrics):
    """One counter a name, ``headstart_..._total``, with the engine's labels."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in _TEXTS.items():
            metric = metric_types[Counter](name=f"headstart_{name}", documentation=text, labelnames=labelnames)
            self._counters[name] = {engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(value)
