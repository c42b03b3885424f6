"""What is known of HBM decides where a prompt goes, over real HTTP and a real bus; only the engines are doubles."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from engine_double import EngineDouble
from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import Bus, wait_for

from cachebus.keys import chunk_keys, root_key
from router.policies import BUSIER_MAX

LONG = [ord("x")] * 1100


@pytest.fixture
def engines(make_engine: MakeEngine, router: RouterUnderTest) -> list[EngineDouble]:
    """A prefill worker and two decode workers."""
    made = [make_engine("p", "prefill"), make_engine("a", "decode"), make_engine("b", "decode")]
    router.knows(3)
    return made


def ask(router: RouterUnderTest, prompt: Any) -> dict[str, str]:
    status, headers, _ = router.post({"model": "m", "prompt": prompt})
    assert status == 200
    return headers


def holds(router: RouterUnderTest, engine: EngineDouble, ids: list[int]) -> None:
    """The engine has the chunks of ``ids`` in HBM, and the router has heard of it."""
    engine.hold_in_hbm(ids)
    keys = chunk_keys(root_key(b"n" * 32), ids, 256)
    wait_for(lambda: router.gateway.watch.replica.hbm_prefix(engine.name, keys) == len(keys))


def test_a_prompt_in_somebodys_hbm_skips_prefill_and_goes_there(engines: list[EngineDouble], router: RouterUnderTest) -> None:
    prefill, _, warm = engines
    holds(router, warm, LONG)
    for number in range(3):
        headers = ask(router, [*LONG, number])
        assert (headers["x-headstart-route"], headers["x-headstart-worker"]) == ("decode", "b")
    assert prefill.bodies == []


def test_a_prefix_that_leaves_much_to_compute_goes_through_prefill_and_then_there(engines: list[EngineDouble], router: RouterUnderTest) -> None:
    prefill, _, warm = engines
    holds(router, warm, LONG[:256])
    for number in range(2):
        headers = ask(router, LONG[:300] + [number] * 800)
        assert (headers["x-headstart-route"], headers["x-headstart-worker"]) == ("prefill+decode", "b")
    assert len(prefill.bodies) == 2


def test_the_hbm_of_a_prefill_worker_skips_nothing(engines: list[EngineDouble], router: RouterUnderTest) -> None:
    holds(router, engines[0], LONG)
    assert ask(router, LONG)["x-headstart-route"] == "prefill+decode"


def test_a_worker_that_is_much_busier_is_passed_over_and_its_hbm_does_not_count(engines: list[EngineDouble], router: RouterUnderTest) -> None:
    _, _, warm = engines
    holds(router, warm, LONG)
    warm.hold.clear()
    with ThreadPoolExecutor(BUSIER_MAX["decode"] + 1) as pool:
        running = [pool.submit(ask, router, LONG) for _ in range(BUSIER_MAX["decode"] + 1)]
        wait_for(lambda: len(warm.bodies) == len(running))
        headers = ask(router, LONG)
        assert (headers["x-headstart-route"], headers["x-headstart-worker"]) == ("prefill+decode", "a")
        warm.hold.set()
        assert {answer.result()["x-headstart-worker"] for answer in running} == {"b"}


def test_what_is_gone_from_hbm_is_computed(engines: list[EngineDouble], router: RouterUnderTest) -> None:
    prefill, _, warm = engines
    holds(router, warm, LONG)
    warm.hold_in_hbm([])
    wait_for(lambda: set(router.gateway.watch.replica.hbm_prefixes([b"k" * 32])) == {"b"} and not router.gateway.watch.replica._hbm["b"])
    assert ask(router, LONG)["x-headstart-route"] == "prefill+decode"
    assert len(prefill.bodies) == 1


def test_when_the_warm_worker_fails_another_takes_over(engines: list[EngineDouble], router: RouterUnderTest) -> None:
    _, cold, warm = engines
    holds(router, warm, LONG)
    warm.status = 500
    headers = ask(router, LONG)
    assert (headers["x-headstart-route"], headers["x-headstart-worker"]) == ("decode", "a")
    assert (len(cold.bodies), len(warm.bodies)) == (1, 1)


def test_the_least_loaded_policy_looks_at_no_hbm(bus: Bus, engines: list[EngineDouble]) -> None:
    engines[2].hold_in_hbm(LONG)
    plain = RouterUnderTest(bus, policy="least_loaded")
    try:
        first = ask(plain, LONG)
        assert (first["x-headstart-route"], first["x-headstart-worker"]) == ("prefill+decode", "a")
        assert ask(plain, LONG)["x-headstart-worker"] == "b"
    finally:
        plain.stop()


def test_a_router_that_starts_later_knows_from_the_snapshot(bus: Bus, engines: list[EngineDouble]) -> None:
    engines[2].hold_in_hbm(LONG)
    later = RouterUnderTest(bus)
    try:
        assert ask(later, LONG)["x-headstart-worker"] == "b"
        assert engines[0].bodies == []
    finally:
        later.stop()
