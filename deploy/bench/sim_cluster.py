"""A cache bus and simulated workers, each a process of its own, for as long as a measurement lasts."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cachebus.engine import process_tree
from cachebus.errors import HeadstartError
from cachebus.messages import Worker
from deploy.launcher import registered

_START_SECONDS_MAX = 120.0
_END_SECONDS_MAX = 15.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class SimPlan:
    """What to start. ``profile`` may be None; ``region_gb`` is the DRAM tier's size; ``apart``: each worker is a process, else each role."""

    prefill: int
    decode: int
    speed: float
    profile: Path | None
    region_gb: float
    apart: bool = False


@dataclass(frozen=True)
class SimCluster:
    """A running cluster."""

    run_dir: Path
    workers: Sequence[Worker]

    def urls(self, role: str) -> list[str]:
        """Where the workers of a role are."""
        return [worker.url for worker in self.workers if worker.role == role]

    def total(self, name: str) -> float:
        """The sum of a counter over all workers."""
        return sum(_counter(worker.url, name) for worker in self.workers)


@contextlib.contextmanager
def sim_cluster(plan: SimPlan, logs: Path | None) -> Iterator[SimCluster]:
    """Starts bus and workers and ends them afterwards. Raises HeadstartError where they don't get ready."""
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder, contextlib.ExitStack() as stack:
        run_dir = Path(folder)
        place = ["--set", f"cache.run_dir={run_dir}", "--log-level", "warning"]
        stack.enter_context(process([*headstart("cachebus"), *place, "--set", f"cache.max_local_cpu_size={plan.region_gb}"], logs, "cachebus"))
        await_true("the cachebus", lambda: registered(run_dir) is not None)
        for role, count in (("prefill", plan.prefill), ("decode", plan.decode)):
            named = [(f"{role}{number}", 1) for number in range(count)] if plan.apart else [(role, count)]
            for name, workers in named:
                command = [*headstart("sim"), *place, "--role", role, "--workers", str(workers), "--name", name, "--speed", str(plan.speed)]
                command += ["--profile", str(plan.profile)] if plan.profile else []
                stack.enter_context(process(command, logs, name))
        await_true("the simulated workers", lambda: len(registered(run_dir) or ()) == plan.prefill + plan.decode)
        yield SimCluster(run_dir, registered(run_dir) or ())


def headstart(role: str) -> list[str]:
    """The command line of a role."""
    return [sys.executable, "-m", "deploy", role]


@contextlib.contextmanager
def process(command: Sequence[str], logs: Path | None, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command meanwhile; its output goes to a file in ``logs``, or nowhere."""
    with contextlib.ExitStack() as stack:
        out: IO[bytes] | int = subprocess.DEVNULL
        if logs:
            logs.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context((logs / f"{name}.log").open("ab"))
        started = process_tree.start(command, os.environ, stdout=out, stderr=out)
        try:
            yield started
        finally:
            started.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(_END_SECONDS_MAX)
            process_tree.kill_tree(started)


def await_true(what: str, ready: Callable[[], bool], seconds_max: float = _START_SECONDS_MAX) -> None:
    """Returns once ``ready`` is. Raises HeadstartError where that takes too long."""
    deadline = time.monotonic() + seconds_max
    while not ready():
        if time.monotonic() > deadline:
            raise HeadstartError(f"{what} did not get ready within {seconds_max:g} s; --logs keeps what it said")
        time.sleep(_POLL_SECONDS)


def _counter(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        found = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])
