"""A daemon's connections to the other nodes that keep claims, around ``agreement.py``. All of it is the daemon's thread's, which never waits here."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from cachebus.agreement import Agreement
from cachebus.below import Below
from cachebus.codec import decode_reply, encode_request
from cachebus.effects import Effect
from cachebus.errors import ProtocolError
from cachebus.messages import Request
from cachebus.messages_routers import Claim, EndClaim, Exchange, TellLoads
from cachebus.settings import CacheSettings
from cachebus.wire import NODE_BYTES
from cachebus.zeromq import Server
from cachebus.zeromq_peers import PeerAddress, PeerLink

log = logging.getLogger("headstart.cachebus")

LOOK_MS = 100


class Keepers:
    """See the module. ``below`` knows which nodes are heard, ``server`` waits for their answers, too."""

    def __init__(self, cache: CacheSettings, server: Server, below: Below) -> None:
        self._server, self._below = server, below
        # Who is not listening can't be asked, and a router's own bus is followed by nobody.
        keeps = cache.node_port and not cache.peer_workers
        self.agreement = Agreement(secrets.token_bytes(NODE_BYTES) if keeps else b"", self._ask)
        self._links: dict[str, tuple[PeerAddress, PeerLink]] = {}
        self._look_at_ms = 0.0

    def handlers(self, now_ms: Callable[[], float]) -> dict[type, Callable[..., list[Effect]]]:
        """Who does what is asked: client, ticket, request."""
        it, elsewhere = self.agreement, self._server.is_elsewhere
        return {
            Claim: lambda c, t, r: it.claim(c, t, r, now_ms(), elsewhere=elsewhere(c)),
            EndClaim: lambda c, t, r: it.end(r, elsewhere=elsewhere(c)),
            TellLoads: lambda c, t, r: it.tell(c, t, r, now_ms()),
            Exchange: lambda c, t, r: it.exchange(c, t, r, now_ms()),
        }

    def turn(self, now_ms: float) -> list[Effect]:
        """Takes other nodes' answers in, and goes on without those that did not come in time."""
        effects = [effect for peer in list(self._links) for effect in self._answers(peer, now_ms)]
        if now_ms >= self._look_at_ms:
            self._look_at_ms = now_ms + LOOK_MS
            self._follow()
        return effects + self.agreement.tick(now_ms)

    def close(self) -> None:
        """Ends the connections."""
        for peer in list(self._links):
            self._drop(peer)

    def _follow(self) -> None:
        keepers = self._below.keepers()
        for peer in [peer for peer, (address, _) in self._links.items() if peer not in keepers or keepers[peer][1] != address]:
            self._drop(peer)
        for peer, (_, address) in keepers.items():
            if peer not in self._links:
                link = PeerLink(address, events=False)
                self._server.wait_for(link)
                self._links[peer] = (address, link)
        self.agreement.live({peer: node for peer, (node, _) in keepers.items()})

    def _drop(self, peer: str) -> None:
        link = self._links.pop(peer)[1]
        self._server.wait_for(link, no_longer=True)
        link.close()

    def _ask(self, peer: str, number: int, request: Request) -> bool:
        return peer in self._links and self._links[peer][1].send(encode_request(number, request))

    def _answers(self, peer: str, now_ms: float) -> list[Effect]:
        effects: list[Effect] = []
        for frame in self._links[peer][1].receive(0)[0]:
            try:
                reply = decode_reply(frame)
            except ProtocolError as error:
                log.warning("peer %s: %s", peer, error)
                continue
            effects += self.agreement.heard(peer, reply.ticket, reply.body, now_ms)
        return effects
