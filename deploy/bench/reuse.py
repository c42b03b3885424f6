"""``headstart bench reuse``: requests a second where a share of the requests begins with one of a few system prompts and the rest is new.

Clients ask in a loop. Engines are held to a budget of KV in their own memory, which the system prompts exceed; ``control`` is plain vLLM without the
budget. Where prefill limits, a share of reuse of r allows 1 / (1 - r) times the requests that are served without reuse; that rate is measured on the
control, too.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cachebus.errors import HeadstartError, SettingsError
from deploy.bench import benchmark, engines, goals
from deploy.bench.benchmark import Results, say
from deploy.bench.load import Load, Piece, Request, Served, begun, hit_share, in_windows
from deploy.bench.report import Row
from deploy.bench.streaming import StreamingEngine
from deploy.settings import Settings

SYSTEMS = [goals.CONTROL, goals.PLAIN, goals.OURS, goals.OFFLOADING, goals.LMCACHE]
RATE, TTFT, HITS, BOUND = "requests_per_second", "ttft_seconds", "hit_tokens_share", "bound_share"
_GROUP = 20
"""So many requests have exactly the share of new ones that is asked for, so that short windows have it, too."""
_RATE_MAX = 250
_FILL_SECONDS_MAX = 600.0
_PROMPT_SEED, _NEW_SEED, _QUESTION_SEED = 1 << 30, 1 << 31, 1 << 32


@dataclass(frozen=True)
class Plan:
    """The prompts, and how long each load runs: ``warm_seconds``, then ``windows`` of ``window_seconds``."""

    prompts: int
    prompt_tokens: int
    question_tokens: int
    answer_tokens: int
    warm_seconds: float
    window_seconds: float
    windows: int
    settle_seconds: float = 3.0
    """From a load to the next, for what still runs in the engine to end."""

    @property
    def tokens(self) -> int:
        """A prompt's length with its question."""
        return self.prompt_tokens + self.question_tokens

    @property
    def seconds(self) -> float:
        """How long a load runs."""
        return self.warm_seconds + self.window_seconds * self.windows

    def request(self, prompt: int | None, number: int) -> Request:
        """Request ``number`` about system prompt ``prompt``; None: about a new one. No question is asked twice."""
        begin = Piece(_NEW_SEED + number if prompt is None else _PROMPT_SEED + prompt, self.prompt_tokens)
        return Request([begin, Piece(_QUESTION_SEED + number, self.question_tokens)], self.answer_tokens)

    def requests(self, reuse: int, first: int) -> list[Request]:
        """As many as the load could need, the first of number ``first``; ``reuse``: the percentage that begin with a system prompt."""
        generator = random.Random(first)
        found: list[Request] = []
        while len(found) < self.seconds * _RATE_MAX:
            new = round(_GROUP * (100 - reuse) / 100)
            kinds = [None] * new + [generator.randrange(self.prompts) for _ in range(_GROUP - new)]
            generator.shuffle(kinds)
            found += [self.request(kind, first + len(found) + place) for place, kind in enumerate(kinds)]
        return found


@dataclass(frozen=True)
class Comparison:
    """A rate of ours as a multiple of another, and the least that it should be."""

    what: str
    ratio: float
    ratio_min: float


@dataclass
class State:
    """What one load hands on to the next: the numbers of requests that were taken, and the rate without reuse."""

    taken: int = 0
    cold_rate: float = 0.0


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Measures; 0 where every system answered. Raises SettingsError."""
    names = engines.chosen(options.systems, SYSTEMS)
    shares = benchmark.numbers("--reuse", options.reuse, 0)
    if unfit := [share for share in shares if share > 100 or share * _GROUP % 100]:
        raise SettingsError(f"--reuse {unfit[0]}: give percentages in steps of {100 // _GROUP}")
    clients = benchmark.numbers("--concurrency", options.concurrency)
    plan = Plan(
        options.prompts,
        options.prompt_tokens,
        options.question_tokens,
        options.answer_tokens,
        options.warm_seconds,
        options.window_seconds,
        options.runs,
    )
    # The control comes first, since the others are held against its rate without reuse.
    names.sort(key=lambda name: name != goals.CONTROL)
    measure_one = functools.partial(measure, plan, shares, clients, State())
    results, failures = benchmark.benchmark(settings, options, names, measure_one)
    for one in comparisons(results.rows):
        say(f"{one.what}: {one.ratio:.2f}" + (f", MISSED: at least {one.ratio_min}" if one.ratio < one.ratio_min else ""))
    headings = {RATE: "req/s", TTFT: "TTFT, s", HITS: "share of the prompts' tokens cached", BOUND: "share of the bound"}
    benchmark.finish(results, options, benchmark.tables(results, headings))
    return 1 if failures else 0


def case_of(system: str, reuse: int) -> str:
    """The row's case: where hits come from, and the percentage of requests that reuse a system prompt."""
    if not reuse:
        return goals.COLD
    source = {goals.CONTROL: goals.OWN_HIT, goals.PLAIN: f"{goals.OWN_HIT} held to a budget"}.get(system, goals.HIT)
    return f"{source}, {reuse}%"


