"""How people's tools ask what a node holds."""

from __future__ import annotations

from cachebus.wire import Message, Tier

CHUNKS_MAX = 10_000
"""Chunks in one page of a listing: about a megabyte."""


class ListChunks(Message, frozen=True):
    """Asks for the chunks of the node in the order of their keys: those after a key, ``count_max`` or ``CHUNKS_MAX`` of them at most."""

    after: bytes = b""
    count_max: int = CHUNKS_MAX


class ChunkInfo(Message, frozen=True):
    """A chunk and where it is; ``length`` and the rest are 0 where only the shared tier has it. ``used_at``: seconds since 1970.

    ``layout`` (16 bytes) is what an Acquire of it must name; b"" where this node does not know it.
    """

    key: bytes
    tiers: list[Tier]
    length: int = 0
    pinned: bool = False
    used_at: int = 0
    readers: int = 0
    layout: bytes = b""


class Chunks(Message, frozen=True):
    """Reply to ListChunks: a page, and whether chunks come after it.

    ``layouts``: the shape and the element type that a layout stands for, of the engines that this daemon has seen.
    """

    chunks: list[ChunkInfo]
    more: bool
    layouts: dict[bytes, tuple[str, str]] = {}  # noqa: RUF012 - msgspec gives each message its own


class Pin(Message, frozen=True):
    """Keeps chunks in DRAM, or with ``pinned`` false lets them be evicted again."""

    keys: list[bytes]
    pinned: bool


class Clear(Message, frozen=True):
    """Drops all chunks of these tiers, or with ``tenant`` (``cachebus.keys.tenant_id``) those that are its own."""

    tiers: list[Tier]
    tenant: bytes = b""


class Cleared(Message, frozen=True):
    """An event: somebody cleared what ``tenant`` has, or, b"", what all have; who keeps anything else of their prompts is to drop it.

    ``node``: which other node said so, "" for the bus's own.
    """

    tenant: bytes = b""
    node: str = ""


class Count(Message, frozen=True):
    """Reply to Pin and Clear: how many chunks it was done to."""

    count: int
