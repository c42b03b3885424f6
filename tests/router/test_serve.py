"""The router as a process: how it starts and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from router_under_test import MakeEngine
from tests_shared import Bus, wait_for

from cachebus.errors import BusUnavailable, HeadstartError
from cachebus.ports import free_port
from router import serve as module
from router.settings import RouterSettings

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from router.serve import serve
from router.settings import RouterSettings
sys.exit(serve(RouterSettings(port=int(sys.argv[2]), drain_seconds_max=int(sys.argv[3])), Path(sys.argv[1])))
"""


class Process:
    """A router in a process of its own."""

    def __init__(self, bus: Bus, drain_seconds: int) -> None:
        self.port = free_port("127.0.0.1")
        command = [sys.executable, "-c", PROGRAM, str(bus.run_dir), str(self.port), str(drain_seconds)]
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        wait_for(lambda: self.ready() is not None)

    def ready(self) -> int | None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def ask(self) -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("POST", "/v1/completions", json.dumps({"model": "m", "prompt": "y", "stream": True}))
        return connection

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)


@pytest.fixture
def started(bus: Bus) -> Iterator[list[Process]]:
    made: list[Process] = []
    yield made
    for router in made:
        router.process.kill()
        router.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_answers_finish_and_exits_with_0(bus: Bus, make_engine: MakeEngine, started: list[Process], number: int) -> None:
    decode = make_engine("d", "decode")
    started.append(router := Process(bus, 20))
    wait_for(lambda: router.ready() == 200)
    decode.hold.clear()
    connection = router.ask()
    wait_for(lambda: len(decode.bodies) == 1)
    router.end(number)
    wait_for(lambda: router.ready() is None)
    assert router.process.poll() is None, "it must wait for its answer"
    decode.hold.set()
    assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
    connection.close()
    assert router.process.wait(10) == 0


def test_a_stop_waits_no_longer_than_it_may(bus: Bus, make_engine: MakeEngine, started: list[Process]) -> None:
    decode = make_engine("d", "decode")
    started.append(router := Process(bus, 1))
    wait_for(lambda: router.ready() == 200)
    decode.hold.clear()
    connection = router.ask()
    wait_for(lambda: len(decode.bodies) == 1)
    router.end()
    assert router.process.wait(10) == 0
    wait_for(lambda: decode.aborted == 1)
    connection.close()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HeadstartError, match=rf"router\.port: can't listen on 127\.0\.0\.1:{port}"):
            module.serve(RouterSettings(port=port), tmp_path)


def test_without_a_bus_it_does_not_start_and_frees_its_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUS_SECONDS_MAX", 0.2)
    before = threading.active_count()
    port = free_port("127.0.0.1")
    with pytest.raises(BusUnavailable, match="headstart cachebus"):
        module.serve(RouterSettings(port=port), tmp_path)
    socket.create_server(("127.0.0.1", port)).close()
    assert threading.active_count() == before
