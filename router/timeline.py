"""What happened to one request, and when: the one record behind the console's waterfall and OpenTelemetry's spans.

The request that is being served is found through a context variable, so that what calls workers need not hand it on. A task inherits it from
whoever began it: a prefill that several wait for belongs to the request that leads it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from cachebus.messages import Report
from router.costs import Way

PHASES_MAX = 64
"""Phases kept of a request; what comes after them is not recorded."""
WAIT = "wait"


@dataclass(frozen=True)
class Trace:
    """The W3C trace that a request belongs to. ``parent``: the client's span, "" where the trace begins here; ``state``: its tracestate."""

    trace_id: str
    parent: str = ""
    sampled: bool = True
    state: str = ""

    def headers(self, span_id: str) -> dict[str, str]:
        """What a worker is sent so that its spans are children of ``span_id``."""
        headers = {"traceparent": f"00-{self.trace_id}-{span_id}-{'01' if self.sampled else '00'}"}
        return headers | ({"tracestate": self.state} if self.state else {})


@dataclass(eq=False)
class Phase:
    """A piece of a request's time, in seconds of the monotonic clock: ``receive``, ``queue``, ``render``, ``wait``, ``prefill`` or ``decode``.

    ``cached``: the tokens that its worker did not compute, by source; ``failed``: the kind of error that ended it; ``headers``: for its worker.
    """

    name: str
    worker: str
    begun: float
    span_id: str = ""
    ended: float | None = None
    first_token: float | None = None
    failed: str = ""
    cached: Mapping[str, int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Timeline:
    """A request's phases and what became of it. ``wall``: seconds since 1970 at ``begun``; ``cached``: tokens nobody computed for it, by source."""

    request_id: str
    path: str
    begun: float
    wall: float
    tenant: str = ""
    trace: Trace | None = None
    span_id: str = ""
    model: str = ""
    route: str = "none"
    worker: str = ""
    status: int = 0
    prompt_tokens: int = 0
    cached: Mapping[str, int] = field(default_factory=dict)
    ways: Sequence[Way] = ()
    first_token: float | None = None
    ended: float | None = None
    phases: list[Phase] = field(default_factory=list)

    def begin(self, name: str, worker: str, now: float) -> Phase:
        """A phase begins. Waiting that goes on is one phase, however often it was looked whether it is over."""
        last = self.phases[-1] if self.phases else None
        if last is not None and name == WAIT == last.name and last.worker == worker:
            last.ended = None
            return last
        phase = Phase(name, worker, now)
        if self.trace is not None:
            phase.span_id = secrets.token_hex(8)
            phase.headers = self.trace.headers(phase.span_id)
        if len(self.phases) < PHASES_MAX:
            self.phases.append(phase)
        return phase

    def prepared(self, model: str, prompt_tokens: int, ways: Sequence[Way]) -> None:
        """Its way is chosen, the first of ``ways``; 0 tokens where they were not counted."""
        self.model, self.prompt_tokens, self.ways = model, prompt_tokens, ways

    def token(self, now: float) -> None:
        """The first token of the decode leg under way has come."""
        if self.first_token is None:
            self.first_token = now
        leg = self._last("decode")
        if leg is not None:
            leg.first_token = now

    def reported(self, name: str, report: Report | None) -> None:
        """The bus has told where the prompt came from in the last leg of that name."""
        leg = self._last(name)
        if report is not None and leg is not None and leg.worker == report.worker:
            leg.cached = sources(report)

    def end(self, status: int, route: str, now: float) -> None:
        """The request is over, and so is what is still under way for it: a prefill goes on only for others who wait for it."""
        self.status, self.route, self.ended = status, route, now
        for phase in self.phases:
            if phase.ended is None:
                phase.ended = now

    def _last(self, name: str) -> Phase | None:
        return next((phase for phase in reversed(self.phases) if phase.name == name), None)


def sources(report: Report) -> dict[str, int]:
    """Tokens that were not computed, by where they came from."""
    found: list[tuple[str, int]] = [("hbm", report.hbm_tokens), *report.pulled.items()]
    return {name: tokens for name, tokens in found if tokens}


_current: ContextVar[Timeline | None] = ContextVar("timeline", default=None)


def follow(timeline: Timeline) -> None:
    """What this task does from now on, and what it begins, is done for that request."""
    _current.set(timeline)


def followed() -> Timeline | None:
    """The request that is being served."""
    return _current.get()


def first_token() -> None:
    """The decode leg of the request being served has brought its first token."""
    timeline = _current.get()
    if timeline is not None:
        timeline.token(time.monotonic())


@contextmanager
def phase(name: str, worker: str = "") -> Iterator[Phase]:
    """A phase of the request being served, from here to the end of the block."""
    timeline, now = _current.get(), time.monotonic()
    found = Phase(name, worker, now) if timeline is None else timeline.begin(name, worker, now)
    try:
        yield found
    except BaseException as error:
        found.failed = type(error).__name__
        raise
    finally:
        if found.ended is None:
            found.ended = time.monotonic()
