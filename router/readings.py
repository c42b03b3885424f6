"""What workers' engines say of themselves in their Prometheus metrics, as far as the pools' sizes depend on it. Pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_SAMPLE = re.compile(
    rb"^vllm:(kv_cache_usage_perc|num_requests_running|num_requests_waiting|request_success_total|inter_token_latency_seconds_sum"
    rb"|inter_token_latency_seconds_count)(?:\{.*\})? (\S+)$",
    re.MULTILINE,
)
_BLOCKS = re.compile(rb'^vllm:cache_config_info\{.*?num_gpu_blocks="(\d+)"', re.MULTILINE)


@dataclass(frozen=True)
class EngineReading:
    """One engine at one moment. ``kv_used``: share of its KV ``blocks`` (0: it does not tell how many) that requests hold.

    ``finished``, ``token_seconds``, ``tokens``: requests that ever ended, and the seconds between tokens of all of them, and how many that were.
    """

    kv_used: float = 0.0
    blocks: int = 0
    running: int = 0
    waiting: int = 0
    finished: int = 0
    token_seconds: float = 0.0
    tokens: int = 0


def parse(exposition: bytes) -> EngineReading:
    """Reads an engine's metrics; what it does not tell is 0. Several engines of one server (data parallelism) are one worker."""
    sums: dict[bytes, float] = defaultdict(float)
    engines = 0
    for name, value in _SAMPLE.findall(exposition):
        sums[name] += float(value)
        engines += name == b"kv_cache_usage_perc"
    return EngineReading(
        kv_used=sums[b"kv_cache_usage_perc"] / max(1, engines),
        blocks=sum(int(blocks) for blocks in _BLOCKS.findall(exposition)),
        running=int(sums[b"num_requests_running"]),
        waiting=int(sums[b"num_requests_waiting"]),
        finished=int(sums[b"request_success_total"]),
        token_seconds=sums[b"inter_token_latency_seconds_sum"],
        tokens=int(sums[b"inter_token_latency_seconds_count"]),
    )


@dataclass(frozen=True)
class PoolReading:
    """A pool at one moment. ``used``: its KV in workers' worth, with what those take who wait for blocks; ``blocks``, ``free``: KV blocks.

    ``requests``: that run or wait. Since the last look: ``finished`` requests, and the mean seconds between two tokens, None where none came.
    """

    used: float
    blocks: int
    free: int
    running: int
    requests: int
    finished: int
    inter_token_seconds: float | None


class Readings:
    """The last reading of every worker, and those at the last look."""

    def __init__(self) -> None:
        self._now: dict[str, EngineReading] = {}
        self._before: dict[str, EngineReading] = {}

    def take(self, worker: str, reading: EngineReading) -> None:
        """A worker was read."""
        self._now[worker] = reading

    def keep(self, workers: Collection[str]) -> None:
        """Only these are there any longer."""
        for known in (self._now, self._before):
            for worker in [name for name in known if name not in workers]:
                del known[worker]

    def look(self, workers: Iterable[str], full: float) -> PoolReading:
        """These workers together. ``full``: the share of used blocks from which on who waits is taken to wait for blocks."""
        used = token_seconds = 0.0
        blocks = free = running = requests = finished = tokens = 0
        for worker in workers:
            now = self._now.get(worker)
            if now is None:
                continue
            # A worker that is read for the first time has a past of unknown length.
            before = self._before.get(worker, now)
            if now.finished < before.finished or now.tokens < before.tokens:
                before = EngineReading()
            crowd = (now.running + now.waiting) / max(1, now.running) if now.kv_used >= full else 1.0
            used += now.kv_used * crowd
            blocks += now.blocks
            free += round(now.blocks * (1 - now.kv_used))
            running += now.running
            requests += now.running + now.waiting
            finished += now.finished - before.finished
            token_seconds += now.token_seconds - before.token_seconds
            tokens += now.tokens - before.tokens
            self._before[worker] = now
        return PoolReading(used, blocks, free, running, requests, finished, token_seconds / tokens if tokens else None)
