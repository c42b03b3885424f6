"""The console: one page, and the figures that it shows. No prompt, no key, no token and no address is among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cachebus.messages import Worker
from router.explain import told
from router.gateway import Gateway
from router.history import STEP_SECONDS, STEPS, Step, quantile
from router.timeline import Timeline

ROWS_MAX = 60
FLIGHTS_MAX = 20
STAT_SECONDS = 0.5
"""For how long the bus is not asked again, however many look."""
_FOLDER = Path(__file__).parent / "console_page"
PAGE = {"/console": "page.html", "/console/style.css": "style.css", "/console/script.js": "script.js"}
"""The page's files, which tell nothing, by path."""
_TYPES = {"page.html": "text/html; charset=utf-8", "style.css": "text/css; charset=utf-8", "script.js": "text/javascript; charset=utf-8"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_TIERS = {"dram": "chunks", "nvme": "nvme_chunks", "redis": "redis_chunks", "peer": "peer_chunks"}


class Console:
    """Its routes' answers. Who may ask is decided before."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._files = {name: (_FOLDER / name).read_bytes() for name in _TYPES}
        self._statistics: Mapping[str, float] | None = None
        self._asked_at = float("-inf")

    def routes(self, check: Callable[[Request], None] = lambda request: None) -> list[Route]:
        """The page's files, and ``/console/data``: all figures as JSON; with ``?request=ID`` that request's path, too, null where it is forgotten.

        ``check`` raises ApiError where somebody may not ask.
        """

        async def file(request: Request) -> Response:
            check(request)
            name = PAGE[request.scope["path"]]
            return Response(self._files[name], headers={**_HEADERS, "content-type": _TYPES[name]})

        async def data(request: Request) -> Response:
            check(request)
            return await self._data(request)

        return [*(Route(path, file) for path in PAGE), Route("/console/data", data)]

    async def _data(self, request: Request) -> Response:
        now = time.monotonic()
        if now - self._asked_at >= STAT_SECONDS:
            self._asked_at = now
            self._statistics = await self._gateway.colleagues.statistics()
        found = figures(self._gateway, self._statistics, time.monotonic())
        asked = request.query_params.get("request")
        if asked is not None:
            timeline = self._gateway.recent.find(asked)
            found["request"] = None if timeline is None else path_of(timeline, time.monotonic())
        return JSONResponse(found, headers=_HEADERS)


def figures(gateway: Gateway, statistics: Mapping[str, float] | None, now: float) -> dict[str, Any]:
    """What the page shows of the whole: seconds, bytes, tokens. ``statistics``: the bus's counters, None where it does not answer."""
    steps = gateway.recent.history.steps(now)
    rows = list(islice(gateway.recent.latest_first(), ROWS_MAX))
    return {
        "now": time.time(),
        "bus": gateway.watch.connected,
        "ready": gateway.ready,
        "policy": gateway.settings.policy,
        "routers": gateway.colleagues.count,
        "requests": {"under_way": len(gateway.recent.under_way), "waiting": gateway.door.waiting, "max": gateway.settings.requests_max},
        "workers": _workers(gateway, now),
        "tiers": None if statistics is None else _tiers(statistics),
        "hits": _hits(steps),
        "ttft": _ttft(steps, now),
        "flights": _flights(gateway, now),
        "last": [_row(timeline, now) for timeline in rows],
    }


def path_of(timeline: Timeline, now: float) -> dict[str, Any]:
    """One request's way: its phases in seconds since it came, and the ways it had."""

    def since(moment: float | None) -> float | None:
        return None if moment is None else round(moment - timeline.begun, 6)

    phases = [
        {
            "name": phase.name,
            "worker": phase.worker,
            "begun": since(phase.begun),
            "first_token": since(phase.first_token),
            "ended": since(phase.ended),
            "failed": phase.failed,
            "cached": dict(phase.cached),
        }
        for phase in timeline.phases
    ]
    trace = timeline.trace.trace_id if timeline.trace is not None and timeline.trace.sampled else ""
    return {**_row(timeline, now), "path": timeline.path, "trace": trace, "phases": phases, "ways": told(timeline.ways)}


def _row(timeline: Timeline, now: float) -> dict[str, Any]:
    end = now if timeline.ended is None else timeline.ended
    return {
        "id": timeline.request_id,
        "at": timeline.wall,
        "tenant": timeline.tenant,
        "model": timeline.model,
        "route": timeline.route,
        "worker": timeline.worker,
        "status": timeline.status,
        "under_way": timeline.ended is None,
        "prompt_tokens": timeline.prompt_tokens,
        "cached": dict(timeline.cached),
        "ttft": None if timeline.first_token is None else round(timeline.first_token - timeline.begun, 6),
        "seconds": round(end - timeline.begun, 6),
    }


def _workers(gateway: Gateway, now: float) -> list[dict[str, Any]]:
    workers, hbm = list(gateway.watch.replica.workers.values()), gateway.watch.replica.hbm_chunks()
    out = gateway.fleet.health.out(workers, now)

    def one(worker: Worker) -> dict[str, Any]:
        load = gateway.fleet.load(worker.worker, now)
        state = "draining" if worker.draining else "out" if worker.worker in out else "ready"
        return {
            "worker": worker.worker,
            "role": worker.role,
            "model": worker.model,
            "state": state,
            "requests": gateway.fleet.requests(worker.worker),
            "running": load.running,
            "backlog": round(load.backlog, 3),
            "hbm_chunks": hbm.get(worker.worker),
        }

    return [one(worker) for worker in sorted(workers, key=lambda w: (w.role, w.worker))]


def _tiers(statistics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Tiers with anything in them, and those that are set up. Bytes of the shared tier and of other nodes are theirs to know."""
    rows = [
        {
            "tier": tier,
            "chunks": statistics.get(chunks, 0),
            "bytes": statistics.get(f"{tier}_bytes"),
            "capacity": statistics.get(f"{tier}_capacity_bytes"),
        }
        for tier, chunks in _TIERS.items()
    ]
    return [row for row in rows if row["chunks"] or row["capacity"] or statistics.get(f"{row['tier']}_usable")]


def _hits(steps: list[Step]) -> dict[str, Any]:
    cached: dict[str, int] = {}
    for step in steps:
        for source, tokens in step.cached.items():
            cached[source] = cached.get(source, 0) + tokens
    return {"prompt_tokens": sum(step.prompt_tokens for step in steps), "cached": cached}


def _ttft(steps: list[Step], now: float) -> dict[str, Any]:
    newest = now - now % STEP_SECONDS
    points = [
        {"age": round(newest - step.begun), "median": quantile([step], 0.5), "p99": quantile([step], 0.99), "requests": step.times.total()}
        for step in steps
    ]
    return {
        "seconds": STEP_SECONDS * STEPS,
        "step": STEP_SECONDS,
        "median": quantile(steps, 0.5),
        "p99": quantile(steps, 0.99),
        "requests": sum(step.times.total() for step in steps),
        "points": points,
    }


def _flights(gateway: Gateway, now: float) -> dict[str, Any]:
    flights = gateway.dispatcher.flights.under_way
    rows = [
        {
            "leg": "decode" if flight.task is None else "prefill",
            "chunks": len(flight.keys),
            "waiting": flight.interested - 1,
            "seconds_left": round(max(0.0, flight.until - now), 3),
        }
        for flight in islice(flights, FLIGHTS_MAX)
    ]
    return {"count": len(flights), "some": rows}
