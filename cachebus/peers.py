"""Other nodes as a tier: a thread follows each one's directory, threads ask for loans and read the bytes.

A follower hears a node's events, asks for what it missed, and pings it each second; a node that is not heard for ``SILENCE_SECONDS`` counts as
gone until it is heard again. What it holds on disk or in DRAM can be had; what it knows of third nodes can't, so nothing is passed on in circles.
Where routers here are to know of a node's workers, its follower says on what the node says of those that are its own.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cachebus.chunk import ChunkHeader
from cachebus.chunk import key_id as digest_key_id
from cachebus.codec import decode_events, decode_reply, encode_request
from cachebus.effects import Held, Job, Loan, Outcome, Probe, Read
from cachebus.errors import BusError, BusUnavailable, ProtocolError
from cachebus.lanes import Digesting, Jobs, Lane, Memory, taken
from cachebus.messages import Event, Ping, Pong, Removed, Reply, Report, Request, Snapshot, SnapshotReply, Stored, WorkerDown, WorkerUp
from cachebus.messages_hbm import HbmChanged
from cachebus.messages_peers import Lend, Lent, Missed
from cachebus.messages_tools import Cleared
from cachebus.peer_places import PeerPlaces
from cachebus.replica import Replica
from cachebus.wire import NODE_BYTES, Tier
from cachebus.zeromq_peers import BytesReader, PeerAddress, PeerLink, Wanted

log = logging.getLogger("headstart.cachebus")

SILENCE_SECONDS = 2.5
"""A live node is heard each second."""

ASK_SECONDS = 1.0
RENEW_SECONDS = 5.0
"""After so much silence a node is connected to again: ZeroMQ never tries again where a key was refused, and it may have been allowed since."""

LOOK_SECONDS = 2.0
"""How often nodes are looked for where one name stands for all."""

_LOOK_MS = 200
_OWN: frozenset[Tier] = frozenset({"dram", "nvme"})


class Follower(threading.Thread):
    """Keeps what is known of one node in step with it. ``changed`` and ``news``, of its own workers, are called from this thread."""

    def __init__(
        self, name: str, address: PeerAddress, key_id: bytes, changed: Callable[[Held], None], news: Callable[[str, Event], None] | None = None
    ) -> None:
        super().__init__(name=f"headstart-peer-{name}", daemon=True)
        self.round_trip = 0.0
        self._node = b""
        self.address = address
        self._peer, self._key_id, self._changed, self._news = name, key_id, changed, news
        self._told: set[str] = set()
        self._replica = Replica()
        self._ending = threading.Event()
        self._ticket = 0
        self._pinged: dict[int, float] = {}
        self._up = self._foreign = False
        self._heard_at = self._asked_at = float("-inf")

    @property
    def keeper(self) -> bytes:
        """Who the node is among those that keep claims; nothing while it is silent, and where it keeps none."""
        return self._node if self._up else b""

    def stop(self) -> None:
        """Ends the thread."""
        self._ending.set()

    def run(self) -> None:
        link = PeerLink(self.address, events=True)
        linked_at, ping_at = time.monotonic(), 0.0
        while not self._ending.is_set():
            replies, batches = link.receive(_LOOK_MS)
            now = time.monotonic()
            if now - max(linked_at, self._heard_at) > RENEW_SECONDS:
                link.close()
                link, linked_at = PeerLink(self.address, events=True), now
            try:
                in_step = self._take(replies, batches, now)
            except ProtocolError as error:
                log.warning("peer %s: %s", self._peer, error)
                in_step = True
            if not in_step and now - self._asked_at >= ASK_SECONDS:
                self._asked_at = now
                self._send(link, Snapshot(*self._replica.position))
            if now >= ping_at:
                ping_at = now + 1.0
                self._pinged = {self._send(link, Ping()): now}
            if self._up and now - self._heard_at > SILENCE_SECONDS:
                self._up = False
                log.warning("peer %s is silent: requests go on without it", self._peer)
                self._gone()
        if self._up:
            log.info("peer %s is no peer any more", self._peer)
            self._gone()
        link.close()

    def _send(self, link: PeerLink, body: Request) -> int:
        self._ticket += 1
        link.send(encode_request(self._ticket, body))
        return self._ticket

    def _gone(self) -> None:
        self._changed(Held("peer", peer=self._peer, gone=True))
        for worker in self._told:
            self._tell(WorkerDown(worker))
        self._told = set()

    def _tell(self, event: Event) -> None:
        if self._news:
            self._news(self._peer, event)

    def _tell_all(self) -> None:
        """What the node knows of its own workers, after a time in which it was not followed."""
        own = {name: worker for name, worker in self._replica.workers.items() if not worker.node}
        hbm = self._replica.hbm_keys()
        for name in self._told - own.keys():
            self._tell(WorkerDown(name))
        for name, worker in own.items():
            self._tell(WorkerUp(worker))
            self._tell(HbmChanged(name, list(hbm.get(name, ())), [], whole=True))
        self._told = set(own)

    def _tell_one(self, event: Event) -> None:
        if isinstance(event, WorkerUp):
            if event.worker.node:
                return
            self._told.add(event.worker.worker)
        elif isinstance(event, Cleared):
            # What a node was itself told is not said on: two who follow each other would never end.
            if event.node:
                return
        elif not isinstance(event, WorkerDown | HbmChanged | Report) or event.worker not in self._told:
            return
        elif isinstance(event, WorkerDown):
            self._told.discard(event.worker)
        self._tell(event)

    def _take(self, replies: list[bytes], batches: list[bytes], now: float) -> bool:
        """Whether all that the node told is known here."""
        if replies or batches:
            self._heard_at = now
        in_step = True
        for frame in batches:
            in_step = self._apply(frame)
        for frame in replies:
            reply = decode_reply(frame)
            if isinstance(reply.body, Missed):
                in_step = all(self._apply(batch) for batch in reply.body.batches)
            elif isinstance(reply.body, SnapshotReply):
                self._replica.load(reply.body)
                self._up, in_step = False, True
            elif isinstance(reply.body, Pong):
                self._pong(reply.ticket, reply.body, now)
        if batches and in_step and not self._up and not self._foreign:
            self._up = True
            keys = self._replica.keys(_OWN)
            log.info("peer %s is there: %d chunks, %.1f ms away", self._peer, len(keys), 1000 * self.round_trip)
            self._changed(Held("peer", keys, whole=True, peer=self._peer))
            self._tell_all()
        return in_step

    def _apply(self, frame: bytes) -> bool:
        batch = decode_events(frame)
        position = self._replica.position
        if not self._replica.apply(batch):
            return False
        if self._up and self._replica.position != position:
            touched = {key for event in batch.events if isinstance(event, Stored | Removed) and event.tier in _OWN for key in event.keys}
            there = {key for key in touched if self._replica.tiers(key) & _OWN}
            self._changed(Held("peer", there, touched - there, peer=self._peer))
            for event in batch.events:
                self._tell_one(event)
        return True

    def _pong(self, ticket: int, pong: Pong, now: float) -> None:
        if ticket in self._pinged:
            seconds = now - self._pinged.pop(ticket)
            self.round_trip = seconds if not self.round_trip else 0.8 * self.round_trip + 0.2 * seconds
        self._node = pong.node if len(pong.node) == NODE_BYTES else b""
        foreign = pong.key_id != self._key_id
        if foreign and not self._foreign:
            log.error("peer %s has another digest key, so nothing of it can be checked: give both one security.digest_key_file", self._peer)
        self._foreign = foreign


@dataclass
class _Connections:
    """One thread's connections to one node."""

    link: PeerLink
    reader: BytesReader
    ticket: int = 0

    def close(self) -> None:
        """Ends both."""
        self.link.close()
        self.reader.close()


