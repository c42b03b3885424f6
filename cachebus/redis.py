"""The shared tier: chunks in Redis or Valkey. The one file that knows redis-py.

A chunk is a header value (see ``cachebus.chunk``) and parts of at most 4 MiB, all under one hash tag, so that a cluster keeps them together:
``headstart:1:<digest key's id>:{<chunk key>}`` and the same with ``:0``, ``:1``, ... The header is written last: what has none is not there.

redis-py finds the server, logs in and speaks TLS. Payloads do not go through it: they are sent from the region and received into it on
the connection's own socket, which moves several times as many bytes as a client that makes objects of them.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
from redis import cluster, sentinel

from cachebus.breaker import Breaker
from cachebus.chunk import HEADER_BYTES, ChunkHeader, pack_header, unpack_header
from cachebus.errors import TierError
from cachebus.resp import Answered, Line, command, command_parts

log = logging.getLogger("headstart.cachebus")

PART_BYTES = 4 << 20
"""Larger values are slow on every client and server."""

REFUSED_SECONDS = 5.0
"""How long nothing is written after the server had no room or refused to be written."""

WRITE_PATIENCE = 10
"""How many times as long a silence may be while writing: nobody waits for it, and a busy server is not a dead one."""

_PORTS = {"sentinel": 26379, "cluster": 6379}
_SCAN_COUNT = 1000


class RemoteUnavailable(TierError):
    """The shared tier does not answer, or did not a moment ago."""


@dataclass(frozen=True)
class RemoteSettings:
    """``key_id`` names the digest key; ``ttl_seconds`` 0: none; ``timeout_ms`` is the longest silence while reading."""

    url: str
    key_id: bytes
    ttl_seconds: int
    timeout_ms: int


class Remote:
    """See the module. Any thread may call; each has connections of its own. Raises RemoteUnavailable where nobody answers in time.

    Whatever fails that way closes its connection and makes every later call fail at once, until ``tick`` finds that the server answers.
    """

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings
        self._prefix = f"headstart:1:{settings.key_id.hex()}:"
        self._breaker = Breaker()
        self._server = _Server(settings.url, settings.timeout_ms / 1000)
        self._local = threading.local()
        self._life = 0
        self._refused_until = 0.0
        self._lock = threading.Lock()
        names = ("read_bytes", "written_bytes", "timeouts", "refused")
        self.counts: dict[str, int] = dict.fromkeys(names, 0)

    @property
    def available(self) -> bool:
        """Whether the tier answered when it was asked last."""
        return not self._breaker.open

    def probe(self, keys: Sequence[bytes]) -> list[ChunkHeader | None]:
        """The headers under these keys, in one round trip; None where there is no whole header of that key."""
        found: list[ChunkHeader | None] = []
        for group in self._server.groups([self._name(key) for key in keys]):
            scratch = bytearray(HEADER_BYTES)
            with self._connection(group[0]) as line:
                line.send([command(b"GET", name.encode()) for name in group])
                for name in group:
                    length = line.receive_value(memoryview(scratch))
                    header = unpack_header(bytes(scratch)) if length == HEADER_BYTES else None
                    found.append(header if header is not None and self._name(header.key) == name else None)
        return found

    def get(self, header: ChunkHeader, into: memoryview) -> ChunkHeader | None:
        """Reads the payload into ``into`` (``header.length`` bytes); the header found with it, None where they are not there as ``header`` says.

        ``into`` is not written any more when this returns.
        """
        name = self._name(header.key)
        parts = _parts(into)
        scratch = bytearray(HEADER_BYTES)
        with self._connection(name) as line:
            line.send([command(b"GET", part.encode()) for part in [name, *_part_names(name, len(parts))]])
            whole = line.receive_value(memoryview(scratch)) == HEADER_BYTES
            for part in parts:
                whole &= line.receive_value(part) == len(part)
        found = unpack_header(bytes(scratch)) if whole else None
        self.counts["read_bytes"] += len(into)
        same = found is not None and (found.key, found.digest, found.length) == (header.key, header.digest, header.length)
        return found if same else None

    def put(self, header: ChunkHeader, payload: memoryview) -> bool:
        """Stores a chunk; False where the server refuses it, as it does when it is full: then nothing is written for a while."""
        if time.monotonic() < self._refused_until:
            return False
        name = self._name(header.key)
        parts = _parts(payload)
        expiry = [b"EX", str(self._settings.ttl_seconds).encode()] if self._settings.ttl_seconds else []
        with self._connection(name, patience=WRITE_PATIENCE) as line:
            for part_name, part in [*zip(_part_names(name, len(parts)), parts, strict=True), (name, memoryview(pack_header(header)))]:
                line.send(command_parts([b"SET", part_name.encode(), part, *expiry]))
                error = line.receive_status()
                if error:
                    self._refuse(error)
                    return False
        self.counts["written_bytes"] += len(payload)
        return True

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forgets chunks; how many of them were there."""
        with self._controlled():
            return sum(int(self._server.client.delete(self._name(key)) or 0) for key in keys)

    def scan(self) -> Iterator[bytes]:
        """The keys of all chunks of this digest key."""
        pattern = re.compile(re.escape(self._prefix) + r"\{([0-9a-f]{64})\}$")
        with self._controlled():
            for name in self._server.client.scan_iter(match=f"{self._prefix}*", count=_SCAN_COUNT):
                found = pattern.match(name.decode("ascii", "replace"))
                if found:
                    yield bytes.fromhex(found[1])

    def clear(self) -> int:
        """Forgets all chunks of this digest key; how many values that were."""
        count = 0
        with self._controlled():
            for name in self._server.client.scan_iter(match=f"{self._prefix}*", count=_SCAN_COUNT):
                count += int(self._server.client.unlink(name) or 0)
        return count

    def info(self) -> dict[str, Any]:
        """What the server says of itself."""
        with self._controlled():
            return dict(self._server.client.info())

    def ping(self) -> float:
        """Seconds of a round trip."""
        with self._connection(self._name(b"")) as line:
            started = time.perf_counter()
            line.send([command(b"PING")])
            line.receive_status()
            return time.perf_counter() - started

    def tick(self) -> bool:
        """Tries to reach a tier that was given up, when that is due; True where it answers again."""
        if not self._breaker.due(time.monotonic()):
            return False
        try:
            self._server.find()
            with self._connection(self._name(b""), trying=True) as line:
                line.send([command(b"PING")])
                error = line.receive_status()
        except TierError:
            return False
        if error:
            self._breaker.failed(time.monotonic())
            return False
        if self._breaker.answered():
            log.info("redis: %s answers", redacted(self._settings.url))
            return True
        return False

    def _name(self, key: bytes) -> str:
        return f"{self._prefix}{{{key.hex()}}}"

    @contextlib.contextmanager
    def _connection(self, name: str, *, trying: bool = False, patience: int = 1) -> Iterator[Line]:
        if self._breaker.open and not trying:
            raise RemoteUnavailable("the shared tier does not answer")
        if getattr(self._local, "life", None) != self._life:
            self._local.life, self._local.lines = self._life, {}
        where = self._server.where(name)
        line: Line | None = None
        try:
            line = self._local.lines.get(where) or self._server.connect(name)
            self._local.lines[where] = line
            line.wait_at_most(patience * self._settings.timeout_ms / 1000)
            yield line
        except Answered as error:
            self._local.lines.pop(where, None)
            self._gave_up(error, line)
            raise RemoteUnavailable(str(error)) from error
        except (OSError, redis.RedisError) as error:
            self._local.lines.pop(where, None)
            self._gave_up(error, line)
            raise RemoteUnavailable(f"the shared tier does not answer: {error}") from error

    @contextlib.contextmanager
    def _controlled(self) -> Iterator[None]:
        if self._breaker.open:
            raise RemoteUnavailable("the shared tier does not answer")
        try:
            yield
        except (OSError, redis.RedisError) as error:
            self._gave_up(error, None)
            raise RemoteUnavailable(f"the shared tier does not answer: {error}") from error

    def _gave_up(self, error: Exception, line: Line | None) -> None:
        if line is not None:
            line.close()
        with self._lock:
            self.counts["timeouts"] += 1
            if self._breaker.failed(time.monotonic()):
                # Connections of other threads may be as dead.
                self._life += 1
                log.warning("redis: %s does not answer (%s): requests go on without it", redacted(self._settings.url), error)

    def _refuse(self, error: str) -> None:
        with self._lock:
            self.counts["refused"] += 1
            if time.monotonic() >= self._refused_until:
                log.warning("redis: %s takes no chunks now: %s", redacted(self._settings.url), error)
            self._refused_until = time.monotonic() + REFUSED_SECONDS


