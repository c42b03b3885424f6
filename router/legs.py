"""Calls to workers: render a prompt, prefill it, open the decode leg."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from cachebus.messages import Worker
from router.fields import prefill_body

_JSON = {"content-type": "application/json"}
_ANSWER_BYTES_MAX = 64 << 20

LegBroken = (aiohttp.ClientError, ConnectionError, TimeoutError)
"""What a call raises when its worker is gone or does not talk HTTP any longer."""


class EngineAnswer(Exception):
    """An engine's own answer that goes to the client as it is: a refusal of the client's request."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"the engine answered {status}")
        self.status = status
        self.body = body


class LegFailed(Exception):
    """A worker answered with a failure of its own (5xx)."""


class Legs:
    """One HTTP client for all workers. Cancelling a call closes its connection, and the engine aborts the request."""

    def __init__(self, connect_seconds_max: float) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds_max)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0), headers=_JSON, read_bufsize=1 << 20)

    async def close(self) -> None:
        """Closes every connection."""
        await self._session.close()

    async def render(self, worker: Worker, path: str, body: dict[str, Any]) -> list[int] | None:
        """The prompt's token ids as the engine itself renders them; None where they alone don't make the prompt (images, say).

        Raises EngineAnswer where the engine refuses the request, and LegFailed or LegBroken where the worker fails.
        """
        request = msgspec.json.encode({**body, "stream": False, "stream_options": None})
        async with self._session.post(f"{worker.url}{path}/render", data=request) as answer:
            raw = await answer.read()
            if 400 <= answer.status < 500:
                raise EngineAnswer(answer.status, raw)
            if answer.status != 200:
                raise LegFailed(f"{worker.worker} answered {answer.status} to render")
        rendered = msgspec.json.decode(raw)
        prompts = rendered if isinstance(rendered, list) else [rendered]
        if len(prompts) != 1 or prompts[0].get("features"):
            return None
        ids: list[int] = prompts[0]["token_ids"]
        return ids

    async def prefill(self, worker: Worker, token_ids: Sequence[int], transfer_id: str, request_id: str) -> None:
        """Has a prompt computed and published. Raises LegFailed or LegBroken."""
        data = prefill_body(worker.model, token_ids, transfer_id)
        headers = {"x-request-id": f"{request_id}-prefill"}
        async with self._session.post(f"{worker.url}/v1/completions", data=data, headers=headers) as answer:
            await answer.read()
            if answer.status != 200:
                raise LegFailed(f"{worker.worker} answered {answer.status} to a prefill")

    @asynccontextmanager
    async def decode(self, worker: Worker, path: str, data: bytes, request_id: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """The engine's answer, open. Raises EngineAnswer, LegFailed or LegBroken."""
        async with self._session.post(f"{worker.url}{path}", data=data, headers={"x-request-id": request_id}) as answer:
            if 400 <= answer.status < 500:
                raise EngineAnswer(answer.status, await answer.content.read(_ANSWER_BYTES_MAX))
            if answer.status != 200:
                raise LegFailed(f"{worker.worker} answered {answer.status}")
            yield answer
