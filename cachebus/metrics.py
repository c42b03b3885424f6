"""The daemon's Prometheus metrics, read from its last statistics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cachebus.exposition import expose

SILENCE_SECONDS = 15.0
"""The daemon's thread says something each second; one that says nothing for so long hangs."""

_CHUNK_EVENTS = ("stored", "evicted", "granted", "missed", "no_room", "abandoned", "expired")
_BELOW = ("nvme", "redis", "peer")
_BELOW_EVENTS = ("stored", "evicted", "promoted", "missed", "skipped")
_MESSAGES = "messages_"
_WORKERS = "workers_"
_HBM = "hbm_chunks_"


class BusMetrics(Collector):
    """What ``Daemon.statistics`` returned last. Its values are replaced as a whole, by the daemon; scrapes read them."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._heard_at = time.monotonic()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    @property
    def values(self) -> dict[str, float]:
        """The last ones; empty before the daemon runs."""
        return self._values

    @values.setter
    def values(self, values: dict[str, float]) -> None:
        self._values, self._heard_at = values, time.monotonic()

    def serve(self, host: str, port: int) -> int:
        """Answers scrapes, ``/health`` and ``/ready``; returns the port. Raises HeadstartError where it is taken."""
        return expose("cache.metrics_port", (host, port), self._registry, self.stuck, lambda: self.stuck() or self._starting())

    def stuck(self) -> str:
        """ "" while the daemon's thread goes round, else for how long it has not."""
        silent = time.monotonic() - self._heard_at
        return f"the cachebus does nothing, {silent:.0f} s" if silent > SILENCE_SECONDS else ""

    def _starting(self) -> str:
        return "" if self._values else "the cachebus starts"

    def collect(self) -> Iterator[Metric]:
        """One family a name."""
        values = self.values
        for name, text in (("bytes", "Bytes of the tier in use"), ("capacity_bytes", "Bytes that the tier may use")):
            gauge = GaugeMetricFamily(f"headstart_tier_{name}", text, labels=["tier"])
            for tier in ("dram", "nvme"):
                gauge.add_metric([tier], values.get(f"{tier}_{name}", 0))
            yield gauge
        usable = GaugeMetricFamily("headstart_tier_usable", "Whether the tier answers", labels=["tier"])
        for tier in _BELOW:
            usable.add_metric([tier], values.get(f"{tier}_usable", 0))
        yield usable
        chunks = CounterMetricFamily("headstart_chunks", "What happened to chunks and tail blocks", labels=["tier", "event"])
        for event in _CHUNK_EVENTS:
            chunks.add_metric(["dram", event], values.get(f"{event}_total", 0))
        for tier, event in itertools.product(_BELOW, _BELOW_EVENTS):
            chunks.add_metric([tier, event], values.get(f"{tier}_{event}_total", 0))
        yield chunks
        failures = CounterMetricFamily("headstart_integrity_failures", "Pulls whose bytes did not match their digest", labels=["tier"])
        failures.add_metric(["dram"], values.get("integrity_failures_total", 0))
        for tier in _BELOW:
            failures.add_metric([tier], values.get(f"{tier}_integrity_failures_total", 0))
        yield failures
        for name in ("leases", "writing", "waiters", "holders", "engines", "promoting", "write_behind_bytes", "peers", "lent"):
            yield GaugeMetricFamily(f"headstart_bus_{name}", f"The directory's {name}", value=values.get(name, 0))
        workers = GaugeMetricFamily("headstart_bus_workers", "Registered workers", labels=["role"])
        for role in ("prefill", "decode"):
            workers.add_metric([role], values.get(_WORKERS + role, 0))
        yield workers
        hbm = GaugeMetricFamily("headstart_hbm_chunks", "Chunks in a living worker's HBM", labels=["worker"])
        for name, value in values.items():
            if name.startswith(_HBM):
                hbm.add_metric([name.removeprefix(_HBM)], value)
        yield hbm
        text = "Times that KV events of an engine were lost, so that its worker counted as cold"
        yield CounterMetricFamily("headstart_hbm_gaps", text, value=values.get("hbm_gaps_total", 0))
        text = "Claims of routers that another node, whose they were, did not answer in time"
        yield CounterMetricFamily("headstart_bus_claims_unanswered", text, value=values.get("claims_unanswered_total", 0))
        messages = CounterMetricFamily("headstart_bus_messages", "Messages by kind; malformed ones were dropped", labels=["kind"])
        for name, value in values.items():
            if name.startswith(_MESSAGES):
                messages.add_metric([name.removeprefix(_MESSAGES).removesuffix("_total")], value)
        yield messages
