"""A trace of an hour or so stretched over a day: more by day, less by night. Pure.

The trace is played several times, each time with prefixes of its own; its own bursts stay, since every arrival keeps its place among the others.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deploy.bench.trace import Arrival

DAY_SECONDS = 86_400.0
BEGINS_AT = 6.0
"""The clock hour at which a replay begins, so that its night comes last and has a day to repeat."""
_LOWEST_AT = 4.0
_POINTS = 1440
NIGHT = (0.0, 6.0)
_REPEATED = 500
_PASS_IDS = 1 << 24


@dataclass(frozen=True)
class Shape:
    """``requests`` a day. At the lowest hour ``low`` of the highest rate; ``repeats``: by night only what came in the evening is asked again."""

    requests: int
    low: float
    repeats: bool
    seed: int


def rate_at(hour: float, low: float) -> float:
    """The rate at a clock hour, as a share of the highest: a cosine, lowest at 4:00 and highest at 16:00."""
    return low + (1 - low) * (0.5 - 0.5 * math.cos(2 * math.pi * (hour - _LOWEST_AT) / 24))


def day_of(trace: Sequence[Arrival], shape: Shape) -> list[Arrival]:
    """The day's arrivals, seconds after ``BEGINS_AT``."""
    passes = -(-shape.requests // len(trace))
    length = trace[-1].at_seconds * (1 + 1 / len(trace))
    played = [
        replace(one, at_seconds=one.at_seconds + number * length, blocks=tuple(number * _PASS_IDS + block for block in one.blocks))
        for number in range(passes)
        for one in trace
    ][: shape.requests]
    whole = played[-1].at_seconds * (1 + 1 / len(played))
    cumulative = _cumulative(shape.low)
    found = [replace(one, at_seconds=_when(one.at_seconds / whole, cumulative)) for one in played]
    return _with_repeats(found, random.Random(shape.seed)) if shape.repeats else found


def clock_hour(at_seconds: float) -> float:
    """The hour on the clock at a moment of the replay."""
    return (BEGINS_AT + at_seconds / 3600) % 24


def _cumulative(low: float) -> list[float]:
    sums = [0.0]
    for point in range(_POINTS):
        sums.append(sums[-1] + rate_at(BEGINS_AT + 24 * (point + 0.5) / _POINTS, low))
    return [value / sums[-1] for value in sums]


def _when(share: float, cumulative: Sequence[float]) -> float:
    place = max(1, bisect_left(cumulative, share))
    before, after = cumulative[place - 1], cumulative[place]
    return (place - 1 + (share - before) / (after - before)) * DAY_SECONDS / _POINTS


def _with_repeats(day: Sequence[Arrival], chance: random.Random) -> list[Arrival]:
    found: list[Arrival] = []
    evening: list[Arrival] = []
    for one in day:
        if NIGHT[0] <= clock_hour(one.at_seconds) < NIGHT[1] and found:
            evening = evening or found[-_REPEATED:]
            found.append(replace(chance.choice(evening), at_seconds=one.at_seconds))
        else:
            found.append(one)
    return found
