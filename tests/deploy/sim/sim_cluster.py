"""Simulated workers as processes, for tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Protocol

import msgspec
from tests_shared import ANSWER_MS, Bus, wait_for

from cachebus.messages import SnapshotReply, Stat, StatReply
from deploy.sim.expected import expected_tokens
from deploy.sim.profile import Profile

PROFILE = Profile(blocks=300, max_model_len=4096, max_num_batched_tokens=1024, max_num_seqs=16, publish_gb_per_second=5)
"""Little HBM and slow copies out of it, so that blocks are wanted again while they are still being copied."""
SPEED = 40.0


class AnyBus(Protocol):
    """A bus of the tests, in a thread or a process."""

    run_dir: Path

    def snapshot(self) -> SnapshotReply: ...


class SimCluster:
    """The simulated workers of one bus."""

    def __init__(self, bus: AnyBus, folder: Path, profile: Profile = PROFILE) -> None:
        self._bus = bus
        self.profile = folder / "profile.json"
        self.profile.write_bytes(msgspec.json.encode(profile))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def launch(self, name: str, role: str, workers: int = 1, *settings: str, speed: float = SPEED) -> None:
        command = [sys.executable, "-m", "deploy", "sim", "--role", role, "--workers", str(workers), "--name", name, "--speed", str(speed)]
        command += ["--profile", str(self.profile), "--log-level", "warning", "--set", f"cache.run_dir={self._bus.run_dir}"]
        command += [part for setting in settings for part in ("--set", setting)]
        self.processes[name] = subprocess.Popen(command)

    def urls(self) -> dict[str, str]:
        return {worker.worker: worker.url for worker in self._bus.snapshot().workers}

    def hbm(self) -> dict[str, int]:
        """How many chunks the bus knows in whose HBM."""
        return {worker: len(keys) for worker, keys in self._bus.snapshot().hbm.items()}

    def ready(self, count: int) -> dict[str, str]:
        wait_for(lambda: len(self.urls()) == count, 30)
        return self.urls()

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            process.wait(20)


def right(prompt: list[int], count: int) -> list[int]:
    return expected_tokens(PROFILE.model, PROFILE.layers, prompt, count)


def counters(bus: Bus) -> dict[str, float]:
    client = bus.client()
    reply = client.call(Stat(), ANSWER_MS)
    client.close()
    assert isinstance(reply, StatReply)
    return reply.values


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        found = re.search(rf"^{name}{{[^}}]*}} ([0-9.e+]+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def post(url: str, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
