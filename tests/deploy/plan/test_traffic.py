"""What a cache of a size has of the requests: Che's approximation against LRU itself, traces against LRU and their ceiling."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from deploy.bench.hit_ceiling import hits_lru
from deploy.bench.trace import Arrival, ceiling
from deploy.plan.traffic import Shared, Traced, grid, popularities


def replayed(traffic: Shared, blocks: int, count: int = 12_000) -> float:
    """The share of requests with a known prefix that LRU of so many blocks has whole; a block is one token here."""
    chance = random.Random(5)
    weights = [rank**-traffic.zipf for rank in range(1, traffic.prefixes + 1)]
    prompts, known = [], []
    fresh = 1 << 40
    for number in range(count):
        prefix = []
        if chance.random() < traffic.reuse:
            place = chance.choices(range(traffic.prefixes), weights)[0]
            prefix = list(range(place * traffic.prefix, (place + 1) * traffic.prefix))
            known.append(number)
        rest = traffic.prompt + traffic.output - len(prefix)
        prompts.append([*prefix, *range(fresh, fresh + rest)])
        fresh += rest
    found = hits_lru(prompts, blocks)
    later = [number for number in known if number > count // 4]
    return sum(found[number] >= traffic.prefix for number in later) / len(later)


@pytest.mark.parametrize("zipf", [0.0, 1.0])
@pytest.mark.parametrize("blocks", [100, 400, 1000, 4000])
def test_che_tells_what_lru_has(zipf: float, blocks: int) -> None:
    traffic = Shared(1.0, prompt=10, output=1, reuse=0.7, prefixes=100, prefix=8, zipf=zipf)
    assert traffic.found_share(blocks) == pytest.approx(replayed(traffic, blocks), abs=0.03)


def test_che_knows_the_ends() -> None:
    traffic = Shared(1.0, prompt=10, output=1, reuse=0.7, prefixes=100, prefix=8)
    assert traffic.found_share(7) == 0, "no room for one prefix"
    assert traffic.found_share(1e12) == pytest.approx(1)
    assert traffic.found_share(math.inf) == 1
    assert Shared(1.0, 10, 1, 0.0, 100, 8).found_share(1e12) == 0
    assert 0 < traffic.found_share(200) < traffic.found_share(400) < 1


@pytest.mark.parametrize(("count", "zipf"), [(1, 1.0), (7, 0.0), (199, 1.3), (50_000, 0.0), (50_000, 0.7), (50_000, 1.2)])
def test_groups_are_as_popular_as_their_members(count: int, zipf: float) -> None:
    weights = np.arange(1, count + 1, dtype=np.float64) ** -zipf
    exact = weights / weights.sum()
    counts, popularity = popularities(count, zipf)
    assert counts.sum() == count
    assert np.dot(counts, popularity) == pytest.approx(1)
    assert popularity[0] == pytest.approx(exact[0], rel=1e-4)
    for requests in (10, 1000, 100_000):
        there = -np.expm1(-requests * exact)
        grouped = -np.expm1(-requests * popularity)
        assert np.dot(counts, grouped) == pytest.approx(there.sum(), rel=1e-3)
        assert np.dot(counts * popularity, grouped) == pytest.approx(np.dot(exact, there), rel=1e-3)


def test_a_billion_prefixes_take_no_longer() -> None:
    assert len(popularities(10**9, 0.0)[0]) == 1
    assert len(popularities(10**9, 1.0)[0]) < 2500
    assert Shared(1.0, 10, 1, 0.7, 10**9, 8, zipf=1.0).found_share(1e9) == pytest.approx(0.8, abs=0.1)


def test_each_tier_has_what_those_above_it_lack() -> None:
    traffic = Shared(1.0, prompt=10, output=1, reuse=0.7, prefixes=100, prefix=8)
    requests = traffic.requests({"dram": 200, "nvme": 100, "redis": 800})
    shares = {name: requests.mean(tokens) / 8 for name, tokens in requests.cached.items()}
    assert shares["dram"] == pytest.approx(0.7 * traffic.found_share(200))
    assert shares["nvme"] == 0, "it is the smaller one"
    assert shares["redis"] == pytest.approx(0.7 * (traffic.found_share(800) - traffic.found_share(200)))
    assert requests.share.sum() == pytest.approx(1)


def arrival(at: float, blocks: tuple[int, ...], tokens: int) -> Arrival:
    return Arrival(at, tokens, 4, blocks)


ARRIVALS = [
    arrival(0, (0, 1, 2), 1500),
    arrival(1, (0, 1, 3), 1300),
    arrival(2, (9, 1), 1024),
    arrival(4, (0, 1, 2), 1500),
]


def test_a_trace_finds_what_came_before_at_the_beginning() -> None:
    traffic = Traced(ARRIVALS, None)
    assert (traffic.rate, traffic.prompt_max, traffic.total_max) == (0.75, 1500, 1504)
    found = traffic.requests({"dram": math.inf})
    # The id 1 behind 9 is not the one behind 0.
    assert list(found.cached["dram"]) == [0, 1024, 0, 1500]
    assert found.mean(found.all_cached) / found.mean(found.prompt) == pytest.approx(ceiling(ARRIVALS))


def test_a_trace_in_front_of_tiers_that_are_too_small() -> None:
    found = Traced(ARRIVALS, 5.0).requests({"dram": 3 * 512, "nvme": 5 * 512})
    assert list(found.cached["dram"]) == [0, 1024, 0, 512], "the end of a prompt goes first"
    assert list(found.cached["dram"] + found.cached["nvme"]) == [0, 1024, 0, 1024]
    assert np.array_equal(found.all_cached, found.cached["dram"] + found.cached["nvme"])


def test_the_grid_ends_where_it_must() -> None:
    assert grid(0) == []
    assert grid(12) == [1, 2, 3, 5, 7, 10, 12]
    assert grid(0.5) == [0.5]
