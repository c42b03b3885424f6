"""The router's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cachebus.messages import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class RouterMetrics:
    """One registry a router."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter("headstart_requests", "Answered requests", ["route", "code"], registry=registry)
        self.ttft = Histogram(
            "headstart_time_to_first_token_seconds", "From a request's arrival to its first bytes", ["route"], buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("headstart_prompt_tokens", "Prompt tokens of answered requests", registry=registry)
        self.cached_tokens = Counter("headstart_cached_tokens", "Prompt tokens that nobody computed for their request", ["source"], registry=registry)
        self.prefills = Counter("headstart_prefills", "Prefill legs", ["outcome"], registry=registry)
        self.followed = Counter("headstart_followed", "Decode legs that began while their prompt was being computed", registry=registry)
        self.resumed = Counter("headstart_resumed_streams", "Streams whose worker died in the middle", ["outcome"], registry=registry)
        self.in_flight = Gauge("headstart_requests_in_flight", "Requests under way", registry=registry)
        self._workers = Gauge("headstart_workers", "Registered workers", ["role", "state"], registry=registry)
        self._backlog = Gauge(
            "headstart_prefill_backlog_seconds", "Seconds of prefill before this router's requests, all workers together", registry=registry
        )
        self.kv_blocks_free = Gauge("headstart_decode_kv_blocks_free", "KV blocks of ready decode workers that no request holds", registry=registry)
        text = "KV blocks that the largest prompt takes that waits at a decode worker"
        self.kv_blocks_wanted = Gauge("headstart_decode_kv_blocks_wanted", text, registry=registry)
        text = "Mean time between two tokens of a stream since the last reading, as decode workers say; 0: none came"
        self.inter_token_latency = Gauge("headstart_inter_token_latency_seconds", text, registry=registry)
        self.wanted = Gauge("headstart_wanted_workers", "How many workers there should be", ["role"], registry=registry)

    def exposition(self, workers: Iterable[Worker], out: Collection[str], backlog_seconds: float) -> bytes:
        """Prometheus' text format. ``out``: workers that get nothing by their own fault."""
        self._backlog.set(backlog_seconds)
        self._workers.clear()
        for role in ("prefill", "decode"):
            for state in ("ready", "draining", "out"):
                self._workers.labels(role, state).set(0)
        for worker in workers:
            self._workers.labels(worker.role, "draining" if worker.draining else "out" if worker.worker in out else "ready").inc()
        return generate_latest(self._registry)
