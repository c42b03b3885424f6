"""The decode leg: from the worker that is chosen to the answer's last byte, and on with another worker where that one dies."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, field

import aiohttp
from starlette.types import Send

from cachebus.messages import Report
from router.apis import COMPLETIONS, RESPONSES, is_anthropic
from router.callers import Caller
from router.dispatch import Route
from router.door import Urgency
from router.errors import ApiError
from router.explain import explanation
from router.fields import DecodeRequest, decode_body
from router.fleet import Leg
from router.gateway import Gateway
from router.legs import EngineAnswer, LegBroken, LegFailed, LegRefused
from router.message_transcript import MessageTranscript
from router.policies import Chosen
from router.reports import arrived
from router.resume import next_leg, transcript_for, with_ids
from router.timeline import first_token
from router.transcript import Diverged, EngineFailed, Transcript
from router.usage import EventPatcher, events_in, is_engine_failure, patch_json

log = logging.getLogger("headstart.router")

DECODE_ATTEMPTS = 3
"""Workers in a row that may fail without a token that the client did not have."""
RETRY_SECONDS = 1
_EVENTS_AHEAD = {RESPONSES: 2}
"""Events that a stream begins with before its engine has computed anything (response.created, response.in_progress)."""


@dataclass
class Call:
    """A request under way. ``sent``: whether its answer has begun; ``cached``: how many cached tokens its headers tell of;
    ``events``: how many events of a stream its client has.

    ``explains``: whether its client asked why it goes the way it goes;
    ``transcript`` is what its client has of a stream that another worker could go on with.
    """

    path: str
    send: Send
    caller: Caller = field(default_factory=Caller)
    request_id: str = field(default_factory=lambda: secrets.token_hex(16))
    started: float = field(default_factory=time.monotonic)
    route: str = "none"
    status: int = 500
    sent: bool = False
    events: int = 0
    explains: bool = False
    urgency: Urgency = Urgency(0, float("inf"))  # noqa: RUF009 - it is frozen
    cached: int = 0
    transcript: Transcript | MessageTranscript | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers that every answer carries; each API's clients look for the id under their own name."""
        return {"x-request-id": self.request_id} | ({"request-id": self.request_id} if is_anthropic(self.path) else {})

    @property
    def progress(self) -> int:
        """How much the client has, as far as it is counted: tokens, or characters where the API has no tokens."""
        return 0 if self.transcript is None else self.transcript.progress

    async def begin(self, headers: dict[str, str]) -> None:
        """Sends the head of an answer that is no refusal."""
        self.sent, self.status = True, 200
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": 200, "headers": raw})

    async def pass_on(self, data: bytes, *, more: bool = True) -> None:
        """Sends a piece of the body."""
        self.events += events_in(data)
        if data or not more:
            await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def out_of_time(self) -> None:
        """The deadline has passed. Raises ApiError (504) where nothing was sent yet."""
        error = ApiError(504, "the answer was not ready by its deadline", code="deadline_exceeded")
        if not self.sent:
            raise error
        await self.pass_on(error.event(self.path, self.events), more=False)


