"""What the cache tools ask the bus."""

from __future__ import annotations

from typing import TypeVar

from cachebus.client import BusClient
from cachebus.messages import Reply, Request
from cachebus.messages_tools import ChunkInfo, Chunks, ListChunks

ANSWER_MS_MAX = 10_000
_R = TypeVar("_R", bound=Reply)


def ask(client: BusClient, request: Request, expected: type[_R]) -> _R:
    """The reply. Raises BusUnavailable where none comes in time."""
    reply = client.call(request, ANSWER_MS_MAX)
    assert isinstance(reply, expected)
    return reply


def every_chunk(client: BusClient) -> Chunks:
    """All pages of the node's chunks as one. What comes or goes meanwhile may be in it or not."""
    page = ask(client, ListChunks(), Chunks)
    chunks: list[ChunkInfo] = list(page.chunks)
    while page.more:
        page = ask(client, ListChunks(chunks[-1].key), Chunks)
        chunks += page.chunks
    return Chunks(chunks, more=False, layouts=page.layouts)
