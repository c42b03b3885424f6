"""The benchmark ``headstart bench routing``: a trace replayed through gateways on simulated workers, cold caches each time.

Hit rates come from the workers: what share of all prompt tokens no worker computed. So they count alike for gateways that say nothing about caches.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cachebus.errors import SettingsError
from deploy.bench import quiet, report
from deploy.bench.gateways import OURS, SMG, VLLM_ROUTER, Gateway, chosen, running
from deploy.bench.replay import Pace, Served, replay
from deploy.bench.sim_cluster import SimPlan, sim_cluster
from deploy.bench.trace import Arrival, ceiling, read_trace, total_tokens
from deploy.sim.expected import expected_tokens
from deploy.sim.profile import Profile, read_profile

SHARE_OF_CEILING_MIN = 0.95
_CHECKED_SEED = 1


@dataclass(frozen=True)
class Measured:
    """One replay. Seconds are the workers' own; ``late_share``: by how much their steps took longer than the profile says."""

    gateway: Gateway
    requests: int
    failed: int
    wrong: int
    share_of_ceiling: float
    ttft_seconds: Sequence[float]
    late_share: float
    foreign_cores: float

    @property
    def mean_ttft(self) -> float:
        """Mean time to first token."""
        return statistics.fmean(self.ttft_seconds) if self.ttft_seconds else float("inf")

    @property
    def p99_ttft(self) -> float:
        """Its 99th percentile."""
        return report.figure(self.ttft_seconds)[1] if self.ttft_seconds else float("inf")


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table or one JSON object; 1 where an answer was wrong. Raises HeadstartError."""
    gateways = chosen(options.systems, {VLLM_ROUTER: options.vllm_router, SMG: options.smg})
    if not (options.rate > 0 and options.speed > 0 and options.requests > 0):
        raise SettingsError("--rate, --speed and --requests: give more than 0")
    arrivals = read_trace(options.trace, options.requests)
    profile = read_profile(options.profile)
    _say(f"{len(arrivals)} requests, {total_tokens(arrivals):,} prompt tokens, {ceiling(arrivals):.3f} of them came before")
    found: list[Measured] = []
    for gateway in gateways:
        found.append(_measure(gateway, arrivals, profile, options))
        _say_measured(found[-1])
        result = _document(found, arrivals, profile, options)
        if options.output:
            # What is measured stays, should the next one fail.
            report.write(options.output, result)
    print(json.dumps(result) if options.json else table(found))
    for verdict in verdicts(found):
        _say(verdict)
    return 1 if any(measured.wrong for measured in found) else 0


def _document(found: Sequence[Measured], arrivals: Sequence[Arrival], profile: Profile, options: argparse.Namespace) -> dict[str, Any]:
    rows = [row for measured in found for row in rows_of(measured, profile.model, case_of(options))]
    command = ["headstart", "bench", "routing", *(sys.argv[sys.argv.index("routing") + 1 :] if "routing" in sys.argv else ())]
    foreign = {measured.gateway.label: round(measured.foreign_cores, 2) for measured in found}
    return report.document(rows, command, {"foreign_cores": foreign, "ceiling": round(ceiling(arrivals), 4)})


def case_of(options: argparse.Namespace) -> str:
    """What was replayed, for rows."""
    return f"{options.trace.name.partition('.')[0]}, {options.prefill}+{options.decode} workers, rate {options.rate:g}"


def rows_of(measured: Measured, model: str, case: str) -> list[report.Row]:
    """A replay's figures as rows."""
    ttft = report.figure(measured.ttft_seconds or [float("inf")])
    mean = round(measured.mean_ttft, 4)
    figures = {
        "share_of_ceiling": (round(measured.share_of_ceiling, 4),) * 2,
        "ttft_seconds": ttft,
        "mean_ttft_seconds": (mean, mean),
        "failed_requests": (measured.failed,) * 2,
        "late_share": (round(measured.late_share, 4),) * 2,
    }
    return [
        report.Row("routing", measured.gateway.label, model, "", case, 0, 0, name, *figure, measured.requests) for name, figure in figures.items()
    ]


