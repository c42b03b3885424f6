"""Whether a prefix is sooner pulled or computed, by what steps and pulls took lately. Pure state.

A step takes ``a * tokens + b * attended`` seconds: every token's matrices, and attention over what precedes it. Both are fitted to the steps
seen, old ones counting ever less, and each length of context for itself: a hundred short prompts must not make forget what a long one took.
A tier's bytes come at the rate at which they came lately; what is not known is taken for fast, so it is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachebus.wire import Tier

FORGOTTEN_AFTER_SECONDS = 10.0
"""A tier's rate is forgotten when it was not seen for so long: the slow tier of a moment ago is tried again."""

_KEPT = 0.9
"""What of all that was learnt of a tier still counts after one more sample."""

_STEPS_KEPT = 0.8
"""The same for steps whose tokens attend to about as many others, within a factor of two."""

_LENGTH_KEPT, _LENGTH_MIN = 0.9, 0.02
"""How much a length of context counts less for every step of another one, and how much at least."""


@dataclass(frozen=True)
class StepTook:
    """``seconds`` for a step of ``tokens``, which attended to ``attended`` tokens in all."""

    tokens: int
    attended: float
    seconds: float


@dataclass(frozen=True)
class PullTook:
    """``seconds`` until ``length`` bytes had come from ``tier``."""

    tier: Tier
    length: int
    seconds: float


@dataclass(frozen=True)
class Piece:
    """A next part of a prefix: ``length`` bytes that lie in ``tier``, after which ``tokens`` of the prompt are there."""

    tier: Tier
    length: int
    tokens: int


def attended(first: int, last: int) -> float:
    """How many tokens those from ``first`` to ``last`` attend to, all together."""
    return (last * last - first * first) / 2


def of_prompts(parts: Sequence[tuple[int, int]]) -> tuple[int, float]:
    """The tokens of a step that computes any of a prompt, and how many those attend to; nothing of one that only generates.

    ``parts``: of each request, tokens before and in the step. A step that generates takes about as long for one request as for many, so by it an
    engine with little to do would think itself slow at prompts, and routers would leave it with little to do.
    """
    if all(tokens <= 1 for _, tokens in parts):
        return 0, 0.0
    return sum(tokens for _, tokens in parts), sum(attended(before, before + tokens) for before, tokens in parts)


class _Steps:
    """Steps of one length of context: their mean, in which later ones count more. ``counts``: how much it counts beside other lengths."""

    def __init__(self) -> None:
        self.counts = 1.0
        self._weight = 0.0
        # Of tokens², tokens * attended, attended², tokens and attended, each a second: the normal equations of the fit.
        self._sums = [0.0] * 5

    def add(self, sample: StepTook) -> None:
        # Relative to what it took, so that a short step counts as much as a long one.
        tokens, attention = sample.tokens / sample.seconds, sample.attended / sample.seconds
        terms = (tokens * tokens, tokens * attention, attention * attention, tokens, attention)
        self._sums = [_STEPS_KEPT * total + term for total, term in zip(self._sums, terms, strict=True)]
        self._weight = _STEPS_KEPT * self._weight + 1
        self.counts = 1.0

    def terms(self) -> list[float]:
        return [self.counts * total / self._weight for total in self._sums]


class BreakEven:
    """Learns from samples and judges prefixes."""

    def __init__(self) -> None:
        self._steps: dict[int, _Steps] = {}
        self._pulled: dict[Tier, tuple[float, float, float]] = {}

    def add(self, sample: StepTook | PullTook, now_seconds: float) -> None:
        """One more measurement."""
        if isinstance(sample, PullTook):
            length, seconds, at = self._pulled.get(sample.tier, (0.0, 0.0, 0.0))
            kept = _KEPT if now_seconds - at < FORGOTTEN_AFTER_SECONDS else 0.0
            self._pulled[sample.tier] = (length * kept + sample.length, seconds * kept + sample.seconds, now_seconds)
            return
        if sample.seconds <= 0 or not sample.tokens:
            return
        length = int(sample.attended / sample.tokens).bit_length()
        for other, steps in self._steps.items():
            if other != length:
                steps.counts = max(_LENGTH_MIN, steps.counts * _LENGTH_KEPT)
        self._steps.setdefault(length, _Steps()).add(sample)

    def compute_seconds(self, first: int, last: int) -> float | None:
        """What computing a prompt's tokens from ``first`` to ``last`` takes; None before a step was seen."""
        rates = self._fitted()
        return _step_seconds(rates, first, last) if rates else None

    @property
    def longest_tokens(self) -> int:
        """How many tokens those of a step attended to at most, as a power of two: what a longer prompt takes is a guess."""
        return 1 << max(self._steps) if self._steps else 0

    def rates(self, now_seconds: float) -> tuple[float, float, dict[Tier, float]]:
        """Seconds a token computed, a token attended to, and a byte of each tier: what is known of them now; 0 or absent: not known."""
        known = {tier: self._seconds(tier, 1, now_seconds) for tier in self._pulled}
        return *(self._fitted() or (0.0, 0.0)), {tier: seconds for tier, seconds in known.items() if seconds}

    def _fitted(self) -> tuple[float, float] | None:
        """Seconds a token, and a token attended to; None before a step was seen."""
        if not self._steps:
            return None
        tt, ta, aa, ts, as_ = (sum(terms) for terms in zip(*(steps.terms() for steps in self._steps.values()), strict=True))
        determinant = tt * aa - ta * ta
        a, b = ts / tt, 0.0
        # Steps that are all alike tell nothing of the second term.
        if determinant > 1e-6 * tt * aa:
            fitted = (ts * aa - as_ * ta) / determinant, (as_ * tt - ts * ta) / determinant
            a, b = fitted if min(fitted) >= 0 else (a, 0.0) if fitted[1] < 0 else (0.0, as_ / aa)
        return a, b

    def worth(self, pieces: Sequence[Piece], first: int, last: int, now_seconds: float) -> int:
        """How many of ``pieces`` to pull so that tokens ``first`` to ``last`` of a prompt are there soonest; all where nothing is known."""
        rates = self._fitted()
        if rates is None:
            return len(pieces)
        best, best_seconds = 0, _step_seconds(rates, first, last)
        lengths: dict[Tier, int] = {}
        copied = 0
        for number, piece in enumerate(pieces, 1):
            copied += piece.length
            lengths[piece.tier] = lengths.get(piece.tier, 0) + piece.length
            # Tiers bring their bytes side by side, and what has come is copied meanwhile.
            pull = max(self._seconds("dram", copied, now_seconds), *(self._seconds(tier, length, now_seconds) for tier, length in lengths.items()))
            seconds = pull + _step_seconds(rates, piece.tokens, last)
            if seconds <= best_seconds:
                best, best_seconds = number, seconds
        return best

    def _seconds(self, tier: Tier, length: int, now_seconds: float) -> float:
        pulled, seconds, at = self._pulled.get(tier, (0.0, 0.0, 0.0))
        if not pulled or now_seconds - at >= FORGOTTEN_AFTER_SECONDS:
            return 0.0
        return length * seconds / pulled


def _step_seconds(rates: tuple[float, float], first: int, last: int) -> float:
    return rates[0] * (last - first) + rates[1] * attended(first, last)
