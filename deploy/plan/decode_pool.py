"""How many decode workers generate the answers, and what bounds each of them. Pure; times are seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from cachebus.errors import HeadstartError
from deploy.plan.queueing import Queue
from deploy.plan.rates import Rates
from deploy.plan.service import Service
from deploy.plan.traffic import Requests, Traffic

_BUSY_MAX = 0.9
"""Share of a decode worker's time that may go into prompts; the rest is for tokens."""
_CROWD_QUANTILE = NormalDist().inv_cdf(0.99)
"""Memory and places suffice for 99% of the time. Requests that are there at once are taken as Poisson, which a normal law comes near enough to."""
_STEPS = 60
_WORKERS_MAX = 1 << 20


@dataclass(frozen=True)
class DecodePool:
    """``limits``: workers that each limit alone needs; at most ``room_share`` of a worker's KV room is taken; ``batch`` requests generate on each."""

    workers: int
    limits: dict[str, int]
    batch: float
    token_seconds: float
    room_share: float
    queue: Queue

    @property
    def bound_by(self) -> str:
        """The limit that needs most workers."""
        return max(self.limits, key=lambda name: self.limits[name])


class DecodeLoad:
    """What all decode workers have to do together."""

    def __init__(self, traffic: Traffic, requests: Requests, service: Service, rates: Rates) -> None:
        alone = np.where(service.by_prefill, 0.0, 1.0)
        self._rates, self._rate = rates, traffic.rate
        self._output = requests.mean(requests.output)
        self._context = requests.mean(requests.output * (requests.prompt + requests.output / 2)) / self._output
        self._held = requests.mean(requests.prompt + requests.output)
        self._ready = requests.mean(service.pull + alone * service.compute)
        self._computes = requests.mean(alone)
        mean = requests.mean(alone * service.compute) / max(self._computes, 1e-12)
        spread = requests.mean(alone * service.compute**2) / max(self._computes, 1e-12) - mean**2
        self._compute, self._variation = mean, max(0.0, spread) / max(mean**2, 1e-24)
        self._burstiness = traffic.burstiness

    def fastest_token(self) -> float:
        """Seconds of a token of a request that has a worker to itself."""
        return self._rates.step(1.0, self._context)

    def pool(self, workers: int, limits: dict[str, int]) -> DecodePool:
        """A pool of that size."""
        queue = Queue(workers, self._rate * self._computes, self._compute, self._variation, self._burstiness)
        batch, token = self._generating(workers)
        return DecodePool(workers, limits, batch, token, self._held_tokens(workers) / self._rates.room_tokens, queue)

    def limits(self, token_seconds_max: float) -> dict[str, int]:
        """Workers that each limit alone needs. Raises HeadstartError where no number of them is enough."""
        most = self._rates.sequences_max
        tests: dict[str, Callable[[int], bool]] = {
            "compute": lambda workers: math.isfinite(self._generating(workers)[0]),
            "time between tokens": lambda workers: self._generating(workers)[1] <= token_seconds_max,
            "KV in HBM": lambda workers: self._held_tokens(workers) <= self._rates.room_tokens,
            "requests at once": lambda workers: _crowd(self._present(workers)) <= most,
        }
        return {name: _fewest(name, enough) for name, enough in tests.items()}

    def _generating(self, workers: int) -> tuple[float, float]:
        """Requests that generate on a worker, and seconds from token to token; infinite where it can't keep up."""
        busy = self._rate * self._computes * self._compute / workers
        if busy >= _BUSY_MAX:
            return math.inf, math.inf
        wanted, free, most = self._rate * self._output / workers, 1 - busy, float(self._rates.sequences_max)

        def made(batch: float) -> float:
            return batch / self._rates.step(max(batch, 1.0), self._context) * free

        if made(most) < wanted:
            return math.inf, math.inf
        low, high = 0.0, most
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if made(middle) < wanted else (low, middle)
        return high, self._rates.step(max(high, 1.0), self._context) / free

    def _present(self, workers: int) -> float:
        """Requests that hold KV on a worker, those included whose prompt is being pulled or computed."""
        _, token = self._generating(workers)
        return self._rate / workers * (self._ready + self._output * token)

    def _held_tokens(self, workers: int) -> float:
        return _crowd(self._present(workers)) * self._held


def _crowd(mean: float) -> float:
    """How many are there at once, but for 1% of the time; at least the one for whom the worker is there."""
    return max(1.0, mean + _CROWD_QUANTILE * math.sqrt(mean)) if math.isfinite(mean) else math.inf


def _fewest(name: str, enough: Callable[[int], bool]) -> int:
    high = 1
    while not enough(high):
        high *= 2
        if high > _WORKERS_MAX:
            raise HeadstartError(f"no number of decode workers is enough ({name}): give a worker more GPUs (--tp) or allow slower tokens (--itl-ms)")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
