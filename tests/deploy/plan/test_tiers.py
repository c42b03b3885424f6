"""A tier is as large as it pays, and not there where it does not."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.plan.gpus import GPUS
from deploy.plan.rates import Modelled
from deploy.plan.service import service
from deploy.plan.shape import shape_of
from deploy.plan.tiers import Choice, Chosen, Prices, Tier
from deploy.plan.traffic import Requests, Shared

ENGINE = Modelled(shape_of("llama-3.1-8b", 2, 2), GPUS["h200"])
TRAFFIC = Shared(1.0, 32_768, 200, 0.8, 100, 32_000)
PREFIX_GB = 32_000 * 131_072 / 1e9
DRAM = Tier("dram", 200, 0.0)
NVME = Tier("nvme", 2000, 0.0, 6e9)
REDIS = Tier("redis", 2000, 0.0005, 20e9, shared=True)


def chosen(*tiers: Tier, traffic: Shared = TRAFFIC, nodes: int = 1) -> dict[str, Chosen]:
    return {one.tier.name: one for one in Choice(traffic, ENGINE, Prices(3.8, nodes), 1024).choose(tiers)}


def test_what_dram_can_t_hold_goes_to_nvme() -> None:
    found = chosen(DRAM, NVME)
    assert found["dram"].gigabytes == 200
    assert found["dram"].why == "all there is"
    assert found["nvme"].gigabytes > 100 * PREFIX_GB
    # Prefixes of a request's 0.8 x 32,000 of 32,768 tokens, nearly all of them in one of both.
    assert 0.75 < found["dram"].hit_share + found["nvme"].hit_share < 0.8 * 32_000 / 32_768
    assert found["nvme"].hit_share > 0.3


def test_a_tier_with_a_price_is_smaller_or_not_there() -> None:
    free, cheap, dear = (chosen(DRAM, Tier("nvme", 2000, price, 6e9))["nvme"].gigabytes for price in (0.0, 0.001, 1.0))
    assert free > cheap > 0
    assert dear == 0
    assert chosen(DRAM, Tier("nvme", 2000, 1.0, 6e9))["nvme"].why == "its hits would save no more than it costs"
    assert chosen(DRAM, Tier("nvme", 2000, 0.001, 6e9), nodes=8)["nvme"].gigabytes < cheap, "eight nodes pay for it eight times"


def test_redis_pays_once_for_the_cluster() -> None:
    alone, many = (chosen(DRAM, REDIS, nodes=nodes)["redis"] for nodes in (1, 8))
    assert alone.gigabytes == many.gigabytes > 0


def test_a_tier_that_is_too_slow_is_not_there() -> None:
    slow = chosen(DRAM, Tier("nvme", 2000, 0.0, 0.5e9))["nvme"]
    assert slow.gigabytes == 0
    assert "read for" in slow.why
    beside = chosen(DRAM, NVME, REDIS)
    assert beside["redis"].gigabytes == 0, "NVMe has it all already"
    assert chosen(Tier("dram", 0, 0.0))["dram"].why == "nothing is given for it"


def test_short_prefixes_are_sooner_computed() -> None:
    found = chosen(DRAM, traffic=Shared(50.0, 600, 200, 0.9, 10, 512))
    assert (found["dram"].gigabytes, found["dram"].hit_share) == (0, 0)
    assert found["dram"].why == "what it has is sooner computed than pulled"
    assert chosen(DRAM, traffic=Shared(1.0, 32_768, 200, 0.0, 1, 1))["dram"].why.startswith("nothing is asked for")


def test_a_request_goes_the_way_that_it_lacks_tokens_for() -> None:
    requests = Requests(np.full(4, 0.25), np.array([500.0, 4000, 4000, 32_768]), np.ones(4), {"dram": np.array([256.0, 0, 3800, 16_384])})
    served = service(requests, ENGINE, {}, 1024)
    assert list(served.by_prefill) == [False, True, False, True]
    assert list(served.taken["dram"]) == [0, 0, 3800, 16_384], "256 tokens are sooner computed"
    assert served.own[1] == pytest.approx(float(ENGINE.cold(np.array([4000.0]))[0]))
    assert served.pull[3] == pytest.approx(float(ENGINE.hit(np.array([16_384.0]))[0]))
    slow = service(Requests(np.ones(1), np.array([4000.0]), np.ones(1), {"nvme": np.array([3800.0])}), ENGINE, {"nvme": 2e9}, 1024)
    assert list(slow.taken["nvme"]) == [0], "3,800 tokens are half a gigabyte: a quarter of a second"
