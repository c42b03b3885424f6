"""What a tenant may ask in a minute, of all routers together. Pure: the time is passed in.

Two token buckets a tenant (requests; tokens of prompts and answers), each as large as a minute's worth and filled at that rate. What a request
spends in tokens is known only while it runs, so a request is let in while there is anything left, and what it then spends may leave a debt.

Every router has buckets of its own and takes out of them what others tell that they let in, a moment later: nobody is asked before a request. What is
let in too much meanwhile is such a debt, too. What a router was not told in time it learns from what the other has left: whoever has less is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cachebus.messages_routers import Spent
from cachebus.spending import is_later

_MINUTE = 60.0
_ANYTHING = 1.0
GAP_SECONDS = 3.0
"""Others are heard several times a second. After such a silence what they have left counts, not what they took: some of that has come back."""
TENANTS_MAX = 1024
"""Of so many tenants others are told, of those that took last."""
_TOLD_MAX = (1 << 53) - 1
_FORGOTTEN_SECONDS = 3600.0
"""No request takes so long that its tokens would be counted later."""


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

    def owed(self, now: float) -> int:
        """What has to come back until it is full, rounded up."""
        if not self.per_minute:
            return 0
        self._fill(now)
        return math.ceil(self.per_minute - self.level)

    def owes(self, count: float, now: float) -> None:
        """At least so much has to come back."""
        if self.per_minute:
            self._fill(now)
            self.level = min(self.level, self.per_minute - count)

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


@dataclass
class _Account:
    """A tenant's buckets, what was let in here since ``since``, and when the last of it was."""

    requests: Bucket
    tokens: Bucket
    since: float
    last: float
    let_in: int = 0
    spent: int = 0

    def took(self, requests: int, tokens: int, now: float) -> None:
        """It was let in here."""
        if self.idle(now) > _MINUTE:
            self.since, self.let_in, self.spent = now, 0, 0
        self.requests.take(requests, now)
        self.tokens.take(tokens, now)
        self.let_in, self.spent, self.last = self.let_in + requests, max(0, self.spent + tokens), now

    def idle(self, now: float) -> float:
        """For how long nothing was let in, if all of it has come back; else 0."""
        return 0.0 if self.requests.owed(now) or self.tokens.owed(now) else now - self.last


@dataclass(frozen=True)
class _Heard:
    told: Spent
    at: float


class Limiter:
    """The buckets of all tenants, by name, and what was heard of other routers."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._heard: dict[tuple[str, str], _Heard] = {}

    def admit(self, tenant: str, requests_per_minute: int, tokens_per_minute: int, now: float) -> Refusal | None:
        """Lets a request in and counts it, or says why not; what is refused counts nowhere."""
        account = self._accounts.get(tenant) or self._opened(tenant, requests_per_minute, tokens_per_minute, now)
        account.requests.limited(requests_per_minute, now)
        account.tokens.limited(tokens_per_minute, now)
        for what, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if seconds := bucket.wait(now):
                return Refusal(what, bucket.per_minute, math.ceil(seconds))
        account.took(1, 0, now)
        return None

    def spend(self, tenant: str, tokens: int, now: float) -> None:
        """A request that was let in has taken so many tokens."""
        if account := self._accounts.get(tenant):
            account.took(0, tokens, now)

    def told(self, now: float) -> dict[str, Spent]:
        """What other routers should know. What came back a minute ago they need not; after an hour the tenant is forgotten here, too."""
        found: dict[str, Spent] = {}
        for tenant, account in sorted(self._accounts.items(), key=lambda item: -item[1].last):
            idle = account.idle(now)
            if idle > _FORGOTTEN_SECONDS:
                del self._accounts[tenant]
            elif idle <= _MINUTE and len(found) < TENANTS_MAX and (account.let_in or account.spent):
                counts = round(1000 * (now - account.since)), account.let_in, account.spent, account.requests.owed(now), account.tokens.owed(now)
                found[tenant] = Spent(*(min(count, _TOLD_MAX) for count in counts))
        for place in [place for place, heard in self._heard.items() if now - heard.at > _MINUTE]:
            del self._heard[place]
        return found

    def hear(self, spent: Mapping[str, Mapping[str, Spent]], now: float) -> None:
        """Takes in what others let in, by router and tenant."""
        for router, theirs in spent.items():
            for tenant, told in theirs.items():
                before = self._heard.get((router, tenant))
                if before is None or is_later(told, before.told):
                    self._heard[router, tenant] = _Heard(told, now)
                    if account := self._accounts.get(tenant):
                        _take(account, told, before, now)

    def _opened(self, tenant: str, requests_per_minute: int, tokens_per_minute: int, now: float) -> _Account:
        account = _Account(Bucket.full(requests_per_minute, now), Bucket.full(tokens_per_minute, now), now, now)
        for (_, name), heard in self._heard.items():
            if name == tenant:
                passed = (now - heard.at) / _MINUTE
                account.requests.owes(heard.told.requests_owed - passed * requests_per_minute, now)
                account.tokens.owes(heard.told.tokens_owed - passed * tokens_per_minute, now)
        self._accounts[tenant] = account
        return account


def _take(account: _Account, told: Spent, before: _Heard | None, now: float) -> None:
    """Takes what another router let in since it was heard before."""
    if before is not None and now - before.at <= GAP_SECONDS and told.age_ms >= before.told.age_ms:
        account.requests.take(told.requests - before.told.requests, now)
        account.tokens.take(told.tokens - before.told.tokens, now)
    elif told.age_ms <= 1000 * GAP_SECONDS:
        account.requests.take(told.requests, now)
        account.tokens.take(told.tokens, now)
    else:
        account.requests.owes(told.requests_owed, now)
        account.tokens.owes(told.tokens_owed, now)


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
