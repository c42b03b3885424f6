"""``headstart bench handover``: what a cold prompt's first token takes when one engine computes the prompt and another one answers.

The two engines share a node, and on a machine with one GPU that GPU; the second one is asked when the first has answered, as the router does it.
Plain vLLM computes and answers on one engine: ``added_share`` is what the hand-over adds to its time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from cachebus.errors import HeadstartError
from deploy.bench import benchmark, engines, goals
from deploy.bench.benchmark import LEFT_TOKENS_MAX, Results
from deploy.bench.load import Piece, Request
from deploy.bench.streaming import StreamingEngine
from deploy.settings import Settings

SYSTEMS = [goals.PLAIN, goals.OURS]
HANDOVER = "handover"
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
        seconds = [_first_token(Request([Piece(length * 100 + number, length)], 1), started, length) for number in range(plan.runs)]
        median = results.add(system, goals.COLD if system == goals.PLAIN else HANDOVER, (length, 1), TTFT, seconds)
        if system == goals.PLAIN:
            plan.alone[length] = statistics.median(seconds)
        elif length in plan.alone:
            results.add(system, HANDOVER, (length, 1), ADDED, [median / plan.alone[length] - 1])


def _first_token(request: Request, started: Sequence[StreamingEngine], length: int) -> float:
    (computed,) = started[0].answers([request], _SECONDS_MAX)
    if computed.cached:
        raise HeadstartError(f"a prompt that nobody saw before had {computed.cached} tokens cached")
    if len(started) == 1:
        return computed.ttft
    (answered,) = started[1].answers([request], _SECONDS_MAX)
    if answered.cached < length - LEFT_TOKENS_MAX:
        raise HeadstartError(f"of {length} tokens {answered.cached} were handed over")
    return computed.ttft + answered.ttft
