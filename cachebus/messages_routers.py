"""What routers ask the bus so that they agree with each other, none of them being a leader."""

from __future__ import annotations

from cachebus.wire import Message

CLAIM_KEYS_MAX = 1 << 14
"""Keys of one claim, half a MiB of them: 4 million tokens at 256 a chunk."""


class Claim(Message, frozen=True):
    """A router is about to have the run of ``keys`` computed, in ``seconds``; ``number`` names the claim among those of ``router``."""

    router: str
    number: int
    keys: list[bytes]
    seconds: float


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


class TellLoads(Message, frozen=True):
    """A router's own requests, by worker, now; also the sign that the router lives."""

    router: str
    loads: dict[str, WorkerLoad]


class OtherLoads(Message, frozen=True):
    """Reply to TellLoads: those of all other living routers, added up."""

    routers: int
    loads: dict[str, WorkerLoad]


RouterRequest = Claim | EndClaim | TellLoads
"""What only routers of this machine ask."""
