"""The systems that the prefix benchmark measures, each as a context in which prompts can be asked. One runs at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cachebus.engine import process_tree
from cachebus.engine.command import served_name
from cachebus.errors import HeadstartError
from cachebus.ports import free_port
from deploy.bench import goals
from deploy.client import Answer, ask
from deploy.launcher import Cluster, answers, private_run_dir
from deploy.reference import PlainEngine, Variant
from deploy.settings import Settings

COMPLETIONS = "/v1/completions"
ANSWER_TOKENS = 8
SETTLE_SECONDS = 0.5
_NEVER = 1 << 30
_LMCACHE_START_SECONDS_MAX = 120
_LMCACHE_END_SECONDS_MAX = 20
_LMCACHE_GB = 4
_TRIES_MAX = 5

Ask = Callable[[str], Answer]
"""Sends one prompt and returns the answer."""


@dataclass(frozen=True)
class Case:
    """One way to ask: ``fresh`` with a prompt nobody has seen, else with the prompt that the case before it asked.

    A case that is not ``timed`` is asked once a prompt length, for its tokens only.
    """

    name: str
    fresh: bool
    ask: Ask
    timed: bool = True


def _asker(url: str, settings: Settings) -> Ask:
    def send(prompt: str) -> Answer:
        time.sleep(SETTLE_SECONDS)
        body = {"model": served_name(settings.model), "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        return ask(url, COMPLETIONS, body)

    return send


@contextmanager
def plain_vllm(settings: Settings, logs: Path, progress: Callable[[str], None]) -> Iterator[list[Case]]:
    """vLLM alone: cold, and a hit of its own prefix cache. It also answers the prompts that only Headstart's further routes are asked."""
    engine = PlainEngine(settings.model, settings.decode, logs / "vllm.log")
    engine.start(progress)
    try:
        send = _asker(engine.url, settings)
        yield [
            Case(goals.COLD, True, send),
            Case(goals.OWN_HIT, False, send),
            Case(goals.COLD_BY_DECODE, True, send, timed=False),
            Case(goals.COLD_BY_BOTH, True, send, timed=False),
        ]
    finally:
        engine.stop()


@contextmanager
def headstart(settings: Settings, logs: Path, progress: Callable[[str], None]) -> Iterator[list[Case]]:
    """A cluster: cold by the default route, a hit on the other decode worker, and cold with each route forced."""
    pools = {"prefill": msgspec.structs.replace(settings.prefill, count=1), "decode": msgspec.structs.replace(settings.decode, count=2)}
    # By its HBM a router would find the worker that computed, and nothing would be pulled.
    router = msgspec.structs.replace(settings.router, port=0, policy="least_loaded")
    with private_run_dir(msgspec.structs.replace(settings, router=router, **pools)) as private:
        cluster = Cluster(private, logs)
        cluster.start(progress)
        try:
            send = _asker(cluster.url, private)
            answered_by = ""

            def cold(prompt: str) -> Answer:
                nonlocal answered_by
                answer = send(prompt)
                answered_by = answer.headers["x-headstart-worker"]
                return answer

            def hit_elsewhere(prompt: str) -> Answer:
                # The router takes the workers in turn; a request that it answered in between shifts the turn.
                for _ in range(_TRIES_MAX):
                    answer = send(prompt)
                    if answer.headers["x-headstart-worker"] != answered_by:
                        break
                worker, source = answer.headers["x-headstart-worker"], answer.headers["x-headstart-cache-source"]
                if worker == answered_by or "dram" not in source:
                    raise HeadstartError(f"the hit was not on another worker from DRAM, but on {worker} after {answered_by}, from {source}")
                return answer

            yield [
                Case(goals.COLD, True, cold),
                Case(goals.HIT, False, hit_elsewhere),
                Case(goals.COLD_BY_DECODE, True, _forced(cluster, private, "router-decode", _NEVER)),
                Case(goals.COLD_BY_BOTH, True, _forced(cluster, private, "router-split", 1)),
            ]
        finally:
            cluster.stop()


def _forced(cluster: Cluster, settings: Settings, name: str, prefill_tokens_min: int) -> Ask:
    """Asks through a second router that always takes one route."""
    # By rule, so that the route measured is the one that was meant.
    return _asker(cluster.add_router(name, "router.policy=prefix_affinity", f"router.prefill_tokens_min={prefill_tokens_min}"), settings)


@contextmanager
def lmcache(settings: Settings, logs: Path, progress: Callable[[str], None], python: str = sys.executable) -> Iterator[list[Case]]:
    """vLLM with LMCache's server mode over shared memory: miss, and hit after vLLM's own prefix cache was emptied.

    The hit is on the same engine: a second one would cost two cores more than the emptying does.
    """
    with lmcache_server(settings, logs, python) as port:
        arguments = ["--kv-transfer-config", json.dumps(lmcache_transfer(port)), "--disable-hybrid-kv-cache-manager"]
        variant = Variant(arguments, {"VLLM_SERVER_DEV_MODE": "1", "LMCACHE_TRACK_USAGE": "false"}, python)
        engine = PlainEngine(settings.model, settings.decode, logs / "lmcache-vllm.log", variant)
        engine.start(progress)
        try:
            send = _asker(engine.url, settings)

            def after_emptying(prompt: str) -> Answer:
                _empty_prefix_cache(engine.url)
                answer = send(prompt)
                if not answer.cached_tokens:
                    raise HeadstartError("LMCache's hit was a miss")
                return answer

            yield [Case(goals.COLD, True, send), Case(goals.HIT, False, after_emptying)]
        finally:
            engine.stop()


def lmcache_transfer(port: int) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` for LMCache's server mode."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
    }


@contextmanager
def lmcache_server(settings: Settings, logs: Path, python: str = sys.executable, gigabytes: int = _LMCACHE_GB) -> Iterator[int]:
    """LMCache's server with ``gigabytes`` of memory; gives its port."""
    port, http_port = free_port("127.0.0.1"), free_port("127.0.0.1")
    name = f"headstart-bench-{os.getpid()}"
    command = [python, "-c", "from lmcache.cli.main import main; main()", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--http-host", "127.0.0.1", "--http-port", str(http_port), "--supported-transfer-mode", "auto", "--shm-name", name]
    command += ["--chunk-size", str(settings.cache.chunk_size), "--l1-size-gb", str(gigabytes), "--eviction-policy", "LRU"]
    environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0"}
    with (logs / "lmcache-server.log").open("ab") as out:
        server = process_tree.start(command, environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _LMCACHE_START_SECONDS_MAX
        while not answers(f"http://127.0.0.1:{http_port}/healthcheck"):
            if server.poll() is not None or time.monotonic() > deadline:
                lines = (logs / "lmcache-server.log").read_text(errors="replace").splitlines()[-12:]
                raise HeadstartError("LMCache's server did not start:\n  " + "\n  ".join(lines))
            time.sleep(0.2)
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(_LMCACHE_END_SECONDS_MAX)
        process_tree.kill_tree(server)
        # A server that had to be killed leaves its memory behind.
        Path(f"/dev/shm/lmcache_l1_pool_{name}").unlink(missing_ok=True)


def _empty_prefix_cache(url: str) -> None:
    """Empties vLLM's own prefix cache, which it refuses while blocks are held."""
    for _ in range(_TRIES_MAX):
        time.sleep(SETTLE_SECONDS)
        with urllib.request.urlopen(urllib.request.Request(f"{url}/reset_prefix_cache", method="POST"), timeout=10) as reply:
            if json.load(reply).get("success"):
                return
    raise HeadstartError("vLLM's own prefix cache could not be emptied")
