"""The benchmark ``headstart bench scaling``: a day of a trace on simulated workers, pools scaled by the router's rule against fixed ones.

Everything is simulated, in simulated time (``deploy.scaling``), so it takes minutes and depends on no machine. Fixed pools are the smallest that
keep the same goals over the same day, found by trying.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cachebus.errors import SettingsError
from deploy.bench import report
from deploy.bench.trace import Arrival, ceiling, read_trace
from deploy.scaling.day import DAY_SECONDS, Shape, clock_hour, day_of
from deploy.scaling.replay import SAMPLE_SECONDS, Goal, Outcome, Plant, Replay
from deploy.sim.profile import Profile, read_profile
from router.scaling_settings import ScalingSettings

LARGE = Profile(
    model="405B in FP8 on 8 H100, assumed",
    blocks=20_000,
    kv_bytes_per_token=516_096,
    step_ms=2.0,
    prefill_tokens_per_second=((1, 2000.0), (512, 4000.0), (2048, 4500.0)),
    attention_ns_per_pair=1.0,
    decode_ms=((1, 26.0), (8, 30.0), (32, 42.0), (128, 80.0)),
    decode_ns_per_context_token=19.0,
)
"""A model whose pools are of some size at the rate of the trace: arithmetic over peak rates, nothing measured."""
RULE, NO_GUARD, NO_ZERO = "rule", "rule without guard", "rule without zero"
_WITHOUT: dict[str, dict[str, float]] = {
    RULE: {},
    NO_GUARD: {"prefill_per_decode_min": 0.0, "prefill_per_decode_max": 1e6},
    NO_ZERO: {"prefill_min": 1},
}
DAY, REPEATS = "day", "day, repeats by night"
_CASES = {DAY: (RULE, NO_GUARD), REPEATS: (RULE, NO_ZERO)}
"""Which rules are tried: zero never comes about by day, and the guard minds no hour."""


@dataclass(frozen=True)
class Ran:
    """A day under one way of sizing the pools."""

    system: str
    case: str
    outcome: Outcome


def run(options: argparse.Namespace) -> int:
    """Simulates, prints a table or one JSON object; 1 where the rule missed its goal. Raises HeadstartError."""
    if not (options.requests > 0 and options.gpus > 0 and 0 < options.low <= 1 and 0 < options.share <= 1):
        raise SettingsError("--requests, --gpus, --low and --share: give more than 0, the last two at most 1")
    trace = read_trace(options.trace, options.trace_requests)
    plant = Plant(read_profile(options.profile) if options.profile else LARGE, options.start_seconds, int(options.store_tokens))
    rule, goal = rule_of(options), Goal(options.ttft, options.itl, options.share)
    found: list[Ran] = []
    result: dict[str, Any] = {}
    for case, systems in _CASES.items():
        arrivals = day_of(trace, Shape(options.requests, options.low, case == REPEATS, options.seed))
        _say(f"{case}: {len(arrivals)} requests, {ceiling(arrivals):.3f} of their tokens came before")
        for system in systems:
            changed = msgspec.structs.replace(rule, **_WITHOUT[system])
            found.append(Ran(system, case, Replay(plant, goal, (1, 1), changed).run(arrivals, DAY_SECONDS)))
            _say(line_of(found[-1], options.gpus))
        fixed = smallest(plant, goal, arrivals, (rule.prefill_max, rule.decode_max))
        if fixed is None:
            _say(f"{case}: no fixed pools up to {rule.prefill_max} + {rule.decode_max} keep the goals")
        else:
            found.append(Ran(f"fixed {fixed[0][0]} + {fixed[0][1]}", case, fixed[1]))
            _say(line_of(found[-1], options.gpus))
        result = _document(found, plant, options)
        if options.output:
            report.write(options.output, result)
    print(json.dumps(result) if options.json else table(found, options.gpus))
    return 1 if any(ran.system == RULE and ran.outcome.share < goal.share for ran in found) else 0


def rule_of(options: argparse.Namespace) -> ScalingSettings:
    """The rule: half of a first token's time may be waiting, and tokens may come as slowly as the goal allows."""
    rule = ScalingSettings(
        prefill_min=0,
        prefill_max=options.prefill_max,
        decode_max=options.decode_max,
        prefill_busy=options.busy,
        backlog_seconds=options.ttft / 2,
        inter_token_seconds=options.itl,
    )
    for key, wrong in rule.problems():
        raise SettingsError(f"scaling.{key}: {wrong}")
    return rule


