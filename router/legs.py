"""Calls to workers: render a prompt, prefill it, open the decode leg."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec

from cachebus.messages import Worker
from router.apis import COMPLETIONS
from router.callers import Terms
from router.fields import prefill_body, render_body
from router.health import Health
from router.timeline import Phase, phase
from router.transcript import EngineFailed

_JSON = {"content-type": "application/json"}
_ANSWER_BYTES_MAX = 64 << 20
RENDER_SECONDS_MAX = ASK_SECONDS_MAX = 60.0
PREFILL_SECONDS_MAX = 600.0
"""A leg that takes longer is given up. What it published stays, so whoever comes next goes on from there."""
HEALTH_SECONDS_MAX = 1.5
_IDLE_SECONDS_MAX = 2.0
"""How long an unused connection is kept: vLLM closes it after 5 s, and a request sent at that moment would look like a dead worker."""

LegBroken = (aiohttp.ClientError, ConnectionError, TimeoutError)
"""What a call raises when its worker is gone or does not talk HTTP any longer."""


class _Rendered(msgspec.Struct):
    """What is read of an engine's rendering: ``features`` are what token ids alone can't say."""

    token_ids: list[int]
    features: Any = None


class EngineAnswer(Exception):
    """An engine's own answer that goes to the client as it is: a refusal of the client's request."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"the engine answered {status}")
        self.status = status
        self.body = body


class LegFailed(Exception):
    """A worker answered with a failure of its own (5xx)."""


class LegRefused(LegFailed):
    """A worker answered with a 5xx: it may be failing, or the request may do that to any. Whoever asks others then tells ``Health`` which."""


class Legs:
    """One HTTP client for all workers. Cancelling a call closes its connection, and the engine aborts the request."""

    def __init__(self, connect_seconds_max: float, health: Health) -> None:
        self.health = health
        self._limits: dict[str, set[asyncio.Timeout]] = {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds_max)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS_MAX)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, headers=_JSON, read_bufsize=1 << 20)
        # A worker is where it registered, and nowhere else.
        self._post = functools.partial(self._session.post, allow_redirects=False)

    async def close(self) -> None:
        """Closes every connection."""
        await self._session.close()

    def let_go(self, worker: Worker) -> int:
        """Ends all legs at a worker with a TimeoutError; how many there were."""
        limits = self._limits.get(worker.worker, set())
        for limit in limits:
            limit.reschedule(asyncio.get_running_loop().time())
        return len(limits)

    @asynccontextmanager
    async def _at(self, worker: Worker, name: str) -> AsyncIterator[Phase]:
        """A leg there, which can be let go. What becomes of it is noted."""
        limits = self._limits.setdefault(worker.worker, set())
        with phase(name, worker.worker) as now:
            try:
                async with asyncio.timeout(None) as limit:
                    limits.add(limit)
                    try:
                        yield now
                    finally:
                        limits.discard(limit)
                        if not limits and self._limits.get(worker.worker) is limits:
                            del self._limits[worker.worker]
            except LegRefused:
                raise
            except (LegFailed, EngineFailed, *LegBroken):
                self.health.failed(worker.worker, time.monotonic())
                raise
            self.health.succeeded(worker.worker, time.monotonic())

    async def render(self, worker: Worker, path: str, body: dict[str, Any], terms: Terms) -> list[int] | None:
        """The prompt's token ids as the engine itself renders them; None where they alone don't make the prompt (images, say).

        Raises EngineAnswer where the engine refuses the request, and LegFailed or LegBroken where the worker fails.
        """
        request = render_body(body, terms)
        address = f"{worker.url}{path}/render"
        async with (
            self._at(worker, "render") as now,
            asyncio.timeout(RENDER_SECONDS_MAX),
            self._post(address, data=request, headers=now.headers) as answer,
        ):
            raw = await answer.read()
            _check(worker, answer.status, raw)
        try:
            rendered = msgspec.json.decode(raw, type=_Rendered | list[_Rendered])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise LegFailed(f"{worker.worker} rendered what is no prompt: {error}") from error
        prompts = rendered if isinstance(rendered, list) else [rendered]
        return None if len(prompts) != 1 or prompts[0].features else prompts[0].token_ids

    async def ask(self, worker: Worker, path: str, data: bytes, request_id: str) -> tuple[str, bytes]:
        """What an engine answers to what needs no KV: content type and body. Raises EngineAnswer, LegFailed or LegBroken."""
        its = {"x-request-id": request_id}
        async with (
            self._at(worker, "ask") as now,
            asyncio.timeout(ASK_SECONDS_MAX),
            self._post(f"{worker.url}{path}", data=data, headers={**its, **now.headers}) as answer,
        ):
            raw = await answer.read()
            _check(worker, answer.status, raw)
            return answer.content_type, raw

    async def prefill(self, worker: Worker, model: str, token_ids: Sequence[int], transfer_id: str, request_id: str, terms: Terms) -> None:
        """Has a prompt computed and published. Raises LegFailed or LegBroken."""
        data = prefill_body(model, token_ids, transfer_id, terms)
        its = {"x-request-id": f"{request_id}-prefill"}
        address = f"{worker.url}{COMPLETIONS}"
        async with (
            self._at(worker, "prefill") as now,
            asyncio.timeout(PREFILL_SECONDS_MAX),
            self._post(address, data=data, headers={**its, **now.headers}) as answer,
        ):
            await answer.read()
            if answer.status != 200:
                raise LegFailed(f"{worker.worker} answered {answer.status} to a prefill")

    async def is_healthy(self, worker: Worker) -> bool:
        """Whether its HTTP server answers in time, and does not say that its engine is dead."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS_MAX), self._session.get(f"{worker.url}/health") as answer:
                return answer.status < 500
        except LegBroken:
            return False

    async def metrics(self, worker: Worker) -> bytes | None:
        """Its engine's Prometheus metrics; None where they don't come in time."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS_MAX), self._session.get(f"{worker.url}/metrics", allow_redirects=False) as answer:
                return await answer.read() if answer.status == HTTPStatus.OK else None
        except LegBroken:
            return None

    @asynccontextmanager
    async def decode(self, worker: Worker, path: str, data: bytes, request_id: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """The engine's answer, open. Raises EngineAnswer, LegFailed or LegBroken."""
        its = {"x-request-id": request_id}
        async with self._at(worker, "decode") as now, self._post(f"{worker.url}{path}", data=data, headers={**its, **now.headers}) as answer:
            if answer.status != 200:
                _check(worker, answer.status, await answer.content.read(_ANSWER_BYTES_MAX))
            yield answer


def _check(worker: Worker, status: int, body: bytes) -> None:
    """Raises EngineAnswer where the request is at fault, or asks what this engine can't do (501), and LegFailed where the worker is."""
    if 400 <= status < 500 or status == HTTPStatus.NOT_IMPLEMENTED:
        raise EngineAnswer(status, body)
    if status != HTTPStatus.OK:
        raise LegRefused(f"{worker.worker} answered {status}")
