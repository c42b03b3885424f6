"""Cachebus processes on this machine that know each other, with keys, to be stopped and killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from peer_nodes import free_ports
from tests_shared import ANSWER_MS, wait_for

from cachebus import security
from cachebus.client import BusClient
from cachebus.errors import BusUnavailable
from cachebus.messages import Snapshot, SnapshotReply, Stat, StatReply
from cachebus.zeromq_peers import new_pair


class Node:
    """One of them, as those ask it that are given a bus."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def snapshot(self) -> SnapshotReply:
        client = BusClient(self.run_dir, "test")
        reply = client.call(Snapshot(), ANSWER_MS)
        client.close()
        assert isinstance(reply, SnapshotReply)
        return reply


class BusProcesses:
    """Nodes "0", "1", ...; ``run_dirs`` are where each is asked."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self.ports = [free_ports() for _ in range(count)]
        security.begin(folder / "keys")
        for number in range(count):
            security.add(folder / "keys", str(number), "node", new_pair)
        self.run_dirs = [folder / f"node{number}" for number in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for number, run_dir in enumerate(self.run_dirs):
            run_dir.mkdir()
            self.processes.append(self._started(number))
        try:
            self.in_touch(*range(count))
        except BaseException:
            self.stop()
            raise

    def in_touch(self, *numbers: int) -> None:
        """Returns once these nodes hear each other, and nobody else."""
        wait_for(lambda: all(self.statistics(number).get("keepers") == len(numbers) - 1 for number in numbers), 30)

    def statistics(self, number: int) -> dict[str, float]:
        """A node's counters; none while it does not answer."""
        client = BusClient(self.run_dirs[number], "test")
        try:
            reply = client.call(Stat(), 500)
            assert isinstance(reply, StatReply)
            return dict(reply.values)
        except BusUnavailable:
            return {}
        finally:
            client.close()

    def signal(self, number: int, what: signal.Signals) -> None:
        self.processes[number].send_signal(what)

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()

    def start(self, number: int) -> None:
        """Starts one that was killed again."""
        self.processes[number] = self._started(number)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _started(self, number: int) -> subprocess.Popen[bytes]:
        others = [other for other in range(len(self.ports)) if other != number]
        keys = {
            "cache.run_dir": self.run_dirs[number],
            "cache.region_path": self.run_dirs[number] / "region",
            "cache.max_local_cpu_size": 0.05,
            "cache.node_port": self.ports[number],
            "cache.peers": [f"{other}@127.0.0.1:{self.ports[other]}" for other in others],
            "security.keys_dir": self._folder / "keys" / str(number),
        }
        settings = [text for name, value in keys.items() for text in ("--set", f"{name}={value}")]
        with (self._folder / f"node{number}.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "deploy.cli", "cachebus", *settings], stderr=log)
