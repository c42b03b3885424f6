"""A daemon's side towards other nodes: who may speak to it, what each role may ask, what is lent to whom."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from cachebus.errors import BusError
from cachebus.lending import Lending
from cachebus.messages import Granted, Ping, Request, Snapshot, Stat
from cachebus.messages_peers import Lend, Lent, LentChunk
from cachebus.messages_routers import Claim, EndClaim, Exchange
from cachebus.security import Keyring, MemberRole, is_loopback
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.shelf import Entry
from cachebus.zeromq_peers import Listen, NodeSockets, Pair

log = logging.getLogger("headstart.cachebus")

_AGREE = (Claim, EndClaim, Exchange)
_MAY_ASK: dict[MemberRole, tuple[type[Request], ...]] = {"node": (Ping, Snapshot, Lend, *_AGREE), "router": (Ping, Snapshot, Stat, *_AGREE)}
_MAY_CONNECT: dict[str, tuple[MemberRole, ...]] = {"requests": ("node", "router"), "events": ("node", "router"), "bytes": ("node",)}


class Node:
    """See the module. Raises BusError where the address is open to others and there are no keys, or where a port is taken."""

    def __init__(self, cache: CacheSettings, security: SecuritySettings, data: memoryview) -> None:
        self._keys = Keyring(Path(security.keys_dir)) if security.keys_dir else None
        if self._keys is None and not is_loopback(cache.node_host):
            raise BusError(
                f"cache.node_host: {cache.node_host} can be reached from other machines, and there are no keys: "
                "make them with `headstart keys` and set security.keys_dir"
            )
        pair = Pair(self._keys.public, self._keys.secret) if self._keys else None
        self.lending = Lending()
        self._publics = self._keys.publics() if self._keys else frozenset()
        self.sockets = NodeSockets(Listen(cache.node_host, cache.node_port, pair, self._may_connect, security.encrypt_peer_bytes))
        try:
            self.sockets.serve_bytes(data, self.lending.may_read)
        except BusError:
            self.sockets.close()
            raise

    def refusal(self, user: str, body: Request) -> str:
        """ "" where this user may ask this, else why not."""
        role: MemberRole = "node"
        if self._keys:
            member = self._keys.member(user.encode())
            if member is None:
                return "this key is not allowed here (any more)"
            role = member.role
        return "" if isinstance(body, _MAY_ASK[role]) else f"a {role} of another machine may not ask for {type(body).__name__}"

    def lent(self, granted: Granted, index: Mapping[bytes, Entry], now_ms: float) -> Lent:
        """What another node is told of a lease that it was just granted on entries of ``index``."""
        chunks = [LentChunk(e.key, e.offset, e.length, e.digest, index[e.key].tenant, index[e.key].expires_at) for e in granted.extents]
        return self.lending.lend(granted.lease, chunks, now_ms)

    def look_for_revoked(self) -> None:
        """Cuts off who is not allowed any more."""
        if self._keys:
            self.sockets.readmit_subscribers()
            publics = self._keys.publics()
            if self._publics - publics:
                log.warning("%d keys were revoked: every subscriber has to connect again", len(self._publics - publics))
                self.sockets.drop_subscribers()
            self._publics = publics

    def _may_connect(self, socket: str, public: bytes) -> bool:
        member = self._keys.member(public) if self._keys else None
        allowed = member is not None and member.role in _MAY_CONNECT[socket]
        if not allowed:
            log.warning("refused a connection to %s: %s", socket, f"{member.name} is a {member.role}" if member else "the key is not allowed")
        return allowed
