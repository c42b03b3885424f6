"""The systems that the prefix benchmark measures, each as a context in which prompts can be asked. One runs at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cachebus.engine import process_tree
from cachebus.engine.command import served_name
from cachebus.errors import HeadstartError
from deploy.client import Answer, ask
from deploy.launcher import Cluster, answers, free_port, private_run_dir
from deploy.reference import PlainEngine, Variant
from deploy.settings import Settings

COMPLETIONS = "/v1/completions"
ANSWER_TOKENS = 8
SETTLE_SECONDS = 0.5
_NEVER = 1 << 30
_LMCACHE_START_SECONDS_MAX = 120
_LMCACHE_GB = 4

Ask = Callable[[str], Answer]
"""Sends one prompt and returns the answer."""


@dataclass(frozen=True)
class Case:
    """One way to ask: ``fresh`` with a prompt nobody has seen, else with the prompt that the case before it asked."""

    name: str
    fresh: bool
    ask: Ask


def _asker(url: str, settings: Settings) -> Ask:
    def send(prompt: str) -> Answer:
        time.sleep(SETTLE_SECONDS)
        body = {"model": served_name(settings.model), "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        return ask(url, COMPLETIONS, body)

    return send


@contextmanager
def plain_vllm(settings: Settings, logs: Path, progress: Callable[[str], None]) -> Iterator[list[Case]]:
    """vLLM alone: cold, and a hit of its own prefix cache."""
    engine = PlainEngine(settings.model, settings.decode, logs / "vllm.log")
    engine.start(progress)
    try:
        send = _asker(engine.url, settings)
        yield [Case("cold", True, send), Case("hbm", False, send)]
    finally:
        engine.stop()


@contextmanager
def headstart(settings: Settings, logs: Path, progress: Callable[[str], None]) -> Iterator[list[Case]]:
    """A cluster: cold by the default route, a hit on the other decode worker, and cold with each route forced."""
    pools = {"prefill": msgspec.structs.replace(settings.prefill, count=1), "decode": msgspec.structs.replace(settings.decode, count=2)}
    router = msgspec.structs.replace(settings.router, port=0)
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
                answer = send(prompt)
                if answer.headers["x-headstart-worker"] == answered_by or "dram" not in answer.headers["x-headstart-cache-source"]:
                    raise HeadstartError("the hit was not on another worker, or not from DRAM")
                return answer

            yield [
                Case("cold", True, cold),
                Case("dram", False, hit_elsewhere),
                Case("cold, decode alone", True, _forced(cluster, private, "router-decode", _NEVER)),
                Case("cold, prefill+decode", True, _forced(cluster, private, "router-split", 1)),
            ]
        finally:
            cluster.stop()


def _forced(cluster: Cluster, settings: Settings, name: str, prefill_tokens_min: int) -> Ask:
    """Asks through a second router that always takes one route."""
    port = free_port(settings.router.host)
    cluster.launch(name, "--set", f"router.port={port}", "--set", f"router.prefill_tokens_min={prefill_tokens_min}")
    url = f"http://{settings.router.host}:{port}"
    deadline = time.monotonic() + 60
    while not answers(f"{url}/ready"):
        if time.monotonic() > deadline:
            raise HeadstartError(f"{name} did not get ready")
        time.sleep(0.2)
    return _asker(url, settings)


@contextmanager
def lmcache(settings: Settings, logs: Path, progress: Callable[[str], None], python: str = sys.executable) -> Iterator[list[Case]]:
    """vLLM with LMCache's server mode over shared memory: miss, and hit after vLLM's own prefix cache was emptied."""
    port, http_port = free_port("127.0.0.1"), free_port("127.0.0.1")
    name = f"headstart-bench-{os.getpid()}"
    command = [python, "-c", "from lmcache.cli.main import main; main()", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--http-host", "127.0.0.1", "--http-port", str(http_port), "--supported-transfer-mode", "auto", "--shm-name", name]
    command += ["--chunk-size", str(settings.cache.chunk_size), "--l1-size-gb", str(_LMCACHE_GB), "--eviction-policy", "LRU"]
    environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0"}
    with (logs / "lmcache-server.log").open("ab") as out:
        server = process_tree.start(command, environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _LMCACHE_START_SECONDS_MAX
        while not answers(f"http://127.0.0.1:{http_port}/healthcheck"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise HeadstartError(f"LMCache's server did not start: see {logs / 'lmcache-server.log'}")
            time.sleep(0.2)
        connector = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
        }
        arguments = ["--kv-transfer-config", json.dumps(connector), "--disable-hybrid-kv-cache-manager"]
        variant = Variant(arguments, {"VLLM_SERVER_DEV_MODE": "1", "LMCACHE_TRACK_USAGE": "false"}, python)
        engine = PlainEngine(settings.model, settings.decode, logs / "lmcache-vllm.log", variant)
        engine.start(progress)
        try:
            send = _asker(engine.url, settings)

            def after_reset(prompt: str) -> Answer:
                time.sleep(SETTLE_SECONDS)
                with urllib.request.urlopen(urllib.request.Request(f"{engine.url}/reset_prefix_cache", method="POST"), timeout=10) as reply:
                    if reply.status != 200:
                        raise HeadstartError("vLLM's prefix cache was not emptied")
                answer = send(prompt)
                if not answer.cached_tokens:
                    raise HeadstartError("LMCache's hit was a miss")
                return answer

            yield [Case("cold", True, send), Case("dram", False, after_reset)]
        finally:
            engine.stop()
    finally:
        process_tree.kill_tree(server)
