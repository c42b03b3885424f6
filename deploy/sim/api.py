"""A simulated engine's HTTP server: as much of vLLM's as the router and its tools use."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from deploy.sim import messages, responses
from deploy.sim.answers import Answer
from deploy.sim.engine import Ask, Sampled, SimulatedEngine
from deploy.sim.fields import Refused, asked, prompt_of
from deploy.sim.messages import MessageAnswer
from deploy.sim.profile import Profile
from deploy.sim.responses import ResponseAnswer
from deploy.sim.vocabulary import text_of

BODY_BYTES_MAX = 64 << 20
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
_READ: dict[str, Callable[[Any], Any]] = {MESSAGES: messages.as_chat, RESPONSES: responses.as_chat}
"""What makes a chat of a request that is none."""
_FORMS: dict[str, tuple[str, type[Answer]]] = {
    COMPLETIONS: ("cmpl", Answer),
    CHAT: ("chatcmpl", Answer),
    MESSAGES: ("chatcmpl", MessageAnswer),
    RESPONSES: ("resp", ResponseAnswer),
}
"""How answers are named and formed."""
_METRICS = {
    "pulled_bytes": "pulled from the region",
    "pulled_chunks": "pulled",
    "integrity_failures": "pulls whose bytes did not match their digest",
    "late_chunks": "promised from a slower tier and not there in time",
    "handed_bytes": "had straight from another engine",
    "handed_chunks": "had straight from another engine",
    "stale_offers": "offered and not there any more when they were read",
    "offered_chunks": "offered to engines that wait for them",
    "published_bytes": "published",
    "published_chunks": "published",
    "unpublished_chunks": "not published because the bus did not answer in time",
    "sim_computed_prompt_tokens": "tokens of prompts that were computed, not found",
    "sim_step_seconds": "time that the profile gives the steps computed",
    "sim_late_seconds": "time that they took beyond it, because the machine was busy",
}
_ENGINES = {
    "vllm:request_success_total": "sim_ended_requests",
    "vllm:inter_token_latency_seconds_sum": "sim_token_seconds",
    "vllm:inter_token_latency_seconds_count": "sim_tokens",
}
"""What vLLM's engines count under these names. A histogram's buckets are left out."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Tokens:
    """Hands an engine's tokens, which come on its thread, to the requests that wait for them on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queues: dict[str, asyncio.Queue[Sampled]] = {}

    def expect(self, request_id: str) -> asyncio.Queue[Sampled]:
        """The request's tokens to come; ``forget`` it when it ends."""
        return self._queues.setdefault(request_id, asyncio.Queue())

    def forget(self, request_id: str) -> None:
        """Nobody waits for them any longer."""
        self._queues.pop(request_id, None)

    def deliver(self, found: Sequence[Sampled]) -> None:
        """Tokens of one step. Any thread may call it while the loop runs."""
        self._loop.call_soon_threadsafe(self._put, found)

    def _put(self, found: Sequence[Sampled]) -> None:
        for sampled in found:
            if (waiting := self._queues.get(sampled.request_id)) is not None:
                waiting.put_nowait(sampled)


