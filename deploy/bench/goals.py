"""What the prefix benchmark's figures are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.bench.report import Row

PLAIN, OURS, LMCACHE, OFFLOADING = "vllm", "headstart", "lmcache-server", "vllm-offloading"
OURS_HBM = "headstart-hbm"
"""Ours with ``cache.handover: hbm``."""
CONTROL = "control"
"""Plain vLLM with as much KV in its own memory as it takes, where the others are held to a budget."""
COLD, OWN_HIT, HIT, RESTART = "cold", "hbm", "dram", "restart"
COLD_BY_DECODE, COLD_BY_BOTH = "cold, decode alone", "cold, prefill+decode"


@dataclass(frozen=True)
class Outcome:
    """A figure of ours as a multiple of what it is compared with, and the most that it may be."""

    goal: str
    tokens: int
    ratio: float
    ratio_max: float

    @property
    def reached(self) -> bool:
        """Whether the goal is met."""
        return self.ratio <= self.ratio_max


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """Every goal at every prompt length for which there are rows enough."""
    found = {(row.system, row.case, row.tokens): row.median for row in rows}
    result: list[Outcome] = []
    for tokens in sorted({row.tokens for row in rows}):
        cold, own_hit = found.get((PLAIN, COLD, tokens)), found.get((PLAIN, OWN_HIT, tokens))
        hit, theirs = found.get((OURS, HIT, tokens)), found.get((LMCACHE, HIT, tokens))
        both = found.get((OURS, COLD_BY_BOTH, tokens))
        ours = [found[OURS, case, tokens] for case in (COLD, COLD_BY_DECODE, COLD_BY_BOTH) if (OURS, case, tokens) in found]
        if hit and own_hit:
            result.append(Outcome("hit on another worker / vLLM's own hit", tokens, hit / own_hit, 1.25))
        if hit and theirs:
            result.append(Outcome("hit on another worker / LMCache's hit", tokens, hit / theirs, 1.0))
        if ours and cold:
            result.append(Outcome("cold by the best route / vLLM's cold", tokens, min(ours) / cold, 1.05))
        if both and cold and own_hit:
            result.append(Outcome("cold through prefill and decode / vLLM's cold + hit", tokens, both / (cold + own_hit), 1.0))
    return sorted(result, key=lambda outcome: outcome.goal)
