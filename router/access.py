"""Who may ask at all: the keys of tenants, and what each may ask in a minute. Stands before every route."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cachebus.tenants import Tenant, TenantsFile
from router.callers import Caller, put, terms_of
from router.door import PRIORITY_HEADER, urgency_of
from router.errors import ApiError
from router.limits import Limiter, Meter
from router.usage import counted, events_in

OPEN_PATHS = ("/health", "/ready")
_BEARER = b"bearer "


class Access:
    """An ASGI application before another. ``tenants`` gives the tenants once the router has started; None: no keys, everybody is one tenant."""

    def __init__(self, app: ASGIApp, tenants: Callable[[], TenantsFile | None], limiter: Limiter) -> None:
        self._app, self._tenants, self._limiter = app, tenants, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets the request through with its caller noted, or answers it (400, 401, 429)."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            caller, limited = self._caller(scope)
        except ApiError as error:
            extra = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            await error.response(extra, scope["path"])(scope, receive, send)
            return
        put(scope, caller)
        await self._app(scope, receive, _metered(send, caller.meter) if limited else send)

    def _caller(self, scope: Scope) -> tuple[Caller, bool]:
        tenants, headers = self._tenants(), dict(scope["headers"])
        if tenants is None:
            return Caller(terms=terms_of(headers, "")), False
        name, tenant = authenticated(tenants, headers)
        terms = terms_of(headers, tenants.now.salts[name])
        if scope["method"] == "POST":
            if urgency_of(headers, 0.0, 0.0).priority > tenant.priority_max:
                text = f"{PRIORITY_HEADER} may be {tenant.priority_max} at most (priority_max of tenant {name})"
                raise ApiError(403, text, code="priority_too_high", param=PRIORITY_HEADER)
            self._admit(name, tenant)

        def spend(tokens: int) -> None:
            self._limiter.spend(name, tokens, time.monotonic())

        return Caller(name, terms, Meter(spend)), bool(tenant.tokens_per_minute)

    def _admit(self, name: str, tenant: Tenant) -> None:
        refusal = self._limiter.admit(name, tenant.requests_per_minute, tenant.tokens_per_minute, time.monotonic())
        if refusal:
            text = f"Rate limit reached: {refusal.per_minute} {refusal.what} per minute. Try again in {refusal.seconds} s."
            raise ApiError(429, text, code="rate_limit_exceeded", retry_seconds=refusal.seconds)


def authenticated(tenants: TenantsFile, headers: dict[bytes, bytes]) -> tuple[str, Tenant]:
    """Whose key came with the request. Raises ApiError (401)."""
    given = headers.get(b"authorization", b"")
    key = given[len(_BEARER) :].strip() if given[: len(_BEARER)].lower() == _BEARER else headers.get(b"x-api-key", b"")
    if not key:
        text = "You didn't provide an API key. Send it as `Authorization: Bearer KEY`, or as `x-api-key: KEY`."
        raise ApiError(401, text, code="missing_api_key")
    tenants.look()
    name = tenants.now.of_key(key)
    if name is None:
        raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
    return name, tenants.now.named[name]


def _metered(send: Send, meter: Meter) -> Send:
    """Counts an answer's tokens as they leave: an event of a stream for one, until its usage says it exactly."""
    exact = False

    async def counting(message: Message) -> None:
        nonlocal exact
        body = message.get("body", b"")
        if used := counted(body):
            meter.prompt_is(used[0])
            # Streams of some APIs tell of the prompt before there is an answer.
            if used[1]:
                exact = True
                meter.generated_is(used[1])
        elif message.get("more_body") and not exact:
            meter.generated_is(meter.generated + events_in(body))
        await send(message)

    return counting
