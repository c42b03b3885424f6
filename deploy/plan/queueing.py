"""Waiting lines: what requests wait before a pool that computes one at a time on each worker. Pure; times are seconds.

Erlang's C is exact where arrivals are Poisson and service times exponential; Allen and Cunneen's approximation scales its wait for other ones.
The wait of those who wait at all is taken as exponential, which it is in the tail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deploy.plan.figures import Floats

_STEPS = 80


def erlang_c(servers: int, load: float) -> float:
    """The share of arrivals that find all servers busy; ``load`` is arrivals times service time. 1 where the load is too much."""
    if load >= servers:
        return 1.0
    blocked = 1.0
    for server in range(1, servers + 1):
        blocked = load * blocked / (server + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


@dataclass(frozen=True)
class Queue:
    """A pool of ``servers``: ``rate`` arrivals a second, service times of mean ``service`` and squared variation ``variation``.

    ``burstiness`` is the squared coefficient of variation of the times between arrivals, 1 where they are Poisson.
    """

    servers: int
    rate: float
    service: float
    variation: float = 0.0
    burstiness: float = 1.0

    @property
    def utilisation(self) -> float:
        """The busy share of the servers' time; 1 and more is too much for them."""
        if not self.servers:
            return math.inf if self.rate else 0.0
        return self.rate * self.service / self.servers

    @property
    def waiting_share(self) -> float:
        """The share of arrivals that wait."""
        return erlang_c(self.servers, self.rate * self.service)

    @property
    def mean_wait(self) -> float:
        """Of all arrivals; infinite where the pool can't keep up."""
        if self.utilisation >= 1:
            return math.inf
        if not self.servers:
            return 0.0
        alone = self.waiting_share * self.service / (self.servers * (1 - self.utilisation))
        return alone * (self.burstiness + self.variation) / 2

    def waits_longer(self, seconds: Floats) -> Floats:
        """The share of arrivals that wait for longer than that; all of them for less than nothing."""
        mean, waiting = self.mean_wait, self.waiting_share
        if math.isinf(mean):
            return np.ones_like(seconds)
        tail = waiting * np.exp(-np.maximum(seconds, 0.0) * waiting / mean) if mean else np.zeros_like(seconds)
        return np.where(seconds < 0, 1.0, tail)


def quantile(exceeds: Callable[[float], float], share: float) -> float:
    """The smallest value that at most ``1 - share`` exceed; ``exceeds`` falls and reaches 0 somewhere."""
    if exceeds(0.0) <= 1 - share:
        return 0.0
    high = 1e-6
    while exceeds(high) > 1 - share:
        high *= 2
    low = high / 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeds(middle) > 1 - share else (low, middle)
    return high
