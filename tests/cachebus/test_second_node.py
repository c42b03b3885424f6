"""Two cachebus processes in network namespaces of their own: pull, a cut cable, and afterwards the index equals the truth."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import PATH, Cable
from peer_nodes import get, put
from test_below import clear, content, key
from tests_shared import ANSWER_MS, DIGEST_KEY, wait_for

from cachebus import security
from cachebus.client import BusClient
from cachebus.holder import Holder
from cachebus.messages import Snapshot, SnapshotReply, Stat, StatReply
from cachebus.zeromq_peers import new_pair

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

DEAD_SECONDS_MAX, IN_STEP_SECONDS_MAX = 3.0, 5.0
LOOK_SECONDS = 0.3


class Process:
    """A cachebus in a namespace; what it is asked goes over its own sockets, which are files."""

    def __init__(self, cable: Cable, number: int, folder: Path) -> None:
        self.run_dir = folder / f"node{number}"
        self.run_dir.mkdir()
        self.daemon = self
        other = 1 - number
        keys = {
            "cache.run_dir": self.run_dir,
            "cache.region_path": self.run_dir / "region",
            "cache.max_local_cpu_size": 0.02,
            "cache.node_host": cable.addresses[number],
            "cache.node_port": 7000,
            "cache.peers": f"['{other}@{cable.addresses[other]}:7000']",
            "security.keys_dir": folder / "keys" / str(number),
        }
        settings = [text for name, value in keys.items() for text in ("--set", f"{name}={value}")]
        command = cable.inside(number, sys.executable, "-m", "deploy.cli", "cachebus", *settings)
        self.log = (folder / f"node{number}.log").open("w")
        self.process = subprocess.Popen(command, stderr=self.log, env={**os.environ, "PATH": PATH})
        wait_for(lambda: (self.run_dir / "daemon.lock").exists() and (self.run_dir / "bus.sock").exists(), 30)
        self.holder = Holder(self.run_dir)

    def client(self, holder: Holder | None = None) -> BusClient:
        return BusClient(self.run_dir, "test", holder)

    def statistics(self) -> dict[str, float]:
        reply = self._call(Stat())
        assert isinstance(reply, StatReply)
        return reply.values

    def keys(self, *tiers: str) -> set[bytes]:
        reply = self._call(Snapshot())
        assert isinstance(reply, SnapshotReply)
        return {k for tier in tiers for k in reply.keys[tier]}  # type: ignore[index]

    def _call(self, request: Stat | Snapshot) -> object:
        client = self.client()
        try:
            return client.call(request, ANSWER_MS)
        finally:
            client.close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Cable, Process, Process]]:
    security.begin(tmp_path / "keys")
    (tmp_path / "keys" / "digest.key").write_bytes(DIGEST_KEY)
    for number in range(2):
        security.add(tmp_path / "keys", str(number), "node", new_pair)
    cable = Cable()
    processes = [Process(cable, number, tmp_path) for number in range(2)]
    yield cable, processes[0], processes[1]
    for process in processes:
        process.stop()
    cable.close()


def test_a_cable_is_cut_and_mended(nodes: tuple[Cable, Process, Process]) -> None:
    cable, one, two = nodes
    wait_for(lambda: one.statistics()["peers"] == two.statistics()["peers"] == 1, 15)
    put(one, 1, 2)  # type: ignore[arg-type]
    wait_for(lambda: two.keys("peer") == {key(1), key(2)})
    assert get(two, 1) == [(content(1), "peer")]  # type: ignore[arg-type]

    cable.cut()
    cut_at = time.monotonic()
    assert get(two, 2) == []  # type: ignore[arg-type]
    assert time.monotonic() - cut_at < 1, "a lookup waits for the dead"
    wait_for(lambda: two.statistics()["peers"] == 0, 10)
    dead = time.monotonic() - cut_at
    assert two.keys("peer") == set()

    clear(one, "dram")  # type: ignore[arg-type]
    put(one, 3, 4)  # type: ignore[arg-type]
    put(two, 5)  # type: ignore[arg-type]
    wait_for(lambda: one.statistics()["peers"] == 0, 10)
    time.sleep(2)
    cable.heal()
    healed_at = time.monotonic()
    wait_for(lambda: two.keys("peer") == one.keys("dram") == {key(3), key(4)} and one.keys("peer") == two.keys("dram"), 15)
    in_step = time.monotonic() - healed_at
    assert get(two, 3, 4) == [(content(3), "peer"), (content(4), "peer")]  # type: ignore[arg-type]
    print(f"dead after {dead:.1f} s, in step {in_step:.1f} s after the cable was mended")
    assert dead <= DEAD_SECONDS_MAX + LOOK_SECONDS
    assert in_step <= IN_STEP_SECONDS_MAX
