"""One client of a soak: sends a request, reads what comes, goes away where the plan says so, and tells how it ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from deploy.bench.soak_plan import MESSAGES, RESPONSES, Asked
from deploy.sim.vocabulary import text_of_words

ANSWER_SECONDS_MAX = 60.0
"""A request that has not ended by then hangs."""
CONNECT_SECONDS_MAX = 30.0
_AGAIN_SECONDS = 0.1
_JSON = {"content-type": "application/json"}
_DATA, _DONE = b"data: ", b"[DONE]"

WHOLE, LEFT, REFUSED, ERROR_ANSWER, ERROR_EVENT = "whole", "left by the client", "refused", "error answer", "error event"
CUT, HUNG, WRONG, SILENT, UNEXPECTED = "connection cut", "hung", "wrong", "ended without a word", "unexpected answer"
BAD = (HUNG, WRONG, SILENT, UNEXPECTED)
"""What no fault excuses."""


@dataclass
class Ended:
    """How a request ended. ``said``: an error's own words, or what was wrong. ``tokens``: those that came and were compared."""

    outcome: str
    said: str = ""
    tokens: int = 0
    route: str = ""
    cached: int = 0
    refused_connections: int = 0


@dataclass
class _Came:
    """What has come of an answer: its text, its ids where they are told, and how a stream ended."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    told_ids: bool = False
    events: int = 0
    done: bool = False
    error: str = ""

    def wrong(self, asked: Asked, *, whole: bool) -> str:
        """What is wrong with it; "" where nothing is."""
        text = text_of_words(asked.answer)
        if (self.text != text) if whole else not text.startswith(self.text):
            return f"text {self.text!r} in place of {text!r}"
        if self.told_ids and ((self.ids != asked.answer) if whole else self.ids != asked.answer[: len(self.ids)]):
            return f"ids {self.ids} in place of {asked.answer}"
        return ""


class _Left(Exception):
    """The client goes away, as it was to."""


async def ask(session: aiohttp.ClientSession, url: str, asked: Asked) -> Ended:
    """Asks, and again while nobody takes the connection: then nothing was sent. A client that leaves closes its connection."""
    came, ended = _Came(), Ended(CUT)
    give_up = asyncio.get_running_loop().time() + CONNECT_SECONDS_MAX
    while True:
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX), asyncio.timeout(asked.leaves_in) as leaving:
                await _ask(session, url, asked, came, ended)
        except aiohttp.ClientConnectorError as error:
            ended.refused_connections += 1
            if asyncio.get_running_loop().time() > give_up:
                return Ended(HUNG, f"nobody listens: {error}", refused_connections=ended.refused_connections)
            await asyncio.sleep(_AGAIN_SECONDS)
            continue
        except TimeoutError:
            ended.outcome = LEFT if asked.leaves_in is not None and leaving.expired() else HUNG
        except _Left:
            ended.outcome = LEFT
        except (aiohttp.ClientError, ConnectionError) as error:
            ended.outcome, ended.said = CUT, f"{type(error).__name__}: {error}"
        except (msgspec.DecodeError, AttributeError, LookupError, TypeError, ValueError) as error:
            ended.outcome, ended.said = UNEXPECTED, f"no answer of {asked.path}: {type(error).__name__}: {error}"
        return _judged(asked, came, ended)


def _judged(asked: Asked, came: _Came, ended: Ended) -> Ended:
    """The same with what the answer itself says."""
    ended.tokens = len(came.text) // 4
    if wrong := came.wrong(asked, whole=ended.outcome == WHOLE):
        ended.outcome, ended.said = WRONG, f"{wrong}; it was {ended.outcome}"
    return ended


async def _ask(session: aiohttp.ClientSession, url: str, asked: Asked, came: _Came, ended: Ended) -> None:
    async with session.post(url + asked.path, data=asked.body, headers=_JSON) as answer:
        if answer.status != 200:
            ended.said = f"{answer.status} {(await answer.read())[:200].decode(errors='replace')}"
            if answer.status in (429, 503):
                ended.outcome = REFUSED if answer.headers.get("retry-after") else UNEXPECTED
            else:
                ended.outcome = ERROR_ANSWER if answer.status in (502, 504) else UNEXPECTED
            return
        ended.route = answer.headers.get("x-headstart-route", "")
        ended.cached = int(answer.headers.get("x-headstart-cached-tokens", 0))
        if not asked.stream:
            _take_whole(asked.path, msgspec.json.decode(await answer.read()), came)
            ended.outcome = WHOLE
            return
        async for line in answer.content:
            if line.startswith(_DATA):
                _take_event(asked.path, line[len(_DATA) :], came)
                if came.events == asked.leaves_after:
                    answer.close()
                    raise _Left
        ended.outcome = ERROR_EVENT if came.error else WHOLE if came.done else SILENT
        ended.said = came.error


def _take_whole(path: str, answer: Any, came: _Came) -> None:
    if path == MESSAGES:
        came.text = "".join(block["text"] for block in answer["content"])
    elif path == RESPONSES:
        came.text = "".join(part["text"] for item in answer["output"] for part in item["content"])
    else:
        (choice,) = answer["choices"]
        came.text = choice["text"] if "text" in choice else choice["message"]["content"]
        if choice.get("token_ids") is not None:
            came.told_ids, came.ids = True, choice["token_ids"]


def _take_event(path: str, data: bytes, came: _Came) -> None:
    if data.startswith(_DONE):
        came.done = True
        return
    event = msgspec.json.decode(data)
    kind = event.get("type", "")
    if event.get("error") or kind in ("error", "response.failed"):
        came.error = data.decode().strip()
    elif path in (MESSAGES, RESPONSES):
        came.done = came.done or kind in ("message_stop", "response.completed")
        delta = event.get("delta") or ""
        came.text += delta if isinstance(delta, str) else delta.get("text", "")
        came.events += kind in ("content_block_delta", "response.output_text.delta")
    else:
        for choice in event["choices"]:
            came.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            if choice.get("token_ids") is not None:
                came.told_ids = True
                came.ids += choice["token_ids"]
            came.events += 1