class _Server:
    """Where the server is: one, a master that sentinels name, or the nodes of a cluster."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self.client: Any = None
        self._cluster: Any = None

    def find(self) -> None:
        """Looks the server up (again). Raises RemoteUnavailable."""
        options: dict[str, Any] = {"socket_timeout": self._timeout, "socket_connect_timeout": self._timeout, "health_check_interval": 0}
        parts = urlsplit(self._url)
        query = dict(parse_qsl(parts.query))
        if password_file := query.pop("password_file", ""):
            options["password"] = Path(password_file).read_text().strip()
        kind = parts.scheme.partition("+")
        try:
            if kind[2]:
                hosts = [_host_and_port(item, _PORTS[kind[2]]) for item in parts.netloc.rpartition("@")[2].split(",")]
                options |= {"username": parts.username, "password": parts.password} if parts.password else {}
                options |= {"ssl": True, **query} if kind[0] == "rediss" else {}
            if kind[2] == "sentinel":
                watchers: Any = sentinel.Sentinel(hosts, socket_timeout=self._timeout)  # type: ignore[no-untyped-call]
                self.client = watchers.master_for(parts.path.strip("/") or "mymaster", db=int(query.pop("db", 0)), **options)
            elif kind[2] == "cluster":
                nodes = [cluster.ClusterNode(*host) for host in hosts]  # type: ignore[no-untyped-call]
                self.client = self._cluster = cluster.RedisCluster(startup_nodes=nodes, **options)
            else:
                left = f"?{urlencode(query)}" if query else ""
                self.client = redis.Redis.from_url(self._url.partition("?")[0] + left, **options)
        except (OSError, redis.RedisError) as error:
            raise RemoteUnavailable(f"the shared tier does not answer: {error}") from error

    def where(self, name: str) -> str:
        """A name for the node that keeps ``name``."""
        return str(self._cluster.get_node_from_key(name).name) if self._cluster else ""

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """The names in order, cut where the node changes."""
        found: list[list[str]] = []
        last = None
        for name in names:
            where = self.where(name)
            if where != last:
                found.append([])
            found[-1].append(name)
            last = where
        return found

    def connect(self, name: str) -> Line:
        """A connection to the node that keeps ``name``."""
        client = self._cluster.get_redis_connection(self._cluster.get_node_from_key(name)) if self._cluster else self.client
        connection = client.connection_pool.make_connection()
        connection.connect()
        return Line(connection._sock, connection.disconnect, self._timeout)


def redacted(url: str) -> str:
    """The URL without its password."""
    return re.sub(r"(://[^:@/]*):[^@/]*@", r"\1:***@", url)


def _host_and_port(text: str, port: int) -> tuple[str, int]:
    host, _, given = text.rpartition(":")
    return (host, int(given)) if host else (text, port)


def _parts(payload: memoryview) -> list[memoryview]:
    return [payload[start : start + PART_BYTES] for start in range(0, len(payload), PART_BYTES)]


def _part_names(name: str, count: int) -> list[str]:
    return [f"{name}:{number}" for number in range(count)]
