"""Roles tell the service manager when they are ready, and only then."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from units import UNITS, command, environment, read

from cachebus.engine.command import engine_environment
from cachebus.ports import free_port
from cachebus.service_manager import tell_ready
from cachebus.settings import WorkerSettings


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hs-", dir="/tmp") as made:
        yield Path(made)


class Manager:
    """Starts what a unit starts, and hears when it is ready; ``folder`` takes the place of the system's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._heard.bind(str(folder / "notify"))
        self._heard.settimeout(30)
        self.port = free_port("127.0.0.1")
        (folder / "headstart.yaml").write_text(f"cache: {{max_local_cpu_size: 0.05}}\nrouter: {{port: {self.port}}}\n")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str) -> subprocess.Popen[bytes]:
        unit = read(UNITS[name])
        arguments = [part.replace("/etc/headstart", str(self._folder)) for part in command(unit)[1:]]
        variables = {key: value.replace("/run/headstart", str(self._folder / "run")) for key, value in environment(unit).items()}
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy", *arguments], env={**os.environ, **variables, "NOTIFY_SOCKET": str(self._folder / "notify")}
        )
        self.processes.append(process)
        return process

    def heard(self) -> bytes:
        return self._heard.recv(100)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            process.wait(20)
        self._heard.close()


def test_cachebus_and_router_are_ready_when_they_say_so(folder: Path) -> None:
    manager = Manager(folder)
    try:
        bus = manager.start("headstart-cachebus.service")
        assert manager.heard() == b"READY=1"
        manager.start("headstart-router.service")
        assert manager.heard() == b"READY=1"
        assert urllib.request.urlopen(f"http://127.0.0.1:{manager.port}/health", timeout=5).status == 200
        # As `systemctl restart headstart-cachebus`: the folder stays.
        bus.terminate()
        assert bus.wait(20) == 0
        manager.start("headstart-cachebus.service")
        assert manager.heard() == b"READY=1"
    finally:
        manager.stop()


def test_an_abstract_address_is_told_and_nobody_is_no_mistake(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0headstart-{os.getpid()}")
        heard.settimeout(5)
        tell_ready({"NOTIFY_SOCKET": f"@headstart-{os.getpid()}"})
        assert heard.recv(100) == b"READY=1"
    tell_ready({})
    assert not caplog.text
    tell_ready({"NOTIFY_SOCKET": "/nowhere/notify"})
    assert "can't tell the service manager" in caplog.text


def test_an_engine_speaks_to_no_service_manager() -> None:
    assert "NOTIFY_SOCKET" not in engine_environment(WorkerSettings(), {"NOTIFY_SOCKET": "/run/systemd/notify", "PATH": "/bin"})
