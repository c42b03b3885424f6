"""Where other nodes are: those that the settings name, and all that one name resolves to."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

from cachebus.errors import BusError
from cachebus.security import Keyring, is_loopback
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.zeromq_peers import Pair, PeerAddress

log = logging.getLogger("headstart.cachebus")


def peer_addresses(cache: CacheSettings, security: SecuritySettings) -> dict[str, PeerAddress]:
    """The peers that ``cache.peers`` names. Raises BusError where one can't be trusted: it has no key, or there are no keys and it is not here."""
    keys = Keyring(Path(security.keys_dir)) if security.keys_dir else None
    found = {}
    for name, host, port in cache.peer_places():
        found[name if keys else f"{host}:{port}"] = _address("peers", keys, (name, host, port), security)
    return found


class PeerPlaces:
    """All peers there are. ``named`` never changes; what ``look`` finds does, as nodes come and go.

    Raises BusError where one can't be trusted.
    """

    def __init__(self, cache: CacheSettings, security: SecuritySettings) -> None:
        self.named = peer_addresses(cache, security)
        self._place = cache.dns_place()
        self._own = (cache.node_host, cache.node_port)
        self._found: dict[str, PeerAddress] = {}
        self._failed = False
        if self._place:
            keys = Keyring(Path(security.keys_dir)) if security.keys_dir else None
            self._template = _address("peers_dns", keys, self._place, security)

    def look(self) -> dict[str, PeerAddress]:
        """Looks the name up, which may take seconds; where that fails those found before stay."""
        if self._place:
            _, host, port = self._place
            try:
                answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError as error:
                if not self._failed:
                    log.warning("cache.peers_dns: can't resolve %s: %s; it is asked again", host, error)
                self._failed = True
            else:
                self._failed = False
                places = sorted({str(answer[4][0]) for answer in answers} - ({self._own[0]} if port == self._own[1] else set()))
                made = self._template
                self._found = {f"{at}:{port}": PeerAddress(at, port, made.server, made.pair, made.encrypted_bytes) for at in places}
        return self._found | self.named


def _address(setting: str, keys: Keyring | None, place: tuple[str, str, int], security: SecuritySettings) -> PeerAddress:
    name, host, port = place
    if keys is None:
        if not is_loopback(host):
            raise BusError(f"cache.{setting}: {host} is another machine: that needs keys; make them with `headstart keys` and set security.keys_dir")
        return PeerAddress(host, port)
    if not name:
        raise BusError(f"cache.{setting}: say whose key {host}:{port} has: NAME@{host}:{port}, NAME as in `headstart keys add`")
    return PeerAddress(host, port, keys.public_key(name), Pair(keys.public, keys.secret), security.encrypt_peer_bytes)
