"""The limiter, by properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.limits import Bucket, Limiter, Meter

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