@dataclass
class _Own(threading.local):
    by_peer: dict[str, _Connections] = field(default_factory=dict)


class PeerLane(Lane):
    """Other nodes as a tier that is only read. ``key_id`` is what this node's own tiers call their key."""

    tier: Tier = "peer"

    def __init__(
        self,
        places: PeerPlaces,
        memory: Memory,
        key_id: bytes,
        timeout_ms: int,
        streams: int,
        wake: Callable[[], None],
        *,
        tells_workers: bool = False,
    ) -> None:
        self._places, self._key_id, self._timeout_ms, self._tells_workers = places, key_id, timeout_ms, tells_workers
        # Both are replaced as a whole by the thread that looks for nodes; the others read them.
        self._addresses: dict[str, PeerAddress] = places.named
        self._followers: dict[str, Follower] = {}
        self._own, self._streams = _Own(), streams
        self._news: queue.SimpleQueue[tuple[str, Event]] = queue.SimpleQueue()
        super().__init__(memory, streams, 0, wake)

    @property
    def usable(self) -> bool:
        return True

    @property
    def writable(self) -> bool:
        return False

    def distances(self) -> dict[str, float]:
        return {name: follower.round_trip for name, follower in self._followers.items()}

    def keepers(self) -> dict[str, tuple[bytes, PeerAddress]]:
        return {name: (follower.keeper, follower.address) for name, follower in self._followers.items() if follower.keeper}

    def news(self) -> Iterator[tuple[str, Event]]:
        yield from taken(self._news)

    def _heard(self, peer: str, event: Event) -> None:
        self._news.put((peer, event))
        self._wake()

    def _changed(self, held: Held) -> None:
        self._held.put(held)
        self._wake()

    def _do_one(self, job: Job) -> Outcome:
        if not isinstance(job, Probe):
            return Outcome(False)
        try:
            return self._borrow(job)
        except BusError as error:
            log.debug("peer: %s", error)
            # What does not answer may have been refused, and would never come back by itself: see RENEW_SECONDS.
            if isinstance(error, BusUnavailable) and (own := self._own.by_peer.pop(job.peer, None)):
                own.close()
        return Outcome(False)

    def _finish(self, job: Job, jobs: Jobs) -> Iterator[tuple[Job, Outcome]]:
        return self._read(job, job.loan, jobs) if isinstance(job, Read) and job.loan else super()._finish(job, jobs)

    def _read(self, first: Read, loan: Loan, jobs: Jobs) -> Iterator[tuple[Job, Outcome]]:
        """Reads a chunk; more of the same node while there is more than the other threads take, so that bytes come while a chunk's end is checked."""
        begun: deque[tuple[Read, Digesting]] = deque()

        def wanted() -> Iterator[Wanted]:
            job: Read | None = first
            while job is not None and job.loan:
                digesting = self._memory.digesting()
                begun.append((job, digesting))
                yield Wanted(job.loan.lease, job.loan.token, job.loan.offset, self._memory.extent(job.into, job.header.length), digesting.take)
                job = self._next_read(loan.peer, jobs)

        try:
            reader = self._connections(loan.peer).reader
        except BusError as error:
            log.debug("peer: %s", error)
            yield first, Outcome(False)
            return
        try:
            for allowed in reader.read(wanted(), self._timeout_ms):
                job, digesting = begun.popleft()
                yield job, self._checked(job, job.header, digesting) if allowed else Outcome(False)
        except BusError as error:
            log.debug("peer: %s", error)
        for job, _ in begun:
            yield job, Outcome(False)

    def _next_read(self, peer: str, jobs: Jobs) -> Read | None:
        if jobs.qsize() < self._streams:
            return None
        with contextlib.suppress(queue.Empty):
            entry = jobs.get_nowait()
            job = entry[2]
            if isinstance(job, Read) and job.loan and job.loan.peer == peer:
                return job
            jobs.put(entry)
        return None

    def _borrow(self, job: Probe) -> Outcome:
        own = self._connections(job.peer)
        own.ticket += 1
        if not own.link.send(encode_request(own.ticket, Lend(job.layout, job.keys, self._timeout_ms // 2)), self._timeout_ms):
            raise BusUnavailable("there is no connection to the node")
        lent = self._answer(own)
        loans = [Loan(job.peer, lent.lease, lent.token, chunk.offset) for chunk in lent.chunks]
        headers: list[ChunkHeader | None] = [
            ChunkHeader(chunk.key, job.layout, chunk.digest, chunk.length, self._key_id, chunk.tenant, expires_at=chunk.expires_at)
            for chunk in lent.chunks
        ]
        return Outcome(True, headers=headers, loans=loans)

    def _answer(self, own: _Connections) -> Lent:
        deadline = time.monotonic() + self._timeout_ms / 1000
        while (left := deadline - time.monotonic()) > 0:
            for frame in own.link.receive(1000 * left)[0]:
                reply = decode_reply(frame)
                body: Reply = reply.body
                if reply.ticket == own.ticket:
                    if isinstance(body, Lent):
                        return body
                    raise BusError(f"the node answered {body}")
        raise BusUnavailable("the node does not answer")

    def _connections(self, peer: str) -> _Connections:
        """This thread's connections to a node. Those to nodes that are no peers any more end here. Raises BusUnavailable where it is one."""
        addresses, own = self._addresses, self._own.by_peer
        for gone in own.keys() - addresses.keys():
            own.pop(gone).close()
        if peer not in addresses:
            raise BusUnavailable(f"{peer} is no peer any more")
        if peer not in own:
            own[peer] = _Connections(PeerLink(addresses[peer], events=False), BytesReader(addresses[peer]))
        return own[peer]

    def _work(self, jobs: Jobs) -> None:
        for peer in self._places.named:
            self._connections(peer)
        super()._work(jobs)
        for own in self._own.by_peer.values():
            own.close()

    def _upkeep(self) -> None:
        self._follow(self._places.named)
        # The address of a name that is looked up is not known before: that may take seconds, and the daemon does not wait for it.
        while not self._ending.is_set():
            self._follow(self._places.look())
            self._ending.wait(LOOK_SECONDS)
        self._follow({})

    def _follow(self, addresses: dict[str, PeerAddress]) -> None:
        digests, news = digest_key_id(self._memory.digest_key), self._heard if self._tells_workers else None
        gone = [follower for name, follower in self._followers.items() if name not in addresses]
        kept = {name: follower for name, follower in self._followers.items() if name in addresses}
        new = {name: Follower(name, address, digests, self._changed, news) for name, address in addresses.items() if name not in kept}
        self._addresses, self._followers = addresses, kept | new
        for follower in new.values():
            follower.start()
        for follower in gone:
            follower.stop()
        for follower in gone:
            follower.join()
