"""An endpoint as an ASGI application: a request's way from its body to its last byte."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cachebus.keys import tenant_id
from cachebus.messages import Worker
from router.apis import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from router.callers import Terms, caller_of
from router.caps import check_body, check_prompt
from router.decoding import RETRY_SECONDS, Call, Decoding
from router.dispatch import Route
from router.door import urgency_of
from router.errors import ApiError, refusal
from router.explain import EXPLAIN
from router.fields import DecodeRequest, parse_body, plain_prompt
from router.gateway import Gateway
from router.legs import EngineAnswer, LegBroken, LegFailed, LegRefused
from router.policies import Ask
from router.prompts import is_cacheable
from router.remembered import text_of
from router.settings import RouterSettings
from router.stored import UNSTORED, check_stored
from router.timeline import followed, phase

log = logging.getLogger("headstart.router")
Found = TypeVar("Found")


class Endpoint(ABC):
    """What all endpoints that read a body have in common."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self._gateway, self._path = gateway, path

    @abstractmethod
    async def _work(self, call: Call, raw: bytes) -> None:
        """Answers. Raises ApiError or EngineAnswer where nothing was sent yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; a client that leaves cancels all that is done for it alone."""
        call = Call(self._path, send, caller_of(scope), explains=dict(scope["headers"]).get(EXPLAIN) == b"1")
        timeline = self._gateway.recent.begin(call.request_id, self._path, call.caller.tenant, dict(scope["headers"]))
        metrics = self._gateway.metrics
        metrics.in_flight.inc()
        self._gateway.requests += 1
        self._gateway.retries.came()
        try:
            call.urgency = urgency_of(dict(scope["headers"]), self._gateway.settings.request_seconds_max, call.started)
            self._gateway.door.check(call.urgency, self._gateway.requests)
            await self._serve(call, scope, receive)
        except ApiError as error:
            await self._answer(call, scope, receive, error.response(call.headers, self._path))
        except EngineAnswer as answer:
            body = refusal(answer.status, answer.body, self._path)
            await self._answer(call, scope, receive, Response(body, answer.status, call.headers, "application/json"))
        except asyncio.CancelledError:
            call.status = 499
            raise
        finally:
            self._gateway.requests -= 1
            metrics.in_flight.dec()
            metrics.requests.labels(call.route, str(call.status)).inc()
            self._gateway.recent.end(timeline, call.status, call.route)

    async def _serve(self, call: Call, scope: Scope, receive: Receive) -> None:
        with phase("receive"):
            raw = await _read_body(receive, dict(scope["headers"]), self._gateway.settings)
        work = asyncio.create_task(self._work(call, raw))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            left = max(0.0, call.urgency.deadline - time.monotonic())
            done, _ = await asyncio.wait([work, gone], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                work.result()
            elif not done:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                await call.out_of_time()
            else:
                call.status = 499
                log.info("request %s: its client left", call.request_id)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _anywhere(self, worker: Worker, model: str, ask: Callable[[Worker], Awaitable[Found]]) -> tuple[Worker, Found]:
        """What a decode worker says, ``worker`` or another one that serves the model where that one fails, and which it was."""
        gateway = self._gateway
        tried: set[str] = set()
        refused: list[str] = []
        while True:
            try:
                said = await ask(worker)
                gateway.fleet.health.refused(refused, time.monotonic())
                return worker, said
            except (LegFailed, *LegBroken) as error:
                log.warning("%s failed to answer to %s: %s", worker.worker, self._path, str(error) or type(error).__name__)
                tried.add(worker.worker)
                if isinstance(error, LegRefused):
                    refused.append(worker.worker)
                if not gateway.retries.take(time.monotonic()):
                    raise ApiError(502, "the decode worker asked failed", code="workers_failed", retry_seconds=RETRY_SECONDS) from error
                worker = gateway.any_decode_worker(model, tried)

    async def _answer(self, call: Call, scope: Scope, receive: Receive, response: Response) -> None:
        call.status = response.status_code
        await response(scope, receive, call.send)


class GenerationEndpoint(Endpoint):
    """One of ``router.apis.GENERATING``."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        super().__init__(gateway, path)
        self._decoding = Decoding(gateway, path)

    async def _work(self, call: Call, raw: bytes) -> None:
        async with self._gateway.door.inside(call.urgency):
            await self._run(call, raw)

    async def _run(self, call: Call, raw: bytes) -> None:
        body = parse_body(raw)
        check_body(self._gateway.settings, raw, body)
        if self._path == RESPONSES:
            check_stored(body)
        worker = self._gateway.any_decode_worker(body.get("model") or None)
        model = body.get("model") or worker.model
        if self._path == MESSAGES and call.caller.terms.salt and not worker.takes_prompt_token_ids:
            raise _saltless()
        splittable = is_cacheable(self._path, body) and _renders(worker, self._path)
        given = plain_prompt(self._path, body)
        token_ids: Sequence[int] | None = given
        dispatcher = self._gateway.dispatcher
        shortcut: Route | None = None
        if splittable and given is None and self._gateway.lengths.tokens_max(model, len(raw)) >= self._gateway.settings.prefill_tokens_min:
            shortcut, worker, token_ids = await self._look_up(worker, model, body, raw, call.caller.terms)
        if shortcut is not None:
            call.caller.meter.prompt_is(shortcut.ask.tokens)
        if token_ids is not None:
            check_prompt(self._gateway.settings, len(token_ids))
            call.caller.meter.prompt_is(len(token_ids))
        route = shortcut or Route(False, Ask(model))
        if splittable and token_ids is not None:
            route = await dispatcher.prepare(worker, model, token_ids, call.request_id, call.caller.terms)
        call.route = route.name
        self._gateway.scaler.prepared(route.ways[0].tokens if route.ways else 0)
        if (timeline := followed()) is not None:
            timeline.prepared(route.ask.model, len(token_ids or ()), route.ways)
        try:
            self._gateway.check_prefill(route)
            added = UNSTORED if self._path == RESPONSES else {}
            await self._decoding.run(call, DecodeRequest(body, token_ids if splittable and given is None else None, raw, added), route)
        finally:
            if route.flight is not None:
                dispatcher.flights.end(route.flight, computed=False)
            if route.followed is not None:
                route.followed.leave()

    async def _look_up(
        self, worker: Worker, model: str, body: dict[str, Any], raw: bytes, terms: Terms
    ) -> tuple[Route | None, Worker, list[int] | None]:
        """A route straight to decode where the prompt is known but for its end; else its ids. And the worker that told, or any."""
        gateway = self._gateway
        space, text = f"{model}\0{terms.salt}\0{self._path}".encode(), text_of(body)
        guess = gateway.remembered.find(space, text, worker.chunk_size)
        if guess is not None and (known := gateway.dispatcher.straight(worker, model, guess)) is not None:
            return known, worker, None
        worker, token_ids = await self._render(worker, model, body, terms)
        if token_ids is not None:
            gateway.lengths.learn(model, len(raw), len(token_ids))
            keys = gateway.dispatcher.keys(worker, model, token_ids, terms)
            gateway.remembered.add(space, text, len(token_ids), keys, tenant_id(terms.salt))
        return None, worker, token_ids

    async def _render(self, worker: Worker, model: str, body: dict[str, Any], terms: Terms) -> tuple[Worker, list[int] | None]:
        """The prompt's ids, and the worker that rendered them."""
        return await self._anywhere(worker, model, lambda asked: self._gateway.legs.render(asked, self._path, body, terms))


def _renders(worker: Worker, path: str) -> bool:
    """Whether the worker's engine tells a prompt's ids: vLLM 0.25, which takes none beside chats, does so for these two alone."""
    return path in (CHAT, COMPLETIONS) or worker.takes_prompt_token_ids


def _saltless() -> ApiError:
    text = f"this model's engines take no cache_salt at {MESSAGES}, so a tenant's prompts can't be kept apart there: use /v1/chat/completions"
    return ApiError(400, text, code="unsupported_by_engine")


async def _read_body(receive: Receive, headers: dict[bytes, bytes], settings: RouterSettings) -> bytes:
    bytes_max, seconds_max = settings.body_bytes_max, settings.body_seconds_max
    too_large = ApiError(
        413,
        f"the request's body is larger than the {bytes_max} bytes that router.body_bytes_max allows",
        code="body_too_large",
    )
    if int(headers.get(b"content-length", b"0")) > bytes_max:
        raise too_large
    try:
        async with asyncio.timeout(seconds_max):
            return await _read_up_to(receive, bytes_max, too_large)
    except TimeoutError as error:
        raise ApiError(408, f"the request's body did not come within {seconds_max} s (router.body_seconds_max)", code="body_too_slow") from error


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
