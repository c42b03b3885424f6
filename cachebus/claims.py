"""What routers have under way: who computes which chunks, and how busy they keep the workers. A plain state machine of the daemon.

A claim keeps others from computing the same; it protects no bytes. So time alone may end it: a router that is silent for three seconds has no claims
and no load, and one that goes on after all computes something twice at worst.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cachebus.effects import Answer, Effect
from cachebus.errors import BusError
from cachebus.keys import KEY_BYTES
from cachebus.messages_routers import CLAIM_KEYS_MAX, Claim, Claimed, EndClaim, OtherLoads, TellLoads, WorkerLoad

SILENCE_MS_MAX = 3000
CLAIMS_MAX = 4096
"""Claims of one router at a time; more are granted and not kept."""


@dataclass(frozen=True)
class _Held:
    keys: tuple[bytes, ...]
    until_ms: float


@dataclass
class _Router:
    heard_ms: float
    claims: dict[int, _Held] = field(default_factory=dict)
    loads: dict[str, WorkerLoad] = field(default_factory=dict)


class Claims:
    """Routers by name, and whose each key is."""

    def __init__(self) -> None:
        self._routers: dict[str, _Router] = {}
        self._by_key: dict[bytes, tuple[str, int]] = {}

    def claim(self, client: bytes, ticket: int, request: Claim, now_ms: float) -> list[Effect]:
        """Grants a run of keys, or says how much of it is somebody else's from its beginning on. Raises BusError where it can't be a claim."""
        if not 0 < len(request.keys) <= CLAIM_KEYS_MAX or any(len(key) != KEY_BYTES for key in request.keys):
            raise BusError(f"a claim holds 1 to {CLAIM_KEYS_MAX} keys of {KEY_BYTES} bytes")
        router = self._heard(request.router, now_ms)
        owner = self._by_key.get(request.keys[0])
        if owner is not None and owner != (request.router, request.number):
            held = self._routers[owner[0]].claims[owner[1]]
            theirs = next((i for i, key in enumerate(request.keys) if self._by_key.get(key) != owner), len(request.keys))
            return [Answer(client, ticket, Claimed(False, theirs, max(0.0, held.until_ms - now_ms) / 1000))]
        if request.number not in router.claims and len(router.claims) < CLAIMS_MAX:
            keys = tuple(key for key in dict.fromkeys(request.keys) if key not in self._by_key)
            router.claims[request.number] = _Held(keys, now_ms + request.seconds * 1000)
            self._by_key.update(dict.fromkeys(keys, (request.router, request.number)))
        return [Answer(client, ticket, Claimed(True))]

    def end(self, request: EndClaim) -> list[Effect]:
        """Forgets a claim."""
        router = self._routers.get(request.router)
        held = router.claims.pop(request.number, None) if router else None
        for key in held.keys if held else ():
            self._by_key.pop(key, None)
        return []

    def tell(self, client: bytes, ticket: int, request: TellLoads, now_ms: float) -> list[Effect]:
        """Takes a router's loads in and answers with the others'."""
        self._heard(request.router, now_ms).loads = request.loads
        found: dict[str, WorkerLoad] = {}
        others = [router for name, router in self._routers.items() if name != request.router]
        for other in others:
            for worker, load in other.loads.items():
                known = found.get(worker, WorkerLoad(0, 0, 0.0))
                together = (known.in_flight + load.in_flight, known.running + load.running, known.backlog_seconds + load.backlog_seconds)
                found[worker] = WorkerLoad(*together)
        return [Answer(client, ticket, OtherLoads(len(others), found))]

    def end_silent(self, now_ms: float) -> None:
        """Forgets routers that say nothing."""
        for name in [name for name, router in self._routers.items() if now_ms - router.heard_ms > SILENCE_MS_MAX]:
            for number in list(self._routers[name].claims):
                self.end(EndClaim(name, number))
            del self._routers[name]

    def counts(self) -> dict[str, int]:
        """How many there are."""
        return {"routers": len(self._routers), "claims": sum(len(router.claims) for router in self._routers.values())}

    def _heard(self, name: str, now_ms: float) -> _Router:
        router = self._routers.setdefault(name, _Router(now_ms))
        router.heard_ms = now_ms
        return router
