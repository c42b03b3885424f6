"""A part of a trace that an engine can answer in minutes, as requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.bench.load import Piece, Request
from deploy.bench.trace import BLOCK_TOKENS, Arrival

_BLOCK_SEED = 1 << 30
_SHARES = 1000


@dataclass(frozen=True)
class Scale:
    """How a trace is made to fit: its first ``seconds`` times ``speed``, so many times faster, of ``share`` of its conversations.

    ``block_tokens`` stand for a block of 512, in answers, too; an answer has at most ``answer_tokens_max``.
    """

    seconds: float
    speed: float
    share: float
    block_tokens: int
    answer_tokens_max: int


def sample(arrivals: Sequence[Arrival], scale: Scale) -> list[Arrival]:
    """The stretch of the trace that is replayed. Of a conversation all requests stay or none, since single ones would lose what they reuse.

    A conversation is what shares the second block: the first is the system prompt of all.
    """
    end = scale.seconds * scale.speed
    return [one for one in arrivals if one.at_seconds < end and _place(one) < scale.share * _SHARES]


def request(arrival: Arrival, scale: Scale) -> Request:
    """The request to send: random tokens, the same for the same block."""
    full = [Piece(_BLOCK_SEED + block, scale.block_tokens) for block in arrival.blocks[:-1]]
    rest = _scaled(arrival.input_tokens - BLOCK_TOKENS * len(full), scale)
    answer = min(_scaled(arrival.output_tokens, scale), scale.answer_tokens_max)
    return Request([*full, Piece(_BLOCK_SEED + arrival.blocks[-1], rest)], answer, arrival.at_seconds / scale.speed)


def _scaled(tokens: int, scale: Scale) -> int:
    return max(1, round(tokens * scale.block_tokens / BLOCK_TOKENS))


def _place(arrival: Arrival) -> int:
    """Where a conversation stands among all, from 0 to 999, by no order of its own (Knuth's multiplicative hash)."""
    name = arrival.blocks[1] if len(arrival.blocks) > 1 else arrival.blocks[0]
    return ((name + 1) * 2654435761 % (1 << 32)) * _SHARES >> 32
