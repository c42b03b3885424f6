"""Which way a request goes in the simulation: the one that costs least by the router's own costs. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cachebus.messages import Worker
from deploy.sim.profile import Profile, at
from router.costs import Prompt, Rates, Way, after_prefill, decode_alone, prefill_leg
from router.fleet import Fleet

_LEG_SECONDS = 0.005


def rates_of(profile: Profile) -> Rates:
    """What engines of a profile would report of themselves, once they have learnt it."""
    tokens = profile.max_num_batched_tokens
    return Rates(
        1 / at(profile.prefill_tokens_per_second, tokens) + profile.step_ms / 1e3 / tokens,
        profile.attention_ns_per_pair / 1e9,
        {"dram": 1 / (profile.pull_gb_per_second * 1e9)},
    )


class CostRouter:
    """As ``router.policies.ByCost``, over lists of workers instead of a replica of the bus; all have the same rates."""

    def __init__(self, fleet: Fleet, rates: Rates) -> None:
        self._fleet, self._rates = fleet, rates

    def way(self, prompt: Prompt, prefill: Sequence[Worker], decode: Sequence[Worker], now: float) -> Way:
        """The cheapest way; those that cost the same take the worker with fewer requests. There has to be a decode worker."""
        loads = {worker.worker: self._fleet.load(worker.worker, now) for worker in (*prefill, *decode)}
        rates = self._rates
        decoding = self._fleet.pool("decode", [loads[worker.worker] for worker in decode], now)
        found = [decode_alone(prompt, worker, rates, loads[worker.worker], decoding) for worker in decode]
        if prefill:
            pool = self._fleet.pool("prefill", [loads[worker.worker] for worker in prefill], now)
            legs = [prefill_leg(prompt, worker, rates, loads[worker.worker], pool, _LEG_SECONDS) for worker in prefill]
            best = min(legs, key=lambda way: (way.total, self._fleet.requests(way.prefill)))
            found += [after_prefill(prompt, best, worker, rates, loads[worker.worker], decoding, _LEG_SECONDS) for worker in decode]
        return min(found, key=lambda way: (way.total, self._fleet.requests(way.decode)))
