"""The smallest prefill and decode pools that keep an objective. Pure; times are seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cachebus.errors import HeadstartError
from deploy.plan.decode_pool import DecodeLoad, DecodePool
from deploy.plan.figures import Floats
from deploy.plan.first_token import FirstToken, Queues, first_token
from deploy.plan.queueing import Queue
from deploy.plan.rates import Rates
from deploy.plan.service import ROUTER_SECONDS, Service
from deploy.plan.traffic import Requests, Traffic

_SPARE_DECODE = 64
"""Decode workers more than the limits need that are tried for the sake of first tokens."""
_SERVERS_MAX = 1 << 20


@dataclass(frozen=True)
class Objective:
    """What is to be kept: mean and 99th percentile of the time to first token, infinite where it is free; the mean time between tokens."""

    ttft_mean: float
    ttft_p99: float
    token_seconds: float

    def kept(self, found: FirstToken) -> bool:
        """Whether first tokens come in time."""
        return found.mean <= self.ttft_mean and found.p99 <= self.ttft_p99


class Unreachable(HeadstartError):
    """No number of workers keeps the objective. ``best``: what a pool that never makes anybody wait reaches."""

    def __init__(self, best: FirstToken, objective: Objective) -> None:
        self.best = best
        wanted = [f"{name} {limit:.3g} s" for name, limit in (("mean", objective.ttft_mean), ("p99", objective.ttft_p99)) if math.isfinite(limit)]
        super().__init__(
            f"no number of workers reaches a time to first token of {' and '.join(wanted)}: without any waiting it is "
            f"mean {best.mean:.3g} s, p99 {best.p99:.3g} s; give a worker more GPUs (--tp), or allow more"
        )


@dataclass(frozen=True)
class Pools:
    """Both pools and what they reach, for all requests, those that had to be computed from nothing, and those that found something."""

    prefill: Queue
    decode: DecodePool
    every: FirstToken
    cold: FirstToken
    hit: FirstToken

    @property
    def workers(self) -> int:
        """Of both roles."""
        return self.prefill.servers + self.decode.workers


class Sizing:
    """One traffic in front of one kind of engine, whose requests are served as ``service`` says."""

    def __init__(self, traffic: Traffic, requests: Requests, service: Service, rates: Rates) -> None:
        self._requests, self._service, self._rates, self._traffic = requests, service, rates, traffic
        self._there = np.where(service.by_prefill, 1.0, 0.0)
        self._share = requests.mean(self._there)
        self._mean = requests.mean(self._there * service.compute) / max(self._share, 1e-12)
        spread = requests.mean(self._there * service.compute**2) / max(self._share, 1e-12) - self._mean**2
        self._variation = max(0.0, spread) / max(self._mean**2, 1e-24)
        self._decode = DecodeLoad(traffic, requests, service, rates)

    def smallest(self, objective: Objective) -> Pools:
        """The fewest decode workers that their limits and first tokens allow, then the fewest prefill workers. Raises Unreachable, HeadstartError."""
        if self._decode.fastest_token() > objective.token_seconds:
            raise HeadstartError(
                f"--itl-ms {objective.token_seconds * 1e3:g}: a token takes {self._decode.fastest_token() * 1e3:.1f} ms "
                "even for one request alone; give a worker more GPUs (--tp), or allow more"
            )
        limits = self._decode.limits(objective.token_seconds)
        least = max(limits.values())
        for spare in range(_SPARE_DECODE):
            decode = self._decode.pool(least + spare, limits if not spare else {**limits, "first token": least + spare})
            best = self._reached(None, decode)
            if objective.kept(best.every):
                return self._with_prefill(objective, decode)
        raise Unreachable(best.every, objective)

    def without_waiting(self) -> FirstToken:
        """First tokens of a request that comes alone."""
        return self._first_token(np.ones_like(self._there), 0.0, ())

    def sized(self, prefill: int, decode: int) -> Pools:
        """Pools of given sizes, whatever they reach."""
        return self._reached(self._queue(prefill), self._decode.pool(decode, {}))

    def _with_prefill(self, objective: Objective, decode: DecodePool) -> Pools:
        if not self._share:
            return self._reached(self._queue(0), decode)
        low = math.floor(self._traffic.rate * self._share * self._mean)
        high = low + 1
        while not objective.kept(self._reached(self._queue(high), decode).every):
            low, high = high, high + max(1, high - low) * 2
            if high > _SERVERS_MAX:
                raise Unreachable(self._reached(None, decode).every, objective)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if objective.kept(self._reached(self._queue(middle), decode).every) else (middle, high)
        return self._reached(self._queue(high), decode)

    def _queue(self, servers: int) -> Queue:
        return Queue(servers, self._traffic.rate * self._share, self._mean, self._variation, self._traffic.burstiness)

    def _reached(self, prefill: Queue | None, decode: DecodePool) -> Pools:
        """Without a prefill queue: as if nobody waited there."""
        queue = prefill or Queue(1, 0.0, 0.0)
        queues: Queues = ((decode.queue, 1 - self._there),)
        if queue.rate:
            queues = ((queue, self._there), *queues)
        found = np.where(sum(self._service.taken.values(), np.zeros_like(self._there)) > 0, 1.0, 0.0)
        kinds = (np.ones_like(found), 1 - found, found)
        return Pools(queue, decode, *(self._first_token(some, decode.token_seconds, queues, decode.queue.mean_wait) for some in kinds))

    def _first_token(self, kinds: Floats, token_seconds: float, queues: Queues, decode_wait: float = 0.0) -> FirstToken:
        handover = self._rates.handover(self._requests.prompt) + decode_wait
        # A decode worker's step is under way when a request comes to it, and again when its pull ends: half a step each on average.
        alone = ROUTER_SECONDS + self._service.own + token_seconds + np.where(self._service.by_prefill, handover, 0.0)
        return first_token(self._requests.share * kinds, alone, queues)
