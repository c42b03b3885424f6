"""What routers have under way: who computes which chunks, and how busy they keep the workers. A plain state machine of the daemon.

A claim keeps others from computing the same; it protects no bytes. So time alone may end it: a router that is silent for three seconds has no claims
and no load, and one that goes on after all computes something twice at worst. Routers of other nodes claim here, too (``agreement.py``); what all of
them have together is bounded, since they would fill this machine's memory, not theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from cachebus.effects import Answer, Effect
from cachebus.errors import BusError
from cachebus.keys import KEY_BYTES
from cachebus.messages_routers import CLAIM_KEYS_MAX, Claim, Claimed, EndClaim, OtherLoads, TellLoads, WorkerLoad

SILENCE_MS_MAX = 3000
CLAIMS_MAX = 4096
"""Claims of one router at a time; more are granted and not kept."""
ELSEWHERE_MAX, ELSEWHERE_KEYS_MAX = 1024, 1 << 18
"""Routers of other nodes, and keys that all of them have claimed; more is granted and not kept."""


@dataclass(frozen=True)
class _Held:
    keys: tuple[bytes, ...]
    until_ms: float


@dataclass
class _Router:
    heard_ms: float
    elsewhere: bool = False
    claims: dict[int, _Held] = field(default_factory=dict)
    loads: dict[str, WorkerLoad] = field(default_factory=dict)


class Claims:
    """Routers by name, and whose each key is."""

    def __init__(self) -> None:
        self._routers: dict[str, _Router] = {}
        self._by_key: dict[bytes, tuple[str, int]] = {}
        self._elsewhere = self._elsewhere_keys = 0

    def claim(self, client: bytes, ticket: int, request: Claim, now_ms: float, *, elsewhere: bool = False) -> list[Effect]:
        """Grants a run of keys, or says how much of it is somebody else's from its beginning on. ``elsewhere``: for a router of another node.

        Raises BusError where it can't be a claim.
        """
        if not 0 < len(request.keys) <= CLAIM_KEYS_MAX or any(len(key) != KEY_BYTES for key in request.keys):
            raise BusError(f"a claim holds 1 to {CLAIM_KEYS_MAX} keys of {KEY_BYTES} bytes")
        if not (math.isfinite(request.seconds) and request.seconds >= 0):
            raise BusError("a claim says in how many seconds it will be computed")
        router = self._heard(request.router, now_ms, elsewhere)
        owner = self._by_key.get(request.keys[0])
        if owner is not None and owner != (request.router, request.number):
            held = self._routers[owner[0]].claims[owner[1]]
            theirs = next((i for i, key in enumerate(request.keys) if self._by_key.get(key) != owner), len(request.keys))
            return [Answer(client, ticket, Claimed(False, theirs, max(0.0, held.until_ms - now_ms) / 1000))]
        if router is not None and request.number not in router.claims and len(router.claims) < CLAIMS_MAX:
            keys = tuple(key for key in dict.fromkeys(request.keys) if key not in self._by_key)
            if router.elsewhere:
                if self._elsewhere_keys + len(keys) > ELSEWHERE_KEYS_MAX:
                    return [Answer(client, ticket, Claimed(True))]
                self._elsewhere_keys += len(keys)
            router.claims[request.number] = _Held(keys, now_ms + request.seconds * 1000)
            self._by_key.update(dict.fromkeys(keys, (request.router, request.number)))
        return [Answer(client, ticket, Claimed(True))]

    def end(self, request: EndClaim, *, elsewhere: bool = False) -> list[Effect]:
        """Forgets a claim; ``elsewhere``: another node says so, which may for routers of other nodes alone."""
        router = self._routers.get(request.router)
        if router is None or (elsewhere and not router.elsewhere):
            return []
        held = router.claims.pop(request.number, None)
        if held:
            self._elsewhere_keys -= len(held.keys) if router.elsewhere else 0
            for key in held.keys:
                self._by_key.pop(key, None)
        return []

    def has(self, router: str, number: int) -> bool:
        """Whether the router has that claim."""
        return router in self._routers and number in self._routers[router].claims

    def tell(self, request: TellLoads, now_ms: float) -> OtherLoads:
        """Takes a router's loads in; returns those of the others of this node."""
        if (teller := self._heard(request.router, now_ms)) is not None:
            teller.loads = request.loads
        found: dict[str, WorkerLoad] = {}
        others = [router for name, router in self._routers.items() if name != request.router and not router.elsewhere]
        for other in others:
            for worker, load in other.loads.items():
                known = found.get(worker, WorkerLoad(0, 0, 0.0))
                together = (known.in_flight + load.in_flight, known.running + load.running, known.backlog_seconds + load.backlog_seconds)
                found[worker] = WorkerLoad(*together)
        return OtherLoads(len(others), found)

    def live(self, names: Iterable[str], now_ms: float) -> None:
        """Other nodes' routers of these names live, as far as they have claims here."""
        for name in names:
            if name in self._routers and self._routers[name].elsewhere:
                self._routers[name].heard_ms = now_ms

    def own(self) -> list[str]:
        """The routers of this node."""
        return [name for name, router in self._routers.items() if not router.elsewhere]

    def end_silent(self, now_ms: float) -> None:
        """Forgets routers that say nothing."""
        for name in [name for name, router in self._routers.items() if now_ms - router.heard_ms > SILENCE_MS_MAX]:
            for number in list(self._routers[name].claims):
                self.end(EndClaim(name, number))
            self._elsewhere -= self._routers.pop(name).elsewhere

    def counts(self) -> dict[str, int]:
        """How many there are."""
        return {"routers": len(self.own()), "claims": sum(len(router.claims) for router in self._routers.values())}

    def _heard(self, name: str, now_ms: float, elsewhere: bool = False) -> _Router | None:
        """The router, which lives; None where another node speaks for one of this node, or there are too many."""
        router = self._routers.get(name)
        if router is None:
            if elsewhere and self._elsewhere >= ELSEWHERE_MAX:
                return None
            self._elsewhere += elsewhere
            router = self._routers[name] = _Router(now_ms, elsewhere)
        elif elsewhere and not router.elsewhere:
            return None
        router.heard_ms = now_ms
        return router
