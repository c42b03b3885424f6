"""Runs the router under uvicorn."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from msgspec import structs
from starlette.applications import Starlette

from cachebus.errors import HeadstartError
from cachebus.security import is_loopback
from cachebus.tenants import read_tenants
from cachebus.watch import Watch
from router.app import make_app
from router.connections import protocol
from router.gateway import BUS_SECONDS_MAX
from router.processes import asked_to_end, serve_together
from router.recent import Tracing
from router.scaling_settings import ScalingSettings
from router.settings import RouterSettings

log = logging.getLogger("headstart.router")

_BACKLOG = 2048


def serve(settings: RouterSettings, run_dir: Path, tenants_file: str = "", scaling: ScalingSettings | None = None) -> int:
    """Serves until SIGTERM or SIGINT, then lets running answers finish. Raises HeadstartError where it can't start."""
    if not is_loopback(settings.admin_host) and settings.admin_port and not tenants_file:
        place = f"router.admin_host: {settings.admin_host} can be reached from other machines"
        raise HeadstartError(f"{place}, and there are no keys: set security.tenants_file")
    if tenants_file:
        read_tenants(Path(tenants_file))
    listener = _listen("router.port", settings.host, settings.port)

    def serve_as(number: int, said: Callable[[], None]) -> int:
        own = structs.replace(settings, admin_port=settings.admin_port + number if settings.admin_port else 0)
        return _serve(own, listener, lambda: make_app(own, run_dir, tenants_file, _tracing(own), scaling), run_dir, said)

    try:
        if settings.processes == 1:
            return serve_as(0, lambda: None)
        return serve_together(settings.processes, serve_as, settings.drain_seconds_max)
    finally:
        listener.close()


def _serve(settings: RouterSettings, listener: socket.socket, app: Callable[[], Starlette], run_dir: Path, said: Callable[[], None]) -> int:
    """One process; ``said`` is called once it serves."""
    listeners = [listener]
    try:
        if settings.admin_port:
            listeners.append(_listen("router.admin_port", settings.admin_host, settings.admin_port))
        asyncio.run(_reach_bus(run_dir))
        config = uvicorn.Config(
            app(),
            log_config=None,
            http=protocol(settings),
            ws="none",
            access_log=False,
            server_header=False,
            # Nothing here asks who a client is by its address.
            proxy_headers=False,
            timeout_graceful_shutdown=settings.drain_seconds_max,
        )
        host, port = listener.getsockname()[:2]
        log.info("router ready at http://%s:%d/v1", host, port)
        server = _Server(config, said)
        # Uvicorn raises the signals that it heard again once it has stopped, and by default they would then kill this process.
        with asked_to_end(server.stop):
            server.run(sockets=listeners)
        if not server.started:
            raise HeadstartError("the router did not start: its log says why")
    finally:
        for one in listeners[1:]:
            one.close()
    log.info("router stopped")
    return 0


class _Server(uvicorn.Server):
    """``said`` is called when it has started."""

    def __init__(self, config: uvicorn.Config, said: Callable[[], None]) -> None:
        super().__init__(config)
        self._said = said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._said()

    def stop(self) -> None:
        """Has it end."""
        self.should_exit = True


def _tracing(settings: RouterSettings) -> Tracing | None:
    """Who makes spans; only then OpenTelemetry is imported. Raises HeadstartError where it is not installed."""
    if not settings.otlp_endpoint:
        return None
    try:
        from router.tracing import OtlpTracing
    except ImportError as error:
        raise HeadstartError(f"router.otlp_endpoint: {error}; install headstart with its extra `otel`") from error
    return OtlpTracing(settings.otlp_endpoint)


async def _reach_bus(run_dir: Path) -> None:
    """Fails in words before uvicorn would fail in a traceback."""
    watch = Watch(run_dir)
    await watch.start(BUS_SECONDS_MAX)
    await watch.close()


def _listen(key: str, host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise HeadstartError(f"{key}: can't listen on {host}:{port}: {error.strerror}; choose another port") from error
    return listener
