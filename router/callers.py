"""Who asks, and how their request may use the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.types import Scope

from router.errors import ApiError
from router.limits import Meter

TTL_HEADER = "x-headstart-cache-ttl"
TTL_SECONDS_MAX = 10 * 365 * 86_400
_SCOPE = "headstart.caller"


@dataclass(frozen=True)
class Terms:
    """How a request uses the cache: under which ``salt``, whether what it computes is stored (``store``), and for how long (0: no end of its own)."""

    salt: str = ""
    store: bool = True
    ttl_seconds: int = 0


def _free(_tokens: int) -> None:
    pass


@dataclass(frozen=True)
class Caller:
    """``tenant`` is "" where there are none."""

    tenant: str = ""
    terms: Terms = field(default_factory=Terms)
    meter: Meter = field(default_factory=lambda: Meter(_free))


def terms_of(headers: dict[bytes, bytes], salt: str) -> Terms:
    """What the request's own headers wish. Raises ApiError (400) where they make no sense."""
    wishes = {part.strip().lower() for part in headers.get(b"cache-control", b"").decode("latin-1").split(",")}
    given = headers.get(TTL_HEADER.encode())
    if given is None:
        return Terms(salt, "no-store" not in wishes)
    # Nothing but digits: int() would also take "1_0" and " 1 ".
    if not (given.isdigit() and 0 < int(given[:16]) <= TTL_SECONDS_MAX):
        raise ApiError(400, f"{TTL_HEADER} is a number of seconds, 1 to {TTL_SECONDS_MAX}", code="invalid_header", param=TTL_HEADER)
    return Terms(salt, "no-store" not in wishes, int(given))


def put(scope: Scope, caller: Caller) -> None:
    """Notes who asks."""
    scope[_SCOPE] = caller


def caller_of(scope: Scope) -> Caller:
    """Who asks."""
    found = scope.get(_SCOPE)
    return found if isinstance(found, Caller) else Caller()
