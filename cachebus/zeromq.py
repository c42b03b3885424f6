"""ZeroMQ within a node: the bus's sockets, each with its limits set. ``zeromq_peers.py`` has those between nodes; no other file knows ZeroMQ.

ZeroMQ's defaults are unsafe for a bus (no size limit, endless linger), so every socket sets high-water mark, message
size, linger and heartbeats here. A message that can't be queued at once is refused, never waited for.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import zmq
import zmq.asyncio

from cachebus.errors import BusError
from cachebus.zeromq_peers import HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, NodeSockets, PeerLink

REQUESTS, EVENTS = "bus.sock", "events.sock"
"""Names of the two ipc sockets in the run directory."""

QUEUE_MAX = 10_000
MESSAGE_BYTES_MAX = 64 << 20
_LINGER_MS = 200


def _limit(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> None:
    socket.setsockopt(zmq.SNDHWM, QUEUE_MAX)
    socket.setsockopt(zmq.RCVHWM, QUEUE_MAX)
    socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)


class Received(NamedTuple):
    """A message to the daemon. ``user``: None for a client of this node, else the public key (Z85) of one of another, "" where there are no keys."""

    client: bytes
    frame: bytes
    user: str | None


class Server:
    """The daemon's sockets: requests in and replies out, and events out; for this node, and where ``node`` is given for others, too."""

    def __init__(self, requests: str, events: str, node: NodeSockets | None = None) -> None:
        self._context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        self._publisher = self._context.socket(zmq.PUB)
        for socket, address in ((self._router, requests), (self._publisher, events)):
            _limit(socket)
            try:
                socket.bind(address)
            except zmq.ZMQError as error:
                raise BusError(f"can't bind {address}: {error}") from error
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._woken, zmq.POLLIN)
        self._node = node
        if node:
            self._poller.register(node.requests, zmq.POLLIN)

    def receive(self, timeout_ms: int) -> Received | None:
        """The next message; None where none comes in time or ``wake`` was called, or where it is malformed."""
        ready = dict(self._poller.poll(timeout_ms))
        if self._woken in ready:
            os.eventfd_read(self._woken)
        if self._router in ready:
            frames = self._router.recv_multipart()
            return Received(frames[0], frames[1] if len(frames) == 2 else b"", None)
        if self._node and self._node.requests in ready:
            return Received(*self._node.receive())
        return None

    def is_elsewhere(self, client: bytes) -> bool:
        """Whether a client is of another node."""
        return self._node is not None and self._node.is_one(client)

    def wait_for(self, link: PeerLink, *, no_longer: bool = False) -> None:
        """A ``receive`` that waits ends also when something comes over the link."""
        if no_longer:
            self._poller.unregister(link.requests)
        else:
            self._poller.register(link.requests, zmq.POLLIN)

    def wake(self) -> None:
        """Ends a ``receive`` that waits. Any thread may call it, at any time."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._woken, 1)

    def reply(self, client: bytes, frame: bytes) -> None:
        """Sends to a client; one that is gone is passed over (ROUTER drops it)."""
        if self._node and self._node.is_one(client):
            self._node.reply(client, frame)
        else:
            self._router.send_multipart([client, frame], zmq.NOBLOCK)

    def publish(self, frame: bytes) -> None:
        """Sends to every subscriber; one that does not keep up misses it and sees the gap."""
        self._publisher.send(frame)
        if self._node:
            self._node.publish(frame)

    def close(self) -> None:
        """Closes all sockets."""
        if self._node:
            self._node.close()
        self._context.destroy(linger=_LINGER_MS)
        os.close(self._woken)


class Requester:
    """A client's socket. For one thread: it belongs to the thread that made it."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        _limit(self._socket)
        self._socket.connect(address)

    def send(self, frame: bytes) -> bool:
        """Queues a message; False where the queue is full."""
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_ms: float = 0) -> bytes | None:
        """The next message; None where none comes in time."""
        try:
            if timeout_ms <= 0:
                return self._socket.recv(zmq.NOBLOCK)
            return self._socket.recv() if self._socket.poll(max(1, round(timeout_ms))) else None
        except zmq.Again:
            return None

    def close(self) -> None:
        """Closes the socket."""
        self._context.destroy(linger=_LINGER_MS)


class AsyncRequests:
    """A client's socket alone, for asyncio."""

    def __init__(self, requests: str) -> None:
        self._context = zmq.asyncio.Context(io_threads=1)
        self._dealer = self._context.socket(zmq.DEALER)
        _limit(self._dealer)
        self._dealer.connect(requests)

    async def send(self, frame: bytes) -> None:
        """Queues a request."""
        await self._dealer.send(frame)

    async def receive(self) -> bytes:
        """The next reply."""
        return await self._dealer.recv()

    def close(self) -> None:
        """Closes the socket."""
        self._context.destroy(linger=0)


class AsyncPeer:
    """A client's socket and a subscription to the daemon's events, for asyncio."""

    def __init__(self, requests: str, events: str) -> None:
        self._context = zmq.asyncio.Context(io_threads=1)
        self._dealer = self._context.socket(zmq.DEALER)
        self._subscriber = self._context.socket(zmq.SUB)
        for socket in (self._dealer, self._subscriber):
            _limit(socket)
        self._subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        self._dealer.connect(requests)
        self._subscriber.connect(events)

    async def send(self, frame: bytes) -> None:
        """Queues a request."""
        await self._dealer.send(frame)

    async def receive(self) -> bytes:
        """The next reply."""
        return await self._dealer.recv()

    async def event(self) -> bytes:
        """The next batch of events."""
        return await self._subscriber.recv()

    def close(self) -> None:
        """Closes both sockets."""
        self._context.destroy(linger=0)
