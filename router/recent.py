"""The requests under way and the last ones, for people who look, and for traces where there is a collector."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Protocol

from cachebus.messages import Report
from router.history import History
from router.timeline import Timeline, Trace, follow, followed, sources

KEPT = 300
"""Requests kept after their end."""


class Tracing(Protocol):
    """Who makes spans of requests (``router.tracing``)."""

    def trace(self, headers: Mapping[bytes, bytes]) -> Trace:
        """The trace of a request with these headers: its client's, or a new one."""

    def export(self, timeline: Timeline) -> None:
        """Takes a request that is over; neither waits nor fails."""

    async def close(self) -> None:
        """Sends what is left, if that goes quickly."""


class Recent:
    """One a router. ``tracing`` is None where nobody collects traces."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.history = History()
        self.under_way: dict[str, Timeline] = {}
        self.tracing = tracing
        self._ended: deque[Timeline] = deque(maxlen=KEPT)

    def begin(self, request_id: str, path: str, tenant: str, headers: Mapping[bytes, bytes]) -> Timeline:
        """A request has come, and is followed from here on."""
        timeline = Timeline(request_id, path, time.monotonic(), time.time(), tenant)
        if self.tracing is not None:
            timeline.trace, timeline.span_id = self.tracing.trace(headers), secrets.token_hex(8)
        self.under_way[request_id] = timeline
        follow(timeline)
        return timeline

    def answered(self, worker: str, prefill: Report | None, decode: Report | None, counted: Report | None) -> None:
        """The request being served has its first token, from ``worker``. Its legs' reports, and that which says what was cached for it."""
        timeline = followed()
        if timeline is None or timeline.first_token is None:
            return
        timeline.worker = worker
        timeline.reported("prefill", prefill)
        timeline.reported("decode", decode)
        if decode is not None:
            timeline.prompt_tokens = decode.prompt_tokens
        timeline.cached = sources(counted) if counted is not None else {}
        self.history.add(timeline.first_token - timeline.begun, 0 if decode is None else decode.prompt_tokens, timeline.cached, time.monotonic())

    def end(self, timeline: Timeline, status: int, route: str) -> None:
        """It is over."""
        timeline.end(status, route, time.monotonic())
        self.under_way.pop(timeline.request_id, None)
        self._ended.append(timeline)
        if self.tracing is not None:
            self.tracing.export(timeline)

    def latest_first(self) -> Iterator[Timeline]:
        """Those under way, then those that are over."""
        yield from reversed(self.under_way.values())
        yield from reversed(self._ended)

    def find(self, request_id: str) -> Timeline | None:
        """One that is still known."""
        return next((timeline for timeline in self.latest_first() if timeline.request_id == request_id), None)
