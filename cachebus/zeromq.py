"""The one file that knows ZeroMQ: the bus's four sockets, each with its limits set.

ZeroMQ's defaults are unsafe for a bus (no size limit, endless linger), so every socket sets high-water mark, message
size, linger and heartbeats here. A message that can't be queued at once is refused, never waited for.
"""

from __future__ import annotations

import contextlib
import os

import zmq
import zmq.asyncio

from cachebus.errors import BusError

REQUESTS, EVENTS = "bus.sock", "events.sock"
"""Names of the two ipc sockets in the run directory."""

QUEUE_MAX = 10_000
MESSAGE_BYTES_MAX = 64 << 20
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 3000
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


class Server:
    """The daemon's two sockets: requests in and replies out, and events out."""

    def __init__(self, requests: str, events: str) -> None:
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

    def receive(self, timeout_ms: int) -> list[bytes] | None:
        """The frames of the next message, the client's identity first; None where none comes in time or ``wake`` was called."""
        ready = dict(self._poller.poll(timeout_ms))
        if self._woken in ready:
            os.eventfd_read(self._woken)
        return self._router.recv_multipart() if self._router in ready else None

    def wake(self) -> None:
        """Ends a ``receive`` that waits. Any thread may call it, at any time."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._woken, 1)

    def reply(self, client: bytes, frame: bytes) -> None:
        """Sends to a client; one that is gone is passed over (ROUTER drops it)."""
        self._router.send_multipart([client, frame], zmq.NOBLOCK)

    def publish(self, frame: bytes) -> None:
        """Sends to every subscriber; one that does not keep up misses it and sees the gap."""
        self._publisher.send(frame)

    def close(self) -> None:
        """Closes both sockets."""
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
