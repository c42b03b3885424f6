"""The requests that come, and what a cache of a size has of them. Pure but for what the trace's reader does.

A tier that is the larger one has what a smaller one has, too, as all that is stored is written behind. So what a request finds is decided by the
sizes alone: the part that the first tier holds comes from there, what more the next one holds comes from that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from deploy.bench.hit_ceiling import hits_lru
from deploy.bench.trace import BLOCK_TOKENS, Arrival
from deploy.plan.figures import Floats

_STEPS = 100
_GROUP = 100


@dataclass(frozen=True)
class Requests:
    """Kinds of requests, one figure each: their share of all, tokens of prompt and answer, and prompt tokens that come from each tier."""

    share: Floats
    prompt: Floats
    output: Floats
    cached: Mapping[str, Floats] = field(default_factory=dict)

    def mean(self, values: Floats) -> float:
        """Over all requests."""
        return float(np.dot(self.share, values))

    @property
    def all_cached(self) -> Floats:
        """Prompt tokens that come from any tier."""
        return sum(self.cached.values(), np.zeros_like(self.prompt))


class Traffic(Protocol):
    """What comes: ``rate`` requests a second, in gaps whose squared coefficient of variation is ``burstiness``."""

    @property
    def rate(self) -> float: ...

    @property
    def burstiness(self) -> float: ...

    @property
    def prompt_max(self) -> int:
        """Tokens of the longest prompt."""

    @property
    def total_max(self) -> int:
        """Tokens of the longest prompt and its answer."""

    def requests(self, tokens: Mapping[str, float]) -> Requests:
        """The requests in front of tiers that hold so many tokens each, the nearest first."""


@dataclass(frozen=True)
class Shared:
    """``reuse`` of the requests begin with one of ``prefixes`` known prefixes, drawn by Zipf's law (0: all alike); the others with nothing known.

    LRU is asked by Che's approximation (Che, Tung and Wang 2002): a prefix stays for the time in which a cache's worth of other tokens comes. All
    that no other request begins with (questions, answers, unique prompts) passes through and takes room, too.
    """

    rate: float
    prompt: int
    output: int
    reuse: float
    prefixes: int
    prefix: int
    zipf: float = 0.0
    burstiness: float = 1.0

    @property
    def prompt_max(self) -> int:
        return self.prompt

    @property
    def total_max(self) -> int:
        return self.prompt + self.output

    def found_share(self, tokens: float) -> float:
        """The share of those that begin with a known prefix which find it in a cache of so many tokens."""
        counts, popularity = popularities(self.prefixes, self.zipf)
        passing = self.output + (1 - self.reuse) * self.prompt + self.reuse * (self.prompt - self.prefix)
        if not self.reuse or tokens < self.prefix:
            return 0.0

        def kept(requests: float) -> Floats:
            return np.asarray(-np.expm1(-self.reuse * popularity * requests), np.float64)

        low, high = 0.0, 1.0
        while self.prefix * np.dot(counts, kept(high)) + passing * high < tokens:
            low, high = high, high * 2
            if high > 1e15:
                return 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.prefix * np.dot(counts, kept(middle)) + passing * middle < tokens else (low, middle)
        return float(np.dot(counts * popularity, kept(low)))

    def requests(self, tokens: Mapping[str, float]) -> Requests:
        before, shares, names = 0.0, [], list(tokens)
        for found in _rising([self.found_share(size) for size in tokens.values()]):
            shares.append(self.reuse * (found - before))
            before = found
        share = np.array([1 - self.reuse * before, *shares])
        alike = np.ones_like(share)
        cached = {name: np.where(np.arange(len(share)) == place, float(self.prefix), 0.0) for place, name in enumerate(names, 1)}
        return Requests(share, alike * self.prompt, alike * self.output, cached)


def popularities(count: int, zipf: float) -> tuple[Floats, Floats]:
    """How many of ``count`` things have which share of the requests, by Zipf's law: one by one at first, then in groups that grow by a hundredth."""
    starts = [1]
    while starts[-1] <= count:
        starts.append(starts[-1] + max(1, starts[-1] // _GROUP if zipf else count))
    edges = np.minimum(np.array(starts, np.float64), count + 1)
    counts = np.diff(edges)
    weights = ((edges[:-1] + edges[1:] - 1) / 2) ** -zipf
    return counts, weights / np.dot(counts, weights)


class Traced:
    """The requests of a trace, each a kind of its own; LRU is replayed. ``rate`` may be another than the trace's own."""

    def __init__(self, arrivals: Sequence[Arrival], rate: float | None, burstiness: float = 1.0) -> None:
        self._prompts = _chained(arrivals)
        self._prompt = np.array([float(one.input_tokens) for one in arrivals])
        self._output = np.array([float(one.output_tokens) for one in arrivals])
        self._all_tokens = len({block for prompt in self._prompts for block in prompt}) * BLOCK_TOKENS
        self._found: dict[int, Floats] = {}
        self.rate = rate if rate else (len(arrivals) - 1) / max(arrivals[-1].at_seconds, 1e-9)
        self.burstiness = burstiness
        self.prompt_max = int(self._prompt.max())
        self.total_max = int((self._prompt + self._output).max())

    def requests(self, tokens: Mapping[str, float]) -> Requests:
        cached: dict[str, Floats] = {}
        before = np.zeros_like(self._prompt)
        for name, size in tokens.items():
            here = np.maximum(before, self._leading(size))
            cached[name], before = here - before, here
        return Requests(np.full_like(self._prompt, 1 / len(self._prompt)), self._prompt, self._output, cached)

    def _leading(self, tokens: float) -> Floats:
        blocks = int(min(tokens, self._all_tokens) // BLOCK_TOKENS)
        if blocks not in self._found:
            found = np.array(hits_lru(self._prompts, blocks), np.float64) * BLOCK_TOKENS
            self._found[blocks] = np.minimum(found, self._prompt)
        return self._found[blocks]


def _rising(values: Sequence[float]) -> list[float]:
    return list(np.maximum.accumulate(values)) if values else []


def _chained(arrivals: Sequence[Arrival]) -> list[list[int]]:
    """Each prompt's blocks under numbers that name all before them, too."""
    numbers: dict[tuple[int, int], int] = {}
    prompts = []
    for one in arrivals:
        prompt: list[int] = []
        for block in one.blocks:
            prompt.append(numbers.setdefault((prompt[-1] if prompt else -1, block), len(numbers)))
        prompts.append(prompt)
    return prompts


def grid(most: float) -> list[float]:
    """Sizes to try up to ``most``: 1, 2, 3, 5, 7 times each power of ten, and that itself; none where it is 0."""
    if most <= 0:
        return []
    tens = range(max(0, math.ceil(math.log10(most))) + 1)
    return sorted({size for ten in tens for step in (1, 2, 3, 5, 7) if (size := step * 10.0**ten) < most} | {most})