def measure(
    plan: Plan, shares: Sequence[int], clients: Sequence[int], state: State, system: str, started: list[StreamingEngine], results: Results
) -> None:
    """Every load on one system; on the control first the one without reuse."""
    engine = started[0]
    if system == goals.CONTROL:
        state.cold_rate = _cell(plan, 0, clients[0], state, system, engine, results)
        say(f"without reuse {state.cold_rate:g} req/s, measured on the control with {clients[0]} clients; the bound is that over 1 - reuse")
    _fill(plan, engine)
    for reuse in shares:
        for count in clients:
            _cell(plan, reuse, count, state, system, engine, results)


def _fill(plan: Plan, engine: StreamingEngine) -> None:
    """Asks every system prompt once, one after the other, so that whoever keeps it has it."""
    requests = [Request([Piece(_PROMPT_SEED + prompt, plan.prompt_tokens)], 1) for prompt in range(plan.prompts)]
    engine.answers(requests, _FILL_SECONDS_MAX, clients=1)
    time.sleep(plan.settle_seconds)


def _cell(plan: Plan, reuse: int, clients: int, state: State, system: str, engine: StreamingEngine, results: Results) -> float:
    """One load on one system; its rate in requests a second."""
    requests = plan.requests(reuse, state.taken)
    state.taken += len(requests)
    served = engine.run(Load(requests, plan.seconds, clients))
    time.sleep(plan.settle_seconds)
    answered = begun(served, plan.warm_seconds, plan.seconds)
    if not answered:
        raise HeadstartError(f"nothing was answered within {plan.seconds:g} s: give --warm-seconds and --window-seconds more time")
    place, case = (plan.tokens, clients), case_of(system, reuse)
    name = goals.PLAIN if system == goals.CONTROL else system
    rate = results.add(name, case, place, RATE, _rates(plan, served))
    results.add(name, case, place, TTFT, [one.ttft for one in answered])
    results.add(name, case, place, HITS, [hit_share(answered)])
    if reuse < 100 and reuse and state.cold_rate:
        results.add(name, case, place, BOUND, [share_of_bound(rate, state.cold_rate, reuse)])
    return rate


def _rates(plan: Plan, served: Sequence[Served]) -> list[float]:
    return [len(window) / plan.window_seconds for window in in_windows(served, plan.warm_seconds, plan.window_seconds, plan.windows)]


def share_of_bound(rate: float, cold_rate: float, reuse: int) -> float:
    """A rate as a share of the bound: the rate without reuse over the share that still has to be computed."""
    return rate * (1 - reuse / 100) / cold_rate


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Ours against the control, and against the best of those that were held to the same budget."""
    rates = {(row.system, row.case, row.concurrency): row.median for row in rows if row.metric == RATE}
    found = []
    for (system, case, clients), rate in rates.items():
        if system != goals.OURS or case == goals.COLD:
            continue
        reuse = case.rpartition(", ")[2]
        in_hbm = f"{goals.OWN_HIT}, {reuse}"
        same = [
            other
            for (name, its_case, at), other in rates.items()
            if name != goals.OURS and at == clients and its_case.endswith(f", {reuse}") and its_case != in_hbm
        ]
        load = f"{reuse} reuse, {clients} clients"
        if full := rates.get((goals.PLAIN, in_hbm, clients)):
            found.append(Comparison(f"{load}: req/s / vLLM with everything in HBM", rate / full, 0.8))
        if best := max(same, default=0.0):
            found.append(Comparison(f"{load}: req/s / the best rival at the same budget", rate / best, 2.0))
    return found
