"""Runs the router under uvicorn."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

import uvicorn

from cachebus.errors import HeadstartError
from cachebus.watch import Watch
from router.app import make_app
from router.gateway import BUS_SECONDS_MAX
from router.settings import RouterSettings

log = logging.getLogger("headstart.router")

_BACKLOG = 2048


def serve(settings: RouterSettings, run_dir: Path) -> int:
    """Serves until SIGTERM or SIGINT, then lets running answers finish. Raises HeadstartError where it can't start."""
    listener = _listen(settings)
    try:
        asyncio.run(_reach_bus(run_dir))
        config = uvicorn.Config(
            make_app(settings, run_dir),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=settings.drain_seconds_max,
        )
        host, port = listener.getsockname()[:2]
        log.info("router ready at http://%s:%d/v1", host, port)
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()
    log.info("router stopped")
    return 0


async def _reach_bus(run_dir: Path) -> None:
    """Fails in words before uvicorn would fail in a traceback."""
    watch = Watch(run_dir)
    await watch.start(BUS_SECONDS_MAX)
    await watch.close()


def _listen(settings: RouterSettings) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise HeadstartError(f"router.port: can't listen on {settings.host}:{settings.port}: {error.strerror}; choose another port") from error
    return listener
