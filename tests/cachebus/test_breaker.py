from cachebus.breaker import BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN, Breaker


def test_it_begins_open_and_due() -> None:
    breaker = Breaker()
    assert breaker.open
    assert breaker.due(0)
    assert breaker.answered()
    assert not breaker.open
    assert not breaker.due(100)


def test_attempts_become_rarer_up_to_a_limit() -> None:
    breaker = Breaker()
    breaker.answered()
    assert breaker.failed(10)
    now, waits = 10.0, []
    for _ in range(8):
        wait = next(step / 100 for step in range(10_000) if breaker.due(now + step / 100))
        waits.append(wait)
        now += wait
        assert not breaker.failed(now)
    assert waits[0] == BACKOFF_SECONDS_MIN
    assert waits == sorted(waits)
    assert waits[-1] == BACKOFF_SECONDS_MAX
