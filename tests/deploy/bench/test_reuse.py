"""The reuse benchmark's own decisions: which requests are new, the bound, and what ours is held against."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from cachebus.errors import SettingsError
from deploy.bench import reuse
from deploy.bench.report import Row
from deploy.bench.reuse import Comparison, Plan
from deploy.settings import read_settings

PLAN = Plan(prompts=12, prompt_tokens=1000, question_tokens=64, answer_tokens=8, warm_seconds=1, window_seconds=2, windows=3)


def row(system: str, case: str, rate: float, clients: int = 10) -> Row:
    return Row("reuse", system, "", "", case, 1064, clients, reuse.RATE, rate, rate, 3)


@pytest.mark.parametrize(("percent", "new"), [(80, 4), (95, 1), (0, 20), (100, 0)])
def test_every_twenty_requests_have_the_share_of_new_ones(percent: int, new: int) -> None:
    requests = PLAN.requests(percent, 0)
    assert len(requests) >= PLAN.seconds * 100
    system_prompts = {PLAN.request(prompt, 0).pieces[0] for prompt in range(12)}
    for first in range(0, 400, 20):
        assert sum(one.pieces[0] not in system_prompts for one in requests[first : first + 20]) == new
    if percent:
        assert {one.pieces[0] for one in requests} & system_prompts == system_prompts


def test_nothing_new_is_asked_twice_and_no_question() -> None:
    one = PLAN.requests(80, 0)
    two = PLAN.requests(80, len(one))
    questions = [request.pieces[1].seed for request in one + two]
    assert len(set(questions)) == len(questions)
    system_prompts = {PLAN.request(prompt, 0).pieces[0].seed for prompt in range(12)}
    new = [request.pieces[0].seed for request in one + two if request.pieces[0].seed not in system_prompts]
    assert len(set(new)) == len(new)
    assert not set(new) & set(questions)


def test_the_bound_is_the_rate_without_reuse_over_what_is_still_computed() -> None:
    assert reuse.share_of_bound(5.0, 1.0, 80) == pytest.approx(1.0)
    assert reuse.share_of_bound(5.0, 1.0, 95) == pytest.approx(0.25)


def test_ours_is_held_against_the_control_and_the_best_at_the_same_budget() -> None:
    rows = [
        row("vllm", "cold", 1.0),
        row("vllm", "hbm, 80%", 4.0),
        row("vllm", "hbm held to a budget, 80%", 1.5),
        row("vllm-offloading", "dram, 80%", 2.0),
        row("vllm-offloading", "dram, 95%", 9.0),
        row("vllm-offloading", "dram, 80%", 8.0, clients=50),
        row("headstart", "dram, 80%", 3.0),
    ]
    assert reuse.comparisons(rows) == [
        Comparison("80% reuse, 10 clients: req/s / vLLM with everything in HBM", 0.75, 0.8),
        Comparison("80% reuse, 10 clients: req/s / the best rival at the same budget", 1.5, 2.0),
    ]
    assert reuse.comparisons(rows[:-1]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": "vllm,sglang"}, "'sglang' is unknown"),
        ({"reuse": "82"}, "--reuse 82"),
        ({"reuse": "105"}, "--reuse 105"),
        ({"reuse": "most"}, "--reuse most"),
        ({"concurrency": "0"}, "--concurrency 0"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"systems": "vllm", "reuse": "80", "concurrency": "10"}
    with pytest.raises(SettingsError, match=message):
        reuse.run(read_settings(None, [], {}), argparse.Namespace(**{**given, **changes}))