class Api:
    """The server of one engine."""

    def __init__(self, engine: SimulatedEngine, tokens: Tokens, profile: Profile) -> None:
        self._engine, self._tokens, self._profile = engine, tokens, profile
        self._numbers = itertools.count()
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Requests that are being answered."""
        return self._in_flight

    def application(self) -> web.Application:
        """Its routes. A client that leaves cancels its request."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        for path in _FORMS:
            app.router.add_post(path, self._generating(path))
            app.router.add_post(f"{path}/render", self._rendering(path))
        app.router.add_post(f"{MESSAGES}/count_tokens", self._count)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        return app

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=503 if self._engine.failed.is_set() else 200)

    async def _models(self, _request: web.Request) -> web.Response:
        model = {"id": self._profile.model, "object": "model", "owned_by": "headstart", "max_model_len": self._profile.max_model_len}
        return _json({"object": "list", "data": [model]})

    async def _metrics(self, _request: web.Request) -> web.Response:
        running, waiting = self._engine.load
        label = f'{{model_name="{self._profile.model}"}}'
        gauges = {"num_requests_running": running, "num_requests_waiting": waiting, "kv_cache_usage_perc": self._engine.kv_used}
        lines = []
        for name, value in gauges.items():
            lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name}{label} {value:g}"]
        config = f'{{block_size="{self._profile.block_size}",num_gpu_blocks="{self._profile.blocks}"}}'
        lines += ["# TYPE vllm:cache_config_info gauge", f"vllm:cache_config_info{config} 1"]
        lines += [f"{name}{label} {self._engine.counts[count]:.12g}" for name, count in _ENGINES.items()]
        counts = {**self._engine.mover.counts, **self._engine.publisher.counts, **self._engine.counts}
        for name, text in _METRICS.items():
            full = f"headstart_{name}_total"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} counter", f"{full}{label} {counts[name]:g}"]
        return web.Response(text="\n".join(lines) + "\n")

    async def _count(self, request: web.Request) -> web.StreamResponse:
        try:
            return _json({"input_tokens": len(prompt_of(messages.as_chat(await _body(request), counting=True), chat=True))})
        except Refused as error:
            return _refusal(error)

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await _body(request)
            ids = prompt_of(body, chat=isinstance(body, dict) and "messages" in body)
        except Refused as error:
            return _refusal(error)
        return _json({"count": len(ids), "max_model_len": self._profile.max_model_len, "tokens": ids, "token_strs": None})

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await _body(request)
            return _json({"prompt": text_of(prompt_of({"prompt": body.get("tokens") if isinstance(body, dict) else None}, chat=False))})
        except Refused as error:
            return _refusal(error)

    def _rendering(self, path: str) -> Handler:
        chat, read = path != COMPLETIONS, _READ.get(path, _as_it_is)

        async def render(request: web.Request) -> web.StreamResponse:
            try:
                ids = prompt_of(read(await _body(request)), chat=chat)
            except Refused as error:
                return _refusal(error)
            rendered = {"token_ids": ids, "features": None}
            return _json(rendered if chat else [rendered])

        return render

    def _generating(self, path: str) -> Handler:
        chat, read = path != COMPLETIONS, _READ.get(path, _as_it_is)
        name, form = _FORMS[path]

        async def generate(request: web.Request) -> web.StreamResponse:
            try:
                understood = asked(read(await _body(request)), self._profile, chat=chat)
            except Refused as error:
                return _refusal(error)
            return await self._answer(request, form(f"{name}-{next(self._numbers)}", self._profile.model, understood))

        return generate

    async def _answer(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        request_id, understood = answer.request_id, answer.asked
        waiting = self._tokens.expect(request_id)
        self._in_flight += 1
        # The engine appends what it generates.
        self._engine.submit(Ask(request_id, list(understood.prompt), understood.max_tokens, understood.salt, understood.transfer))
        try:
            if understood.stream:
                response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
                # A client may leave between two events, before that cancels its request.
                with contextlib.suppress(ConnectionResetError):
                    await self._stream(response, request, answer, waiting)
                return response
            while not answer.ended:
                sampled = await waiting.get()
                answer.take([sampled.token])
            answer.cached_tokens = sampled.cached_tokens
            return web.Response(body=answer.whole(), content_type="application/json")
        finally:
            self._in_flight -= 1
            self._tokens.forget(request_id)
            if len(answer.token_ids) < understood.max_tokens:
                self._engine.abort(request_id)

    async def _stream(self, response: web.StreamResponse, request: web.Request, answer: Answer, waiting: asyncio.Queue[Sampled]) -> None:
        # As vLLM does, the headers go out at once, before anything is computed.
        await response.prepare(request)
        if first := answer.first_event():
            await response.write(first)
        while not answer.ended:
            sampled = [await waiting.get()]
            while not waiting.empty():
                sampled.append(waiting.get_nowait())
            answer.cached_tokens = sampled[-1].cached_tokens
            event = answer.event([one.token for one in sampled])
            await response.write(event + answer.last_events() if answer.ended else event)
        await response.write_eof()


def _as_it_is(body: Any) -> Any:
    return body


async def _body(request: web.Request) -> Any:
    try:
        return msgspec.json.decode(await request.read())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from error


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def _refusal(error: Refused) -> web.Response:
    return _json({"error": {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}}, 400)
