"""What routers ask the bus so that they agree with each other, none of them being a leader, and what their buses ask each other for that."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cachebus.wire import Message

CLAIM_KEYS_MAX = 1 << 14
"""Keys of one claim, half a MiB of them: 4 million tokens at 256 a chunk."""


class Claim(Message, frozen=True):
    """A router is about to have the run of ``keys`` computed, in ``seconds``; ``number`` names the claim among those of ``router``.

    ``prompt``: the key of the prompt's first chunk, which is the same for all that overlap; where it is not given the first of ``keys``.
    """

    router: str
    number: int
    keys: list[bytes]
    seconds: float
    prompt: bytes = b""


class Claimed(Message, frozen=True):
    """Reply to Claim. Not ``granted``: the first ``chunks`` of the keys are somebody else's, who thinks to need ``seconds`` more."""

    granted: bool
    chunks: int = 0
    seconds: float = 0.0


class EndClaim(Message, frozen=True):
    """What was claimed is computed, or will not be; answered with nothing."""

    router: str
    number: int


class WorkerLoad(Message, frozen=True):
    """Requests that somebody has at a worker: all, those that generate, and the seconds of computing before the next one."""

    in_flight: int
    running: int
    backlog_seconds: float


_Count = Annotated[int, Meta(ge=0, lt=1 << 53)]


class Spent(Message, frozen=True):
    """What a tenant took of its limits at one router in the last ``age_ms``: requests, and tokens of prompts and answers.

    ``owed``: what has to come back, as the router sees it, until the tenant has all of its requests, and all of its tokens, again.
    """

    age_ms: _Count
    requests: _Count
    tokens: _Count
    requests_owed: _Count
    tokens_owed: _Count


class TellLoads(Message, frozen=True):
    """A router's own requests, by worker, now; also the sign that the router lives. ``spent``: by tenant; None where no tenants are limited."""

    router: str
    loads: dict[str, WorkerLoad]
    spent: dict[str, Spent] | None = None


class OtherLoads(Message, frozen=True):
    """Reply to TellLoads: the loads of all other living routers of this bus, added up, and what tenants took at all others, by router."""

    routers: int
    loads: dict[str, WorkerLoad]
    spent: dict[str, dict[str, Spent]] = {}  # noqa: RUF012 - msgspec gives each its own


class Exchange(Message, frozen=True):
    """From one bus to another: ``routers`` live, and tenants took ``spent`` at them. ``wants``: whether it asks what they took elsewhere."""

    routers: list[str]
    spent: dict[str, dict[str, Spent]]
    wants: bool


class Exchanged(Message, frozen=True):
    """Reply to Exchange: what tenants took at routers that the asker did not name."""

    spent: dict[str, dict[str, Spent]]


RouterRequest = Claim | EndClaim | TellLoads | Exchange
"""What routers ask, those of this machine, and the buses of others."""
