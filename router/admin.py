"""What only operators may ask: a port of its own, on loopback unless told otherwise; elsewhere an admin's key is asked for."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from cachebus.client import BusClient
from cachebus.errors import BusError
from cachebus.messages_tools import Clear, Count
from cachebus.security import is_loopback
from router.access import authenticated
from router.console import PAGE, Console
from router.errors import ApiError
from router.gateway import Gateway

log = logging.getLogger("headstart.router")

_CLEAR_MS_MAX = 10_000
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ByPort:
    """An ASGI application that hands what came in at ``admin_port`` (0: none) to ``admin``, and all else to ``app``."""

    def __init__(self, app: ASGIApp, admin: ASGIApp, admin_port: int) -> None:
        self._app, self._admin, self._port = app, admin, admin_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The port is the socket's own, so nothing that a client sends can change it."""
        server = scope.get("server")
        at_admin = scope["type"] == "http" and self._port and server is not None and server[1] == self._port
        await (self._admin if at_admin else self._app)(scope, receive, send)


class Admin:
    """The admin routes as an ASGI application. ``run_dir`` is the bus's."""

    def __init__(self, gateway: Gateway, run_dir: Path) -> None:
        self._gateway, self._run_dir = gateway, run_dir
        console = Console(gateway)
        self._open = is_loopback(gateway.settings.admin_host)
        self._routes = Router(
            [
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/scaling", self._scaling),
                Route("/tenants", self._tenants),
                Route("/tenants/{name}/cache", self._clear, methods=["DELETE"]),
                *console.routes(),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request. Errors are answered as everywhere."""
        try:
            if not self._open and scope["path"] not in PAGE:
                check_admin(self._gateway, dict(scope["headers"]))
            await self._routes({**scope, "app": None}, receive, send)
        except ApiError as error:
            await error.response({})(scope, receive, send)
        except HTTPException as error:
            found = ApiError(error.status_code, error.detail, code="unknown_url" if error.status_code == 404 else "method_not_allowed")
            await found.response({})(scope, receive, send)

    async def _health(self, _request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _metrics(self, _request: Request) -> Response:
        return metrics(self._gateway)

    async def _scaling(self, _request: Request) -> Response:
        return scaling_answer(self._gateway)

    async def _tenants(self, _request: Request) -> Response:
        tenants = self._gateway.tenants
        if tenants is not None:
            tenants.look()
        named = tenants.now.named if tenants is not None else {}
        kept = ("group", "requests_per_minute", "tokens_per_minute", "cache_share_max", "priority_max", "admin")
        rows = [{"name": name, "keys": len(tenant.keys), **{field: getattr(tenant, field) for field in kept}} for name, tenant in named.items()]
        return JSONResponse({"tenants": rows})

    async def _clear(self, request: Request) -> Response:
        tenants, name = self._gateway.tenants, request.path_params["name"]
        if tenants is not None:
            tenants.look()
        if tenants is None or name not in tenants.now.named:
            raise ApiError(404, f"there is no tenant {name}", code="tenant_not_found", param="name")
        owner = tenants.now.owner(name)
        try:
            dropped = await asyncio.to_thread(_drop, self._run_dir, owner.tenant)
        except BusError as error:
            raise ApiError(503, str(error), code="cache_unavailable") from error
        # The bus tells all routers; this one answers when it has done it.
        self._gateway.remembered.clear(owner.tenant)
        log.info("the cache of tenant %s was cleared: %d chunks", name, dropped)
        return JSONResponse({"tenant": name, "dropped": dropped, "shared_with": list(owner.others)})


def _drop(run_dir: Path, tenant: bytes) -> int:
    client = BusClient(run_dir, "router")
    try:
        reply = client.call(Clear(["dram", "nvme", "redis"], tenant), _CLEAR_MS_MAX)
        assert isinstance(reply, Count)
        return reply.count
    finally:
        client.close()


def metrics(gateway: Gateway) -> Response:
    """Prometheus' text format."""
    workers, now = gateway.watch.replica.workers.values(), time.monotonic()
    out, backlog = gateway.fleet.health.out(workers, now), gateway.fleet.prefill_backlog(workers, now)
    return Response(gateway.metrics.exposition(workers, out, backlog), media_type=METRICS_TYPE)


def scaling_answer(gateway: Gateway) -> Response:
    """How many workers there should be, as JSON. Raises ApiError (503) where that is not known: then nobody scales by it."""
    answer = gateway.scaler.answer(time.monotonic())
    if answer is None:
        raise ApiError(503, "the pools' wanted sizes are not known yet, or scaling.reading_seconds is 0", code="scaling_unknown")
    return JSONResponse(answer)


def check_admin(gateway: Gateway, headers: dict[bytes, bytes]) -> None:
    """Raises ApiError (401, 403) where the request carries no admin's key though there are keys."""
    if gateway.tenants is None:
        return
    _, tenant = authenticated(gateway.tenants, headers)
    if not tenant.admin:
        raise ApiError(403, "only a tenant with `admin: true` may ask this", code="not_an_admin")
