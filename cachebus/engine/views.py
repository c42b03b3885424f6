"""What the scheduler half is told of its engine, its requests and their steps, and where it sends what it asks. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cachebus.engine.transfer import TransferParams
from cachebus.messages import Reply, Request


class Bus(Protocol):
    """Where requests to the daemon go."""

    def submit(self, body: Request) -> int:
        """Sends and returns the ticket under which a reply may come."""

    def poll(self, wait_ms: float = 0) -> list[tuple[int, Reply]]:
        """The replies that have come; where there are none, what comes first within ``wait_ms``."""


@dataclass(frozen=True)
class Policy:
    """What a worker pulls and publishes. Sizes are tokens, ``layout`` is the engine's layout digest.

    ``hold_ms``: how long the blocks of a prompt computed for somebody else are kept for who reads them, ``hold_blocks_max`` of them at most.
    ``holders``: of each tensor-parallel rank, in whose name its part of a prefix is leased. A chunk is there when all ranks' parts are.
    """

    worker: str
    holders: Sequence[str]
    namespace: bytes
    layout: bytes
    chunk_size: int
    block_size: int
    save_decode_cache: bool
    lookup_ms_max: int
    pull_tokens_min: int
    hold_ms: int = 0
    hold_blocks_max: int = 0


@dataclass(frozen=True)
class RequestView:
    """A request as the engine has it. ``tokens`` is live: it grows as the request generates; ``adapter``: digest of its LoRA adapter, if any."""

    request_id: str
    tokens: Sequence[int]
    prompt_tokens: int
    salt: str
    may_pull: bool
    transfer: TransferParams | None
    adapter: str = ""


@dataclass(frozen=True)
class Scheduled:
    """A request's part in a step: ``blocks`` are new (all of them where ``restarted``); tokens before and in this step."""

    request_id: str
    blocks: list[int]
    restarted: bool
    computed: int
    scheduled: int
