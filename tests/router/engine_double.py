"""A worker's HTTP side as the router sees it: renders, prefills and generates by rule, and does what a test tells it.

It stands for an engine at the HTTP boundary only; tests/engine runs the router against real ones. A "token" is one
character, and the answer to a prompt is its length in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tests_shared import ANSWER_MS, LAYOUT, NAMESPACE, Bus, wait_for

from cachebus.keys import chunk_keys, root_key
from cachebus.messages import Commit, NewEntry, Report, Reserve, Reserved, WrittenEntry
from cachebus.messages_hbm import OpenHbm, ReportHbm

CHUNK = 256
KINDS = ("completions", "chat/completions", "messages", "responses")


class EngineDouble:
    """One worker on a port of its own, registered on ``bus``."""

    def __init__(self, bus: Bus, name: str, role: str, *, model: str = "m", takes_ids: bool = True, adapters: dict[str, str] | None = None) -> None:
        self.name, self.role, self._bus = name, role, bus
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.rendered: list[dict[str, Any]] = []
        self.aborted = 0
        self.status = 200
        self.hold = threading.Event()
        self.hold.set()
        self.die_after_pieces = -1
        self.reports, self.lacks_route = True, False
        self.pieces: list[bytes] | None = None
        self._client = bus.client()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        routes = [Route(f"/v1/{kind}/render", self._render, methods=["POST"]) for kind in KINDS]
        routes += [Route(f"/v1/{kind}", self._generate, methods=["POST"]) for kind in KINDS]
        routes += [Route(path, self._count, methods=["POST"]) for path in ("/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize")]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_config=None, timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.adapters = adapters or {}
        bus.register(name, role, self.url, model, takes_ids=takes_ids, adapters=self.adapters)

    def stop(self) -> None:
        self.hold.set()
        self._server.should_exit = True
        self._thread.join()
        # Left to the garbage collector, a ZeroMQ context blocks the thread that happens to collect it.
        self._client.close()

    def hold_in_hbm(self, ids: list[int]) -> None:
        """Says over the bus, as a supervisor would, that the chunks of ``ids`` and nothing else lie in its HBM."""
        holder = self._bus.holder.id
        self._client.call(OpenHbm(self.name, holder), ANSWER_MS)
        self._client.call(ReportHbm(self.name, holder, chunk_keys(root_key(NAMESPACE), ids, CHUNK), []), ANSWER_MS)

    async def _render(self, request: Request) -> Response:
        body = await request.json()
        if self.status == 400:
            return JSONResponse({"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}}, 400)
        self.rendered.append(body)
        text = body["prompt"] if "prompt" in body else _text(body)
        rendered = {"token_ids": [ord(c) for c in text], "features": None}
        return JSONResponse([rendered] if "prompt" in body else rendered)

    async def _count(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        if self.lacks_route:
            return JSONResponse({"detail": "Not Found"}, 404)
        if self.status != 200:
            return JSONResponse({"error": {"message": "no", "type": "x", "param": None, "code": self.status}}, self.status)
        return JSONResponse({"input_tokens": 5})

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        try:
            while not self.hold.is_set():
                if await request.is_disconnected():
                    raise asyncio.CancelledError
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.aborted += 1
            return Response()
        if self.status != 200:
            return JSONResponse({"error": {"message": "no", "type": "server_error", "param": None, "code": self.status}}, self.status)
        ids = _ids(body)
        if self.role == "prefill":
            await asyncio.to_thread(self._store, ids, self.adapters.get(body["model"], ""))
        if self.reports:
            part = body["kv_transfer_params"]["headstart"]
            self._client.submit(
                Report(part["transfer_id"], part["leg"], self.name, len(ids), 0, {} if self.role == "prefill" else {"dram": len(ids) - 1})
            )
        if request.url.path == "/v1/messages":
            return self._message(len(ids), stream=bool(body.get("stream")))
        if request.url.path == "/v1/responses":
            return self._response(len(ids), stream=bool(body.get("stream")))
        usage = {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 77}}
        if not body.get("stream"):
            return JSONResponse({"choices": [{"text": f"{len(ids)} tokens"}], "usage": usage, "kv_transfer_params": {"secret": 1}})
        return StreamingResponse(self._stream(usage), media_type="text/event-stream")

    def _message(self, tokens: int, *, stream: bool) -> Response:
        usage = {"input_tokens": tokens - 7, "output_tokens": 2, "cache_read_input_tokens": 7}
        message = {"id": "chatcmpl-1", "type": "message", "role": "assistant", "content": [{"type": "text", "text": "ab"}], "usage": usage}
        if not stream:
            return JSONResponse(message)
        events = [
            {"type": "message_start", "message": message | {"content": [], "usage": usage | {"output_tokens": 0}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}} for text in "ab"),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
            {"type": "message_stop"},
        ]
        return self._named(events)

    def _response(self, tokens: int, *, stream: bool) -> Response:
        details = {"cached_tokens": 7, "cached_tokens_per_turn": []}
        usage = {"input_tokens": tokens, "input_tokens_details": details, "output_tokens": 2, "total_tokens": tokens + 2}
        response = {"id": "resp_1", "object": "response", "usage": usage, "kv_transfer_params": {"secret": 1}}
        if not stream:
            return JSONResponse(response)
        empty = {"id": "resp_1", "object": "response", "usage": None}
        events = [
            *({"type": f"response.{name}", "response": empty} for name in ("created", "in_progress")),
            *({"type": "response.output_text.delta", "delta": text} for text in "ab"),
            {"type": "response.completed", "response": response | {"kv_transfer_params": None}},
        ]
        return self._named([event | {"sequence_number": number} for number, event in enumerate(events)])

    def _named(self, events: list[dict[str, Any]]) -> Response:
        encoded = [f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n".encode() for event in events]
        return StreamingResponse(self._pieces(self.pieces or encoded), media_type="text/event-stream")

    def _stream(self, usage: dict[str, Any]) -> AsyncIterator[bytes]:
        return self._pieces(
            self.pieces
            or [
                b'data: {"choices":[{"text":"a"}]}\n\n',
                b'data: {"choices":[{"text":"b"}],"usage":null}\n\n',
                b"data: " + json.dumps({"choices": [], "usage": usage}, separators=(",", ":")).encode() + b"\n\n",
                b"data: [DONE]\n\n",
            ]
        )

    async def _pieces(self, events: list[bytes]) -> AsyncIterator[bytes]:
        with contextlib.suppress(asyncio.CancelledError):
            for number, event in enumerate(events):
                if number == self.die_after_pieces:
                    raise RuntimeError("the double dies as it was told to")
                yield event
                await asyncio.sleep(0.01)

    def _store(self, ids: list[int], adapter: str) -> None:
        keys = chunk_keys(root_key(NAMESPACE, adapter=adapter), ids, CHUNK)
        reserve = Reserve(self._bus.holder.id, LAYOUT, [NewEntry(key, 4096) for key in keys])
        client = self._bus.client()
        reserved = client.call(reserve, ANSWER_MS)
        assert isinstance(reserved, Reserved)
        client.submit(Commit(self._bus.holder.id, [WrittenEntry(s.slot, s.generation, b"d" * 32) for s in reserved.slots]))
        client.close()


def _text(body: dict[str, Any]) -> str:
    given = body.get("messages") or body.get("input") or []
    contents = [given] if isinstance(given, str) else [item.get("content", "") for item in given]
    return str(body.get("system", "")) + "".join(content if isinstance(content, str) else json.dumps(content) for content in contents)


def _ids(body: dict[str, Any]) -> list[int]:
    given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
    prompt = body.get("prompt")
    if given:
        return list(given)
    text = prompt or _text(body)
    return list(prompt) if isinstance(prompt, list) else [0] * len(text)
