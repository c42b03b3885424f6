"""Calls to a worker that does not behave, over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from cachebus.messages import Worker
from router import legs as module
from router.apis import CHAT, COMPLETIONS
from router.callers import Terms
from router.health import Health
from router.legs import EngineAnswer, LegBroken, LegFailed, Legs


@contextlib.asynccontextmanager
async def answering(body: bytes, status: int = 200, *, pause_seconds: float = 0, more: bytes = b"") -> AsyncIterator[tuple[Legs, Worker]]:
    """Legs, and a worker that gives everybody the same answer."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                await asyncio.sleep(pause_seconds)
                writer.write(b"HTTP/1.1 %d x\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n" % (status, more, len(body)) + body)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, family=socket.AF_INET)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    legs = Legs(1, Health())
    try:
        yield legs, Worker("w", "decode", url, "m", b"n" * 32, 16, 256, 8192, True)
    finally:
        await legs.close()
        server.close()


async def render(body: bytes, status: int = 200, path: str = CHAT) -> list[int] | None:
    async with answering(body, status) as (legs, worker):
        return await legs.render(worker, path, {"messages": []}, Terms())


def test_what_a_rendering_says() -> None:
    assert asyncio.run(render(b'{"token_ids": [1, 2], "features": null, "sampling_params": {}}')) == [1, 2]
    assert asyncio.run(render(b'[{"token_ids": [1, 2]}]', path=COMPLETIONS)) == [1, 2]
    assert asyncio.run(render(b'[{"token_ids": [1]}, {"token_ids": [2]}]', path=COMPLETIONS)) is None
    assert asyncio.run(render(b'{"token_ids": [1], "features": {"mm_hashes": {"image": ["x"]}}}')) is None


@pytest.mark.parametrize("body", [b"", b"{}", b"nonsense", b'{"token_ids": ["a"]}', b'{"token_ids": null}', b"\xff"])
def test_a_rendering_that_is_none_is_the_workers_failure(body: bytes) -> None:
    with pytest.raises(LegFailed, match="w rendered what is no prompt"):
        asyncio.run(render(body))


def test_a_refusal_is_the_engines_answer_and_a_fault_the_workers() -> None:
    with pytest.raises(EngineAnswer) as refused:
        asyncio.run(render(b'{"error": "too long"}', 400))
    assert (refused.value.status, refused.value.body) == (400, b'{"error": "too long"}')
    with pytest.raises(LegFailed, match="500"):
        asyncio.run(render(b"{}", 500))


def test_a_worker_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENDER_SECONDS_MAX", 0.05)
    monkeypatch.setattr(module, "PREFILL_SECONDS_MAX", 0.05)

    async def scenario() -> None:
        async with answering(b"{}", pause_seconds=5) as (legs, worker):
            with pytest.raises(LegBroken):
                await legs.render(worker, CHAT, {}, Terms())
            with pytest.raises(LegBroken):
                await legs.prefill(worker, "m", [1], "t", "r", Terms())

    asyncio.run(scenario())


def test_an_idle_connection_is_given_up_before_the_engine_closes_it() -> None:
    async def scenario() -> None:
        async with answering(b'{"token_ids": [1]}') as (legs, worker):
            connector = legs._session.connector
            assert connector is not None
            await legs.render(worker, CHAT, {}, Terms())
            assert connector._keepalive_timeout < 5, "vLLM's own limit (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)"

    asyncio.run(scenario())


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_worker_that_points_elsewhere_is_not_followed(status: int) -> None:
    async def scenario() -> None:
        async with (
            answering(b'{"token_ids": [1]}') as (_, stranger),
            answering(b"", status, more=f"location: {stranger.url}/\r\n".encode()) as (legs, worker),
        ):
            with pytest.raises(LegFailed, match=str(status)):
                await legs.render(worker, CHAT, {}, Terms())
            with pytest.raises(LegFailed, match=str(status)):
                await legs.prefill(worker, "m", [1], "t", "r", Terms())
            with pytest.raises(LegFailed, match=str(status)):
                async with legs.decode(worker, CHAT, b"{}", "r"):
                    pass

    asyncio.run(scenario())
