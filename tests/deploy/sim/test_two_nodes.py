"""Routers of two nodes, each with simulated workers of its own: what one has computed the other pulls, also when both are asked at once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bus_processes import BusProcesses, Node
from router_under_test import RouterUnderTest
from sim_cluster import SimCluster, metric, right
from tests_shared import wait_for

SPEED = 2.0
"""So slow that a prompt takes long enough to be asked for by all meanwhile."""
PROMPT_TOKENS, ANSWER_TOKENS = 3000, 4
CLIENTS = 3
PROMPTS = 5


class TwoNodes:
    def __init__(self, folder: Path) -> None:
        self.buses = BusProcesses(folder, 2)
        nodes = [Node(run_dir) for run_dir in self.buses.run_dirs]
        self.sims = []
        for number, bus in enumerate(nodes):
            (folder / f"sims{number}").mkdir()
            sims = SimCluster(bus, folder / f"sims{number}")
            sims.launch(f"p{number}", "prefill", speed=SPEED)
            sims.launch(f"d{number}", "decode", speed=SPEED)
            self.sims.append(sims)
        for sims in self.sims:
            sims.ready(2)
        self.routers = [RouterUnderTest(bus) for bus in nodes]
        for router in self.routers:
            router.knows(2)

    def computed(self) -> float:
        """The tokens of prompts that workers have computed."""
        return sum(metric(url, "headstart_sim_computed_prompt_tokens_total") for sims in self.sims for url in sims.urls().values())

    def stop(self) -> None:
        for router in self.routers:
            router.stop()
        for sims in self.sims:
            sims.stop()
        self.buses.stop()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[TwoNodes]:
    found = TwoNodes(tmp_path)
    yield found
    found.stop()


def ask(router: RouterUnderTest, prompt: list[int]) -> str:
    """The answer's way; its tokens are the right ones."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "return_token_ids": True}
    status, headers, raw = router.post(body)
    assert status == 200, raw
    assert str(right(prompt, ANSWER_TOKENS)).replace(" ", "").encode() in raw
    return headers["x-headstart-route"]


def test_what_both_are_asked_at_once_is_computed_once(two: TwoNodes) -> None:
    chance = random.Random(7)
    once = []
    for _ in range(PROMPTS):
        prompt = [chance.randrange(100_000) for _ in range(PROMPT_TOKENS)]
        before = two.computed()
        with ThreadPoolExecutor(2 * CLIENTS) as pool:
            ways = list(pool.map(ask, two.routers * CLIENTS, [prompt] * 2 * CLIENTS))
        assert ways.count("prefill+decode") >= 1
        computed = two.computed() - before
        assert PROMPT_TOKENS <= computed < 2.2 * PROMPT_TOKENS
        # Every decode worker computes a prompt's last token itself, and what comes after its last whole block.
        once.append(computed < 1.2 * PROMPT_TOKENS)
    # Where the machine runs nobody for 25 ms a prompt is computed twice.
    assert once.count(True) >= PROMPTS - 1, once
    wait_for(lambda: all(two.buses.statistics(number)["claims"] == 0 for number in range(2)), 20)
