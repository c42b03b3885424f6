"""Puts a plan together: tiers, pools and money, with the cache and without, and whether the cache pays. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deploy.plan import cost
from deploy.plan.first_token import FirstToken
from deploy.plan.pools import Objective, Pools, Sizing, Unreachable
from deploy.plan.rates import Rates
from deploy.plan.service import Service
from deploy.plan.tiers import Choice, Chosen, Prices, Tier
from deploy.plan.traffic import Requests, Traffic

_P99_FACTOR = 2.0
"""The objective where none is given: so many times the p99 that nobody's waiting and no cache would give."""
_ROUNDS = 4
_FASTER_MIN = 0.1


@dataclass(frozen=True)
class Wanted:
    """What is planned for. ``tiers`` from the nearest on; ``objective`` may leave both first token times free, then one is made."""

    traffic: Traffic
    rates: Rates
    gpu_price: float
    gpus_per_node: int
    tiers: tuple[Tier, ...]
    objective: Objective
    prefill_tokens_min: int


@dataclass(frozen=True)
class Side:
    """The cluster with the cache, or without. ``one_less``: first tokens with one prefill worker less.

    ``worker_seconds``: up to the first token, a request's mean, without waiting; dollars are an hour's, or a million tokens'.
    """

    pools: Pools
    one_less: FirstToken
    gpus: int
    nodes: int
    worker_seconds: float
    gpu_dollars: float
    tier_dollars: float
    million_tokens: float

    @property
    def dollars(self) -> float:
        """An hour of all."""
        return self.gpu_dollars + self.tier_dollars


@dataclass(frozen=True)
class Plan:
    """The outcome. A side is None where no number of workers keeps the objective, and ``unreachable`` says why."""

    objective: Objective
    tiers: Sequence[Chosen]
    hit_share: float
    with_cache: Side | None
    without: Side | None
    unreachable: str
    thousand_prompts: tuple[float, float]
    """Dollars for the GPU time that 1,000 prompts take: without the cache, and with it"""
    verdict: str
    pays: bool


def plan(wanted: Wanted) -> Plan:
    """Raises HeadstartError where an answer's tokens can't come fast enough whatever the number of workers."""
    cold = Choice(wanted.traffic, wanted.rates, Prices(wanted.gpu_price, 1), wanted.prefill_tokens_min).served({})[:2]
    objective = wanted.objective
    if math.isinf(objective.ttft_mean) and math.isinf(objective.ttft_p99):
        alone = Sizing(wanted.traffic, *cold, wanted.rates).without_waiting()
        objective = replace(objective, ttft_p99=_P99_FACTOR * alone.p99)
    without, unreachable = _side(wanted, objective, *cold, chosen=())
    nodes, chosen, cached = 1, list[Chosen](), cold
    with_cache, failed = without, unreachable
    for _ in range(_ROUNDS):
        choice = Choice(wanted.traffic, wanted.rates, Prices(wanted.gpu_price, nodes), wanted.prefill_tokens_min)
        chosen = choice.choose(wanted.tiers)
        cached = choice.served({one.tier: one.gigabytes for one in chosen if one.gigabytes})[:2]
        with_cache, failed = _side(wanted, objective, *cached, chosen=chosen)
        if with_cache is None or with_cache.nodes == nodes:
            break
        nodes = with_cache.nodes
    requests, served = cached
    hit_share = requests.mean(sum(served.taken.values(), np.zeros_like(requests.prompt))) / requests.mean(requests.prompt)
    pays, verdict = _verdict(wanted, hit_share, with_cache, without)
    thousand = _thousand(wanted, *cold), _thousand(wanted, requests, served)
    return Plan(objective, chosen, hit_share, with_cache, without, failed or unreachable, thousand, verdict, pays)


def _side(wanted: Wanted, objective: Objective, requests: Requests, served: Service, chosen: Sequence[Chosen]) -> tuple[Side | None, str]:
    """A cluster for these requests, or why there is none."""
    try:
        sizing = Sizing(wanted.traffic, requests, served, wanted.rates)
        pools = sizing.smallest(objective)
    except Unreachable as error:
        return None, str(error)
    gpus = pools.workers * wanted.rates.gpus
    nodes = math.ceil(gpus / wanted.gpus_per_node)
    prices = Prices(wanted.gpu_price, nodes)
    tiers = sum(prices.of(one.tier, one.gigabytes) for one in chosen)
    tokens = wanted.traffic.rate * requests.mean(requests.prompt + requests.output)
    return (
        Side(
            pools=pools,
            one_less=sizing.sized(max(0, pools.prefill.servers - 1), pools.decode.workers).every,
            gpus=gpus,
            nodes=nodes,
            worker_seconds=requests.mean(served.own),
            gpu_dollars=gpus * wanted.gpu_price,
            tier_dollars=tiers,
            million_tokens=cost.per_million_tokens(gpus * wanted.gpu_price + tiers, tokens),
        ),
        "",
    )


def _thousand(wanted: Wanted, requests: Requests, served: Service) -> float:
    return cost.of_gpu_time(cost.REQUESTS, requests.mean(served.own), wanted.gpu_price * wanted.rates.gpus)


def _verdict(wanted: Wanted, hit_share: float, with_cache: Side | None, without: Side | None) -> tuple[bool, str]:
    """Whether the cache pays, and why."""
    if not hit_share:
        return False, f"does not pay: {_why_no_hits(wanted)}"
    if with_cache is None:
        return False, "can't be planned: with the cache, too, no number of workers keeps the objective"
    if without is None:
        return True, "pays: without the cache no number of workers keeps the objective"
    saved = without.dollars - with_cache.dollars
    ahead, behind = with_cache.pools.every.mean, without.pools.every.mean
    times = f"mean time to first token {behind:.3g} s without the cache, {ahead:.3g} s with it"
    if saved > 0:
        return (
            True,
            f"pays: {with_cache.gpus} GPUs instead of {without.gpus}, {cost.shown(saved)} an hour less ({saved / without.dollars:.0%}); {times}",
        )
    if saved == 0 and ahead < (1 - _FASTER_MIN) * behind:
        return True, f"pays in time, not in money: as many GPUs; {times}"
    if saved == 0:
        return False, f"does not pay: as many GPUs, and first tokens come no {_FASTER_MIN:.0%} sooner ({times})"
    return False, f"does not pay: {cost.shown(-saved)} an hour dearer with it; {times}"


def _why_no_hits(wanted: Wanted) -> str:
    ideal = wanted.traffic.requests({"all": math.inf})
    if not ideal.mean(ideal.all_cached):
        return "no prompt begins like another one"
    known = ideal.mean(ideal.all_cached) / ideal.mean((ideal.all_cached > 0).astype(np.float64))
    tokens = np.array([known])
    computed, pulled = float(wanted.rates.compute(np.zeros(1), tokens)[0]), float(wanted.rates.hit(tokens)[0])
    if pulled >= computed:
        return f"to compute the {known:,.0f} tokens that are known takes {computed * 1e3:.3g} ms, to pull them {pulled * 1e3:.3g} ms"
    return "what is known is gone from every tier before it is asked for again, or what it saves is less than the tiers cost"