def smallest(plant: Plant, goal: Goal, arrivals: Sequence[Arrival], most: tuple[int, int]) -> tuple[tuple[int, int], Outcome] | None:
    """The fixed pools of fewest workers, up to ``most`` of each, that keep the goal; None where none do."""
    tried: dict[tuple[int, int], Outcome] = {}

    def keeps(prefill: int, decode: int) -> bool:
        sizes = prefill, decode
        if sizes not in tried:
            tried[sizes] = Replay(plant, goal, sizes, None, gives_up=True).run(arrivals, DAY_SECONDS)
            kept = f"kept by {tried[sizes].share:.3f}" if not tried[sizes].broken else f"missed after {tried[sizes].requests} requests"
            _say(f"fixed {prefill} + {decode}: {kept}")
        return not tried[sizes].broken

    found = fewest(keeps, most)
    return None if found is None else (found, tried[found])


def fewest(keeps: Callable[[int, int], bool], most: tuple[int, int]) -> tuple[int, int] | None:
    """The pair with the smallest sum for which ``keeps`` holds. More workers of a kind never break it, so it is asked for a few pairs only."""
    best: tuple[int, int] | None = None
    high = most[0]
    for decode in range(1, most[1] + 1):
        high = high if best is None else min(high, sum(best) - decode - 1)
        if high < 1 or not keeps(high, decode):
            continue
        low = 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(middle, decode) else (middle + 1, high)
        best = high, decode
    return best


def _document(found: Sequence[Ran], plant: Plant, options: argparse.Namespace) -> dict[str, Any]:
    rows = [row for ran in found for row in rows_of(ran, plant.profile.model, options.gpus)]
    command = ["headstart", "bench", "scaling", *(sys.argv[sys.argv.index("scaling") + 1 :] if "scaling" in sys.argv else ())]
    every = int(1800 / SAMPLE_SECONDS)
    pools = {
        f"{ran.system}, {ran.case}": [[round(clock_hour(at), 2), prefill, decode] for at, prefill, decode in ran.outcome.pools[::every]]
        for ran in found
    }
    return report.document(rows, command, {}) | {"pools": pools}


def rows_of(ran: Ran, model: str, gpus: int) -> list[report.Row]:
    """A day's figures as rows."""
    outcome = ran.outcome
    seconds = {"ttft_seconds": report.figure(outcome.ttft), "inter_token_seconds": report.figure(outcome.itl)}
    single = {
        "gpu_hours": outcome.hours * gpus,
        "prefill_worker_hours": outcome.worker_seconds["prefill"] / 3600,
        "decode_worker_hours": outcome.worker_seconds["decode"] / 3600,
        "goals_met_share": outcome.share,
        "ttft_met_share": outcome.met_ttft / outcome.requests,
        "inter_token_met_share": outcome.met_itl / outcome.requests,
    }

    def row(metric: str, median: float, p99: float, runs: int) -> report.Row:
        return report.Row("scaling", ran.system, model, "auto", ran.case, 0, 0, metric, median, p99, runs)

    found = [row(metric, *figures, outcome.requests) for metric, figures in seconds.items()]
    return found + [row(metric, round(value, 4), round(value, 4), 1) for metric, value in single.items()]


def line_of(ran: Ran, gpus: int) -> str:
    """A day in a line."""
    outcome = ran.outcome
    hours = " + ".join(f"{outcome.worker_seconds[role] / 3600:.1f}" for role in ("prefill", "decode"))
    return f"{ran.case}, {ran.system}: goals met by {outcome.share:.4f}, {outcome.hours * gpus:.0f} GPU-hours (workers: {hours} h)"


def table(found: Sequence[Ran], gpus: int) -> str:
    """The result in Markdown."""
    lines = [
        "| | goals met | TTFT | time between tokens | TTFT p50, p99, s | prefill, decode, worker-hours | GPU-hours |",
        "|---|---|---|---|---|---|---|",
    ]
    for ran in found:
        one = ran.outcome
        shares = " | ".join(f"{share:.3f}" for share in (one.share, one.met_ttft / one.requests, one.met_itl / one.requests))
        ttft = ", ".join(f"{value:.1f}" for value in report.figure(one.ttft))
        hours = ", ".join(f"{one.worker_seconds[role] / 3600:.0f}" for role in ("prefill", "decode"))
        lines.append(f"| {ran.case}: {ran.system} | {shares} | {ttft} | {hours} | {one.hours * gpus:,.0f} |")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
