"""Tenants' shares of the shared tier. All nodes write there and none rules, so what a tenant has on a server is kept by that server.

It is a sorted set for each tenant whose share is below 1 (``cachebus.redis_account``), changed by plain commands. Each bus has a copy: a tenant that
would have too much loses what it used longest ago before its next chunk goes out, in the same go. Of the tenants that it stores for a bus asks four
times a second what others stored. Accounts are put right by every look at all chunks: what the server evicted or let expire is not counted any
more, what was stored without being counted is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
from redis.exceptions import NoPermissionError

from cachebus.chunk import ChunkHeader
from cachebus.redis_account import MEMBER_BYTES, Account, Chunk, chunk_of, taken_bytes
from cachebus.redis_names import Names, part_count, part_names
from cachebus.redis_servers import RemoteUnavailable, Servers
from cachebus.resp import command

log = logging.getLogger("headstart.cachebus")

CLOCKS_DIFFER_SECONDS = 5.0
"""So much may the clocks of nodes differ before one learns late what another stored."""

_AT_ONCE = 256
"""Headers that are asked for, and chunks that are removed, in one go."""

_T = TypeVar("_T")
Probe = Callable[[Sequence[bytes]], list[ChunkHeader | None]]
"""The headers under keys, as ``cachebus.redis`` reads them."""


@dataclass(frozen=True)
class ShareSettings:
    """``tenant_share``: what each may take; ``capacity_bytes``: of what, in a cluster of all nodes together, 0: of each server's maxmemory.

    ``ttl_seconds``: how long a chunk stays, 0: no limit.
    """

    tenant_share: float = 1.0
    capacity_bytes: int = 0
    ttl_seconds: int = 0


class Shares:
    """See the module. ``reached`` guards what is asked of a place, and raises RemoteUnavailable. Any thread may call."""

    def __init__(self, servers: Servers, names: Names, settings: ShareSettings, reached: Callable[[str], AbstractContextManager[None]]) -> None:
        self._servers, self._names, self._settings, self._reached = servers, names, settings, reached
        self._lock = threading.Lock()
        self._shares: dict[bytes, float] = {}
        self._capacity: dict[str, int] = {}
        self._accounts: dict[tuple[str, bytes], Account] = {}
        self._stored_for: set[tuple[str, bytes]] = set()
        self._removed: list[bytes] = []
        # Chunks of tenants without a share, so that their headers are read once.
        self._others: set[bytes] = set()
        self._told: set[tuple[str, str]] = set()

    def share(self, shares: Mapping[bytes, float]) -> None:
        """From now on these tenants may take these shares, where they are below that of all."""
        with self._lock:
            self._shares, self._others = dict(shares), set()

    # With the bytes.

    def admit(self, where: str, headers: Sequence[ChunkHeader]) -> tuple[set[bytes], list[bytes]]:
        """Which of these chunks may be stored at a place, and the commands that go before them: those make room, and count them.

        Raises RemoteUnavailable where a tenant's account is not known yet and can't be had.
        """
        admitted = {header.key for header in headers}
        commands: list[bytes] = []
        for tenant in {header.tenant for header in headers}:
            account = self._account(where, tenant)
            if account is None:
                continue
            bytes_max = self._bytes_max(where, tenant)
            theirs = [Chunk(header.key, header.length) for header in headers if header.tenant == tenant]
            now, name = time.time(), self._name(where, tenant)
            # One after the other also where they go together: so an account's oldest entry says what is older.
            used_at = {chunk: round(now + number / 1e6, 6) for number, chunk in enumerate(theirs)}
            with self._lock:
                fitting = [chunk for chunk in theirs if taken_bytes(chunk.length) <= bytes_max]
                gone = [old for chunk in fitting for old in account.put(chunk, used_at[chunk])]
                removed = account.drop_beyond(bytes_max)
                stored = [chunk for chunk in fitting if chunk.key in account]
                self._stored_for.add((where, tenant))
                self._removed += [chunk.key for chunk in removed]
            admitted -= {chunk.key for chunk in theirs if chunk not in stored}
            commands += [command(b"UNLINK", *self._values_of(chunk)) for chunk in removed]
            if members := [chunk.member() for chunk in [*gone, *removed]]:
                commands.append(command(b"ZREM", name, *members))
            if stored:
                commands.append(command(b"ZADD", name, *(word for chunk in stored for word in (b"%.6f" % used_at[chunk], chunk.member()))))
        return admitted, commands

    def use(self, where: str, header: ChunkHeader) -> list[bytes]:
        """The command that goes before a chunk is read, if any: it is used, so others of its tenant's go first."""
        account = self._accounts.get((where, header.tenant))
        if account is None or header.key not in account:
            return []
        now, chunk = round(time.time(), 6), Chunk(header.key, header.length)
        with self._lock:
            account.put(chunk, now)
        return [command(b"ZADD", self._name(where, header.tenant), b"XX", b"%.6f" % now, chunk.member())]

    def refused(self, where: str, error: str) -> None:
        """The server does not do what accounts need: no share holds there until it is tried again."""
        self._capacity[where] = 0
        self._tell(where, error)

    # Beside them.

    def keep(self) -> list[bytes]:
        """Learns what other nodes stored of the tenants that this one stores for, and removes what is too much; all keys that were removed lately."""
        with self._lock:
            stored_for, self._stored_for = self._stored_for, set()
        for where, tenant in stored_for:
            with contextlib.suppress(RemoteUnavailable):
                self._learn(where, tenant)
        with self._lock:
            removed, self._removed = self._removed, []
        return removed

    def mend(self, there: Collection[bytes], probe: Probe) -> None:
        """Puts the accounts right, now that ``there`` are the keys of all chunks."""
        with self._lock:
            self._accounts = {at: account for at, account in self._accounts.items() if self._share(at[1]) < 1}
        if self._settings.tenant_share >= 1 and all(share >= 1 for share in self._shares.values()):
            return
        by_place: dict[str, set[bytes]] = {where: set() for where in self._servers.places()}
        for key in there:
            by_place.setdefault(self._servers.where(self._names.chunk(key)), set()).add(key)
        for where, keys in by_place.items():
            with contextlib.suppress(RemoteUnavailable):
                self._ask_capacity(where)
                if self._capacity[where]:
                    self._mend(where, keys, probe)
        self._others &= set(there)

    def forget(self, tenant: bytes = b"") -> None:
        """What a tenant had was deleted; without one, all that there was, and the accounts, too."""
        for where in self._servers.places() if tenant else ():
            with contextlib.suppress(RemoteUnavailable), self._asking(where) as client:
                client.unlink(self._name(where, tenant))
        with self._lock:
            self._accounts = {(where, whose): account for (where, whose), account in self._accounts.items() if tenant and whose != tenant}

    # Inner workings.

    def _share(self, tenant: bytes) -> float:
        return min(self._settings.tenant_share, self._shares.get(tenant, 1.0))

    def _bytes_max(self, where: str, tenant: bytes) -> int:
        return int(self._share(tenant) * self._capacity.get(where, 0))

    def _account(self, where: str, tenant: bytes) -> Account | None:
        """A tenant's account; None where it has no share, or none holds there."""
        if self._share(tenant) >= 1:
            return None
        if where not in self._capacity:
            self._ask_capacity(where)
        return (self._accounts.get((where, tenant)) or self._read(where, tenant)) if self._capacity[where] else None

    def _ask_capacity(self, where: str) -> None:
        capacity = self._settings.capacity_bytes // max(1, len(self._servers.places()))
        if not capacity:
            with self._asking(where) as client:
                capacity = int(client.info("memory").get("maxmemory", 0))
        if not capacity:
            self._tell(where, "it has no maxmemory, and cache.remote_capacity_gb is 0")
        self._capacity[where] = capacity

    def _read(self, where: str, tenant: bytes) -> Account | None:
        """The whole account."""
        now, name = time.time(), self._name(where, tenant)
        account: Account | None = None
        with self._asking(where) as client:
            found = sorted(client.zscan_iter(name, count=1000), key=lambda pair: pair[1])
            account = Account(now)
            stale = [old.member() for member, used_at in found if len(member) == MEMBER_BYTES for old in account.put(chunk_of(member), used_at)]
            if stale:
                client.zrem(name, *stale)
            with self._lock:
                self._accounts[where, tenant] = account
                # What was counted while it was read is learnt soon.
                self._stored_for.add((where, tenant))
        return account

    def _learn(self, where: str, tenant: bytes) -> None:
        account = self._accounts.get((where, tenant))
        if account is None:
            return
        now, since, name = time.time(), account.learnt_at - CLOCKS_DIFFER_SECONDS, self._name(where, tenant)
        with self._asking(where) as client:
            asked = client.pipeline(transaction=False)
            asked.zrangebyscore(name, "-inf", "+inf", start=0, num=1, withscores=True)
            asked.zrangebyscore(name, since, "+inf", withscores=True)
            first, new = asked.execute()
            with self._lock:
                account.learn(first[0][1] if first else since, [(chunk_of(member), used_at) for member, used_at in new], now)
                over = account.drop_beyond(self._bytes_max(where, tenant)) if self._capacity.get(where) else []
                self._removed += [chunk.key for chunk in over]
            for some in _some(over):
                client.unlink(*(value for chunk in some for value in self._values_of(chunk)))
                client.zrem(name, *(chunk.member() for chunk in some))

    def _mend(self, where: str, there: set[bytes], probe: Probe) -> None:
        with self._lock:
            known = [tenant for place, tenant in self._accounts if place == where]
        counted = {key for tenant in known for key in self._mend_account(where, tenant, there, probe)}
        missing: dict[bytes, list[ChunkHeader]] = {}
        for keys in _some(there - counted - self._others):
            for header in filter(None, probe(keys)):
                if self._share(header.tenant) >= 1:
                    self._others.add(header.key)
                    continue
                if (where, header.tenant) not in self._accounts:
                    counted |= self._mend_account(where, header.tenant, there, probe)
                if header.key not in counted:
                    missing.setdefault(header.tenant, []).append(header)
        for tenant, headers in missing.items() if self._capacity[where] else ():
            with self._asking(where) as client:
                for some in _some(headers):
                    client.zadd(self._name(where, tenant), {Chunk(one.key, one.length).member(): one.written_at for one in some}, nx=True)
                self._read(where, tenant)

    def _mend_account(self, where: str, tenant: bytes, there: set[bytes], probe: Probe) -> set[bytes]:
        """Reads an account and takes out what is no longer there; what is left."""
        account = self._read(where, tenant)
        if account is None:
            return set()
        # Those that came since the look was begun are there all the same.
        for keys in _some(account.keys() - there):
            kept = {header.key for header in probe(keys) if header is not None}
            gone = [key for key in keys if key not in kept or self._servers.where(self._names.chunk(key)) != where]
            with self._lock:
                members = [chunk.member() for key in gone for chunk in account.drop(key)]
            if members:
                with self._asking(where) as client:
                    client.zrem(self._name(where, tenant), *members)
        if self._settings.ttl_seconds:
            # As long as what is stored now: no account goes before its chunks.
            with self._asking(where) as client:
                client.expire(self._name(where, tenant), self._settings.ttl_seconds)
        return account.keys()

    @contextlib.contextmanager
    def _asking(self, where: str) -> Iterator[Any]:
        """redis-py's client of a place. What the server refuses ends the block, and nothing else."""
        with self._reached(where):
            try:
                yield self._servers.client(where)
            except redis.ResponseError as error:
                # Others are about where the server is, or how it is.
                if type(error) not in (redis.ResponseError, NoPermissionError):
                    raise
                self.refused(where, str(error))

    def _name(self, where: str, tenant: bytes) -> bytes:
        return self._names.account(tenant, self._servers.tag(where)).encode()

    def _values_of(self, chunk: Chunk) -> list[bytes]:
        name = self._names.chunk(chunk.key)
        return [value.encode() for value in [name, *part_names(name, part_count(chunk.length))]]

    def _tell(self, where: str, why: str) -> None:
        if (where, why) not in self._told:
            self._told.add((where, why))
            log.warning("redis: tenants' shares do not hold%s: %s", where and f" at {where}", why)


def _some(items: Iterable[_T]) -> Iterator[list[_T]]:
    """All of them, so many at a time as are asked for in one go."""
    ordered = list(items)
    for start in range(0, len(ordered), _AT_ONCE):
        yield ordered[start : start + _AT_ONCE]
