"""Router processes that share a port, with simulated workers: all take requests, one that is killed is replaced, all end when they are asked to."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sim_cluster import PROFILE, SimCluster, post, right
from tests_shared import Bus, wait_for

from cachebus.ports import free_port
from deploy.cli import main

HOST = "127.0.0.1"
PROCESSES, CLIENTS, TOKENS = 2, 8, 8


class Routers:
    """The processes, as a user starts them."""

    def __init__(self, run_dir: Path) -> None:
        first = free_port(HOST, PROCESSES + 1)
        self.url, self.admin = f"http://{HOST}:{first}", [f"http://{HOST}:{first + number}" for number in range(1, PROCESSES + 1)]
        settings = [f"cache.run_dir={run_dir}", f"router.port={first}", f"router.admin_port={first + 1}", "router.drain_seconds_max=5"]
        command = [sys.executable, "-m", "deploy", "router", "--workers", str(PROCESSES), *(part for one in settings for part in ("--set", one))]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def requests(self) -> list[float]:
        """How many each of them has answered; -1 where it does not say."""
        return [sum(map(float, re.findall(r"^headstart_requests_total\{.*\} (\S+)$", said(f"{url}/metrics"), re.MULTILINE))) for url in self.admin]

    def serve(self) -> bool:
        return all(said(f"{url}/metrics") for url in self.admin)


def said(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


@pytest.fixture
def routers(bus: Bus) -> Iterator[Routers]:
    found = Routers(bus.run_dir)
    yield found
    if found.process.poll() is None:
        found.process.kill()
    found.process.communicate(timeout=20)


def ask(url: str, seed: int) -> bool:
    """Whether the answer is right."""
    chance = random.Random(seed)
    prompt = [chance.randrange(100_000) for _ in range(400)]
    body = {"model": PROFILE.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    status, answer = post(url, "/v1/completions", body)
    assert status == 200, answer
    return bool(answer["choices"][0]["token_ids"] == right(prompt, TOKENS))


def test_all_take_requests_and_one_that_dies_is_replaced(sims: SimCluster, routers: Routers) -> None:
    sims.launch("p", "prefill")
    sims.launch("d", "decode", 2)
    sims.ready(3)
    wait_for(routers.serve, 30)
    with ThreadPoolExecutor(CLIENTS) as pool:
        assert all(pool.map(lambda seed: ask(routers.url, seed), range(64)))
    counts = routers.requests()
    assert sum(counts) == 64
    assert all(counts), f"one of them was not asked: {counts}"

    before = routers.children()
    assert len(before) == PROCESSES
    os.kill(before[0], signal.SIGKILL)
    wait_for(lambda: before[0] not in routers.children())
    assert all(ask(routers.url, seed) for seed in range(64, 72)), "the others go on"
    wait_for(lambda: len(routers.children()) == PROCESSES and routers.serve(), 30)

    routers.process.send_signal(signal.SIGTERM)
    assert routers.process.wait(20) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)


def test_a_killed_parent_leaves_nobody_behind(routers: Routers) -> None:
    wait_for(routers.serve, 30)
    children = routers.children()
    routers.process.kill()
    routers.process.wait(5)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 20)


def test_what_keeps_a_router_from_starting_is_said_once(tmp_path: Path) -> None:
    ports = free_port(HOST, 3)
    arguments = ["--workers", "2", "--set", f"cache.run_dir={tmp_path}", "--set", f"router.port={ports}", "--set", f"router.admin_port={ports + 1}"]
    done = subprocess.run([sys.executable, "-m", "deploy", "router", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "no cachebus answers" in done.stderr


def test_processes_that_end_again_and_again_end_the_whole(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    script = f"""
import sys
from pathlib import Path
from router import processes
processes._AGAIN_SECONDS = 0.0
def serve(number, said):
    said()
    with Path({str(lives)!r}).open("a") as file:
        file.write(str(number))
    return 7
sys.exit(processes.serve_together(3, serve, 1.0))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert 5 <= len(lives.read_text()) <= 10


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--workers", "2"], "router.processes: 2 processes have metrics of their own each: give admin_port"),
        (["--workers", "0"], "router.processes: 0 is too small"),
        (["--workers", "3", "--set", "router.admin_port=7998"], "router.admin_port: 8000 is router.port, too"),
        (["--workers", "3", "--set", "router.admin_port=65534"], "router.admin_port: 65534 leaves no ports for 3 processes"),
    ],
)
def test_settings_that_can_not_be(given: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["router", *given]) == 2
    assert problem in capsys.readouterr().err
