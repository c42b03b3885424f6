"""What a tenant may ask in a minute. Pure: the time is passed in.

Two token buckets a tenant (requests; tokens of prompts and answers), each as large as a minute's worth and filled at that rate. What a request
spends in tokens is known only while it runs, so a request is let in while there is anything left, and what it then spends may leave a debt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_MINUTE = 60.0
_ANYTHING = 1.0


@dataclass
class Bucket:
    """``per_minute`` a minute, that many at once; 0: without limit."""

    per_minute: int
    level: float
    at: float

    @classmethod
    def full(cls, per_minute: int, now: float) -> Bucket:
        """A bucket that nobody has taken from."""
        return cls(per_minute, float(per_minute), now)

    def wait(self, now: float) -> float:
        """Seconds until there is something in it."""
        if not self.per_minute:
            return 0.0
        self._fill(now)
        return max(0.0, (min(_ANYTHING, self.per_minute) - self.level) * _MINUTE / self.per_minute)

    def take(self, count: int, now: float) -> None:
        """Takes that much, also what is not there: the debt is filled up first. A negative count gives back."""
        if self.per_minute:
            self._fill(now)
            self.level = min(self.level - count, float(self.per_minute))

    def limited(self, per_minute: int, now: float) -> None:
        """The limit is another from now on; what was taken stays taken."""
        if per_minute != self.per_minute:
            self._fill(now)
            self.level += per_minute - self.per_minute
            self.per_minute = per_minute

    def _fill(self, now: float) -> None:
        self.level = min(float(self.per_minute), self.level + max(0.0, now - self.at) * self.per_minute / _MINUTE)
        self.at = max(now, self.at)


@dataclass(frozen=True)
class Refusal:
    """``what`` was used up, "requests" or "tokens", of ``per_minute``; in ``seconds`` there is something again."""

    what: str
    per_minute: int
    seconds: int


class Limiter:
    """The buckets of all tenants, by name."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[Bucket, Bucket]] = {}

    def admit(self, tenant: str, requests_per_minute: int, tokens_per_minute: int, now: float) -> Refusal | None:
        """Lets a request in and counts it, or says why not; what is refused counts nowhere."""
        if tenant not in self._buckets:
            self._buckets[tenant] = (Bucket.full(requests_per_minute, now), Bucket.full(tokens_per_minute, now))
        requests, tokens = self._buckets[tenant]
        requests.limited(requests_per_minute, now)
        tokens.limited(tokens_per_minute, now)
        for what, bucket in (("requests", requests), ("tokens", tokens)):
            if seconds := bucket.wait(now):
                return Refusal(what, bucket.per_minute, math.ceil(seconds))
        requests.take(1, now)
        return None

    def spend(self, tenant: str, tokens: int, now: float) -> None:
        """A request that was let in has taken so many tokens."""
        if tenant in self._buckets:
            self._buckets[tenant][1].take(tokens, now)


class Meter:
    """The tokens of one request; ``spend`` hears of every one once, also where a count is corrected later."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        self._spend = spend
        self.prompt = self.generated = 0

    def prompt_is(self, tokens: int) -> None:
        """Its prompt has so many tokens."""
        if tokens != self.prompt:
            self._spend(tokens - self.prompt)
            self.prompt = tokens

    def generated_is(self, tokens: int) -> None:
        """Its answer has so many by now."""
        if tokens != self.generated:
            self._spend(tokens - self.generated)
            self.generated = tokens
