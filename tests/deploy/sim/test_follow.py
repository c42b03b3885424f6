"""A decode worker that pulls a prompt while a prefill worker computes it: the right tokens, whatever becomes of the prefill worker."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from router_under_test import RouterUnderTest
from sim_cluster import PROFILE, SimCluster, counters, metric, right
from tests_shared import Bus, wait_for

TOKENS, ANSWER = 4000, 20
SLOW = msgspec.structs.replace(PROFILE, max_num_batched_tokens=256, prefill_tokens_per_second=((1, 4000.0),), pull_gb_per_second=1.5)
"""A prompt takes a second in sixteen steps to compute, and a third of one to pull."""


@pytest.fixture
def sims(bus: Bus, tmp_path: Path) -> Iterator[SimCluster]:
    cluster = SimCluster(bus, tmp_path, SLOW)
    yield cluster
    cluster.stop()


@pytest.fixture
def router(bus: Bus, sims: SimCluster) -> Iterator[RouterUnderTest]:
    sims.launch("p", "prefill", speed=1)
    sims.launch("d", "decode", speed=1)
    sims.ready(2)
    router = RouterUnderTest(bus, policy="cost")
    router.knows(2)
    # Whoever generates at the decode worker would wait for each prompt that is computed there.
    connection, generating = router.open("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4000, "stream": True})
    generating.readline()
    # What engines have computed and pulled tells how long the next prompt takes.
    for first in (1000, 2000):
        answer(router, first)
    yield router
    connection.close()
    router.stop()


def prompt(first: int) -> list[int]:
    return list(range(first, first + TOKENS))


def answer(router: RouterUnderTest, first: int) -> tuple[dict[str, str], float]:
    started = time.monotonic()
    status, headers, raw = router.post({"prompt": prompt(first), "max_tokens": ANSWER, "return_token_ids": True})
    assert status == 200
    assert json.loads(raw)["choices"][0]["token_ids"] == right(prompt(first), ANSWER)
    return headers, time.monotonic() - started


def followed(router: RouterUnderTest) -> float:
    lines = router.get("/metrics")[1].decode().splitlines()
    return float(next(line for line in lines if line.startswith("headstart_followed_total ")).split()[1])


def test_what_is_published_is_pulled_while_the_rest_is_computed(bus: Bus, sims: SimCluster, router: RouterUnderTest) -> None:
    before = followed(router)
    headers, _ = answer(router, 10_000)
    assert headers["x-headstart-route"] == "prefill+decode"
    assert headers["x-headstart-cached-tokens"] == "0", "it was computed for this request"
    assert followed(router) == before + 1
    urls = sims.urls()
    assert metric(urls["d"], "headstart_late_chunks_total") == 0
    wait_for(lambda: counters(bus)["leases"] == 0 and counters(bus)["waiters"] == 0)
    again, seconds = answer(router, 10_000)
    assert again["x-headstart-cached-tokens"] != "0"
    assert seconds < 0.9


def test_a_prefill_worker_that_dies_in_the_middle_costs_time_alone(bus: Bus, sims: SimCluster, router: RouterUnderTest) -> None:
    before = followed(router)
    done: list[dict[str, str]] = []
    asking = threading.Thread(target=lambda: done.append(answer(router, 20_000)[0]))
    asking.start()
    wait_for(lambda: followed(router) == before + 1)
    sims.processes["p"].send_signal(signal.SIGKILL)
    asking.join(20)
    assert done, "the answer is right, or the thread has failed"
    wait_for(lambda: counters(bus)["leases"] == 0 and counters(bus)["waiters"] == 0)
