"""What the tiers benchmark's figures are held against: the host's limit in the same run, and LMCache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.bench.report import Row
from deploy.bench.tier_values import GET, PUT

OURS, UNCHECKED, LMCACHE = "headstart", "headstart, unchecked", "lmcache"
FIO, REDIS_BENCHMARK, ZEROMQ, ZEROMQ_OWN_MEMORY = "fio", "redis-benchmark", "zeromq", "zeromq, own memory"
SHARES_MIN = {FIO: 0.9, REDIS_BENCHMARK: 0.8, ZEROMQ: 0.8, ZEROMQ_OWN_MEMORY: 0.8, LMCACHE: 1.0}
"""What share of a system's speed ours has to reach. Others are shown and bind nobody."""


@dataclass(frozen=True)
class Outcome:
    """Our speed as a share of another's, and the least that it may be. ``case``: tier and size; ``metric``: put or get."""

    case: str
    metric: str
    system: str
    share: float
    share_min: float

    @property
    def reached(self) -> bool:
        """Whether the goal is met."""
        return self.share >= self.share_min


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """Every goal for which there are rows. Where a limit was measured with several numbers of connections, its best one counts."""
    best = _best(rows)
    found = []
    for (system, case, metric), value in best.items():
        ours = best.get((OURS, case, metric))
        if system in SHARES_MIN and ours and value:
            found.append(Outcome(case, metric, system, ours / value, SHARES_MIN[system]))
    return sorted(found, key=lambda outcome: (outcome.case, outcome.metric, outcome.system))


def table(rows: Sequence[Row]) -> str:
    """Medians in GB/s, best number of connections, by case and direction (rows) and system (columns), in Markdown."""
    best = _best(rows)
    systems = list(dict.fromkeys(row.system for row in rows))
    lines = ["| GB/s | " + " | ".join(systems) + " |", "|---" * (len(systems) + 1) + "|"]
    for case in dict.fromkeys(row.case for row in rows):
        for metric, direction in ((PUT, "put"), (GET, "get")):
            cells = [f"{best[system, case, metric] / 1e9:.2f}" if (system, case, metric) in best else "-" for system in systems]
            if set(cells) != {"-"}:
                lines.append(f"| {case}, {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        at = (row.system, row.case, row.metric)
        best[at] = max(row.median, best.get(at, 0.0))
    return best
