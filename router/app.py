"""The router's routes."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cachebus.service_manager import tell_ready
from router.access import Access
from router.admin import Admin, ByPort, check_admin, metrics, scaling_answer
from router.apis import ASKING, GENERATING
from router.asking import AskingEndpoint
from router.console import Console
from router.endpoint import GenerationEndpoint
from router.errors import ApiError
from router.gateway import Gateway
from router.openapi import routes as openapi_routes
from router.recent import Tracing
from router.scaling_settings import ScalingSettings
from router.settings import RouterSettings
from router.stored import routes as stored_routes


def make_app(
    settings: RouterSettings, run_dir: Path, tenants_file: str = "", tracing: Tracing | None = None, scaling: ScalingSettings | None = None
) -> Starlette:
    """The router as an ASGI application. Its start raises BusUnavailable where there is no bus."""
    gateway = Gateway(settings, run_dir, tenants_file, tracing, scaling)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await gateway.start()
        tell_ready(os.environ)
        try:
            yield
        finally:
            await gateway.close()

    async def health(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(_request: Request) -> Response:
        if gateway.ready:
            return PlainTextResponse("ready\n")
        missing = "no decode worker is ready" if gateway.watch.connected else "the cachebus does not answer"
        return PlainTextResponse(missing + "\n", 503)

    async def models(_request: Request) -> Response:
        decoding = [w for w in gateway.watch.replica.workers.values() if w.role == "decode"]
        served = {name: (w.model, w.max_model_len) for w in decoding for name in (w.model, *w.adapters)}
        data = [
            {"id": name, "object": "model", "created": started, "owned_by": "headstart", "max_model_len": length}
            | ({"parent": model} if name != model else {})
            for name, (model, length) in sorted(served.items())
        ]
        return JSONResponse({"object": "list", "data": data})

    async def its_metrics(request: Request) -> Response:
        check_admin(gateway, dict(request.headers.raw))
        return metrics(gateway)

    async def sizes(request: Request) -> Response:
        check_admin(gateway, dict(request.headers.raw))
        return scaling_answer(gateway)

    routes = [
        *(Route(path, GenerationEndpoint(gateway, path), methods=["POST"]) for path in GENERATING),
        *(Route(path, AskingEndpoint(gateway, path), methods=["POST"]) for path in ASKING),
        *stored_routes(),
        *openapi_routes(),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", its_metrics),
        Route("/scaling", sizes),
        *Console(gateway).routes(lambda request: check_admin(gateway, dict(request.headers.raw))),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(ByPort, Admin(gateway, run_dir), settings.admin_port), Middleware(Access, lambda: gateway.tenants, gateway.limiter)],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error, ApiError: _refused, Exception: _unexpected},
    )
    app.state.gateway = gateway
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return ApiError(error.status_code, error.detail, code=code).response(dict(error.headers or {}), request.url.path)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response({}, request.url.path)


async def _unexpected(request: Request, _error: Exception) -> Response:
    """A fault of the router's own: Starlette raises it again after this answer, so the log has it in full."""
    return ApiError(500, "the router failed; its log says why", code="internal_error").response({}, request.url.path)
