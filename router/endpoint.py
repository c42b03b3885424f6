"""One OpenAI endpoint as an ASGI application: a request's way from its body to its last byte."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cachebus.messages import Report, Worker
from router.dispatch import Route
from router.errors import ApiError
from router.explain import EXPLAIN, explanation
from router.fields import COMPLETIONS, decode_body, is_splittable, parse_body, plain_prompt
from router.fleet import Leg
from router.gateway import Gateway
from router.legs import EngineAnswer, LegBroken, LegFailed
from router.policies import Ask
from router.reports import arrived
from router.usage import EVENT_END, EventPatcher, is_engine_failure, patch_json

log = logging.getLogger("headstart.router")

DECODE_ATTEMPTS = 3
RETRY_SECONDS = 1
BODY_SECONDS_MAX = 60.0


@dataclass
class Call:
    """A request under way. ``sent``: whether its answer has begun; ``explains``: whether its client asked why it goes the way it goes."""

    path: str
    send: Send
    request_id: str = field(default_factory=lambda: secrets.token_hex(16))
    started: float = field(default_factory=time.monotonic)
    route: str = "none"
    status: int = 500
    sent: bool = False
    explains: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """The headers that every answer carries."""
        return {"x-request-id": self.request_id}


class GenerationEndpoint:
    """``/v1/chat/completions`` or ``/v1/completions``."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self._gateway = gateway
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; a client that leaves cancels all that is done for it alone."""
        call = Call(self._path, send, explains=dict(scope["headers"]).get(EXPLAIN) == b"1")
        metrics = self._gateway.metrics
        metrics.in_flight.inc()
        self._gateway.requests += 1
        try:
            if self._gateway.requests > self._gateway.settings.requests_max:
                raise ApiError(503, "the router is full: router.requests_max", code="router_full", retry_seconds=RETRY_SECONDS)
            await self._serve(call, scope, receive)
        except ApiError as error:
            await self._answer(call, scope, receive, error.response(call.headers))
        except EngineAnswer as answer:
            await self._answer(call, scope, receive, Response(answer.body, answer.status, call.headers, "application/json"))
        except asyncio.CancelledError:
            call.status = 499
            raise
        finally:
            self._gateway.requests -= 1
            metrics.in_flight.dec()
            metrics.requests.labels(call.route, str(call.status)).inc()

    async def _serve(self, call: Call, scope: Scope, receive: Receive) -> None:
        raw = await _read_body(receive, dict(scope["headers"]), self._gateway.settings.body_bytes_max)
        work = asyncio.create_task(self._work(call, raw))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                call.status = 499
                log.info("request %s: its client left", call.request_id)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _work(self, call: Call, raw: bytes) -> None:
        body = parse_body(raw)
        worker = self._gateway.any_decode_worker(body.get("model") or None)
        splittable = is_splittable(self._path, body)
        given = plain_prompt(self._path, body)
        token_ids: Sequence[int] | None = given
        if splittable and given is None and self._gateway.lengths.tokens_max(worker.model, len(raw)) >= self._gateway.settings.prefill_tokens_min:
            worker, token_ids = await self._render(worker, body)
            if token_ids is not None:
                self._gateway.lengths.learn(worker.model, len(raw), len(token_ids))
        dispatcher = self._gateway.dispatcher
        route = Route(False, Ask(worker.model))
        if splittable and token_ids is not None:
            route = await dispatcher.prepare(worker, token_ids, call.request_id)
        call.route = route.name
        try:
            await self._decode(call, body, route, token_ids if splittable and given is None else None)
        finally:
            if route.flight is not None:
                dispatcher.flights.end(route.flight, computed=False)

    async def _render(self, worker: Worker, body: dict[str, Any]) -> tuple[Worker, list[int] | None]:
        """The prompt's ids, and the worker that rendered them."""
        gateway = self._gateway
        tried: set[str] = set()
        while True:
            try:
                return worker, await gateway.legs.render(worker, self._path, body)
            except (LegFailed, *LegBroken) as error:
                log.warning("rendering on %s failed: %s", worker.worker, error or type(error).__name__)
                tried.add(worker.worker)
                worker = gateway.any_decode_worker(worker.model, tried)

    async def _decode(self, call: Call, body: dict[str, Any], route: Route, token_ids: Sequence[int] | None) -> None:
        gateway = self._gateway
        tried: set[str] = set()
        for _ in range(DECODE_ATTEMPTS):
            chosen = gateway.choose_decode_worker(route.ask, tried)
            worker = chosen.worker
            tried.add(worker.worker)
            transfer_id = secrets.token_hex(8)
            report = gateway.dispatcher.reports.expect(transfer_id)
            useful = self._path == COMPLETIONS or worker.takes_prompt_token_ids
            data = decode_body(self._path, body, transfer_id, token_ids if useful else None)
            leg = gateway.fleet.begin(worker, chosen.way.compute, time.monotonic())
            try:
                async with gateway.legs.decode(worker, self._path, data, call.request_id) as answer:
                    await self._relay(call, leg, route, answer, report)
                    return
            except (LegFailed, *LegBroken) as error:
                log.warning("request %s: decode on %s failed: %s", call.request_id, worker.worker, error or type(error).__name__)
                if call.sent:
                    await self._break_off(call)
                    return
            finally:
                gateway.fleet.end(leg, time.monotonic())
                gateway.dispatcher.reports.forget(transfer_id)
        raise ApiError(502, "the decode workers tried failed to answer", code="workers_failed", retry_seconds=RETRY_SECONDS)

    async def _relay(self, call: Call, leg: Leg, route: Route, answer: aiohttp.ClientResponse, expected: asyncio.Future[Report]) -> None:
        streams = answer.content_type == "text/event-stream"
        first = await _first_event(leg.worker, answer) if streams else await answer.read()
        self._gateway.fleet.token(leg, time.monotonic())
        if route.flight is not None:
            self._gateway.dispatcher.flights.end(route.flight, computed=True)
        report = await arrived(expected, self._gateway.settings.report_ms_max)
        counted = route.prefill if route.through_prefill else report
        cached = self._count(counted, report)
        headers = call.headers | {
            "x-headstart-route": route.name,
            "x-headstart-worker": leg.worker,
            "x-headstart-cached-tokens": str(cached),
            "x-headstart-cache-source": _sources(counted),
        }
        if call.explains:
            headers["x-headstart-explanation"] = explanation(route.ways)
        call.status = 200
        self._gateway.metrics.ttft.labels(route.name).observe(time.monotonic() - call.started)
        if not streams:
            whole = patch_json(first, cached)
            await _start(call, headers | {"content-type": "application/json", "content-length": str(len(whole))})
            await call.send({"type": "http.response.body", "body": whole})
            return
        await _start(call, headers | {"content-type": answer.headers.get("content-type", "text/event-stream"), "cache-control": "no-cache"})
        patcher = EventPatcher(cached)
        piece = first
        while piece:
            leg.tokens += piece.count(EVENT_END)
            events = patcher.feed(piece)
            if events:
                await call.send({"type": "http.response.body", "body": events, "more_body": True})
            piece = await answer.content.readany()
        await call.send({"type": "http.response.body", "body": patcher.flush()})

    def _count(self, counted: Report | None, report: Report | None) -> int:
        """Cached tokens: those that nobody computed for this request."""
        metrics = self._gateway.metrics
        if report is not None:
            metrics.prompt_tokens.inc(report.prompt_tokens)
        if counted is None:
            return 0
        metrics.cached_tokens.labels("hbm").inc(counted.hbm_tokens)
        for tier, tokens in counted.pulled.items():
            metrics.cached_tokens.labels(tier).inc(tokens)
        return counted.hbm_tokens + counted.pulled_tokens

    async def _break_off(self, call: Call) -> None:
        """Ends a stream whose worker died: an error event and no [DONE], so that no client takes it for the whole answer."""
        error = ApiError(502, "the worker that generated this answer died; the answer is incomplete", code="worker_died")
        await call.send({"type": "http.response.body", "body": b"data: " + error.body() + b"\n\n"})

    async def _answer(self, call: Call, scope: Scope, receive: Receive, response: Response) -> None:
        call.status = response.status_code
        await response(scope, receive, call.send)


