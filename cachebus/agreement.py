"""What routers of several nodes agree on: which daemon keeps a prompt's claim, and what tenants took of their limits.

Each prompt, and each tenant, belongs to one of the daemons that live: the one that comes first when all are hashed together with its name (rendezvous
hashing), so every daemon finds it by itself and none leads. A daemon claims at home first, then asks the owner, for ``ANSWER_MS_MAX`` at most: where
that is silent, dead or cut off the claim stands. The worst of that is a prompt that is computed twice.

A plain state machine of the daemon; ``ask`` sends to another node and says whether there was a connection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blake3 import blake3

from cachebus.claims import Claims
from cachebus.effects import Answer, Effect
from cachebus.messages import Reply, Request
from cachebus.messages_routers import Claim, Claimed, EndClaim, Exchange, Exchanged, OtherLoads, TellLoads
from cachebus.spending import ENTRIES_MAX, Spending

ANSWER_MS_MAX = 25
"""What a request waits for another node; its router waits twice that for this one."""
EXCHANGE_MS = 200

Ask = Callable[[str, int, Request], bool]


@dataclass(frozen=True)
class _Asked:
    client: bytes
    ticket: int
    request: Claim
    peer: str
    until_ms: float


class Agreement:
    """``node``: who this daemon is for the others, nothing where it keeps no claims for them. ``now_ms`` is a monotonic clock."""

    def __init__(self, node: bytes, ask: Ask) -> None:
        self.node = node
        self._ask = ask
        self._claims, self._spending = Claims(), Spending()
        self._peers: Mapping[str, bytes] = {}
        self._asked: dict[int, _Asked] = {}
        self._kept_at: dict[tuple[str, int], str] = {}
        self._tenants_of: dict[str, str | None] = {}
        self._number = 0
        self._exchange_at_ms = 0.0
        self._unanswered = 0

    def owner(self, name: bytes) -> str | None:
        """The peer that a prompt or tenant belongs to; None: this daemon."""
        first = max(((blake3(node + name).digest(), peer) for peer, node in self._peers.items()), default=(b"", ""))
        own = blake3(self.node + name).digest() if self.node else b""
        return first[1] if first[0] > own else None

    def live(self, peers: Mapping[str, bytes]) -> None:
        """The peers that are heard now and keep claims, and who each is."""
        now = {peer: node for peer, node in peers.items() if node != self.node}
        if now != self._peers:
            self._peers = now
            self._tenants_of.clear()

    def claim(self, client: bytes, ticket: int, request: Claim, now_ms: float, *, elsewhere: bool) -> list[Effect]:
        """Answers a router of this node, or another node for one of its own. Raises BusError where it can't be a claim."""
        answers = self._claims.claim(client, ticket, request, now_ms, elsewhere=elsewhere)
        place = (request.router, request.number)
        refused = any(isinstance(answer, Answer) and isinstance(answer.body, Claimed) and not answer.body.granted for answer in answers)
        if elsewhere or refused or not self._peers or place in self._kept_at or not self._claims.has(*place):
            return answers
        peer = self.owner(request.prompt or request.keys[0])
        if peer is None:
            return answers
        self._number += 1
        if not self._ask(peer, self._number, request):
            self._unanswered += 1
            return answers
        self._kept_at[place] = peer
        self._asked[self._number] = _Asked(client, ticket, request, peer, now_ms + ANSWER_MS_MAX)
        return []

    def end(self, request: EndClaim, *, elsewhere: bool) -> list[Effect]:
        """A claim has ended, here and where it was kept."""
        if not elsewhere and (peer := self._kept_at.pop((request.router, request.number), None)) is not None:
            self._ask(peer, 0, request)
        return self._claims.end(request, elsewhere=elsewhere)

    def tell(self, client: bytes, ticket: int, request: TellLoads, now_ms: float) -> list[Effect]:
        """Takes in what a router of this node says of itself; answers with what is known of others."""
        others = self._claims.tell(request, now_ms)
        if request.spent is not None:
            self._spending.tell(request.router, request.spent, now_ms)
            others = OtherLoads(others.routers, others.loads, self._spending.for_router(request.router))
        return [Answer(client, ticket, others)]

    def exchange(self, client: bytes, ticket: int, request: Exchange, now_ms: float) -> list[Effect]:
        """Another node's routers live, and took so much."""
        self._claims.live(request.routers, now_ms)
        self._spending.told_by_node(request.spent, now_ms)
        return [Answer(client, ticket, Exchanged(self._spending.for_node(request.routers)))] if request.wants else []

    def heard(self, peer: str, number: int, reply: Reply, now_ms: float) -> list[Effect]:
        """Another node has answered."""
        if isinstance(reply, Exchanged):
            self._spending.learn(reply.spent, now_ms)
            return []
        asked = self._asked.get(number)
        if asked is None or asked.peer != peer:
            return []
        del self._asked[number]
        request = asked.request
        if isinstance(reply, Claimed) and not reply.granted and 0 < reply.chunks <= len(request.keys) and 0 <= reply.seconds < math.inf:
            self._kept_at.pop((request.router, request.number), None)
            return [*self._claims.end(EndClaim(request.router, request.number)), Answer(asked.client, asked.ticket, reply)]
        return [Answer(asked.client, asked.ticket, Claimed(True))]

    def due_ms(self, now_ms: float) -> float:
        """In how long somebody has waited for another node for long enough."""
        return max(0.0, min((asked.until_ms for asked in self._asked.values()), default=math.inf) - now_ms)

    def tick(self, now_ms: float) -> list[Effect]:
        """Grants what nobody has answered in time, and tells other nodes what they should know."""
        late = [number for number, asked in self._asked.items() if now_ms >= asked.until_ms or asked.peer not in self._peers]
        effects: list[Effect] = []
        for number in late:
            asked = self._asked.pop(number)
            effects.append(Answer(asked.client, asked.ticket, Claimed(True)))
        self._unanswered += len(late)
        if now_ms >= self._exchange_at_ms:
            self._exchange_at_ms = now_ms + EXCHANGE_MS
            self._exchange()
        return effects

    def end_silent(self, now_ms: float) -> None:
        """Forgets routers that say nothing, here and where their claims are kept."""
        self._claims.end_silent(now_ms)
        self._spending.end_silent(now_ms)
        for router, number in [place for place in self._kept_at if not self._claims.has(*place)]:
            self.end(EndClaim(router, number), elsewhere=False)

    def counts(self) -> dict[str, int]:
        """How many routers and claims there are, other nodes that keep claims, and claims that one of those did not answer in time."""
        return {**self._claims.counts(), "keepers": len(self._peers), "claims_unanswered_total": self._unanswered}

    def _exchange(self) -> None:
        keepers, wants, routers = set(self._kept_at.values()), self._spending.wanted, self._claims.own()
        shares = self._spending.own(self._owner_of_tenant) if self._peers else {}
        for peer in self._peers:
            if wants or peer in keepers:
                self._ask(peer, 0, Exchange(routers, shares.get(peer, {}), wants))

    def _owner_of_tenant(self, tenant: str) -> str | None:
        if tenant not in self._tenants_of:
            if len(self._tenants_of) >= ENTRIES_MAX:
                self._tenants_of.clear()
            self._tenants_of[tenant] = self.owner(tenant.encode())
        return self._tenants_of[tenant]
