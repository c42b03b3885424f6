"""A router that really runs, and the ways to ask it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from engine_double import EngineDouble
from tests_shared import wait_for

from router.app import make_app
from router.connections import protocol
from router.recent import Tracing
from router.scaling_settings import ScalingSettings
from router.settings import RouterSettings

MakeEngine = Callable[..., EngineDouble]


class HasRunDir(Protocol):
    """A bus of the tests, in a thread or a process."""

    run_dir: Path


class RouterUnderTest:
    """A router on a port of its own."""

    def __init__(
        self, bus: HasRunDir, tenants_file: str = "", tracing: Tracing | None = None, scaling: ScalingSettings | None = None, **settings: Any
    ) -> None:
        # By rule: what costs least depends on what the machine is doing.
        rules = {"policy": "prefix_affinity", "prefill_tokens_min": 512}
        self.settings = RouterSettings(port=0, **{**rules, "body_bytes_max": 100_000, "connect_seconds_max": 1, **settings})
        self.app = make_app(self.settings, bus.run_dir, tenants_file, tracing, scaling)
        self._server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_config=None, http=protocol(self.settings)))
        admin = [self.settings.admin_port] if self.settings.admin_port else []
        self._listeners = [socket.create_server(("127.0.0.1", port)) for port in (0, *admin)]
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": self._listeners})
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.port = self._listeners[0].getsockname()[1]

    def stop(self) -> None:
        # A test that failed may have left requests that nothing will ever answer.
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        for listener in self._listeners:
            listener.close()

    @property
    def requests_seen(self) -> int:
        return self._server.server_state.total_requests

    @property
    def gateway(self) -> Any:
        return self.app.state.gateway

    def open(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[HTTPConnection, HTTPResponse]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        raw = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST", path, raw, {"content-type": "application/json", **(headers or {})})
        return connection, connection.getresponse()

    def post(self, body: Any, path: str = "/v1/completions", headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        connection, response = self.open(path, body, headers)
        raw = response.read()
        connection.close()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, raw

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        raw = response.read()
        connection.close()
        return response.status, raw

    def app_level(self, tenant: str) -> float:
        """How many tokens the tenant has left in this minute."""
        level: float = self.gateway.limiter._accounts[tenant].tokens.level
        return level

    def knows(self, count: int) -> None:
        wait_for(lambda: len(self.gateway.watch.replica.workers) == count)