def table(found: Sequence[Measured]) -> str:
    """One line a gateway, in Markdown."""
    lines = ["| | share of ceiling | TTFT mean, s | median | p99 | failed | wrong |", "|---" * 7 + "|"]
    for one in found:
        median, p99 = report.figure(one.ttft_seconds or [float("inf")])
        cells = (f"{one.share_of_ceiling:.3f}", f"{one.mean_ttft:.3f}", f"{median:.3f}", f"{p99:.3f}", str(one.failed), str(one.wrong))
        lines.append(f"| {one.gateway.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(found: Sequence[Measured]) -> list[str]:
    """Each of our gateways against the goals: the ceiling, and every other gateway's mean and p99."""
    said = []
    for ours in (one for one in found if one.gateway.system == OURS and not one.gateway.policy):
        missed = "" if ours.share_of_ceiling >= SHARE_OF_CEILING_MIN else f", MISSED: at least {SHARE_OF_CEILING_MIN}"
        said.append(f"{ours.gateway.label}: share of ceiling {ours.share_of_ceiling:.3f}{missed}")
        for other in (one for one in found if one is not ours):
            for name, mine, theirs in (("mean TTFT", ours.mean_ttft, other.mean_ttft), ("p99 TTFT", ours.p99_ttft, other.p99_ttft)):
                missed = ", MISSED: below 1" if mine >= theirs else ""
                said.append(f"{ours.gateway.label}, {name} / {other.gateway.label}: {mine / theirs:.2f}{missed}")
    return said


def _measure(gateway: Gateway, arrivals: Sequence[Arrival], profile: Profile, options: argparse.Namespace) -> Measured:
    plan = SimPlan(options.prefill, options.decode, options.speed, options.profile, options.region_gb)
    with sim_cluster(plan, options.logs) as cluster, running(gateway, cluster, options.logs) as gate:
        before = quiet.read()
        served = replay(gate.url, profile.model, arrivals, Pace(options.rate, options.speed))
        foreign = quiet.foreign_cores(before, quiet.read())
        computed = cluster.total("headstart_sim_computed_prompt_tokens_total")
        late = cluster.total("headstart_sim_late_seconds_total") / max(cluster.total("headstart_sim_step_seconds_total"), 1e-9)
    whole = [one for one in served if not one.failure]
    for failure in sorted({one.failure for one in served if one.failure})[:3]:
        _say(f"{gateway.label}: a request failed: {failure}")
    return Measured(
        gateway=gateway,
        requests=len(served),
        failed=len(served) - len(whole),
        wrong=_wrong(whole, profile, options.check),
        share_of_ceiling=(1 - computed / total_tokens(arrivals)) / max(ceiling(arrivals), 1e-9),
        ttft_seconds=[one.ttft_seconds * options.speed for one in whole],
        late_share=late,
        foreign_cores=foreign,
    )


def _wrong(whole: Sequence[Served], profile: Profile, check: int) -> int:
    """How many of ``check`` answers, drawn at random, are not the oracle's."""
    drawn = random.Random(_CHECKED_SEED).sample(list(whole), min(check, len(whole)))
    return sum(one.token_ids != expected_tokens(profile.model, profile.layers, one.arrival.prompt(), one.arrival.output_tokens) for one in drawn)


def _say_measured(one: Measured) -> None:
    _say(
        f"{one.gateway.label}: share of ceiling {one.share_of_ceiling:.3f}, mean TTFT {one.mean_ttft:.3f} s, {one.failed} failed, {one.wrong} wrong; "
        f"steps took {one.late_share:.1%} longer than the profile says, others kept {one.foreign_cores:.2f} cores busy"
    )


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
