"""Replays a trace against a gateway: every request at its time, whatever became of those before it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from deploy.bench.trace import Arrival
from deploy.sim.vocabulary import text_of_words

_SECONDS_MAX = 600.0
_DATA, _DONE = b"data: ", b"data: [DONE]"


@dataclass
class Served:
    """A request's outcome. Seconds on the clock, from when it was due; ``failure`` is "" where its answer is whole."""

    arrival: Arrival
    late_seconds: float = 0.0
    ttft_seconds: float = 0.0
    total_seconds: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True)
class Pace:
    """``rate``: how many times faster than in the trace requests arrive; ``speed``: how many times faster than its clock time passes."""

    rate: float
    speed: float

    def due(self, arrival: Arrival) -> float:
        """Seconds on the clock after the start."""
        return arrival.at_seconds / self.rate / self.speed


def replay(url: str, model: str, arrivals: Sequence[Arrival], pace: Pace) -> list[Served]:
    """Returns when the last request ended."""
    return asyncio.run(_replay(url, model, arrivals, pace))


async def _replay(url: str, model: str, arrivals: Sequence[Arrival], pace: Pace) -> list[Served]:
    served = [Served(arrival) for arrival in arrivals]
    # A connection each: gateways differ in how soon they close one that is not used, which fails the request that comes just then.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(_SECONDS_MAX), read_bufsize=1 << 20) as session:
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for one in served:
                due = started + pace.due(one.arrival)
                # Made before it is due, so that making it is in nobody's time.
                body = _body(model, one.arrival)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(_ask(session, url, body, one, due))
    return served


def _body(model: str, arrival: Arrival) -> bytes:
    request: dict[str, Any] = {"model": model, "prompt": text_of_words(arrival.prompt()), "max_tokens": arrival.output_tokens, "temperature": 0}
    return msgspec.json.encode(request | {"stream": True, "return_token_ids": True, "ignore_eos": True})


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, served: Served, due: float) -> None:
    served.late_seconds = time.monotonic() - due
    try:
        async with session.post(f"{url}/v1/completions", data=body, headers={"content-type": "application/json"}) as answer:
            if answer.status != 200:
                served.failure = f"{answer.status} {(await answer.text())[:200]}"
                return
            served.failure = "the stream ended early"
            async for line in answer.content:
                _take(served, line, due)
            served.total_seconds = time.monotonic() - due
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        served.failure = f"{type(error).__name__} {error}"


def _take(served: Served, line: bytes, due: float) -> None:
    if line.startswith(_DONE):
        if len(served.token_ids) == served.arrival.output_tokens:
            served.failure = ""
        return
    if not line.startswith(_DATA):
        return
    event = msgspec.json.decode(line[len(_DATA) :])
    for choice in event.get("choices") or ():
        tokens = choice.get("token_ids") or ()
        if tokens and not served.token_ids:
            served.ttft_seconds = time.monotonic() - due
        served.token_ids += tokens
