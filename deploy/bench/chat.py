"""``headstart bench chat``: time to first token of every turn of a conversation, whose next prompt is the last one, its answer and a new message.

Between turns every engine's own cache is emptied, so that what was computed comes back from DRAM. Ours is asked on two workers in turn: what one
computed the other pulls. Plain vLLM shows both ends: ``hbm`` keeps its cache, ``cold`` computes every turn's whole prompt.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cachebus.errors import HeadstartError, SettingsError
from deploy.bench import benchmark, engines, goals
from deploy.bench.benchmark import Results
from deploy.bench.load import Piece, Request, hit_share
from deploy.bench.streaming import StreamingEngine
from deploy.settings import Settings

SYSTEMS = [goals.PLAIN, goals.OURS, goals.OFFLOADING, goals.LMCACHE]
TTFT, HITS = "ttft_seconds", "hit_tokens_share"
_TURN_SECONDS_MAX = 600.0


@dataclass(frozen=True)
class Plan:
    """What is asked: ``turns`` of ``turn_tokens``, of which the last ``answer_tokens`` are the engine's."""

    turns: int
    turn_tokens: int
    answer_tokens: int
    runs: int
    pause_seconds: float
    """From the end of a turn to the next one."""

    def message(self, conversation: int, turn: int) -> Piece:
        """What the user says: random token ids, others in each conversation and turn."""
        return Piece((conversation + 1) * 1000 + turn, self.turn_tokens - self.answer_tokens)

    def known_min(self, turn: int) -> int:
        """How many tokens of a turn's prompt are cached at least: the prompt before it, but for a part of a chunk."""
        return turn and max(0, turn * self.turn_tokens - self.answer_tokens - benchmark.LEFT_TOKENS_MAX)


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Measures; 0 where every system answered and every hit was one. Raises SettingsError."""
    names = engines.chosen(options.systems, SYSTEMS)
    plan = Plan(options.turns, options.turn_tokens, options.answer_tokens, options.runs, options.pause)
    if plan.answer_tokens >= plan.turn_tokens:
        raise SettingsError(f"--answer-tokens {plan.answer_tokens}: a turn of {plan.turn_tokens} tokens needs room for the user's message")
    at_once = benchmark.numbers("--concurrency", options.concurrency)
    results, failures = benchmark.benchmark(settings, options, names, functools.partial(measure, plan, at_once), workers=2)
    benchmark.finish(results, options, benchmark.tables(results, {TTFT: "TTFT, s", HITS: "share of the prompt's tokens cached"}))
    return 1 if failures else 0


def measure(plan: Plan, at_once: Sequence[int], system: str, started: list[StreamingEngine], results: Results) -> None:
    """All conversations with one system. Raises HeadstartError where a turn that should have been a hit was none."""
    conversation = 0
    missed = 0
    for concurrency in at_once:
        for case in [goals.OWN_HIT, goals.COLD] if system == goals.PLAIN else [goals.HIT]:
            seconds: dict[int, list[float]] = defaultdict(list)
            shares: dict[int, list[float]] = defaultdict(list)
            for _ in range(plan.runs):
                missed += _converse(plan, range(conversation, conversation + concurrency), started, case, (seconds, shares))
                conversation += concurrency
            for turn in range(plan.turns):
                place = ((turn + 1) * plan.turn_tokens - plan.answer_tokens, concurrency)
                results.add(system, case, place, TTFT, seconds[turn])
                results.add(system, case, place, HITS, shares[turn])
    if missed:
        raise HeadstartError(f"{missed} turns that should have been hits were none")


def _converse(
    plan: Plan,
    conversations: range,
    started: list[StreamingEngine],
    case: str,
    found: tuple[dict[int, list[float]], dict[int, list[float]]],
) -> int:
    """Runs conversations beside each other, all of a turn at once; how many answers' prompts were not cached as they should be."""
    prompts: dict[int, list[Piece]] = {number: [] for number in conversations}
    missed = 0
    for turn in range(plan.turns):
        if case != goals.OWN_HIT:
            for engine in started:
                engine.empty_hbm()
        for number, prompt in prompts.items():
            prompt.append(plan.message(number, turn))
        engine = started[turn % len(started)]
        answers = engine.answers([Request(list(prompt), plan.answer_tokens) for prompt in prompts.values()], _TURN_SECONDS_MAX)
        for prompt, answer in zip(prompts.values(), answers, strict=True):
            prompt.append(Piece(0, 0, answer.ids))
            found[0][turn].append(answer.ttft)
            found[1][turn].append(hit_share([answer]))
            missed += case != goals.COLD and answer.cached < plan.known_min(turn)
        time.sleep(plan.pause_seconds)
    return missed
