"""The decode benchmark's loads, and its refusal of arrivals that are not what their case says."""

from __future__ import annotations

import pytest

from cachebus.errors import HeadstartError
from deploy.bench import goals
from deploy.bench.decode import ALONE, Plan, check_hits

PLAN = Plan(batch=4, batch_tokens=100, batch_answer=1000, arrivals=3, prefix_tokens=2000, question_tokens=64, interval=0.5, lead=2.0, runs=1)


def test_hits_ask_for_what_was_computed_and_cold_ones_for_something_else() -> None:
    known = {request.pieces[0] for request in PLAN.prefixes()}
    assert len(known) == PLAN.arrivals
    loads = {case: PLAN.load(case, turn) for turn, case in enumerate((goals.OWN_HIT, goals.HIT, goals.COLD), 1)}
    asked = {case: [request for request in load.requests if not request.background] for case, load in loads.items()}
    assert {request.pieces[0] for request in asked[goals.OWN_HIT]} == {request.pieces[0] for request in asked[goals.HIT]} == known
    assert not {request.pieces[0] for request in asked[goals.COLD]} & known
    again = [request for request in PLAN.load(goals.COLD, 4).requests if not request.background]
    assert not {request.pieces[0] for request in asked[goals.COLD]} & {request.pieces[0] for request in again}
    for requests in asked.values():
        assert [request.at for request in requests] == [2.0, 2.5, 3.0]
    questions = [request.pieces[1] for requests in asked.values() for request in requests]
    batches = [request.pieces[0] for load in loads.values() for request in load.requests if request.background]
    assert len(set(questions)) == len(questions)
    assert len(set(batches)) == len(batches) == 3 * PLAN.batch


def test_alone_the_batch_runs_as_long_as_with_arrivals() -> None:
    load = PLAN.load(ALONE, 1)
    assert len(load.requests) == PLAN.batch
    assert not any(request.background for request in load.requests)
    assert load.seconds == PLAN.end == 3.5


@pytest.mark.parametrize(
    ("case", "cached", "message"),
    [
        (goals.HIT, [2000, 2000], "1 prompts were not answered"),
        (goals.HIT, [2000, 1743, 2000], "dram: 1 prompts of 2000 tokens"),
        (goals.OWN_HIT, [0, 0, 0], "hbm: 3 prompts"),
        (goals.COLD, [0, 16, 0], "cold: 1 prompts"),
    ],
)
def test_what_arrived_must_be_what_the_case_says(case: str, cached: list[int], message: str) -> None:
    with pytest.raises(HeadstartError, match=message):
        check_hits(PLAN, case, cached)


def test_hits_may_leave_a_part_of_a_chunk() -> None:
    check_hits(PLAN, goals.HIT, [2000, 1744, 2063])
    check_hits(PLAN, goals.COLD, [0, 0, 0])
    check_hits(PLAN, ALONE, [])
