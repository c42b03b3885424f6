"""Which goals the figures reach."""

from __future__ import annotations

from deploy.bench import goals
from deploy.bench.report import Row


def rows(**medians: float) -> list[Row]:
    names = {
        "cold": (goals.PLAIN, goals.COLD),
        "own_hit": (goals.PLAIN, goals.OWN_HIT),
        "ours": (goals.OURS, goals.COLD),
        "by_decode": (goals.OURS, goals.COLD_BY_DECODE),
        "by_both": (goals.OURS, goals.COLD_BY_BOTH),
        "hit": (goals.OURS, goals.HIT),
        "theirs": (goals.LMCACHE, goals.HIT),
    }
    return [Row("prefix", *names[name][:1], "m", "auto", names[name][1], 512, 1, "ttft_seconds", at, at, 1) for name, at in medians.items()]


def test_every_goal_with_all_systems() -> None:
    found = goals.outcomes(rows(cold=1.0, own_hit=0.1, ours=1.2, by_decode=1.04, by_both=1.11, hit=0.12, theirs=0.12))
    assert {(outcome.goal, round(outcome.ratio, 2), outcome.reached) for outcome in found} == {
        ("hit on another worker / vLLM's own hit", 1.2, True),
        ("hit on another worker / LMCache's hit", 1.0, True),
        ("cold by the best route / vLLM's cold", 1.04, True),
        ("cold through prefill and decode / vLLM's cold + hit", 1.01, False),
    }


def test_a_system_that_was_left_out_leaves_its_goals_out() -> None:
    assert [outcome.goal for outcome in goals.outcomes(rows(cold=1.0, own_hit=0.1, hit=0.2))] == ["hit on another worker / vLLM's own hit"]
    assert goals.outcomes(rows(hit=0.2)) == []
