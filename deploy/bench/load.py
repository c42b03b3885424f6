"""What a streaming engine is asked, and what it tells of each request. Pure: the engine's process and the benchmarks speak in these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

_FIRST_TOKEN, _TOKENS = 100, 3900
"""Token ids that any vocabulary of more than 4,000 has."""


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """A part of a prompt: ``tokens`` random token ids, the same for the same ``seed``; or the ``ids`` themselves, where given."""

    seed: int
    tokens: int
    ids: list[int] | None = None


class Request(msgspec.Struct, frozen=True):
    """A prompt, as its pieces one after the other, and how many tokens to generate."""

    pieces: list[Piece]
    answer: int
    at: float = 0.0
    """Seconds after the load's start; without clients only."""
    background: bool = False
    """Runs beside the others, and is aborted when they are answered."""
    follow_ms: int = 0
    """Another engine is computing the prompt: how long each of its parts is waited for (``cachebus.engine.transfer``)."""


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Requests that an engine gets at once or one after the other.

    With ``clients``, so many ask in a loop, each the next of ``requests`` when its last one is answered; without, every request is sent ``at`` its
    time. After ``seconds`` whatever still runs is aborted. With ``detail`` every token's time and id come back.
    """

    requests: list[Request]
    seconds: float
    clients: int = 0
    detail: bool = False


class Empty(msgspec.Struct, frozen=True, tag="empty"):
    """Empties the engine's own prefix cache."""


Command = Load | Empty


class Served(msgspec.Struct, frozen=True):
    """What became of a request. Times are seconds after the load's start; ``first`` is None where no token came."""

    number: int
    """The request's place in ``Load.requests``."""
    submitted: float
    prompt: int
    """Tokens of the prompt, ``cached`` of which nobody computed for this request."""
    cached: int = 0
    tokens: int = 0
    first: float | None = None
    last: float | None = None
    finished: bool = False
    times: list[float] = []
    ids: list[int] = []

    @property
    def ttft(self) -> float:
        """Seconds from sending it to its first token, which must have come."""
        assert self.first is not None
        return self.first - self.submitted


class Ran(msgspec.Struct, frozen=True):
    """The requests that were sent, in that order, and whether clients found none left before the time was over."""

    served: list[Served]
    exhausted: bool = False


class Emptied(msgspec.Struct, frozen=True):
    """Whether the prefix cache is empty now."""

    empty: bool


class Ready(msgspec.Struct, frozen=True):
    """The engine serves, with room for ``kv_tokens`` in its own memory, ``token_bytes`` each."""

    kv_tokens: int
    token_bytes: int


def token_ids(pieces: Iterable[Piece]) -> list[int]:
    """The prompt's token ids; those of a longer piece begin with those of a shorter one of the same seed."""
    found: list[int] = []
    for piece in pieces:
        if piece.ids is not None:
            found += piece.ids
        else:
            found += (_FIRST_TOKEN + np.random.default_rng(piece.seed).integers(0, _TOKENS, piece.tokens)).tolist()
    return found


def in_windows(served: Sequence[Served], warm: float, seconds: float, windows: int) -> list[list[Served]]:
    """The answers that were finished in each of ``windows`` stretches of ``seconds`` after ``warm`` seconds."""
    found: list[list[Served]] = [[] for _ in range(windows)]
    for one in served:
        if one.finished and one.last is not None and 0 <= (place := int((one.last - warm) // seconds)) < windows:
            found[place].append(one)
    return found


def begun(served: Sequence[Served], start: float, end: float) -> list[Served]:
    """The requests whose first token came in that stretch of time."""
    return [one for one in served if one.first is not None and start <= one.first < end]


def hit_share(served: Sequence[Served]) -> float:
    """Share of the prompts' tokens that nobody computed."""
    prompts = sum(one.prompt for one in served)
    return sum(one.cached for one in served) / prompts if prompts else 0.0


def gaps(served: Iterable[Served], start: float, end: float) -> list[float]:
    """Seconds between a token and the next one of the same answer, of all that ended in that stretch of time."""
    found: list[float] = []
    for one in served:
        found += [later - sooner for sooner, later in zip(one.times, one.times[1:], strict=False) if start <= later < end]
    return found
