"""Waiting lines, against closed forms and against a simulation of the queue itself."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Callable

import numpy as np
import pytest

from deploy.plan.queueing import Queue, erlang_c, quantile


def simulated_waits(queue: Queue, draw: Callable[[random.Random], float], count: int = 200_000) -> list[float]:
    """First come, first served, Poisson arrivals; service times by ``draw``."""
    chance, now = random.Random(7), 0.0
    free = [0.0] * queue.servers
    waits = []
    for _ in range(count):
        now += chance.expovariate(queue.rate)
        begins = max(now, heapq.heappop(free))
        waits.append(begins - now)
        heapq.heappush(free, begins + draw(chance))
    return waits


def p99(queue: Queue) -> float:
    return quantile(lambda seconds: float(queue.waits_longer(np.array([seconds]))[0]), 0.99)


def test_erlang_c_is_known_for_one_and_two_servers() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    # C(2, a) = a^2 / (2 + a)
    assert erlang_c(2, 1.4) == pytest.approx(1.96 / 3.4)
    assert erlang_c(3, 3.0) == 1
    assert erlang_c(5, 0.0) == 0


def test_one_server_waits_as_pollaczek_and_khinchine_say() -> None:
    fixed = Queue(1, 0.8, 1.0, variation=0.0)
    assert fixed.mean_wait == pytest.approx(0.8 / (2 * 0.2))
    assert Queue(1, 0.8, 1.0, variation=1.0).mean_wait == pytest.approx(0.8 / 0.2)
    assert Queue(1, 0.8, 1.0, variation=1.0, burstiness=3.0).mean_wait == pytest.approx(2 * 0.8 / 0.2)


@pytest.mark.parametrize(
    ("variation", "draw"),
    [
        (0.0, lambda chance: 1.0),
        (1.0, lambda chance: chance.expovariate(1.0)),
        # Half of the prompts take a twentieth of the others.
        (0.8186, lambda chance: chance.choice((0.0952381, 1.9047619))),
    ],
)
@pytest.mark.parametrize(("servers", "utilisation"), [(1, 0.7), (3, 0.8), (8, 0.8)])
def test_several_servers_wait_as_simulated(variation: float, draw: Callable[[random.Random], float], servers: int, utilisation: float) -> None:
    queue = Queue(servers, servers * utilisation, 1.0, variation)
    waits = sorted(simulated_waits(queue, draw))
    assert queue.mean_wait == pytest.approx(statistics.fmean(waits), rel=0.12)
    assert p99(queue) == pytest.approx(waits[int(0.99 * len(waits))], rel=0.2)
    # The control: another variation is told from this one.
    other = Queue(servers, queue.rate, 1.0, variation + 1)
    assert other.mean_wait != pytest.approx(statistics.fmean(waits), rel=0.12)


def test_too_much_is_infinite_and_nothing_is_nothing() -> None:
    assert Queue(2, 2.0, 1.0).mean_wait == math.inf
    assert Queue(0, 2.0, 1.0).mean_wait == math.inf
    assert Queue(0, 0.0, 1.0).mean_wait == 0
    assert list(Queue(2, 2.0, 1.0).waits_longer(np.array([0.0, 1e9]))) == [1, 1]
    assert list(Queue(2, 0.0, 1.0).waits_longer(np.array([-1.0, 0.0, 1.0]))) == [1, 0, 0]


def test_a_quantile_is_where_so_many_exceed_it() -> None:
    assert quantile(lambda value: math.exp(-value), 0.99) == pytest.approx(math.log(100))
    assert quantile(lambda value: 0.001, 0.99) == 0
