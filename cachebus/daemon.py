"""The cachebus daemon: carries out what the directory decides. One a node, one thread, one region.

start: lock the run directory, make or adopt the region, bind the sockets
run:   a message in, effects out; every half second look who died; every second a heartbeat
stop:  unbind; remove the region if nobody maps it any more
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from cachebus import census, holder, housekeeping, zeromq
from cachebus.below import Below
from cachebus.chunk import key_id
from cachebus.codec import decode_request, encode_events, encode_reply
from cachebus.directory import Directory
from cachebus.effects import Answer, Effect, Publish, Start, WipeRecord, WriteRecord
from cachebus.elsewhere import Elsewhere
from cachebus.errors import BusError, HeadstartError, ProtocolError
from cachebus.journal import Journal
from cachebus.keepers import Keepers
from cachebus.lanes import Memory
from cachebus.lineage import Lineage
from cachebus.members import Members
from cachebus.messages import (
    Abandon,
    Acquire,
    Commit,
    Denied,
    Done,
    Drain,
    Event,
    Granted,
    Hello,
    Leave,
    Ping,
    Pong,
    Quarantine,
    Reattach,
    RegisterEngine,
    RegisterWorker,
    Release,
    Reply,
    Report,
    Request,
    Reserve,
    Snapshot,
    SnapshotReply,
    Stat,
    StatReply,
    Welcome,
    Withdraw,
)
from cachebus.messages_handover import Hold, Offer, Stale
from cachebus.messages_hbm import OpenHbm, ReportHbm
from cachebus.messages_peers import Lend, Missed
from cachebus.messages_tools import CHUNKS_MAX, Clear, Cleared, Count, ListChunks, Pin
from cachebus.metrics import BusMetrics
from cachebus.node import Node
from cachebus.region import Region
from cachebus.sealing import Sealer
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.tenants import TenantsFile
from cachebus.wire import Tier

log = logging.getLogger("headstart.cachebus")

_OfHolder = TypeVar("_OfHolder", Acquire, Reserve, Reattach, RegisterEngine, RegisterWorker)

TICK_MS = 20
REAP_MS = 500
UPKEEP_MS = 1000
HEARTBEAT_MS = 1000
OTHER_NODES = "other nodes"
"""The holder of what other nodes read."""


class Daemon:
    """Requests in, effects carried out. ``now_ms`` is a monotonic clock."""

    def __init__(
        self,
        run_dir: Path,
        region: Region,
        digest_key: bytes,
        metrics: BusMetrics,
        cache: CacheSettings,
        security: SecuritySettings = SecuritySettings(),  # noqa: B008 - it is frozen
        ending: threading.Event | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._region = region
        self._cache = cache
        self._chunk_size = cache.chunk_size
        self._digest_key = digest_key
        self._metrics = metrics
        self._epoch = time.time_ns() // 1_000_000
        self._seq = 0
        self._members = Members()
        self._elsewhere = Elsewhere()
        self._lineage = Lineage(Path(cache.local_disk).absolute() if cache.local_disk else run_dir)
        self._tenants = TenantsFile(Path(security.tenants_file), digest_key) if security.tenants_file else None
        self._node = Node(cache, security, region.data) if cache.node_port else None
        sockets = self._node.sockets if self._node else None
        self._server = zeromq.Server(address(run_dir, zeromq.REQUESTS), address(run_dir, zeromq.EVENTS), sockets)
        self._journal = Journal()
        try:
            self._below = Below.open(
                cache, security, Memory(region.data, digest_key, Sealer(digest_key) if security.encrypt_at_rest else None), self._server.wake
            )
        except HeadstartError:
            self._server.close()
            raise
        self._keepers = Keepers(cache, self._server, self._below)
        self._directory = Directory(
            region.data_bytes,
            region.table.slots,
            self._epoch,
            self._below.tiers,
            cache.eviction,
            cache.tenant_share_max,
            time.time() - time.monotonic(),
        )
        if self._tenants:
            self._directory.share(self._tenants.now.shares())
            self._below.share(self._tenants.now.shares())
        self._holders: set[str] = set()
        self._messages: Counter[str] = Counter()
        self._ending = ending or threading.Event()
        self._events: list[Event] = []
        self._handlers = self._make_handlers()
        self._carry_out(self._below.changes())
        self._adopt()

    def _make_handlers(self) -> dict[type, Callable[..., list[Effect]]]:
        return {
            Hello: self._hello,
            Ping: self._ping,
            Snapshot: self._snapshot,
            Stat: lambda c, t, r: [Answer(c, t, StatReply(self._epoch, self.statistics()))],
            RegisterEngine: self._register_engine,
            RegisterWorker: self._register_worker,
            Drain: self._members.drain,
            Leave: self._members.leave,
            Report: lambda c, t, r: [Publish(r)],
            Acquire: lambda c, t, r: self._directory.acquire(c, t, self._of_living(r), _now_ms()),
            Withdraw: lambda c, t, r: self._directory.withdraw(c, r.acquire),
            Release: lambda c, t, r: self._directory.release(r.leases),
            Reserve: lambda c, t, r: self._directory.reserve(c, t, self._of_living(r)),
            Commit: lambda c, t, r: self._directory.commit(r.holder, r.entries, _now_ms()),
            Abandon: lambda c, t, r: self._directory.abandon(r.holder, r.slots, _now_ms()),
            Quarantine: self._quarantine,
            **dict.fromkeys((Offer, Stale, Hold), lambda c, t, r: self._directory.hand_over(c, t, r, _now_ms())),
            ListChunks: lambda c, t, r: [Answer(c, t, census.chunks(self._directory, r.after, max(1, min(r.count_max, CHUNKS_MAX))))],
            Pin: self._pin,
            Clear: self._clear,
            Reattach: self._reattach,
            Lend: self._lend,
            OpenHbm: lambda c, t, r: self._members.open_hbm(c, t, r, _now_ms()),
            ReportHbm: lambda c, t, r: self._members.report_hbm(c, t, r, _now_ms()),
            **self._keepers.handlers(_now_ms),
        }

    def _adopt(self) -> None:
        living = holder.living(self._run_dir)
        if not self._region.adopted:
            return
        self._carry_out(self._directory.adopt(self._region.table.read(), living))
        writers = {record.holder for _, record in self._region.table.read() if record.holder}
        for name in writers - living:
            self._carry_out(self._directory.holder_died(name, _now_ms()))
        self._holders |= living
        self._events.clear()
        kept = int(self._directory.statistics()["chunks"])
        log.info("adopted the region %s: %d chunks; %d holders live", self._region.path, kept, len(living))

    def run(self) -> None:
        """Serves until ``stop``."""
        reap_at = beat_at = upkeep_at = 0.0
        while not self._ending.is_set():
            received = self._server.receive(math.ceil(min(TICK_MS, self._keepers.agreement.due_ms(_now_ms()))))
            while received is not None:
                self._handle(received)
                received = self._server.receive(0)
            now = _now_ms()
            self._take_outcomes(now)
            self._carry_out(self._keepers.turn(now))
            self._carry_out(self._directory.tick(now))
            if now >= upkeep_at:
                upkeep_at = now + UPKEEP_MS
                self._carry_out(housekeeping.upkeep(self._directory, now, self._cache.chunk_ttl_seconds))
                self._carry_out(self._members.hbm.end_silent(now))
                if self._tenants and self._tenants.look():
                    self._directory.share(self._tenants.now.shares())
                    self._below.share(self._tenants.now.shares())
                self._keepers.agreement.end_silent(now)
            if now >= reap_at:
                reap_at = now + REAP_MS
                self._reap()
            if now >= beat_at:
                beat_at = now + HEARTBEAT_MS
                self._metrics.values = self.statistics()
                if self._node:
                    self._carry_out(self._directory.release(self._node.lending.ended(now)))
                    self._node.look_for_revoked()
                self._server.publish(encode_events(self._epoch, self._seq, []))

    def stop(self) -> None:
        """Makes ``run`` return."""
        self._ending.set()

    def close(self) -> None:
        """Writes behind what is queued, unbinds, and removes the region if no living worker maps it."""
        self._below.close()
        self._keepers.close()
        self._server.close()
        in_use = holder.living(self._run_dir)
        self._region.close()
        if in_use:
            log.info("kept the region %s: %d holders live", self._region.path, len(in_use))
        else:
            self._region.path.unlink(missing_ok=True)

    def statistics(self) -> dict[str, float]:
        """Gauges and counters by name."""
        roles = Counter(worker.role for worker in self._members.workers())
        return {
            **self._directory.statistics(),
            **{f"workers_{role}": count for role, count in roles.items()},
            **{f"hbm_chunks_{worker}": count for worker, count in self._members.hbm.counts().items()},
            "hbm_gaps_total": self._members.hbm.gaps,
            "engines": len(self._members.engines),
            **self._keepers.agreement.counts(),
            "lent": len(self._node.lending) if self._node else 0,
            "holders": len(self._holders),
            "events": self._seq,
            **{f"messages_{name}_total": count for name, count in self._messages.items()},
        }

    def _handle(self, received: zeromq.Received) -> None:
        client = received.client
        try:
            envelope = decode_request(received.frame)
        except ProtocolError as error:
            self._messages["malformed"] += 1
            log.warning("dropped a message: %s", error)
            return
        body: Request = envelope.body
        if self._node and received.user is not None and (reason := self._node.refusal(received.user, body)):
            self._messages["refused"] += 1
            self._carry_out([Answer(client, envelope.ticket, Denied(reason))])
            return
        self._messages[type(body).__name__] += 1
        try:
            effects = self._handlers[type(body)](client, envelope.ticket, body)
        except BusError as error:
            effects = [Answer(client, envelope.ticket, Denied(str(error)))]
        self._carry_out(effects)

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Answer):
                self._server.reply(effect.client, encode_reply(effect.ticket, self._as_told(effect)))
            elif isinstance(effect, WriteRecord):
                self._region.table.write(effect.slot, effect.record)
            elif isinstance(effect, WipeRecord):
                self._region.table.wipe(effect.slot)
            elif isinstance(effect, Start):
                self._below.start(effect.job)
            elif isinstance(effect, Publish):
                self._events.append(effect.event)
        if self._events:
            self._seq += 1
            batch = encode_events(self._epoch, self._seq, self._events)
            self._journal.append(self._seq, batch)
            self._server.publish(batch)
            self._events = []

    def _as_told(self, answer: Answer) -> Reply:
        """A lease is told to a worker as it is, and to another node as a loan."""
        body = answer.body
        if isinstance(body, Granted) and self._node and self._node.sockets.is_one(answer.client):
            return self._node.lent(body, self._directory.dram.index, _now_ms())
        return body

    def _lend(self, client: bytes, ticket: int, request: Lend) -> list[Effect]:
        wanted = Acquire(OTHER_NODES, request.layout, request.keys, request.wait_ms, ready_only=True)
        return self._directory.acquire(client, ticket, wanted, _now_ms())

    def _take_outcomes(self, now: float) -> None:
        self._carry_out(self._below.changes())
        for number, outcome in self._below.outcomes():
            self._carry_out(self._directory.done(number, outcome, now))
        for node, event in self._below.news():
            self._carry_out(self._elsewhere.learn(node, event, self._members.engines))

    def _pin(self, client: bytes, ticket: int, request: Pin) -> list[Effect]:
        count, effects = housekeeping.pin(self._directory, request.keys, request.pinned)
        return [*effects, Answer(client, ticket, Count(count))]

    def _clear(self, client: bytes, ticket: int, request: Clear) -> list[Effect]:
        if request.tenant and "redis" in request.tiers and self._cache.remote_url and "redis" not in self._below.tiers.usable:
            raise BusError("the shared tier does not answer, so what a tenant has there can't be deleted: ask again later")
        count, effects = housekeeping.clear(self._directory, request.tiers, request.tenant)
        return [*effects, Publish(Cleared(request.tenant)), Answer(client, ticket, Count(count))]

    def _hello(self, client: bytes, ticket: int, request: Hello) -> list[Effect]:
        if request.holder:
            if not holder.is_alive(self._run_dir, request.holder):
                raise BusError(f"holder {request.holder} of {request.client} has no lock in this run directory")
            self._holders.add(request.holder)
        log.info("%s connected", request.client)
        region = self._region
        return [Answer(client, ticket, Welcome(self._epoch, str(region.path), region.data_bytes, self._chunk_size, self._digest_key))]

    def _ping(self, client: bytes, ticket: int, request: Ping) -> list[Effect]:
        attached = request.holder in self._holders and self._directory.is_attached(request.holder)
        return [Answer(client, ticket, Pong(self._epoch, attached, key_id(self._digest_key), self._keepers.agreement.node))]

    def _snapshot(self, client: bytes, ticket: int, request: Snapshot) -> list[Effect]:
        missed = self._journal.since(request.seq) if request.epoch == self._epoch else None
        if missed is not None:
            return [Answer(client, ticket, Missed(missed))]
        keys: dict[Tier, list[bytes]] = {"dram": self._directory.keys(), **self._below.tiers.keys()}
        workers, hbm = self._members.workers() + self._elsewhere.workers(), self._members.hbm.keys() | self._elsewhere.hbm()
        return [Answer(client, ticket, SnapshotReply(self._epoch, self._seq, keys, workers, hbm))]

    def _register_engine(self, client: bytes, ticket: int, request: RegisterEngine) -> list[Effect]:
        self._of_living(request)
        effects: list[Effect]
        if request.chunk_size != self._chunk_size:
            reason = f"cache.chunk_size is {request.chunk_size} in {request.worker} and {self._chunk_size} in the cachebus: set one value"
            effects = [Answer(client, ticket, Denied(reason))]
        elif request.chunk_bytes > self._region.data_bytes:
            reason = (
                f"one chunk of {request.model!r} takes {request.chunk_bytes} bytes and the region holds {self._region.data_bytes}: "
                "raise cache.max_local_cpu_size or lower cache.chunk_size"
            )
            effects = [Answer(client, ticket, Denied(reason))]
        else:
            parts = request.layout_parts
            self._below.tiers.described[request.layout] = (
                f"{parts.get('layers', '')} x {parts.get('block shape', '')}",
                parts.get("element type", ""),
            )
            effects = self._members.register_engine(client, ticket, request)
            if self._members.engines.get(request.worker) is request:
                self._lineage.register(request, len(self._directory.keys()) + len(self._below.tiers.keys()["nvme"]))
        return effects

    def _register_worker(self, client: bytes, ticket: int, request: RegisterWorker) -> list[Effect]:
        self._of_living(request)
        self._carry_out(self._directory.attach(request.holder))
        log.info("%s worker %s serves %s at %s", request.role, request.worker, request.model, request.url)
        return self._members.register_worker(client, ticket, request)

    def _quarantine(self, client: bytes, ticket: int, request: Quarantine) -> list[Effect]:
        log.error("chunk %s failed its digest when it was pulled: it will not be served again", request.key.hex()[:16])
        return [*self._directory.quarantine(request), Answer(client, ticket, Done())]

    def _reattach(self, client: bytes, ticket: int, request: Reattach) -> list[Effect]:
        self._of_living(request)
        return [*self._directory.reattach(request, _now_ms()), Answer(client, ticket, Done())]

    def _of_living(self, request: _OfHolder) -> _OfHolder:
        """The request, whose holder is watched from now on. What the dead have sent may be read after they were noticed, and nobody would end it.

        Raises BusError where the holder is dead.
        """
        if request.holder not in self._holders:
            if not holder.is_alive(self._run_dir, request.holder):
                raise BusError(f"holder {request.holder} has no lock in this run directory")
            self._holders.add(request.holder)
        return request

    def _reap(self) -> None:
        for name in [name for name in self._holders if not holder.is_alive(self._run_dir, name)]:
            self._holders.discard(name)
            log.info("holder %s is gone: its leases and reservations end", name)
            self._carry_out(self._directory.holder_died(name, _now_ms()))
            self._carry_out(self._members.holder_died(name))


def address(run_dir: Path, name: str) -> str:
    """The ZeroMQ address of one of the bus's sockets."""
    return f"ipc://{run_dir / name}"


def _now_ms() -> float:
    return time.monotonic() * 1000
