"""A tenant's limits hold for all routers together: those of one node, and those of several."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_double import EngineDouble
from peer_nodes import Nodes
from router_under_test import RouterUnderTest
from tenants_under_test import TenantsUnderTest
from tests_shared import Bus, wait_for

LIMIT = 60
TOKENS = 2000
KNOWN_SECONDS = 0.6
"""After so long what one router lets in is known to all."""
SCHEDULING_SECONDS = 0.6
"""What this machine may take beside, with all nodes, routers and clients in one process."""
PROMPT = "y" * 100


class Guarded:
    """A router on each of ``buses``, with the same tenants."""

    def __init__(self, folder: Path, buses: list[Bus]) -> None:
        self.tenants = TenantsUnderTest(folder / "tenants.yaml")
        self.tenants.add("a", f"requests_per_minute: {LIMIT}")
        self.tenants.add("b", f"tokens_per_minute: {TOKENS}")
        different = {bus.run_dir: bus for bus in buses}.values()
        self.engines = [EngineDouble(bus, f"d{number}", "decode") for number, bus in enumerate(different)]
        self.routers = [RouterUnderTest(bus, str(self.tenants.path)) for bus in buses]
        for router in self.routers:
            router.knows(1)

    def ask(self, router: int, tenant: str = "a") -> bool:
        """Whether it was let in."""
        status, _, raw = self.routers[router].post({"model": "m", "prompt": PROMPT}, headers=self.tenants.bearer(tenant))
        assert status in (200, 429), raw
        return status == 200

    def ask_all(self, seconds: float, pause: float) -> list[list[float]]:
        """When each router let requests in, while all are asked that often at once."""
        let_in: list[list[float]] = [[] for _ in self.routers]
        ends = time.monotonic() + seconds

        def client(router: int) -> None:
            while time.monotonic() < ends:
                if self.ask(router):
                    let_in[router].append(time.monotonic())
                time.sleep(pause)

        clients = [threading.Thread(target=client, args=[router]) for router in range(len(self.routers))]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        return let_in

    def stop(self) -> None:
        for router in self.routers:
            router.stop()
        for engine in self.engines:
            engine.stop()


@pytest.fixture(params=["one node", "two nodes"])
def guarded(request: pytest.FixtureRequest, bus: Bus, tmp_path: Path) -> Iterator[Guarded]:
    if request.param == "one node":
        found = Guarded(tmp_path, [bus, bus])
        yield found
        found.stop()
        return
    nodes = Nodes(tmp_path, 2, keys=True)
    wait_for(lambda: all(one.daemon.statistics()["keepers"] == 1 for one in nodes.buses))
    found = Guarded(tmp_path, nodes.buses)
    yield found
    found.stop()
    nodes.stop()


def test_together_they_let_in_the_limit_and_what_they_could_not_know_of(guarded: Guarded) -> None:
    started = time.monotonic()
    let_in = guarded.ask_all(8.0, 0.1)
    took = time.monotonic() - started
    count = sum(map(len, let_in))
    window = KNOWN_SECONDS + SCHEDULING_SECONDS
    in_a_window = max(sum(start <= at < start + window for at in times) for times in let_in for start in times)
    assert LIMIT <= count <= LIMIT + LIMIT * took / 60 + in_a_window
    assert count < 1.6 * LIMIT, "else the test says nothing"


def test_what_was_used_up_at_one_router_is_used_up_at_the_other(guarded: Guarded) -> None:
    assert all(guarded.ask(0) for _ in range(LIMIT))
    time.sleep(KNOWN_SECONDS + SCHEDULING_SECONDS)
    assert sum(guarded.ask(1) for _ in range(20)) <= 3


def test_tokens_of_one_router_are_tokens_of_the_other(guarded: Guarded) -> None:
    assert guarded.ask(1, "b")
    while guarded.ask(0, "b"):
        pass
    time.sleep(KNOWN_SECONDS + SCHEDULING_SECONDS)
    assert guarded.routers[1].app_level("b") < 0.1 * TOKENS
