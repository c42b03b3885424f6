"""The smallest pools: each limit binds where it should, and one worker fewer misses the objective."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cachebus.errors import HeadstartError
from deploy.plan.decode_pool import DecodeLoad
from deploy.plan.first_token import first_token
from deploy.plan.gpus import GPUS
from deploy.plan.pools import Objective, Sizing, Unreachable
from deploy.plan.queueing import Queue
from deploy.plan.rates import Modelled
from deploy.plan.service import ROUTER_SECONDS, service
from deploy.plan.shape import shape_of
from deploy.plan.traffic import Shared

ENGINE = Modelled(shape_of("llama-3.1-8b", 2, 2), GPUS["h200"])


def sizing(traffic: Shared, prefill_min: int = 1024) -> Sizing:
    requests = traffic.requests({"dram": math.inf})
    return Sizing(traffic, requests, service(requests, ENGINE, {}, prefill_min), ENGINE)


def decode_load(traffic: Shared) -> DecodeLoad:
    requests = traffic.requests({"dram": math.inf})
    return DecodeLoad(traffic, requests, service(requests, ENGINE, {}, 1024), ENGINE)


@pytest.mark.parametrize("reuse", [0.0, 0.6])
@pytest.mark.parametrize("objective", [Objective(1.6, math.inf, 0.05), Objective(math.inf, 2.5, 0.05)])
def test_one_prefill_worker_fewer_misses_the_objective(reuse: float, objective: Objective) -> None:
    sized = sizing(Shared(6.0, 32_768, 200, reuse, 10, 32_000))
    found = sized.smallest(objective)
    assert objective.kept(found.every)
    assert found.prefill.servers > 1
    assert not objective.kept(sized.sized(found.prefill.servers - 1, found.decode.workers).every)


def test_reuse_takes_prefill_workers_and_time() -> None:
    cold, cached = (sizing(Shared(6.0, 32_768, 200, reuse, 10, 32_000)).smallest(Objective(math.inf, 4.0, 0.05)) for reuse in (0.0, 0.8))
    assert cached.prefill.servers < 0.5 * cold.prefill.servers
    assert cached.every.mean < 0.5 * cold.every.mean
    assert math.isnan(cold.hit.mean)
    # Pull, 768 tokens computed, half a decode step twice, the router: and at times another one's 768 tokens before them.
    pulled = float(ENGINE.hit(np.array([32_000.0]))[0] + ENGINE.compute(np.array([32_000.0]), np.array([768.0]))[0])
    own = ROUTER_SECONDS + pulled + cached.decode.token_seconds
    assert cached.hit.mean == pytest.approx(own + cached.decode.queue.mean_wait)


def test_nobody_can_be_faster_than_a_prompt_alone() -> None:
    sized = sizing(Shared(1.0, 131_072, 200, 0.0, 10, 131_072))
    assert sized.without_waiting().mean == pytest.approx(10.33 + 0.042, abs=0.03)
    with pytest.raises(Unreachable, match=r"no number of workers reaches .* p99 5 s: .*p99 10\.4 s"):
        sized.smallest(Objective(math.inf, 5.0, 0.05))
    with pytest.raises(HeadstartError, match="--itl-ms 2: a token takes"):
        sized.smallest(Objective(math.inf, 30.0, 0.002))


@pytest.mark.parametrize(
    ("traffic", "token_seconds", "bound"),
    [
        (Shared(2.0, 120_000, 500, 0.9, 10, 120_000), 1.0, "KV in HBM"),
        (Shared(10.0, 16_000, 600, 0.0, 10, 16_000), 0.012, "time between tokens"),
        (Shared(60.0, 100, 2000, 0.0, 10, 100), 0.1, "requests at once"),
        # 900 tokens are computed by decode itself, nine tenths of its time at most.
        (Shared(400.0, 1000, 2, 0.0, 10, 1000), 0.4, "compute"),
    ],
)
def test_each_limit_binds_where_it_should(traffic: Shared, token_seconds: float, bound: str) -> None:
    load = decode_load(traffic)
    limits = load.limits(token_seconds)
    pool = load.pool(max(limits.values()), limits)
    assert pool.bound_by == bound, limits
    assert pool.workers > 1
    assert pool.room_share <= 1
    assert pool.token_seconds <= token_seconds
    # Where not even the tokens can be made, none of the others holds either.
    assert bound == "compute" or max(count for name, count in limits.items() if name != bound) < pool.workers


def test_as_many_tokens_are_made_as_are_asked_for() -> None:
    traffic = Shared(20.0, 4000, 300, 0.0, 10, 4000)
    pool = decode_load(traffic).pool(4, {})
    assert pool.batch / pool.token_seconds * 4 == pytest.approx(20 * 300, rel=0.01)


def test_first_tokens_of_a_mixture() -> None:
    queue = Queue(1, 0.5, 1.0, variation=1.0)
    there = np.array([1.0, 0.0])
    found = first_token(np.array([0.3, 0.7]), np.array([2.0, 0.1]), ((queue, there),))
    assert found.mean == pytest.approx(0.3 * (2 + 1.0) + 0.7 * 0.1)
    # 0.3 x 0.5 exp(-x / 2) = 0.01
    assert found.p99 == pytest.approx(2 + 2 * math.log(15))
    assert math.isnan(first_token(np.zeros(2), np.ones(2), ()).p99)
    endless = ((Queue(1, 2.0, 1.0), there),)
    assert first_token(np.ones(2), np.ones(2), endless).mean == math.inf
    assert first_token(np.array([0.0, 1.0]), np.ones(2), endless).mean == 1, "nobody comes to that queue"
