"""A worker: one engine under supervision. Both roles run it.

start:  reach the bus, start the engine, wait until it is healthy, register
run:    watch the engine's processes; a restarted cachebus is told again; tell what is in HBM (hbm_relay.py)
drain:  on SIGTERM or SIGINT: tell the bus, let running requests end, end the engine, leave
die:    when any process of the engine dies, kill the rest and leave
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

from prometheus_client import CollectorRegistry, Gauge

from cachebus.client import BusClient
from cachebus.engine import process_tree
from cachebus.engine.adapters import check_unchanged, read_adapters
from cachebus.engine.command import (
    PROVEN_VERSIONS,
    WorkerSpec,
    engine_command,
    engine_environment,
    installed_vllm,
    served_name,
    takes_prompt_token_ids,
)
from cachebus.engine.hbm_relay import HbmRelay
from cachebus.errors import BusError
from cachebus.exposition import expose
from cachebus.holder import Holder
from cachebus.keeper import Keeper
from cachebus.messages import Drain, Leave, RegisterWorker, Request
from cachebus.ports import check_free, free_port, told_host
from cachebus.service_manager import tell_ready
from cachebus.zeromq_engine import EngineEndpoints, EngineEvents

EXIT_DRAINED, EXIT_ENGINE_DIED, EXIT_ENGINE_NOT_STARTED = 0, 3, 4

BUS_MS_MAX = 5000
PROGRESS_SECONDS = 5.0
WATCH_SECONDS = 0.2
ENGINE_END_SECONDS_MAX = 15
_LINES_KEPT, _ERRORS_KEPT = 5, 5
_IDLE_LOOKS = 2
"""An engine is idle when it was seen so twice: a router that had not heard of the drain may have sent one more request."""
_BUSY = re.compile(rb"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.e+]+)", re.MULTILINE)


class EngineOutput(threading.Thread):
    """Passes the engine's output on to stderr, each line under the worker's name, and keeps the last lines and the last errors.

    An engine core's error is followed by the long traceback of the API server that waited for it, so the last lines alone don't say why.
    """

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        super().__init__(name="engine-output", daemon=True)
        self._process, self._label = process, name
        self.last: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        self.errors: collections.deque[str] = collections.deque(maxlen=_ERRORS_KEPT)

    def run(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self.last.append(line)
            if "Error" in line or "error:" in line:
                self.errors.append(line)
            sys.stderr.write(f"[{self._label}] {line}\n")


class WorkerProcess:
    """One worker's life; ``run`` returns its exit code."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._log = logging.getLogger(f"headstart.{spec.role}")
        self._ending = threading.Event()
        self._forced = threading.Event()
        self._not_ready = "the engine starts"
        self._pids: list[int] = []
        self._shared: set[Path] = set()
        self._endpoints = EngineEndpoints.make(spec.run_dir)

    def run(self) -> int:
        """Runs the worker. Raises HeadstartError where it can't even begin (no bus, port in use, no vLLM)."""
        version = installed_vllm()
        spec = self._spec = dataclasses.replace(self._spec, adapters=read_adapters(self._spec.model, version, os.environ))
        if ".".join(map(str, version)) not in PROVEN_VERSIONS:
            self._log.warning("vLLM %s was not tried with this release; tried: %s", ".".join(map(str, version)), ", ".join(PROVEN_VERSIONS))
        holder = Holder(spec.run_dir)
        client = BusClient(spec.run_dir, f"{spec.worker} supervisor", holder)
        client.connect(BUS_MS_MAX)
        port = _port(spec)
        self._up = self._serve_metrics()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked_to_end)
        url = f"http://{told_host(spec.pool.host)}:{port}"
        command = engine_command(spec, port, version, self._endpoints)
        environment = engine_environment(spec.pool, os.environ)
        engine = process_tree.start(command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = EngineOutput(engine, spec.worker)
        output.start()
        try:
            failure = self._await_health(engine, url)
            if failure:
                tail = "\n".join(output.errors or output.last)
                self._log.error("the engine did not start: %s\n%s", failure, tail)
                return EXIT_ENGINE_NOT_STARTED
            if self._ending.is_set():
                return EXIT_DRAINED
            check_unchanged(spec.adapters)
            return self._serve(engine, url, holder, client, version)
        finally:
            process_tree.kill_tree(engine, self._pids, self._shared)
            self._endpoints.remove()
            client.close()
            holder.close()

    def _serve(self, engine: subprocess.Popen[bytes], url: str, holder: Holder, client: BusClient, version: tuple[int, ...]) -> int:
        spec = self._spec
        registration: Request = RegisterWorker(
            worker=spec.worker,
            role=spec.role,
            holder=holder.id,
            url=url,
            model=served_name(spec.model),
            max_model_len=_max_model_len(url),
            takes_prompt_token_ids=takes_prompt_token_ids(version),
            adapters={adapter.name: adapter.digest for adapter in spec.adapters},
        )
        epoch = client.connect(BUS_MS_MAX).epoch
        client.call(registration, BUS_MS_MAX)
        keeper = Keeper(spec.run_dir, spec.worker, holder, lambda: registration, epoch)
        keeper.start()
        relay = HbmRelay(spec.run_dir, spec.worker, holder, lambda: EngineEvents(self._endpoints))
        if spec.cache.hbm_events:
            relay.start()
        self._pids = process_tree.descendants(engine.pid)
        self._shared = process_tree.shared_memory([engine.pid, *self._pids])
        self._up.set(1)
        self._not_ready = ""
        tell_ready(os.environ)
        self._log.info("%s ready: %s at %s", spec.worker, served_name(spec.model), url)
        while not self._ending.wait(WATCH_SECONDS):
            gone = [pid for pid in [engine.pid, *self._pids] if not process_tree.is_running(pid)]
            if gone:
                self._log.error("%s: the engine's process %d died: ending the rest of it", spec.worker, gone[0])
                self._leave(client, keeper, relay)
                return EXIT_ENGINE_DIED
        self._drain(engine, url, client)
        self._leave(client, keeper, relay)
        return EXIT_DRAINED

    def _await_health(self, engine: subprocess.Popen[bytes], url: str) -> str:
        """ "" once the engine is healthy or the worker is asked to end, else why it is not."""
        started = time.monotonic()
        told = started
        while not self._ending.is_set():
            if engine.poll() is not None:
                return f"it ended with exit code {engine.returncode}"
            if _get(f"{url}/health") is not None:
                return ""
            now = time.monotonic()
            if now - started > self._spec.pool.start_seconds_max:
                return f"it was not ready after {self._spec.pool.start_seconds_max} s ({self._spec.role}.start_seconds_max)"
            if now - told >= PROGRESS_SECONDS:
                told = now
                self._log.info("%s is loading %s, %d s", self._spec.worker, served_name(self._spec.model), now - started)
            self._ending.wait(WATCH_SECONDS)
        return ""

    def _drain(self, engine: subprocess.Popen[bytes], url: str, client: BusClient) -> None:
        spec = self._spec
        self._up.set(0)
        self._not_ready = "the worker drains"
        try:
            client.call(Drain(spec.worker), BUS_MS_MAX)
        except BusError as error:
            self._log.warning("can't tell the bus that %s drains: %s", spec.worker, error)
        self._log.info("%s drains: running requests may take %d s", spec.worker, spec.pool.drain_seconds_max)
        deadline = time.monotonic() + spec.pool.drain_seconds_max
        idle_looks = 0
        while idle_looks < _IDLE_LOOKS and time.monotonic() < deadline and not self._forced.is_set() and engine.poll() is None:
            idle_looks = 0 if _busy(url) else idle_looks + 1
            self._forced.wait(WATCH_SECONDS)
        engine.send_signal(signal.SIGTERM)
        try:
            engine.wait(ENGINE_END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._log.warning("%s: the engine did not end by itself", spec.worker)

    def _leave(self, client: BusClient, keeper: Keeper, relay: HbmRelay) -> None:
        keeper.stop()
        relay.stop()
        try:
            client.call(Leave(self._spec.worker), BUS_MS_MAX)
        except BusError as error:
            self._log.warning("can't tell the bus that %s leaves: %s", self._spec.worker, error)

    def _serve_metrics(self) -> Gauge:
        """Raises HeadstartError where the port is taken."""
        spec = self._spec
        registry = CollectorRegistry()
        up = Gauge("headstart_worker_up", "1 while the worker takes requests", ["worker", "role"], registry=registry)
        if spec.pool.metrics_port:
            expose(f"{spec.role}.metrics_port", (spec.pool.host, spec.pool.metrics_port), registry, lambda: "", lambda: self._not_ready)
        return up.labels(spec.worker, spec.role)

    def _asked_to_end(self, _signal: int, _frame: FrameType | None) -> None:
        if self._ending.is_set():
            self._forced.set()
        self._ending.set()


def _port(spec: WorkerSpec) -> int:
    """The port for the engine. Raises HeadstartError where the one asked for is taken."""
    if not spec.pool.port:
        return free_port(spec.pool.host)
    check_free(f"{spec.role}.port", spec.pool.host, spec.pool.port)
    return spec.pool.port


def _get(url: str) -> bytes | None:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            body: bytes = answer.read()
            return body
    except (urllib.error.URLError, OSError):
        return None


def _busy(url: str) -> bool:
    """Whether the engine has requests; one that does not say in time may be too busy to."""
    exposition = _get(f"{url}/metrics")
    return exposition is None or any(float(value) > 0 for value in _BUSY.findall(exposition))


def _max_model_len(url: str) -> int:
    models = json.loads(_get(f"{url}/v1/models") or b"{}").get("data") or [{}]
    return int(models[0].get("max_model_len") or 0)
