"""A cluster of real engines and a plain vLLM beside it, and the ways to ask and look into them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests_shared import ANSWER_MS, wait_for

from cachebus.client import BusClient
from cachebus.engine import process_tree
from cachebus.engine.command import served_name
from cachebus.messages import Snapshot, SnapshotReply, Stat, StatReply
from deploy.client import Answer, ask
from deploy.launcher import Cluster
from deploy.prompts import Prompts
from deploy.reference import PlainEngine
from deploy.settings import Settings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
START_SECONDS = 180.0


class Live:
    """Both systems, started once for all tests; a test that kills something brings it back."""

    def __init__(self, settings: Settings, logs: Path) -> None:
        self.settings = settings
        self.logs = logs
        self.model = served_name(settings.model)
        self.prompts = Prompts(settings.model, seed=11)
        self.cluster = Cluster(settings, logs)
        self.plain = PlainEngine(settings.model, settings.decode, logs / "plain.log")

    def start(self) -> None:
        self.cluster.start(lambda text: None)
        self.plain.start(lambda text: None)

    def stop(self) -> None:
        self.plain.stop()
        self.cluster.stop()

    def body(self, prompt: str | list[int] | None = None, **fields: Any) -> dict[str, Any]:
        given = {} if prompt is None else {"prompt": prompt}
        return {"model": self.model, "max_tokens": 8, "temperature": 0, **given, **fields}

    def ours(self, body: dict[str, Any], path: str = COMPLETIONS) -> Answer:
        return ask(self.cluster.url, path, body)

    def plains(self, body: dict[str, Any], path: str = COMPLETIONS) -> Answer:
        return ask(self.plain.url, path, body)

    def statistics(self) -> dict[str, float]:
        reply = self._call(Stat())
        assert isinstance(reply, StatReply)
        return reply.values

    def snapshot(self) -> SnapshotReply:
        reply = self._call(Snapshot())
        assert isinstance(reply, SnapshotReply)
        return reply

    def workers(self) -> dict[str, str]:
        """Address by name of the registered workers."""
        return {worker.worker: worker.url for worker in self.snapshot().workers}

    def _call(self, request: Stat | Snapshot) -> Any:
        client = BusClient(self.cluster.run_dir, "test")
        try:
            return client.call(request, ANSWER_MS)
        finally:
            client.close()

    def engine_processes(self, name: str) -> dict[str, int]:
        """The three processes of a worker's engine by kind."""
        found = {}
        for pid in process_tree.descendants(self.cluster.processes[name].pid):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            for kind, mark in (("api server", "api_server"), ("engine core", "VLLM::EngineCore"), ("worker", "VLLM::Worker")):
                if mark in line:
                    found[kind] = pid
        return found

    def bring_back(self, name: str, *arguments: str) -> None:
        self.cluster.processes[name].wait(60)
        self.cluster.launch(name, *arguments)
        wait_for(lambda: name in self.workers(), START_SECONDS)
        wait_for(lambda: self.metric(self.cluster.url, "headstart_workers") == len(self.cluster.workers))

    def metric(self, url: str, name: str) -> float:
        """The sum of a metric's samples."""
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+-]+)$", text, re.MULTILINE))

    def empty_hbm(self) -> None:
        """Empties every engine's own prefix cache, so that the next hit comes from elsewhere."""
        for url in self.workers().values():
            with urllib.request.urlopen(urllib.request.Request(f"{url}/reset_prefix_cache", method="POST"), timeout=10) as answer:
                assert answer.status == 200

    def unrest(self) -> dict[str, float]:
        """What is leased, written, waited for or computed anywhere, by name; empty when all is at rest."""
        values = self.statistics()
        found = {name: values[name] for name in ("leases", "writing", "waiters", "unattached_holders")}
        found["router"] = self.metric(self.cluster.url, "headstart_requests_in_flight")
        for name, url in self.workers().items():
            for state in ("running", "waiting"):
                found[f"{state} on {name}"] = self.metric(url, f"vllm:num_requests_{state}")
        return {name: value for name, value in found.items() if value}

    def await_rest(self, seconds: float = 10) -> None:
        """Returns once all is at rest; fails where it is not in time."""
        deadline = time.monotonic() + seconds
        while unrest := self.unrest():
            assert time.monotonic() < deadline, f"not at rest after {seconds:g} s: {unrest}"
            time.sleep(0.05)

    def post(self, url: str, body: dict[str, Any], path: str = COMPLETIONS) -> dict[str, Any]:
        """An answer that is not streamed."""
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found
