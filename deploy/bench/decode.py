"""``headstart bench decode``: what a batch that generates feels of long prompts that arrive beside it, as the time from each token to the next.

The same arrivals, one engine: ``hbm``, their prefixes in its own prefix cache; ``dram``, after that was emptied; ``cold``, prefixes nobody computed;
and ``alone``, without arrivals. Every arrival has a prefix of its own and a question that is computed.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cachebus.errors import HeadstartError
from deploy.bench import benchmark, engines, goals
from deploy.bench.benchmark import Results, say
from deploy.bench.load import Load, Piece, Request, gaps
from deploy.bench.streaming import StreamingEngine
from deploy.settings import Settings

SYSTEMS = [goals.PLAIN, goals.OURS, goals.OFFLOADING, goals.LMCACHE]
ALONE = "alone"
ITL, TTFT = "itl_seconds", "ttft_seconds"
RATIO_MAX = 1.05
"""Most that the 99th percentile may be of that with hits in HBM."""
_FILL_SECONDS_MAX, _LOAD_SECONDS_MAX = 600.0, 300.0
_BATCH_SEED, _PREFIX_SEED, _QUESTION_SEED = 1 << 30, 1 << 31, 1 << 32


@dataclass(frozen=True)
class Plan:
    """The batch, and what arrives beside it: ``arrivals`` prompts, one every ``interval`` seconds from ``lead`` seconds on."""

    batch: int
    batch_tokens: int
    batch_answer: int
    arrivals: int
    prefix_tokens: int
    question_tokens: int
    interval: float
    lead: float
    runs: int
    settle_seconds: float = 3.0
    """After the prefixes were computed, for what publishes them to end."""

    def load(self, case: str, turn: int) -> Load:
        """A case's load; ``turn``: another one each time, so that no batch and no question was seen before."""
        first = turn * 1000
        batch = [
            Request([Piece(_BATCH_SEED + first + one, self.batch_tokens)], self.batch_answer, background=case != ALONE) for one in range(self.batch)
        ]
        if case == ALONE:
            return Load(batch, self.end, detail=True)
        prefix = first + self.arrivals if case == goals.COLD else 0
        return Load([*batch, *(self._arrival(prefix + one, first + one, one) for one in range(self.arrivals))], _LOAD_SECONDS_MAX, detail=True)

    def prefixes(self) -> list[Request]:
        """The prefixes that hits need, to be computed before."""
        return [Request([Piece(_PREFIX_SEED + one, self.prefix_tokens)], 1) for one in range(self.arrivals)]

    @property
    def end(self) -> float:
        """Seconds to the arrival after the last."""
        return self.lead + self.arrivals * self.interval

    def _arrival(self, prefix: int, question: int, place: int) -> Request:
        pieces = [Piece(_PREFIX_SEED + prefix, self.prefix_tokens), Piece(_QUESTION_SEED + question, self.question_tokens)]
        return Request(pieces, 1, self.lead + place * self.interval)


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Measures; 0 where every system answered and every hit was one. Raises SettingsError."""
    names = engines.chosen(options.systems, SYSTEMS)
    plan = Plan(
        options.batch,
        options.batch_tokens,
        options.batch_answer_tokens,
        options.arrivals,
        options.prefix_tokens,
        options.question_tokens,
        options.interval,
        options.lead_seconds,
        options.runs,
    )
    results, failures = benchmark.benchmark(settings, options, names, functools.partial(measure, plan))
    _say_goals(results)
    medians = benchmark.tables(results, {ITL: "median from token to token, ms", TTFT: "TTFT of what arrives, ms"}, 1000)
    worst = benchmark.tables(results, {ITL: "p99 from token to token, ms"}, 1000, worst=True)
    benchmark.finish(results, options, [*worst, *medians])
    return 1 if failures else 0


def measure(plan: Plan, system: str, started: list[StreamingEngine], results: Results) -> None:
    """Every case on one system. Raises HeadstartError where a case was not what it says."""
    engine = started[0]
    engine.answers(plan.prefixes(), _FILL_SECONDS_MAX, clients=1)
    time.sleep(plan.settle_seconds)
    cases = [ALONE, goals.OWN_HIT, *([] if system == goals.PLAIN else [goals.HIT]), goals.COLD]
    found: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in cases}
    turn = 0
    for _ in range(plan.runs):
        for case in cases:
            turn += 1
            if case == goals.HIT:
                engine.empty_hbm()
            if case == goals.OWN_HIT and turn > len(cases):
                # What the case before it threw out of the engine's own memory is brought back, by whatever means.
                engine.answers(plan.prefixes(), _FILL_SECONDS_MAX, clients=1)
                time.sleep(plan.settle_seconds)
            _once(plan, case, plan.load(case, turn), engine, found[case])
    for case, (between, firsts) in found.items():
        results.add(system, case, (plan.prefix_tokens, plan.batch), ITL, between)
        if firsts:
            results.add(system, case, (plan.prefix_tokens, plan.batch), TTFT, firsts)


def _once(plan: Plan, case: str, load: Load, engine: StreamingEngine, found: tuple[list[float], list[float]]) -> None:
    served = engine.run(load)
    batch = [one for one in served if one.number < plan.batch]
    arrived = [one for one in served if one.number >= plan.batch]
    late = [one for one in batch if one.first is None or one.first > plan.lead]
    if late:
        raise HeadstartError(f"{len(late)} of the batch generated nothing yet when the first prompt arrived: raise --lead-seconds")
    check_hits(plan, case, [one.cached for one in arrived if one.finished])
    end = max((one.last or 0 for one in arrived), default=plan.end)
    if any(one.finished and (one.last or 0) < end for one in batch):
        raise HeadstartError("the batch was done before the last prompt was answered: raise --batch-answer-tokens")
    found[0].extend(gaps(batch, plan.lead, end))
    found[1].extend(one.ttft for one in arrived)


def check_hits(plan: Plan, case: str, cached: Sequence[int]) -> None:
    """Raises HeadstartError where what arrived was not what the case says: all of it answered, all hits or none."""
    if case == ALONE:
        return
    if len(cached) < plan.arrivals:
        raise HeadstartError(f"{plan.arrivals - len(cached)} prompts were not answered in time")
    least = plan.prefix_tokens - benchmark.LEFT_TOKENS_MAX
    if wrong := [tokens for tokens in cached if (tokens > 0 if case == goals.COLD else tokens < least)]:
        raise HeadstartError(f"{case}: {len(wrong)} prompts of {plan.prefix_tokens} tokens had others cached than they should, such as {wrong[0]}")


def _say_goals(results: Results) -> None:
    worst = {(row.system, row.case): row.p99 for row in results.rows if row.metric == ITL}
    for (system, case), p99 in worst.items():
        base = worst.get((system, goals.OWN_HIT))
        if case == goals.HIT and base:
            missed = system == goals.OURS and p99 / base > RATIO_MAX
            verdict = f", MISSED: at most {RATIO_MAX}" if missed else ""
            say(f"{system}: p99 from token to token while prefixes load / with hits in HBM: {p99 / base:.3f}{verdict}")
