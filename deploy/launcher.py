"""A cluster on one machine: every role a process of its own, started in order, watched, and stopped in order."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

import msgspec

from cachebus.client import BusClient
from cachebus.engine import process_tree
from cachebus.errors import BusUnavailable, HeadstartError
from cachebus.messages import Snapshot, SnapshotReply, Worker
from cachebus.ports import check_free, free_port
from cachebus.settings_file import ENVIRONMENT_PREFIX
from deploy.settings import Settings, as_yaml

log = logging.getLogger("headstart.up")

BUS, ROUTER = "cachebus", "router"
END_SECONDS_MAX = 20
BUS_START_SECONDS_MAX = 120
"""A large region takes half a second a gigabyte to be faulted in."""
ROUTER_START_SECONDS_MAX = 60
RESTARTS_MAX = 5
_POLL_SECONDS = 0.2
_TAIL_LINES = 12

Progress = Callable[[str], None]


class Cluster:
    """The processes of ``settings``. With ``logs`` each role writes to a file there, else to this process's stderr."""

    def __init__(self, settings: Settings, logs: Path | None = None) -> None:
        port = settings.router.port or free_port(settings.router.host)
        self.settings = msgspec.structs.replace(settings, router=msgspec.structs.replace(settings.router, port=port))
        self.url = f"http://{settings.router.host}:{port}"
        self.run_dir = settings.cache.resolved_run_dir(os.environ)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.workers = [f"prefill-{i}" for i in range(settings.prefill.count)] + [f"decode-{i}" for i in range(settings.decode.count)]
        self._logs = logs

    def start(self, progress: Progress) -> None:
        """Starts everything and returns when it serves. Raises HeadstartError, with everything stopped again, where a role fails."""
        check_free("router.port", self.settings.router.host, self.settings.router.port)
        try:
            self.start_bus(progress)
            for worker in self.workers:
                self.launch(worker)
            self.launch(ROUTER)
            limit = max(self.settings.prefill.start_seconds_max, self.settings.decode.start_seconds_max)
            self._await("the workers", progress, self._all_serve, limit)
        except BaseException:
            self.stop()
            raise

    def start_bus(self, progress: Progress) -> None:
        """Starts the cachebus alone. Raises HeadstartError where it fails."""
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = self.run_dir / "cluster.yaml"
        self._file.write_text(as_yaml(self.settings))
        self.launch(BUS)
        self._await(BUS, progress, lambda: registered(self.run_dir) is not None, BUS_START_SECONDS_MAX)

    def launch(self, name: str, *arguments: str) -> None:
        """Starts one role (again), with more ``arguments``."""
        role = name.partition("-")[0]
        command = [sys.executable, "-m", "deploy", role, "--config", str(self._file), *arguments]
        if name in self.workers:
            command += ["--name", name]
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(self._log_of(name).open("ab")) if self._logs else None
            self.processes[name] = process_tree.start(command, _without_settings(os.environ), stdout=out, stderr=out)

    def add_router(self, name: str, *settings: str) -> str:
        """Starts one more router, ``settings`` ("section.key=value") going before the cluster's, and returns its address once it serves.

        Raises HeadstartError where it does not in time. ``name`` begins with "router".
        """
        port = free_port(self.settings.router.host)
        self.launch(name, *(text for setting in (f"router.port={port}", *settings) for text in ("--set", setting)))
        url = f"http://{self.settings.router.host}:{port}"
        deadline = time.monotonic() + ROUTER_START_SECONDS_MAX
        while not answers(f"{url}/ready"):
            if time.monotonic() > deadline:
                raise HeadstartError(f"{name} did not get ready")
            time.sleep(_POLL_SECONDS)
        return url

    def stop(self) -> None:
        """Stops the router, then the workers, then the bus; kills what does not end."""
        routers = [name for name in self.processes if name.startswith(ROUTER)]
        for names in (routers, self.workers, [BUS]):
            group = [self.processes[name] for name in names if name in self.processes]
            for process in group:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            drain = max(self.settings.prefill.drain_seconds_max, self.settings.decode.drain_seconds_max, self.settings.router.drain_seconds_max)
            deadline = time.monotonic() + drain + END_SECONDS_MAX
            for process in group:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
                process_tree.kill_tree(process)
        self.processes.clear()

    def ended(self) -> list[str]:
        """The roles whose process is gone."""
        return [name for name, process in self.processes.items() if process.poll() is not None]

    def _await(self, what: str, progress: Progress, done: Callable[[], bool], seconds_max: float) -> None:
        started = told = time.monotonic()
        while not done():
            for name in self.ended():
                raise HeadstartError(f"{name} ended with exit code {self.processes[name].returncode} while it started{self._tail(name)}")
            now = time.monotonic()
            if now - started > seconds_max:
                raise HeadstartError(f"{what} did not get ready within {seconds_max:g} s")
            if now - told > 1:
                told = now
                ready = registered(self.run_dir) or []
                progress(f"starting: {len(ready)} of {len(self.workers)} workers ready, {now - started:.0f} s")
            time.sleep(_POLL_SECONDS)

    def _all_serve(self) -> bool:
        return set(self.workers) <= {worker.worker for worker in registered(self.run_dir) or []} and answers(f"{self.url}/ready")

    def _log_of(self, name: str) -> Path:
        assert self._logs is not None
        self._logs.mkdir(parents=True, exist_ok=True)
        return self._logs / f"{name}.log"

    def _tail(self, name: str) -> str:
        if not self._logs:
            return "; its own lines above say why"
        lines = self._log_of(name).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return ":\n  " + "\n  ".join(lines)


