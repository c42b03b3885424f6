"""Breakers, lost workers and who is left, on a clock of its own."""

from __future__ import annotations

import random

import pytest

from cachebus.messages import Worker
from router.health import FAILURES_MAX, OUT_SECONDS, OUT_SECONDS_MAX, PROBES_MAX, SILENT_SECONDS, Health


def workers(count: int, role: str = "decode") -> list[Worker]:
    return [Worker(f"{role}-{number}", role, "http://x", "m", b"n", 16, 256, 8192, True) for number in range(count)]  # type: ignore[arg-type]


def names(found: list[Worker]) -> list[str]:
    return sorted(worker.worker for worker in found)


def test_failures_in_a_row_open_a_breaker_and_another_one_at_once_doubles_it() -> None:
    health, pool = Health(), workers(3)
    for _ in range(FAILURES_MAX):
        assert names(health.usable(pool, 0)) == names(pool)
        health.failed("decode-0", 0)
    assert names(health.usable(pool, OUT_SECONDS / 2)) == ["decode-1", "decode-2"]
    assert names(health.usable(pool, OUT_SECONDS)) == names(pool)
    now, seconds = OUT_SECONDS, OUT_SECONDS
    for _ in range(8):
        health.failed("decode-0", now)
        seconds = min(OUT_SECONDS_MAX, 2 * seconds)
        assert health.out(pool, now + 0.99 * seconds) == {"decode-0"}
        now += seconds
        assert not health.out(pool, now)
    health.succeeded("decode-0", now)
    health.failed("decode-0", now)
    assert not health.out(pool, now), "one leg that went well closes it"


def test_a_worker_that_fails_half_of_its_legs_is_out() -> None:
    health, pool = Health(), workers(3)
    for _ in range(4):
        health.succeeded("decode-0", 0)
        health.failed("decode-0", 0)
    assert not health.out(pool, 0)
    health.succeeded("decode-0", 0)
    health.failed("decode-0", 0)
    assert health.out(pool, 0) == {"decode-0"}


def test_old_failures_are_forgotten() -> None:
    health, pool = Health(), workers(3)
    for number in range(100):
        for _ in range(5):
            health.succeeded("decode-0", number * 10.0)
        health.failed("decode-0", number * 10.0)
        assert not health.out(pool, number * 10.0)


@pytest.mark.parametrize("heard", [True, False])
def test_who_is_silent_and_deaf_is_lost_until_it_answers(heard: bool) -> None:
    health, pool = Health(), workers(2)
    now = 10.0
    for number in range(PROBES_MAX):
        now += 1
        if heard:
            health.heard["decode-1"] = now - 0.5
        lost = health.probed("decode-1", now, well=False)
        assert lost is (not heard and number == PROBES_MAX - 1)
    assert names(health.usable(pool, now)) == (names(pool) if heard else ["decode-0"])
    now += SILENT_SECONDS
    assert health.probed("decode-1", now, well=False), "what it sent is long ago now"
    health.heard.clear()
    assert names(health.usable(pool, now + SILENT_SECONDS)) == ["decode-0"]
    health.probed("decode-1", now + 60, well=True)
    assert names(health.usable(pool, now + 60)) == names(pool)


def test_half_of_a_pool_stays_and_other_pools_do_not_count() -> None:
    health, pool = Health(), workers(4) + workers(2, "prefill")
    for number in range(4):
        for _ in range(FAILURES_MAX):
            health.failed(f"decode-{number}", number / 10)
    assert names(health.usable(pool, 0.5)) == ["decode-0", "decode-1", "prefill-0", "prefill-1"], "those that come back soonest"


def test_a_pool_that_is_lost_altogether_is_asked_all_the_same_but_for_prefill() -> None:
    health, decode, prefill = Health(), workers(3), workers(2, "prefill")
    for worker in decode + prefill:
        for _ in range(PROBES_MAX):
            health.probed(worker.worker, 1, well=False)
    assert names(health.usable(decode + prefill, 1)) == names(decode)


def test_calls_are_paced_and_workers_that_left_are_forgotten() -> None:
    health, pool = Health(), workers(3)
    assert names(health.due(pool, 1.0, 5.0)) == names(pool)
    assert health.due(pool, 1.0, 5.9) == []
    assert names(health.due(pool[:1], 1.0, 6.0)) == ["decode-0"]
    assert names(health.due(pool, 1.0, 6.1)) == ["decode-1", "decode-2"]
    health, many = Health(), workers(100)
    health.due(many, 1.0, 10.0)
    assert health.due(many, 1.0, 14.9) == []
    assert len(health.due(many, 1.0, 15.0)) == 100


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_somebody_is_left(seed: int) -> None:
    chance, health, now = random.Random(seed), Health(), 0.0
    pool = workers(chance.randint(1, 5)) + workers(chance.randint(1, 3), "prefill")
    for _ in range(500):
        now += chance.random()
        name = chance.choice(pool).worker
        chance.choice([health.failed, health.succeeded, lambda *it: health.probed(*it, well=chance.random() < 0.3)])(name, now)
        assert "decode" in {worker.role for worker in health.usable(pool, now)}