async def _first_event(worker: str, answer: aiohttp.ClientResponse) -> bytes:
    """The stream's beginning, at least one event of it. Raises LegFailed where that is the engine's own failure.

    vLLM has answered 200 by the time it finds its engine dead; nothing has reached the client yet, so another worker can take over.
    """
    first = b""
    while b"\n\n" not in first:
        piece = await answer.content.readany()
        if not piece:
            break
        first += piece
    if not first:
        raise LegFailed(f"{worker} ended its answer before it began")
    if is_engine_failure(first):
        raise LegFailed(f"{worker} failed as it began to answer")
    return first


async def _start(call: Call, headers: dict[str, str]) -> None:
    call.sent = True
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await call.send({"type": "http.response.start", "status": 200, "headers": raw})


def _sources(report: Report | None) -> str:
    if report is None:
        return "none"
    found = [name for name, tokens in [("hbm", report.hbm_tokens), *report.pulled.items()] if tokens]
    return ",".join(found) or "none"


async def _read_body(receive: Receive, headers: dict[bytes, bytes], bytes_max: int) -> bytes:
    too_large = ApiError(
        413,
        f"the request's body is larger than the {bytes_max} bytes that router.body_bytes_max allows",
        code="body_too_large",
    )
    if int(headers.get(b"content-length", b"0")) > bytes_max:
        raise too_large
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            return await _read_up_to(receive, bytes_max, too_large)
    except TimeoutError as error:
        raise ApiError(408, f"the request's body did not come within {BODY_SECONDS_MAX:g} s", code="body_too_slow") from error


async def _read_up_to(receive: Receive, bytes_max: int, too_large: ApiError) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the request's body is incomplete", code="incomplete_body")
        body += message.get("body", b"")
        if len(body) > bytes_max:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