@contextlib.contextmanager
def private_run_dir(settings: Settings) -> Iterator[Settings]:
    """The settings with a run directory of their own, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        yield msgspec.structs.replace(settings, cache=msgspec.structs.replace(settings.cache, run_dir=folder, region_path=""))


def up(settings: Settings) -> int:
    """Runs a cluster until SIGINT or SIGTERM; a role that dies is started again, with a pause that grows."""
    ending = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        if ending.is_set():
            raise KeyboardInterrupt
        ending.set()

    cluster = Cluster(settings)
    cluster.start(log.info)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        print(_welcome(cluster), file=sys.stderr)
        _keep_running(cluster, ending)
    finally:
        cluster.stop()
    return 0


def _keep_running(cluster: Cluster, ending: threading.Event) -> None:
    restarts = dict.fromkeys(cluster.processes, 0)
    while not ending.wait(1):
        for name in cluster.ended():
            restarts[name] += 1
            code = cluster.processes[name].returncode
            if restarts[name] > RESTARTS_MAX:
                raise HeadstartError(f"{name} ended {restarts[name]} times, last with exit code {code}: giving up")
            pause = 2 ** (restarts[name] - 1)
            log.error("%s ended with exit code %d; starting it again in %d s", name, code, pause)
            if not ending.wait(pause):
                cluster.launch(name)


def _welcome(cluster: Cluster) -> str:
    model = cluster.settings.model.served_name or cluster.settings.model.name
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    return (
        f"\nready: {cluster.url}/v1 serves {model}; Ctrl-C ends it\n\n"
        f"  curl -i {cluster.url}/v1/chat/completions -H 'content-type: application/json' \\\n    -d '{body}'\n"
    )


def registered(run_dir: Path) -> list[Worker] | None:
    """The registered workers; None where no bus answers."""
    if not (run_dir / "daemon.lock").exists():
        return None
    client = BusClient(run_dir, "launcher")
    try:
        reply = client.call(Snapshot(), 500)
    except BusUnavailable:
        return None
    finally:
        client.close()
    return reply.workers if isinstance(reply, SnapshotReply) else None


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without Headstart's keys: the cluster's file has them already, and what it adds must win."""
    return {name: value for name, value in environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}


def answers(url: str) -> bool:
    """Whether the URL answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
