"""The last minutes in figures."""

from __future__ import annotations

import random
import statistics

import pytest

from router.history import STEP_SECONDS, STEPS, History, quantile


def test_quantiles_are_right_within_a_hundredth() -> None:
    draw = random.Random(5)
    times = [draw.lognormvariate(-2, 1.5) for _ in range(5000)]
    history = History()
    for number, time in enumerate(times):
        history.add(time, 10, {}, 100.0 + number / 100)
    steps = history.steps(150.0)
    assert quantile(steps, 0.5) == pytest.approx(statistics.median(times), rel=0.011)
    assert quantile(steps, 0.99) == pytest.approx(sorted(times)[4949], rel=0.011)
    assert quantile([], 0.5) is None


def test_what_is_old_is_not_counted_and_memory_is_bounded() -> None:
    history = History()
    for second in range(2000):
        history.add(0.1 if second < 1900 else 1.0, 100, {"dram": 50, "hbm": 10}, float(second))
    steps = history.steps(1999.0)
    assert len(steps) == STEPS
    assert sum(step.prompt_tokens for step in steps) == STEPS * STEP_SECONDS * 100
    assert steps[-1].cached == {"dram": 250, "hbm": 50}
    later = 1999.0 + STEP_SECONDS * (STEPS - 10)
    assert quantile(history.steps(later), 0.01) == pytest.approx(1.0, rel=0.011)
    assert history.steps(1999.0 + STEP_SECONDS * STEPS) == []


def test_times_out_of_all_reason_are_counted_too() -> None:
    history = History()
    history.add(0.0, 1, {}, 0.0)
    history.add(1e9, 1, {}, 0.0)
    low, high = quantile(history.steps(0.0), 0.5), quantile(history.steps(0.0), 1.0)
    assert low is not None
    assert high is not None
    assert 0 < low < 1e-4 < 3000 < high
