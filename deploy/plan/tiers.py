"""Which tiers, and how large: each as large as it still pays. Pure.

A tier's worth is the GPU time that its hits save, at the GPUs' price; from that its own price is taken. Tiers are chosen from the nearest to the
farthest, and of sizes that are worth about the same the smallest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deploy.plan.rates import Rates
from deploy.plan.service import Service, service
from deploy.plan.traffic import Requests, Traffic, grid

_GIGA = 1e9
_ALIKE = 0.0005
"""A smaller tier is taken where it loses less than this share of the best one's worth."""
_WORTH_MIN = 0.002
"""Nor is one taken that saves less than this share of what the GPUs cost for prompts without a cache."""
_BUSY_MAX = 0.8
"""A tier that would have to read for more of its time than this is not relied on."""


@dataclass(frozen=True)
class Tier:
    """What a tier may be: gigabytes at most (of a node; Redis: of the cluster), dollars a gigabyte and hour, bytes a second; 0 where PCIe decides."""

    name: str
    gigabytes_max: float
    price: float
    bandwidth: float = 0.0
    shared: bool = False


@dataclass(frozen=True)
class Chosen:
    """A tier of a size, of a node or of the cluster as ``Tier`` says. ``hit_share``: of all prompt tokens; ``why`` it is not larger, or not there."""

    tier: Tier
    gigabytes: float
    hit_share: float
    busy: float
    why: str


@dataclass(frozen=True)
class Prices:
    """``gpu``: dollars an hour of one; ``nodes``: how many machines pay for what a node has."""

    gpu: float
    nodes: int

    def of(self, tier: Tier, gigabytes: float) -> float:
        """An hour of a tier."""
        return gigabytes * tier.price * (1 if tier.shared else self.nodes)


class Choice:
    """Chooses for one traffic and one kind of engine."""

    def __init__(self, traffic: Traffic, rates: Rates, prices: Prices, prefill_tokens_min: int) -> None:
        self._traffic, self._rates, self._prices, self._prefill_min = traffic, rates, prices, prefill_tokens_min

    def served(self, sizes: Mapping[Tier, float]) -> tuple[Requests, Service, dict[str, float]]:
        """Requests before tiers of so many gigabytes, how they are served, and how busy each tier is with reading."""
        tokens = {tier.name: size * _GIGA / self._rates.kv_bytes_per_token for tier, size in sizes.items()}
        requests = self._traffic.requests(tokens)
        busy = {tier.name: self._busy(tier, requests) for tier in sizes}
        # Reads share a tier: on average each gets what the others leave.
        bandwidths = {tier.name: tier.bandwidth * (1 - min(busy[tier.name], 0.99)) for tier in sizes if tier.bandwidth}
        return requests, service(requests, self._rates, bandwidths, self._prefill_min), busy

    def dollars(self, requests: Requests, served: Service) -> float:
        """An hour of the GPU time that computing prompts takes; while one is pulled, others have the GPU."""
        return self._traffic.rate * requests.mean(served.compute) * self._rates.gpus * self._prices.gpu

    def choose(self, tiers: tuple[Tier, ...]) -> list[Chosen]:
        """A verdict on each tier, in their order."""
        sizes: dict[Tier, float] = {}
        base = spent = self.dollars(*self.served({})[:2])
        chosen = []
        for tier in tiers:
            best = self._best(tier, sizes, spent, base)
            if best.gigabytes:
                sizes[tier] = best.gigabytes
                spent = self.dollars(*self.served(sizes)[:2])
            chosen.append(best)
        return chosen

    def _best(self, tier: Tier, sizes: Mapping[Tier, float], spent: float, base: float) -> Chosen:
        worth, refused, found, taken = {}, "", False, False
        # A tier below holds what those above it do, too: one that is no larger adds nothing.
        least = max(sizes.values(), default=0.0)
        for size in grid(tier.gigabytes_max):
            requests, served, busy = self.served({**sizes, tier: size})
            found = found or requests.mean(requests.cached[tier.name]) > 0
            taken = taken or requests.mean(served.taken[tier.name]) > 0
            if busy[tier.name] > _BUSY_MAX:
                refused = f"it would have to read for {busy[tier.name]:.0%} of the time"
            elif size > least:
                worth[size] = spent - self.dollars(requests, served) - self._prices.of(tier, size)
        most = max(worth.values(), default=0.0)
        if most <= _WORTH_MIN * base:
            return Chosen(tier, 0.0, 0.0, 0.0, refused or _why_not(tier, found, taken))
        size = min(size for size, value in worth.items() if value >= most - _ALIKE * abs(most))
        requests, served, busy = self.served({**sizes, tier: size})
        share = requests.mean(served.taken[tier.name]) / requests.mean(requests.prompt)
        why = "all there is" if size == tier.gigabytes_max else "more would save less than it costs, or nothing"
        return Chosen(tier, size, share, busy[tier.name], why)

    def _busy(self, tier: Tier, requests: Requests) -> float:
        if not tier.bandwidth:
            return 0.0
        readers = 1 if tier.shared else self._prices.nodes
        return self._traffic.rate * requests.mean(requests.cached[tier.name]) * self._rates.kv_bytes_per_token / (tier.bandwidth * readers)


def _why_not(tier: Tier, found: bool, taken: bool) -> str:
    if tier.gigabytes_max <= 0:
        return "nothing is given for it"
    if not found:
        return "nothing is asked for that it would have, and those above it have not"
    return "its hits would save no more than it costs" if taken else "what it has is sooner computed than pulled"
