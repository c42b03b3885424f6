from __future__ import annotations

import pytest

from deploy.plan import cost


def test_the_known_example_is_cut_not_rounded() -> None:
    cold = cost.of_gpu_time(1000, 11, 5.72)
    cached = cost.of_gpu_time(1000, 0.2 * 11 + 0.8 * 1.5, 5.72)
    assert (cold, cached) == (pytest.approx(17.4778, abs=1e-4), pytest.approx(5.4022, abs=1e-4))
    assert (cost.shown(cold), cost.shown(cached)) == ("$17.47", "$5.40")
    assert f"${cold:.2f}" == "$17.48", "rounded it would be another figure"


def test_amounts_that_floats_miss_by_a_hair_are_whole() -> None:
    assert 28 * 3.8 < 106.4
    assert cost.shown(28 * 3.8) == "$106.40"
    assert cost.shown(1234567.891, 1) == "$1,234,567.8"
    assert cost.shown(0.00009, 4) == "$0.0000"


def test_a_million_tokens() -> None:
    assert cost.per_million_tokens(dollars_per_hour=36, tokens_per_second=10_000) == pytest.approx(1)
