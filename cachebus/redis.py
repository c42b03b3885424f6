"""The shared tier: chunks in Redis or Valkey.

A chunk is a header value (see ``cachebus.chunk``) and parts (see ``cachebus.redis_names``). The header is written last: what has none is not there.

redis-py finds the server, logs in and speaks TLS (``cachebus.redis_servers``). Payloads do not go through it: they are sent from the region and
received into it on the connection's own socket, which moves several times as many bytes as a client that makes objects of them.

In a cluster each node is asked, given up and found again by itself.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.exceptions import AskError

from cachebus.breaker import Breaker
from cachebus.chunk import HEADER_BYTES, ChunkHeader, Taken, pack_header, unpack_header
from cachebus.redis_names import PARTS_MAX, Names, part_names, parts
from cachebus.redis_servers import RemoteUnavailable, Servers, redacted
from cachebus.redis_shares import Shares, ShareSettings
from cachebus.resp import Answered, Line, command, command_parts

log = logging.getLogger("headstart.cachebus")

REFUSED_SECONDS = 5.0
"""How long nothing is written after the server had no room or refused to be written."""

WRITE_PATIENCE = 10
"""How many times as long a silence may be while writing: nobody waits for it, and a busy server is not a dead one."""

_ASKED_AHEAD = 2
"""Parts that one connection has asked for and not got. The server copies every answer before it sends the first byte of it: a chunk that is asked
for at once is silent for longer than ``timeout_ms``, and has left the processor's caches when it is sent."""
_SCAN_COUNT = 1000
_ELSEWHERE = ("MOVED", "ASK", "TRYAGAIN")
"""How a cluster's node says that it is not the one to ask; so the chunk is a miss, and the cluster is looked up again."""
_DOWN = ("CLUSTERDOWN", "MASTERDOWN", "LOADING", "NOAUTH")
"""What a server says that can't serve at all."""
_NOT_ALLOWED = ("NOPERM", "ERR", "WRONGTYPE")
"""What it says where it serves, but not that."""


@dataclass(frozen=True)
class RemoteSettings:
    """``key_id`` names the digest key; ``ttl_seconds`` 0: none; ``timeout_ms`` is the longest silence while reading; ``shares``: of tenants."""

    url: str
    key_id: bytes
    ttl_seconds: int
    timeout_ms: int
    shares: ShareSettings = field(default_factory=ShareSettings)


