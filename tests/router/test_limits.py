"""The limiter, by properties."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachebus.messages_routers import Spent
from router.limits import TENANTS_MAX, Bucket, Limiter, Meter

steps = st.lists(st.tuples(st.floats(0, 30), st.integers(0, 40)), max_size=60)


@given(limit=st.integers(1, 50), gaps=st.lists(st.floats(0, 20), max_size=200))
def test_no_minute_has_more_than_twice_the_limit_and_no_long_time_more_than_the_rate(limit: int, gaps: list[float]) -> None:
    limiter, now, let_in = Limiter(), 0.0, []
    for gap in gaps:
        now += gap
        if limiter.admit("t", limit, 0, now) is None:
            let_in.append(now)
    for number, start in enumerate(let_in):
        for count, end in enumerate(let_in[number:], 1):
            assert count <= limit + limit * (end - start) / 60 + 1e-6


@given(limit=st.integers(1, 5000), taken=steps)
def test_what_is_said_to_be_the_wait_is_the_wait(limit: int, taken: list[tuple[float, int]]) -> None:
    bucket, now = Bucket.full(limit, 0.0), 0.0
    for gap, count in taken:
        now += gap
        bucket.take(count, now)
        assert bucket.level <= limit
        if wait := bucket.wait(now):
            assert bucket.wait(now + wait * 0.9) > 0
            assert bucket.wait(now + wait * 1.001 + 1e-6) == pytest.approx(0, abs=1e-6)
            # It was looked at in the future: time that goes back adds nothing.
            now += wait * 1.001 + 1e-6


@given(spent=st.lists(st.integers(1, 100), max_size=20), tokens=st.integers(1, 500))
def test_a_debt_is_paid_before_anybody_is_let_in(spent: list[int], tokens: int) -> None:
    limiter = Limiter()
    assert limiter.admit("t", 0, tokens, 0.0) is None
    for count in spent:
        limiter.spend("t", count, 0.0)
    left = tokens - sum(spent)
    refusal = limiter.admit("t", 0, tokens, 0.0)
    assert (refusal is None) == (left >= 1)
    if refusal:
        assert refusal.what == "tokens"
        assert limiter.admit("t", 0, tokens, refusal.seconds + 1e-3) is None
        assert refusal.seconds == pytest.approx((1 - left) * 60 / tokens, abs=1)


def test_what_is_refused_counts_nowhere_and_tenants_do_not_share() -> None:
    limiter = Limiter()
    assert limiter.admit("a", 1, 0, 0.0) is None
    for _ in range(100):
        assert limiter.admit("a", 1, 0, 0.0) is not None
    assert limiter.admit("b", 1, 0, 0.0) is None
    assert limiter.admit("a", 1, 0, 60.1) is None


def test_another_limit_is_in_force_at_once_and_gives_nothing_back() -> None:
    limiter = Limiter()
    for _ in range(10):
        assert limiter.admit("t", 10, 0, 0.0) is None
    assert limiter.admit("t", 12, 0, 0.0) is None
    assert limiter.admit("t", 12, 0, 0.0) is None
    assert limiter.admit("t", 12, 0, 0.0) is not None
    assert limiter.admit("t", 0, 0, 0.0) is None, "no limit any more"


def test_a_meter_tells_every_token_once() -> None:
    told: list[int] = []
    meter = Meter(told.append)
    for count in (100, 100, 90):
        meter.prompt_is(count)
    for count in (1, 2, 5):
        meter.generated_is(count)
    assert sum(told) == 95
    assert told == [100, -10, 1, 1, 3]


class Routers:
    """Limiters that hear of each other so many seconds late, as through the bus; ``cut`` off from each other they hear nothing."""

    LAG = 0.6
    STEP = 0.1

    def __init__(self, count: int) -> None:
        self.now = 0.0
        self.limiters = {str(number): Limiter() for number in range(count)}
        self.cut = False
        self.let_in = 0
        self._coming: list[tuple[float, str, dict[str, Spent]]] = []

    def ask(self, router: int, limit: int, times: int = 1) -> int:
        """How many of so many requests are let in."""
        found = sum(self.limiters[str(router)].admit("t", limit, 0, self.now) is None for _ in range(times))
        self.let_in += found
        return found

    def add(self) -> int:
        self.limiters[str(len(self.limiters))] = Limiter()
        return len(self.limiters) - 1

    def passes(self, seconds: float) -> None:
        for _ in range(round(seconds / self.STEP)):
            self.now += self.STEP
            for name, limiter in self.limiters.items():
                told = limiter.told(self.now)
                if told and not self.cut:
                    self._coming.append((self.now + self.LAG - self.STEP, name, told))
            due = [one for one in self._coming if one[0] <= self.now + 1e-9]
            self._coming = [one for one in self._coming if one not in due]
            for _, name, told in due:
                for other, limiter in self.limiters.items():
                    if other != name:
                        limiter.hear({name: told}, self.now)

    def owed(self, router: int) -> int:
        return self.limiters[str(router)]._accounts["t"].requests.owed(self.now)


@pytest.mark.parametrize("routers", [2, 4])
@pytest.mark.parametrize("limit", [60, 600])
def test_all_routers_together_let_in_the_limit_and_what_they_can_not_know_of(routers: int, limit: int) -> None:
    cluster = Routers(routers)
    tries, seconds = 2, 180
    for _ in range(round(seconds / cluster.STEP)):
        for router in range(routers):
            cluster.ask(router, limit, tries)
        cluster.passes(cluster.STEP)
    in_a_lag = tries * round(cluster.LAG / cluster.STEP) * (routers - 1)
    allowed = limit + limit * seconds / 60
    assert allowed - routers <= cluster.let_in <= allowed + in_a_lag
    apart = routers * allowed
    assert cluster.let_in < 0.6 * apart, "and without hearing of each other"


def test_what_was_let_in_too_much_at_once_is_paid_before_anybody_is_let_in() -> None:
    cluster = Routers(3)
    assert [cluster.ask(router, 60, 100) for router in range(3)] == [60, 60, 60]
    cluster.passes(1)
    assert [cluster.owed(router) for router in range(3)] == pytest.approx([179, 179, 179], abs=1)
    cluster.passes(118)
    assert sum(cluster.ask(router, 60, 10) for router in range(3)) == 0
    cluster.passes(3)
    assert sum(cluster.ask(router, 60, 10) for router in range(3)) > 0


def test_a_tenant_that_goes_to_another_router_finds_its_limit_used_up() -> None:
    cluster = Routers(2)
    assert cluster.ask(0, 60, 100) == 60
    cluster.passes(1)
    assert cluster.ask(1, 60, 100) <= 1
    new = cluster.add()
    cluster.passes(1)
    assert cluster.ask(new, 60, 100) <= 2


def test_after_a_cut_whoever_has_less_is_right() -> None:
    cluster = Routers(2)
    cluster.ask(0, 60)
    cluster.ask(1, 60)
    cluster.passes(1)
    cluster.cut = True
    for _ in range(600):
        cluster.ask(0, 60, 5)
        cluster.ask(1, 60)
        cluster.passes(1)
    cluster.cut = False
    cluster.passes(2)
    assert abs(cluster.owed(0) - cluster.owed(1)) <= 1
    assert cluster.owed(0) <= 60, "ten minutes of too much are not a debt of ten minutes"
    before = cluster.let_in
    for _ in range(120):
        for router in range(2):
            cluster.ask(router, 60, 5)
        cluster.passes(1)
    assert cluster.let_in - before <= 120 + 20


def test_a_tenant_that_keeps_its_limit_during_a_cut_has_no_debt_afterwards() -> None:
    cluster = Routers(2)
    for router in range(2):
        cluster.ask(router, 600)
    cluster.passes(1)
    cluster.cut = True
    for _ in range(30):
        assert cluster.ask(0, 600, 9) == 9
        cluster.passes(1)
    cluster.cut = False
    cluster.passes(1)
    assert [cluster.owed(router) for router in range(2)] == pytest.approx([0, 0], abs=10)


def test_tokens_of_others_count_and_what_is_given_back_does_too() -> None:
    one, two = Limiter(), Limiter()
    for limiter in (one, two):
        assert limiter.admit("t", 0, 1000, 0.0) is None
    one.spend("t", 900, 0.1)
    two.hear({"one": one.told(0.2)}, 0.2)
    assert two._accounts["t"].tokens.owed(0.2) == pytest.approx(900, abs=5)
    one.spend("t", -400, 0.3)
    two.hear({"one": one.told(0.4)}, 0.4)
    assert two._accounts["t"].tokens.owed(0.4) == pytest.approx(500, abs=10)


def test_what_comes_late_or_twice_changes_nothing() -> None:
    one, two = Limiter(), Limiter()
    for limiter in (one, two):
        limiter.admit("t", 20, 0, 0.0)
    told = []
    for number in range(10):
        one.admit("t", 20, 0, 0.1 * number)
        told.append(one.told(0.1 * number + 0.01))
    for number in (0, 4, 2, 4, 9, 9, 3):
        two.hear({"one": told[number]}, 1.0)
    assert two._accounts["t"].requests.owed(1.0) == 12


def test_counts_begin_anew_after_a_minute_of_nothing_and_go_on_for_who_owes() -> None:
    cluster = Routers(2)
    for router in range(2):
        cluster.ask(router, 60, 30)
    cluster.passes(200)
    assert cluster.limiters["0"].told(cluster.now) == {}
    assert [cluster.ask(0, 60, 30), cluster.ask(1, 60, 20)] == [30, 20]
    cluster.passes(1)
    assert [cluster.owed(router) for router in range(2)] == pytest.approx([49, 49], abs=1)
    cluster.passes(4000)
    assert cluster.limiters["0"]._accounts == cluster.limiters["0"]._heard == {}


def test_of_many_tenants_those_that_took_last_are_told() -> None:
    limiter = Limiter()
    for number in range(TENANTS_MAX + 5):
        limiter.admit(f"t{number}", 10, 0, number / 1000)
    told = limiter.told(2.0)
    assert len(told) == TENANTS_MAX
    assert "t0" not in told
    assert f"t{TENANTS_MAX + 4}" in told


counts = st.integers(0, (1 << 53) - 1)


@given(st.lists(st.builds(Spent, counts, counts, counts, counts, counts), max_size=8), st.integers(0, 1000))
def test_whatever_others_tell_a_router_goes_on(words: list[Spent], limit: int) -> None:
    limiter = Limiter()
    for number, word in enumerate(words):
        limiter.hear({"x": {"t": word}}, number / 10)
        limiter.admit("t", limit, limit, number / 10)
        assert all(0 <= count < 1 << 53 for count in msgspec.structs.astuple(limiter.told(number / 10).get("t", Spent(0, 0, 0, 0, 0))))
