"""A hand-over counts only where the second engine had the prompt from the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from cachebus.errors import HeadstartError
from deploy.bench import goals, handover
from deploy.bench.benchmark import Results
from deploy.bench.load import Request, Served
from deploy.bench.streaming import StreamingEngine
from deploy.settings import read_settings

TOKENS = 2000


class Engine:
    """Answers after ``seconds`` with ``cached`` of the prompt's tokens cached."""

    def __init__(self, seconds: float, cached: int) -> None:
        self._seconds, self._cached = seconds, cached

    def answers(self, requests: Sequence[Request], _seconds_max: float) -> list[Served]:
        return [Served(0, 1.0, TOKENS, self._cached, 1, 1.0 + self._seconds, 1.0 + self._seconds, True) for _ in requests]


def measured(*engines: Engine, system: str = goals.OURS) -> dict[tuple[str, str], float]:
    plan, results = handover.Plan([TOKENS], runs=1), Results("handover", read_settings(None, [], {}))
    handover.measure(plan, goals.PLAIN, cast("list[StreamingEngine]", [Engine(1.0, 0)]), results)
    handover.measure(plan, system, cast("list[StreamingEngine]", list(engines)), results)
    return {(row.case, row.metric): row.median for row in results.rows if row.system == goals.OURS}


def test_both_engines_times_count_and_the_second_one_is_asked_before_the_first_is_done() -> None:
    found = measured(Engine(1.01, 0), Engine(0.04, TOKENS - 1))
    assert found[handover.HANDOVER, handover.TTFT] == 1.05
    assert found[handover.HANDOVER, handover.ADDED] == 0.05
    # These engines take no time to say what they took, so this is when the second one was asked.
    assert 0.88 <= found[handover.FOLLOWED, handover.TTFT] < 0.95
    assert found[handover.FOLLOWED, handover.ADDED] < 0


def test_reading_each_others_blocks_is_a_case_of_its_own_and_followed() -> None:
    found = measured(Engine(1.01, 0), Engine(0.04, TOKENS - 1), system=goals.OURS_HBM)
    assert {case for case, _ in found} == {handover.HBM}
    assert 0.88 <= found[handover.HBM, handover.TTFT] < 0.95


@pytest.mark.parametrize("engines", [(Engine(1, 0), Engine(1, 0)), (Engine(1, 512), Engine(1, TOKENS - 1))], ids=["computed again", "seen before"])
def test_what_is_no_hand_over_is_an_error(engines: tuple[Engine, Engine]) -> None:
    with pytest.raises(HeadstartError):
        measured(*engines)
