"""What a router tells of simulated workers that really run, and what it wants of them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from router_under_test import RouterUnderTest
from sim_cluster import PROFILE, SimCluster, metric
from tests_shared import Bus, wait_for

from router.scaling_settings import ScalingSettings

QUICK = {"reading_seconds": 1, "shrink_seconds": 3, "zero_seconds": 5, "prefill_min": 0}


@pytest.fixture
def router(bus: Bus) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(bus, scaling=ScalingSettings(**QUICK), policy="cost", prefill_tokens_min=512)  # type: ignore[arg-type]
    yield router
    router.stop()


def told(router: RouterUnderTest) -> dict[str, Any]:
    wait_for(lambda: router.get("/scaling")[0] == 200, 20)
    return dict(json.loads(router.get("/scaling")[1]))


def gauge(router: RouterUnderTest, name: str) -> float:
    (line,) = [line for line in router.get("/metrics")[1].decode().splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[-1])


def ask(router: RouterUnderTest, first: int, tokens: int, answer: int) -> threading.Thread:
    body = {"prompt": [20_000 + (first + n) % 1000 for n in range(tokens)], "max_tokens": answer, "ignore_eos": True}
    thread = threading.Thread(target=router.post, args=(body,))
    thread.start()
    return thread


def test_blocks_and_pace_are_as_the_workers_have_them(bus: Bus, sims: SimCluster, router: RouterUnderTest) -> None:
    sims.launch("d", "decode", 2, speed=4.0)
    urls = sims.ready(2)
    router.knows(2)
    wait_for(lambda: told(router)["readings"]["kv_blocks"] == 2 * PROFILE.blocks, 20)
    assert told(router)["readings"]["kv_blocks_free"] == 2 * PROFILE.blocks
    threads = [ask(router, n, 480, 1200) for n in range(4)]
    wait_for(lambda: told(router)["readings"]["kv_blocks_free"] < 2 * PROFILE.blocks - 4 * 30, 20)
    wait_for(lambda: gauge(router, "headstart_inter_token_latency_seconds") > 0, 20)
    pace = gauge(router, "headstart_inter_token_latency_seconds")
    assert 0.0015 < pace < 0.05, "a step of at most 16 requests takes 8 ms, at four times the speed"
    assert 0 < gauge(router, "headstart_decode_kv_blocks_free") < 2 * PROFILE.blocks
    for thread in threads:
        thread.join()
    assert sum(metric(url, "vllm:request_success_total") for url in urls.values()) == 4
    wait_for(lambda: told(router)["readings"]["kv_blocks_free"] == 2 * PROFILE.blocks, 20)


def test_a_prompt_that_waits_for_blocks_says_how_many(bus: Bus, sims: SimCluster, router: RouterUnderTest) -> None:
    sims.launch("d", "decode", 1, speed=0.03)
    sims.ready(1)
    router.knows(1)
    thread = ask(router, 0, 3200, 2)
    wait_for(lambda: gauge(router, "headstart_decode_kv_blocks_wanted") == 200, 20)
    thread.join()
    wait_for(lambda: gauge(router, "headstart_decode_kv_blocks_wanted") == 0, 20)


def test_the_pools_are_wanted_as_the_load_is(bus: Bus, sims: SimCluster, router: RouterUnderTest) -> None:
    assert router.get("/scaling")[0] in (200, 503)
    sims.launch("p", "prefill", 1, speed=1.0)
    sims.launch("d", "decode", 1, speed=1.0)
    sims.ready(2)
    router.knows(2)
    wait_for(lambda: told(router)["prefill"]["wanted"] == 0, 30)
    assert told(router)["decode"]["wanted"] == 1
    threads = [ask(router, 7 * n, 1500, 100) for n in range(8)]
    wait_for(lambda: told(router)["prefill"]["wanted"] >= 1, 20)
    assert any("wakes" in reason or "load" in reason for reason in told(router)["prefill"]["reasons"])
    for thread in threads:
        thread.join()
    # 8 prompts of 94 blocks don't fit 300, and each has its answer's blocks, too.
    wait_for(lambda: told(router)["decode"]["wanted"] >= 1, 20)


def test_two_routers_of_one_bus_say_the_same(bus: Bus, sims: SimCluster, router: RouterUnderTest) -> None:
    other = RouterUnderTest(bus, scaling=ScalingSettings(**QUICK), policy="cost", prefill_tokens_min=512)  # type: ignore[arg-type]
    try:
        sims.launch("p", "prefill", 1, speed=1.0)
        sims.launch("d", "decode", 1, speed=1.0)
        sims.ready(2)
        for one in (router, other):
            one.knows(2)
        # All workers have been read twice: before, nobody knows since when their counts are.
        time.sleep(3)
        deadline = time.monotonic() + 10
        threads = []
        shares: list[tuple[float, float]] = []
        while time.monotonic() < deadline:
            threads += [ask(one, 13 * len(threads) + n, 1500, 4) for n, one in enumerate((router, other, router))]
            time.sleep(0.3)
            shares.append((told(router)["readings"]["own_share"], told(other)["readings"]["own_share"]))
        for thread in threads:
            thread.join()
        one, two = shares[-1]
        assert (one, two) == (pytest.approx(2 / 3, abs=0.2), pytest.approx(1 / 3, abs=0.15))
        assert told(router)["prefill"]["wanted"] == told(other)["prefill"]["wanted"]
    finally:
        other.stop()