class Remote:
    """See the module. Any thread may call; each has connections of its own. Raises RemoteUnavailable where nobody answers in time.

    Whatever fails that way closes its connection and makes every later call fail at once, until ``tick`` finds that the server answers; in
    a cluster that goes for each node by itself. Raises TierError where the URL says nothing that can be done.
    """

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings
        self._names = Names(settings.key_id)
        self._breaker = Breaker()
        self._silent: dict[str, Breaker] = {}
        self._server = Servers(settings.url, settings.timeout_ms / 1000)
        self.shares = Shares(self._server, self._names, settings.shares, self._controlled)
        self._moved = self._told = False
        self._local = threading.local()
        self._life = 0
        self._refused_until: dict[str, float] = {}
        self._lock = threading.Lock()
        names = ("read_bytes", "written_bytes", "timeouts", "refused")
        self.counts: dict[str, int] = dict.fromkeys(names, 0)

    @property
    def available(self) -> bool:
        """Whether the tier, or a node of it, answered when it was asked last."""
        return not self._breaker.open

    def probe(self, keys: Sequence[bytes]) -> list[ChunkHeader | None]:
        """The headers under these keys, in one round trip to each node; None where there is no whole header of that key."""
        names = [self._name(key) for key in keys]
        by_place: dict[str, list[str]] = {}
        for name in names:
            by_place.setdefault(self._server.where(name), []).append(name)
        found: dict[str, ChunkHeader | None] = {}
        for where, group in by_place.items():
            try:
                self._probe(where, group, found)
            except RemoteUnavailable:
                if self._breaker.open:
                    raise
        return [found.get(name) for name in names]

    def _probe(self, where: str, names: Sequence[str], found: dict[str, ChunkHeader | None]) -> None:
        scratch = bytearray(HEADER_BYTES)
        with self._connection(where) as line:
            line.send([command(b"GET", name.encode()) for name in names])
            for name in names:
                length = self._value(line, memoryview(scratch))
                header = unpack_header(bytes(scratch)) if length == HEADER_BYTES else None
                found[name] = header if header is not None and self._name(header.key) == name else None

    def get(self, header: ChunkHeader, into: memoryview, taken: Taken = lambda piece: None) -> ChunkHeader | None:
        """Reads the payload into ``into`` (``header.length`` bytes); the header found with it, None where they are not there as ``header`` says.

        ``taken`` is called with each part of ``into`` once it is there. ``into`` is not written any more when this returns.
        """
        name = self._name(header.key)
        where, pieces = self._server.where(name), parts(into)
        scratch = bytearray(HEADER_BYTES)
        asked = [command(b"GET", part.encode()) for part in [name, *part_names(name, len(pieces))]]
        used = self.shares.use(where, header)
        with self._connection(where) as line:
            line.send([*used, *asked[: _ASKED_AHEAD + 1]])
            for _ in used:
                line.receive_status()
            whole = self._value(line, memoryview(scratch)) == HEADER_BYTES
            for number, part in enumerate(pieces, _ASKED_AHEAD + 1):
                line.send(asked[number : number + 1])
                whole &= self._value(line, part) == len(part)
                taken(part)
        found = unpack_header(bytes(scratch)) if whole else None
        self.counts["read_bytes"] += len(into)
        same = found is not None and (found.key, found.digest, found.length) == (header.key, header.digest, header.length)
        return found if same else None

    def put(self, header: ChunkHeader, payload: memoryview) -> bool:
        """Stores a chunk; see ``put_all``."""
        return self.put_all([(header, payload)])[0]

    def put_all(self, chunks: Sequence[tuple[ChunkHeader, memoryview]]) -> list[bool]:
        """Stores chunks, headers with payloads, each while the server still works on the one before; whether it took them.

        A server refuses when it is full: then nothing is written there for a while. What is more than a tenant may have is not written.
        """
        stored = [False] * len(chunks)
        by_place: dict[str, list[int]] = {}
        for number, (header, _) in enumerate(chunks):
            by_place.setdefault(self._server.where(self._name(header.key)), []).append(number)
        for where, numbers in by_place.items():
            if time.monotonic() >= self._refused_until.get(where, 0.0):
                admitted, ahead = self.shares.admit(where, [chunks[number][0] for number in numbers])
                going = [number for number in numbers if chunks[number][0].key in admitted]
                for number, taken in zip(going, self._put(where, [chunks[number] for number in going], ahead), strict=True):
                    stored[number] = taken
        return stored

    def _put(self, where: str, chunks: Sequence[tuple[ChunkHeader, memoryview]], ahead: Sequence[bytes]) -> list[bool]:
        values = [self._values_of(header, payload) for header, payload in chunks]
        stored = []
        with self._connection(where, patience=WRITE_PATIENCE) as line:
            answers = _sent(
                line,
                [
                    command_parts([b"SET", at.encode(), value, *self._expiry(header)])
                    for (header, _), own in zip(chunks, values, strict=True)
                    for at, value in own
                ],
                ahead,
            )
            self._counted(where, answers[: len(ahead)])
            del answers[: len(ahead)]
            start = 0
            for (header, payload), own in zip(chunks, values, strict=True):
                said = answers[start : start + len(own)]
                start += len(own)
                stored.append(len(said) == len(own) and not any(said))
                if stored[-1]:
                    self.counts["written_bytes"] += len(payload)
                elif len(said) == len(own) and not said[-1]:
                    # The header went out before the last part's refusal came; without that part it promises what is not there.
                    line.send([command(b"DEL", self._name(header.key).encode())])
                    line.receive_status()
            if error := next(filter(None, answers), ""):
                self._not_written(where, error)
        return stored

    def _expiry(self, header: ChunkHeader) -> list[bytes]:
        own = max(1, header.expires_at - int(time.time())) if header.expires_at else 0
        limits = [seconds for seconds in (self._settings.ttl_seconds, own) if seconds]
        return [b"EX", str(min(limits)).encode()] if limits else []

    def _values_of(self, header: ChunkHeader, payload: memoryview) -> list[tuple[str, memoryview]]:
        """What a chunk is stored as, by name, the header last."""
        name, pieces = self._name(header.key), parts(payload)
        return [*zip(part_names(name, len(pieces)), pieces, strict=True), (name, memoryview(pack_header(header)))]

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forgets chunks; how many of them were there."""
        count = 0
        for name in map(self._name, keys):
            where = self._server.where(name)
            with self._controlled(where):
                # The header first: what has none is not there. What parts it had is not known any more.
                count += int(self._server.client(where).delete(name))
                self._server.client(where).unlink(*part_names(name, PARTS_MAX))
        return count

    def scan(self) -> Iterator[bytes]:
        """The keys of all chunks of this digest key, on the nodes that answer."""
        yield from filter(None, (self._names.key(name) for _, name in self._values()))

    def clear(self) -> int:
        """Forgets all chunks of this digest key; how many values that were."""
        count = 0
        for where, name in self._values():
            with self._controlled(where):
                count += int(self._server.client(where).unlink(name))
        self.shares.forget()
        return count

    def info(self) -> dict[str, Any]:
        """What the server says of itself; of a cluster, what one node says."""
        where = self._place()
        with self._controlled(where):
            return dict(self._server.client(where).info())

    def ping(self) -> float:
        """Seconds of a round trip."""
        with self._connection(self._place()) as line:
            started = time.perf_counter()
            line.send([command(b"PING")])
            line.receive_status()
            return time.perf_counter() - started

    def tick(self) -> bool:
        """Tries to reach what was given up, when that is due, and looks a cluster up again that has changed; True where something answers again."""
        now = time.monotonic()
        if self._breaker.open:
            return self._breaker.due(now) and self._find() and self._try(self._server.where(self._name(b"")), self._breaker)
        if self._moved:
            self._find()
        came_back = False
        for where, breaker in list(self._silent.items()):
            gone = where not in self._server.places()
            if gone or (breaker.due(now) and self._find() and self._try(where, breaker)):
                self._silent.pop(where, None)
                came_back = True
        return came_back

    def _find(self) -> bool:
        self._moved = False
        try:
            self._server.find()
        except RemoteUnavailable as error:
            self._moved = True
            self._gave_up("", error, None)
            return False
        return True

    def _try(self, where: str, breaker: Breaker) -> bool:
        """Asks for a value of that node: one that can't serve answers a PING all the same."""
        name = self._names.tagged(self._server.tag(where))
        try:
            with self._connection(where, trying=True) as line:
                line.send([command(b"GET", name.encode())])
                self._value(line, memoryview(bytearray(HEADER_BYTES)))
        except RemoteUnavailable:
            return False
        if breaker.answered():
            self._told = False
            log.info("redis: %s answers", " ".join([redacted(self._settings.url), where]).strip())
        return True

    def _name(self, key: bytes) -> str:
        return self._names.chunk(key)

    def _place(self) -> str:
        """One that answers, as far as is known."""
        return next((where for where in self._server.places() if where not in self._silent), "")

    def _value(self, line: Line, into: memoryview) -> int:
        """As ``Line.receive_value``; what another node keeps now is not there."""
        try:
            return line.receive_value(into)
        except Answered as error:
            if not str(error).startswith(_ELSEWHERE):
                raise
            self._moved = True
            return -1

    def _values(self) -> Iterator[tuple[str, bytes]]:
        """The names of all values of this digest key, each after its place."""
        for where in self._server.places():
            try:
                with self._controlled(where):
                    for name in self._server.client(where).scan_iter(match=f"{self._names.prefix}*", count=_SCAN_COUNT):
                        yield where, name
            except RemoteUnavailable:
                if self._breaker.open:
                    raise

    def _check(self, where: str) -> None:
        if self._breaker.open or where in self._silent:
            raise RemoteUnavailable("the shared tier does not answer")
        if where not in self._server.places():
            self._moved = True
            raise RemoteUnavailable("no node of the cluster keeps that")

    @contextlib.contextmanager
    def _connection(self, where: str, *, trying: bool = False, patience: int = 1) -> Iterator[Line]:
        if not trying:
            self._check(where)
        if getattr(self._local, "life", None) != self._life:
            self._local.life, self._local.lines = self._life, {}
        line: Line | None = None
        try:
            line = self._local.lines.get(where) or self._server.connect(where)
            self._local.lines[where] = line
            line.wait_at_most(patience * self._settings.timeout_ms / 1000)
            yield line
        except (Answered, OSError, redis.RedisError) as error:
            self._local.lines.pop(where, None)
            self._gave_up(where, error, line)
            raise RemoteUnavailable(f"the shared tier does not answer: {error}") from error

    @contextlib.contextmanager
    def _controlled(self, where: str) -> Iterator[None]:
        self._check(where)
        try:
            yield
        except AskError as error:
            self._moved = True
            raise RemoteUnavailable(f"the shared tier has it elsewhere now: {error}") from error
        except (OSError, redis.RedisError) as error:
            self._gave_up(where, error, None)
            raise RemoteUnavailable(f"the shared tier does not answer: {error}") from error

    def _gave_up(self, where: str, error: Exception, line: Line | None) -> None:
        if line is not None:
            line.close()
        with self._lock:
            self.counts["timeouts"] += 1
            others = self._server.places() - self._silent.keys() - {where}
            alone = self._breaker.open or not where or not others
            breaker = self._breaker if alone else self._silent.setdefault(where, Breaker(open=False))
            if breaker.failed(time.monotonic()) or not self._told:
                self._told = True
                # Connections of other threads may be as dead.
                self._life += 1
                log.warning("redis: %s does not answer (%s): requests go on without it", f"{redacted(self._settings.url)} {where}".strip(), error)

    def _counted(self, where: str, answers: Sequence[str]) -> None:
        for error in filter(None, answers):
            if error.startswith(_ELSEWHERE):
                self._moved = True
            elif error.startswith(_NOT_ALLOWED):
                self.shares.refused(where, error)

    def _not_written(self, where: str, error: str) -> None:
        if error.startswith(_ELSEWHERE):
            self._moved = True
            return
        if error.startswith(_DOWN) or (error.startswith("READONLY") and self._server.kind):
            # Another is the master now.
            raise Answered(error)
        with self._lock:
            self.counts["refused"] += 1
            if time.monotonic() >= self._refused_until.get(where, 0.0):
                log.warning("redis: %s takes no chunks now: %s", redacted(self._settings.url), error)
            self._refused_until[where] = time.monotonic() + REFUSED_SECONDS


def _sent(line: Line, commands: Sequence[Sequence[bytes | memoryview]], ahead: Sequence[bytes] = ()) -> list[str]:
    """Sends commands, each while the server still works on the one before; their statuses as ``Line.receive_status`` gives them.

    None is sent any more once one was refused, so there may be fewer statuses than commands. Those ``ahead`` go first, and may be refused.
    """
    answers: list[str] = []
    line.send([*ahead, *(commands[0] if commands else ())])
    sent = len(ahead) + len(commands[:1])
    for words in commands[1:]:
        if any(answers[len(ahead) :]):
            break
        line.send(words)
        while len(answers) < sent:
            answers.append(line.receive_status())
        sent += 1
    while len(answers) < sent:
        answers.append(line.receive_status())
    return answers
