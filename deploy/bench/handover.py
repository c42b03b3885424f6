"""``headstart bench handover``: what a cold prompt's first token takes when one engine computes the prompt and another one answers.

The two engines share a node, and on a machine with one GPU that GPU. ``handover``: the second one is asked when the first has answered;
``followed``: it is asked while the first one computes, as the router does it, and pulls what is published meanwhile; ``hbm``: the same with
``cache.handover: hbm``, so it reads the first one's blocks. Plain vLLM computes and answers on one engine: ``added_share`` is what the hand-over
adds to its time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cachebus.errors import HeadstartError
from deploy.bench import benchmark, engines, goals
from deploy.bench.benchmark import LEFT_TOKENS_MAX, Results
from deploy.bench.load import Piece, Request, Served
from deploy.bench.streaming import StreamingEngine
from deploy.settings import Settings
from router.follow import PART_MS_MAX, begins_in

SYSTEMS = [goals.PLAIN, goals.OURS, goals.OURS_HBM]
HANDOVER, FOLLOWED, HBM = "handover", "followed", "hbm"
TTFT, ADDED = "ttft_seconds", "added_share"
_SECONDS_MAX = 120.0


@dataclass
class Plan:
    """``lengths`` of prompts in tokens, each asked ``runs`` times; ``alone``: what plain vLLM took, by length, once it was measured."""

    lengths: Sequence[int]
    runs: int
    alone: dict[int, float] = field(default_factory=dict)


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Measures; 0 where every hand-over was whole. Raises SettingsError."""
    names = sorted(engines.chosen(options.systems, SYSTEMS), key=SYSTEMS.index)
    plan = Plan(benchmark.numbers("--lengths", options.lengths), options.runs)
    results, failures = benchmark.benchmark(settings, options, names, functools.partial(measure, plan), workers=2)
    benchmark.finish(results, options, benchmark.tables(results, {TTFT: "TTFT, s", ADDED: "added to plain vLLM's"}))
    return 1 if failures else 0


def measure(plan: Plan, system: str, started: Sequence[StreamingEngine], results: Results) -> None:
    """One system's prompts. Raises HeadstartError where the second engine had to compute what the first had."""
    for length in plan.lengths:
        prompts = [Request([Piece(length * 100 + number, length)], 1) for number in range(2 * plan.runs + 1)]
        if system == goals.PLAIN:
            # The first one warms the engine up for this length.
            seconds = [_computed(started[0], one).ttft for one in prompts[: plan.runs + 1]]
            plan.alone[length] = results.add(system, goals.COLD, (length, 1), TTFT, seconds[1:])
            continue
        warm = _one_by_one(started, prompts[0], length)
        one_by_one = [_one_by_one(started, prompt, length) for prompt in prompts[1 : plan.runs + 1]]
        computing, pulling = (statistics.median(times) for times in zip(*one_by_one, strict=True)) if one_by_one else warm
        begins = begins_in(computing, pulling)
        followed = [_followed(started, prompt, length, begins) for prompt in prompts[plan.runs + 1 :]]
        cases = {HANDOVER: [sum(times) for times in one_by_one], FOLLOWED: followed} if system == goals.OURS else {HBM: followed}
        for case, seconds in cases.items():
            median = results.add(goals.OURS, case, (length, 1), TTFT, seconds)
            if length in plan.alone:
                results.add(goals.OURS, case, (length, 1), ADDED, [median / plan.alone[length] - 1])


def _computed(engine: StreamingEngine, request: Request) -> Served:
    (computed,) = engine.answers([request], _SECONDS_MAX)
    if computed.cached:
        raise HeadstartError(f"a prompt that nobody saw before had {computed.cached} tokens cached")
    return computed


def _one_by_one(started: Sequence[StreamingEngine], request: Request, length: int) -> tuple[float, float]:
    """Seconds of the first engine and of the second."""
    computed = _computed(started[0], request)
    (answered,) = started[1].answers([request], _SECONDS_MAX)
    _check_whole(answered, length)
    return computed.ttft, answered.ttft


def _followed(started: Sequence[StreamingEngine], request: Request, length: int, begins: float) -> float:
    """Seconds from asking the first engine to the answer of the second, which was asked ``begins`` seconds later."""
    with ThreadPoolExecutor(1) as aside:
        begun = time.perf_counter()
        computing = aside.submit(_computed, started[0], request)
        time.sleep(begins)
        (answered,) = started[1].answers([Request(request.pieces, 1, follow_ms=PART_MS_MAX)], _SECONDS_MAX)
        seconds = time.perf_counter() - begun
        computing.result()
    _check_whole(answered, length)
    return seconds


def _check_whole(answered: Served, length: int) -> None:
    if answered.cached < length - LEFT_TOKENS_MAX:
        raise HeadstartError(f"of {length} tokens {answered.cached} were handed over")
