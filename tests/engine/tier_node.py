"""A node of a test's own beside the live one."""

from __future__ import annotations

from pathlib import Path

from live import Live
from tests_shared import ANSWER_MS, wait_for

from cachebus.client import BusClient
from cachebus.messages_tools import Clear, Count
from cachebus.wire import Tier
from deploy.client import Answer, ask
from deploy.launcher import Cluster
from deploy.settings import Settings


class Node:
    """A cluster of its own, beside the live one whose plain engine says what is right."""

    def __init__(self, live: Live, settings: Settings, logs: Path) -> None:
        self.live = live
        self.settings = settings
        self.logs = logs
        self.start()

    def start(self) -> None:
        self.cluster = Cluster(self.settings, self.logs)
        self.cluster.start(lambda text: None)

    def ask(self, prompt: str) -> Answer:
        return ask(self.cluster.url, "/v1/completions", self.live.body(prompt))

    def clear(self, *tiers: Tier) -> None:
        client = BusClient(self.cluster.run_dir, "test")
        assert isinstance(client.call(Clear(list(tiers)), ANSWER_MS), Count)
        client.close()

    def statistics(self) -> dict[str, float]:
        live = Live.__new__(Live)
        live.cluster = self.cluster
        return live.statistics()

    def keys(self) -> dict[Tier, list[bytes]]:
        live = Live.__new__(Live)
        live.cluster = self.cluster
        return live.snapshot().keys

    def empty_hbm(self) -> None:
        live = Live.__new__(Live)
        live.cluster = self.cluster
        live.empty_hbm()

    def settled(self) -> None:
        wait_for(lambda: self.statistics()["write_behind_bytes"] == 0, 20)
