"""A worker's life: start, drain, death. The engine is a stand-in here; tests/engine kills real ones."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests_shared import ANSWER_MS, Bus, wait_for

from cachebus.engine import process_tree
from cachebus.engine.worker_process import EXIT_DRAINED, EXIT_ENGINE_DIED, EXIT_ENGINE_NOT_STARTED
from cachebus.messages import Snapshot, SnapshotReply, Worker

ROOT = Path(__file__).parents[3]
ENGINE = Path(__file__).with_name("engine_that_obeys.py")
PROGRAM = """
import logging, sys
from pathlib import Path
from cachebus.engine import worker_process
from cachebus.engine.command import WorkerSpec
from cachebus.errors import HeadstartError
from cachebus.settings import CacheSettings, ModelSettings, SecuritySettings, WorkerSettings

engine, how, run_dir, port, drain = sys.argv[1:]
logging.basicConfig(level="INFO", format="%(message)s")
worker_process.engine_command = lambda spec, port, version, endpoints: [sys.executable, engine, str(port), how]
worker_process.installed_vllm = lambda: (0, 32, 0)
pool = WorkerSettings(port=int(port), start_seconds_max=3 if how == "load" else 30, drain_seconds_max=int(drain))
spec = WorkerSpec("w", "decode", ModelSettings(name="m"), pool, CacheSettings(), SecuritySettings(), Path(run_dir))
try:
    sys.exit(worker_process.WorkerProcess(spec).run())
except HeadstartError as error:
    sys.exit(f"refused: {error}")
"""


class Run:
    """A worker process over the stand-in."""

    def __init__(self, bus: Bus, how: str = "serve", *, port: int = 0, drain_seconds: int = 30) -> None:
        self._bus = bus
        self.log = bus.run_dir / "worker.log"
        command = [sys.executable, "-c", PROGRAM, str(ENGINE), how, str(bus.run_dir), str(port), str(drain_seconds)]
        with self.log.open("wb") as out:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(command, cwd=bus.run_dir, stdout=out, stderr=out, env=environment)

    def seen(self) -> Worker | None:
        """The worker as routers see it."""
        client = self._bus.client()
        reply = client.call(Snapshot(), ANSWER_MS)
        client.close()
        assert isinstance(reply, SnapshotReply)
        return next(iter(reply.workers), None)

    def busy(self, port: int) -> Path:
        return self._bus.run_dir / f"{port}.busy"


@pytest.fixture
def worker_bus(bus: Bus) -> Bus:
    """A bus on which the engine of worker ``w`` has registered, as the connector does before the server answers."""
    bus.register_engine("w", "decode")
    return bus


@pytest.fixture
def ended() -> Iterator[list[Run]]:
    made: list[Run] = []
    yield made
    for run in made:
        process_tree.kill_tree(run.process)


def test_it_registers_drains_and_leaves(worker_bus: Bus, ended: list[Run]) -> None:
    run = Run(worker_bus)
    ended.append(run)
    wait_for(lambda: run.seen() is not None)
    worker = run.seen()
    assert worker is not None
    assert (worker.worker, worker.max_model_len, worker.draining) == ("w", 4096, False)
    everybody = process_tree.descendants(run.process.pid)
    assert len(everybody) == 2
    busy = run.busy(int(worker.url.rpartition(":")[2]))
    busy.touch()
    run.process.send_signal(signal.SIGTERM)
    wait_for(lambda: (seen := run.seen()) is not None and seen.draining)
    time.sleep(0.5)
    assert run.process.poll() is None, "a running request keeps it"
    busy.unlink()
    assert run.process.wait(20) == EXIT_DRAINED
    assert run.seen() is None
    assert not any(map(process_tree.is_running, everybody))


@pytest.mark.parametrize("how", ["a second signal", "the time limit"])
def test_a_drain_has_an_end(worker_bus: Bus, ended: list[Run], how: str) -> None:
    run = Run(worker_bus, drain_seconds=1 if how == "the time limit" else 600)
    ended.append(run)
    wait_for(lambda: run.seen() is not None)
    worker = run.seen()
    assert worker is not None
    run.busy(int(worker.url.rpartition(":")[2])).touch()
    run.process.send_signal(signal.SIGTERM)
    wait_for(lambda: (seen := run.seen()) is None or seen.draining)
    if how == "a second signal":
        run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(20) == EXIT_DRAINED


def test_one_process_of_the_engine_dies_and_none_is_left(worker_bus: Bus, ended: list[Run]) -> None:
    run = Run(worker_bus)
    ended.append(run)
    wait_for(lambda: run.seen() is not None)
    everybody = process_tree.descendants(run.process.pid)
    os.kill(everybody[-1], signal.SIGKILL)
    assert run.process.wait(20) == EXIT_ENGINE_DIED
    assert run.seen() is None
    assert not any(map(process_tree.is_running, everybody))
    assert "died: ending the rest of it" in run.log.read_text()


def test_an_engine_that_fails_is_told_in_its_own_words(worker_bus: Bus, ended: list[Run]) -> None:
    run = Run(worker_bus, "fail")
    ended.append(run)
    assert run.process.wait(20) == EXIT_ENGINE_NOT_STARTED
    assert "the engine did not start: it ended with exit code 1\nValueError: no room for the KV cache" in run.log.read_text()


def test_an_engine_that_loads_for_too_long_is_ended(worker_bus: Bus, ended: list[Run]) -> None:
    run = Run(worker_bus, "load")
    ended.append(run)
    assert run.process.wait(20) == EXIT_ENGINE_NOT_STARTED
    assert "decode.start_seconds_max" in run.log.read_text()


def test_a_port_in_use_is_refused_before_anything_starts(worker_bus: Bus, ended: list[Run]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        run = Run(worker_bus, port=port)
        ended.append(run)
        assert run.process.wait(20) == 1
    assert f"decode.port: can't listen on 127.0.0.1:{port}" in run.log.read_text()


def test_without_a_bus_nothing_starts(tmp_path: Path, ended: list[Run], worker_bus: Bus) -> None:
    worker_bus.stop()
    run = Run(worker_bus)
    ended.append(run)
    assert run.process.wait(20) == 1
    assert "refused: " in run.log.read_text()
    assert "headstart cachebus" in run.log.read_text()
    worker_bus.start()
