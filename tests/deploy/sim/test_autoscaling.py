"""Pools of simulated workers that really run, started and drained as the router's /scaling says, while load comes and goes.

Time is compressed twentyfold: the rule's own spans are divided by it, and a worker's start of two seconds stands for forty.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from router_under_test import RouterUnderTest
from sim_cluster import SimCluster, right
from tests_shared import Bus, wait_for

from deploy.sim.profile import Profile
from router import scaling
from router.scaling_settings import ScalingSettings

COMPRESSED = 20.0
POLL_SECONDS = 15 / COMPRESSED
PROFILE = Profile(
    blocks=1200,
    max_model_len=4096,
    max_num_batched_tokens=1024,
    max_num_seqs=16,
    prefill_tokens_per_second=((1, 4000.0),),
    decode_ms=((1, 20.0), (16, 26.0)),
)
RULE = ScalingSettings(
    prefill_min=0, prefill_max=4, decode_max=4, backlog_seconds=1.0, inter_token_seconds=0.2, shrink_seconds=4, zero_seconds=6, reading_seconds=1
)


class Pools:
    """Starts and drains workers, the newest first, as a StatefulSet does."""

    def __init__(self, sims: SimCluster, router: RouterUnderTest) -> None:
        self._sims, self._router = sims, router
        self.names: dict[str, list[str]] = {"prefill": [], "decode": []}
        self.seen: list[tuple[float, int, int]] = []
        self._number = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self.resize("prefill", 1)
        self.resize("decode", 1)
        self._router.knows(2)
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()

    def resize(self, role: str, wanted: int) -> None:
        names = self.names[role]
        while len(names) < wanted:
            self._number += 1
            names.append(f"{role}-{self._number}")
            self._sims.launch(names[-1], role, speed=1.0)
        while len(names) > wanted:
            self._sims.processes[names.pop()].send_signal(signal.SIGTERM)

    def most(self, role: str, since: float) -> int:
        return max(one[1 if role == "prefill" else 2] for one in self.seen if one[0] >= since)

    def _run(self) -> None:
        while not self._ending.wait(POLL_SECONDS):
            status, raw = self._router.get("/scaling")
            if status == 200:
                answer = json.loads(raw)
                for role in ("prefill", "decode"):
                    self.resize(role, answer[role]["wanted"])
            self.seen.append((time.monotonic(), len(self.names["prefill"]), len(self.names["decode"])))


class Load:
    """Requests at a rate, each answer held against the oracle."""

    def __init__(self, router: RouterUnderTest) -> None:
        self._router, self._executor = router, ThreadPoolExecutor(64)
        self.failed: list[str] = []
        self.wrong = self.answered = 0
        self._asked: list[Future[None]] = []

    def run(self, prompts: Iterator[list[int]], answer: int, rate: float, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._asked.append(self._executor.submit(self._ask, next(prompts), answer))
            time.sleep(1 / rate)

    def finish(self) -> None:
        for one in self._asked:
            one.result()
        self._executor.shutdown()

    def _ask(self, prompt: list[int], answer: int) -> None:
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": answer, "return_token_ids": True, "temperature": 0}
        status, _, raw = self._router.post(body)
        if status != 200:
            self.failed.append(f"{status} {raw[:200]!r}")
            return
        self.answered += 1
        self.wrong += json.loads(raw)["choices"][0]["token_ids"] != right(prompt, answer)


def new_prompts(chance: random.Random, tokens: int) -> Iterator[list[int]]:
    while True:
        yield [chance.randint(20_000, 30_000) for _ in range(tokens)]


def repeated(prompts: list[list[int]], chance: random.Random) -> Iterator[list[int]]:
    while True:
        yield chance.choice(prompts)


@pytest.fixture
def sims(bus: Bus, tmp_path: Path) -> Iterator[SimCluster]:
    cluster = SimCluster(bus, tmp_path, PROFILE)
    yield cluster
    cluster.stop()


@pytest.fixture
def router(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> Iterator[RouterUnderTest]:
    for name in ("AVERAGE_SECONDS", "BACKLOG_SECONDS", "LOAD_SECONDS", "_SHRINK_STEP_SECONDS"):
        monkeypatch.setattr(scaling, name, getattr(scaling, name) / COMPRESSED)
    router = RouterUnderTest(bus, scaling=RULE, policy="cost", prefill_tokens_min=512, decode_tokens_max=4096, worker_requests_max=16)
    yield router
    router.stop()


def test_pools_follow_the_load_and_nobody_notices(bus: Bus, sims: SimCluster, router: RouterUnderTest) -> None:
    chance, pools, load = random.Random(3), Pools(sims, router), Load(router)
    try:
        pools.start()
        few = [next(new_prompts(chance, 1200)) for _ in range(6)]
        load.run(iter(few), 4, 2.0, 2.5)
        begun = time.monotonic()
        # Long prompts that nobody knows, short answers.
        load.run(new_prompts(chance, 3000), 8, 3.0, 14)
        assert pools.most("prefill", begun) >= 2
        computing = time.monotonic()
        # Prompts that all know, long answers: more at once than a worker takes.
        load.run(repeated(few, chance), 200, 4.5, 14)
        assert pools.most("decode", computing) >= 2
        load.run(repeated(few, chance), 4, 2.0, 4)
        wait_for(lambda: pools.seen[-1][1:] == (0, 1), 30)
        # The first that lacks anything brings prefill back, and is answered meanwhile.
        load.run(new_prompts(chance, 2000), 4, 1.0, 1.5)
        wait_for(lambda: pools.seen[-1][1] >= 1, 10)
    finally:
        pools.stop()
        load.finish()
        print([(round(at - pools.seen[0][0], 1), prefill, decode) for at, prefill, decode in pools.seen], load.answered)
    assert not load.failed
    assert load.wrong == 0
    assert load.answered > 90
