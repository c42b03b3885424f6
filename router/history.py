"""The last minutes in figures: time to first token and where prompts came from, in steps of some seconds. Pure: the time is passed in.

Times are counted in classes that grow by 2%, so the memory is bounded whatever the traffic is, and quantiles are right within 1%.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

STEP_SECONDS = 5.0
STEPS = 60
_GROWTH = math.log(1.02)
_SECONDS_MIN, _SECONDS_MAX = 1e-5, 3600.0


@dataclass
class Step:
    """What came in one step of time. ``times``: how many first tokens, by class."""

    begun: float
    times: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached: Counter[str] = field(default_factory=Counter)


class History:
    """The last ``STEPS`` steps. A step with nothing in it is not kept."""

    def __init__(self) -> None:
        self._steps: deque[Step] = deque(maxlen=STEPS)

    def add(self, ttft: float, prompt_tokens: int, cached: Mapping[str, int], now: float) -> None:
        """A request's first token has come after ``ttft`` seconds."""
        begun = now - now % STEP_SECONDS
        if not self._steps or self._steps[-1].begun != begun:
            self._steps.append(Step(begun))
        step = self._steps[-1]
        step.times[_class(ttft)] += 1
        step.prompt_tokens += prompt_tokens
        step.cached.update(cached)

    def steps(self, now: float) -> list[Step]:
        """Those that are not older than ``STEPS`` steps, the oldest first."""
        return [step for step in self._steps if now - step.begun < STEP_SECONDS * STEPS]


def quantile(steps: Iterable[Step], share: float) -> float | None:
    """The time to first token, in seconds, within which ``share`` of all came; None where none came."""
    times: Counter[int] = Counter()
    for step in steps:
        times.update(step.times)
    left = math.ceil(share * times.total())
    for number in sorted(times):
        left -= times[number]
        if left <= 0:
            return math.exp(number * _GROWTH)
    return None


def _class(seconds: float) -> int:
    return round(math.log(min(max(seconds, _SECONDS_MIN), _SECONDS_MAX)) / _GROWTH)