class Decoding:
    """Decode legs of one endpoint."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self._gateway, self._path = gateway, path

    async def run(self, call: Call, asked: DecodeRequest, route: Route) -> None:
        """Answers a call. Raises ApiError or EngineAnswer where nothing was sent yet; later an error event ends the stream."""
        call.transcript = transcript_for(self._path, asked.body)
        if call.transcript is not None:
            asked = with_ids(self._path, asked)
        tried: set[str] = set()
        refused: list[str] = []
        failures, from_prompt = 0, False
        while failures < DECODE_ATTEMPTS and (chosen := self._choose(call, tried, route)) is not None:
            worker = chosen.worker
            tried.add(worker.worker)
            request, had = asked, call.progress
            if call.sent and call.transcript is not None:
                request = next_leg(self._path, asked, call.transcript, from_prompt=from_prompt, takes_ids=worker.takes_prompt_token_ids)
            try:
                await self._leg(call, chosen, route, request)
                self._gateway.fleet.health.refused(refused, time.monotonic())
                return
            except (LegFailed, EngineFailed, EngineAnswer, Diverged, *LegBroken) as error:
                if isinstance(error, EngineAnswer) and not call.sent:
                    raise
                log.warning("request %s: decode on %s failed: %s", call.request_id, worker.worker, str(error) or type(error).__name__)
                if isinstance(error, LegRefused):
                    refused.append(worker.worker)
                if isinstance(error, Diverged | EngineAnswer):
                    if request is asked:
                        break
                    # What can't be continued may be computed again from the prompt, there too.
                    tried.discard(worker.worker)
                    from_prompt = True
            failures = 1 if call.progress > had else failures + 1
            if call.sent and await self._is_over(call, asked):
                return
            if not (call.sent or self._gateway.retries.take(time.monotonic())):
                break
        if not call.sent:
            raise ApiError(502, "the decode workers tried failed to answer", code="workers_failed", retry_seconds=RETRY_SECONDS)
        await self._break_off(call)

    def _choose(self, call: Call, tried: set[str], route: Route) -> Chosen | None:
        """The next one to ask; None where nobody is left to go on with a stream. Raises ApiError where nothing was sent yet."""
        if call.sent and (call.transcript is None or not call.transcript.resumable):
            return None
        try:
            return self._gateway.choose_decode_worker(route.ask, tried)
        except ApiError:
            if not call.sent:
                raise
            return None

    async def _is_over(self, call: Call, asked: DecodeRequest) -> bool:
        """Whether the client had the last token before the worker died: then what is left to say needs no engine."""
        transcript = call.transcript
        if transcript is None or not transcript.resumable or not transcript.finished:
            return False
        with_usage = bool((asked.body.get("stream_options") or {}).get("include_usage"))
        end = EventPatcher(call.cached).feed(transcript.closing(with_usage=with_usage))
        self._gateway.metrics.resumed.labels("ended").inc()
        await call.pass_on(end, more=False)
        return True

    async def _leg(self, call: Call, chosen: Chosen, route: Route, request: DecodeRequest) -> None:
        gateway, worker = self._gateway, chosen.worker
        transfer_id = secrets.token_hex(8)
        report = gateway.dispatcher.reports.expect(transfer_id)
        useful = self._path == COMPLETIONS or worker.takes_prompt_token_ids
        follow_ms = await route.followed.part_ms(worker) if route.followed is not None else 0
        data = decode_body(self._path, request, transfer_id, request.token_ids if useful else None, call.caller.terms, follow_ms)
        leg = gateway.fleet.begin(worker, chosen.way.compute, time.monotonic(), route.ask.tokens, chosen.way.tokens)
        try:
            async with gateway.legs.decode(worker, self._path, data, call.request_id) as answer:
                if answer.content_type == "text/event-stream":
                    await self._stream(call, leg, route, answer, report)
                else:
                    await self._whole(call, leg, route, answer, report)
        finally:
            gateway.fleet.end(leg, time.monotonic())
            gateway.dispatcher.reports.forget(transfer_id)

    async def _whole(self, call: Call, leg: Leg, route: Route, answer: aiohttp.ClientResponse, expected: asyncio.Future[Report]) -> None:
        raw = await answer.read()
        if call.sent:
            raise LegFailed(f"{leg.worker} answered a stream with something else")
        headers = await self._begun(call, leg, route, expected)
        whole = patch_json(raw, call.cached)
        await call.begin(headers | {"content-type": "application/json", "content-length": str(len(whole))})
        await call.pass_on(whole, more=False)

    async def _stream(self, call: Call, leg: Leg, route: Route, answer: aiohttp.ClientResponse, expected: asyncio.Future[Report]) -> None:
        piece = await _beginning(leg.worker, answer, _EVENTS_AHEAD.get(self._path, 0))
        if not call.sent:
            headers = await self._begun(call, leg, route, expected)
            await call.begin(headers | {"content-type": answer.headers.get("content-type", "text/event-stream"), "cache-control": "no-cache"})
        elif call.transcript is not None:
            self._gateway.fleet.token(leg, time.monotonic())
            first_token()
            how = "continued" if call.transcript.continues else "computed again"
            self._gateway.metrics.resumed.labels(how).inc()
            log.info("request %s: %s goes on after %d, %s", call.request_id, leg.worker, call.progress, how)
        patcher, transcript, heard = EventPatcher(call.cached), call.transcript, self._gateway.fleet.health.heard
        while piece:
            heard[leg.worker] = time.monotonic()
            leg.tokens += events_in(piece)
            await call.pass_on(patcher.feed(piece if transcript is None else transcript.feed(piece)))
            piece = await answer.content.readany()
        if transcript is not None and not transcript.done:
            raise LegFailed(f"{leg.worker} ended its stream in the middle")
        await call.pass_on(patcher.flush(), more=False)

    async def _begun(self, call: Call, leg: Leg, route: Route, expected: asyncio.Future[Report]) -> dict[str, str]:
        """The first token is there: the headers, and what is counted once a request."""
        gateway, now = self._gateway, time.monotonic()
        gateway.fleet.token(leg, now)
        first_token()
        worker = gateway.watch.replica.workers.get(leg.worker)
        if route.leg is not None and worker is not None and leg.turn == leg.begun:
            # One that was followed may have had its end after the first token.
            computed_at = now if route.leg.ended_at is None else route.leg.ended_at
            gateway.dispatcher.policy.hand_over_took(route.ask, worker, now - max(leg.begun, computed_at))
        gateway.fleet.health.succeeded(leg.worker, time.monotonic())
        if route.flight is not None:
            gateway.dispatcher.flights.end(route.flight, computed=True)
        report = await arrived(expected, gateway.settings.report_ms_max)
        if report is not None:
            call.caller.meter.prompt_is(report.prompt_tokens)
        prefill = route.prefill if route.followed is None else await route.followed.report(gateway.settings.report_ms_max)
        counted = prefill if route.through_prefill else report
        call.cached = self._count(counted, report)
        gateway.recent.answered(leg.worker, prefill, report, counted)
        gateway.metrics.ttft.labels(route.name).observe(time.monotonic() - call.started)
        headers = call.headers | {
            "x-headstart-route": route.name,
            "x-headstart-worker": leg.worker,
            "x-headstart-cached-tokens": str(call.cached),
            "x-headstart-cache-source": _sources(counted),
        }
        return headers | ({"x-headstart-explanation": explanation(route.ways)} if call.explains else {})

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
        self._gateway.metrics.resumed.labels("broken off").inc()
        error = ApiError(502, "the worker that generated this answer died; the answer is incomplete", code="worker_died")
        await call.pass_on(error.event(self._path, call.events), more=False)


async def _beginning(worker: str, answer: aiohttp.ClientResponse, ahead: int) -> bytes:
    """The stream's beginning, at least one event more than ``ahead``. Raises LegFailed where it is the engine's own failure.

    vLLM has answered 200 by the time it finds its engine dead; nothing has reached the client yet, so another worker can take over.
    """
    pieces: list[bytes] = []
    events, before = 0, b""
    while events <= ahead and (piece := await answer.content.readany()):
        pieces.append(piece)
        # An event's end may be cut in two.
        events += events_in(before + piece if before else piece)
        before = b"\n" if piece.endswith(b"\n") and not piece.endswith(b"\n\n") else b""
    first = b"".join(pieces)
    if not first:
        raise LegFailed(f"{worker} ended its answer before it began")
    if is_engine_failure(first):
        raise LegFailed(f"{worker} failed as it began to answer")
    return first


def _sources(report: Report | None) -> str:
    if report is None:
        return "none"
    found = [name for name, tokens in [("hbm", report.hbm_tokens), *report.pulled.items()] if tokens]
    return ",".join(found) or "none"
