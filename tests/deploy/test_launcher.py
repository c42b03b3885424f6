from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cachebus.engine import process_tree
from cachebus.errors import HeadstartError
from cachebus.ports import free_port
from deploy import launcher
from deploy.launcher import Cluster, private_run_dir
from deploy.settings import read_settings

HOST = "127.0.0.1"


def started(tmp_path: Path, *overrides: str) -> tuple[str, Cluster]:
    """Starts a cluster that can't start; its error, and what is left of it."""
    settings = read_settings(None, ["router.port=0", "cache.max_local_cpu_size=0.1", *overrides], {})
    with private_run_dir(settings) as private:
        cluster = Cluster(private, tmp_path)
        with pytest.raises(HeadstartError) as caught:
            cluster.start(lambda text: None)
    return str(caught.value), cluster


def children() -> list[str]:
    """Command lines of all that this process started and that runs."""
    found = []
    for pid in process_tree.descendants(os.getpid()):
        if process_tree.is_running(pid):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def test_a_bus_that_cannot_start_is_named_with_its_reason(tmp_path: Path) -> None:
    message, cluster = started(tmp_path, "cache.max_local_cpu_size=100000")
    assert "cachebus ended with exit code 2 while it started" in message
    assert "cache.max_local_cpu_size asks for 100000.00 GB" in message
    assert cluster.processes == {}


def test_a_worker_that_cannot_start_takes_the_others_along(tmp_path: Path) -> None:
    message, cluster = started(tmp_path, "model.name=/no/such/model", "prefill.drain_seconds_max=0", "decode.drain_seconds_max=0")
    assert "ended with exit code" in message
    assert "/no/such/model" in message
    assert cluster.processes == {}
    assert not [line for line in children() if str(tmp_path) in line or "-m deploy" in line or "api_server" in line]


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server((HOST, free_port(HOST))) as taken:
        port = taken.getsockname()[1]
        message, cluster = started(tmp_path, f"router.port={port}")
    assert f"router.port: can't listen on {HOST}:{port}" in message
    assert cluster.processes == {}


class Hasty(threading.Event):
    """Does not wait, but keeps what it was asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout)
        return self.is_set()


def test_a_role_that_dies_is_started_again_after_growing_pauses_and_not_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster = Cluster(read_settings(None, [f"cache.run_dir={tmp_path}"], {}))
    launched: list[str] = []

    def launch(name: str) -> None:
        launched.append(name)
        cluster.processes[name] = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
        cluster.processes[name].wait()

    monkeypatch.setattr(cluster, "launch", launch)
    launch("decode-0")
    ending = Hasty()
    with pytest.raises(HeadstartError, match=r"decode-0 ended 6 times, last with exit code 3: giving up"):
        launcher._keep_running(cluster, ending)
    assert launched == ["decode-0"] * 6
    assert [pause for pause in ending.pauses if pause != 1] == [2, 4, 8, 16]
