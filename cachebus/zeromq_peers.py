"""ZeroMQ between nodes: three tcp sockets of a daemon, and the clients of them.

A node listens at ``port`` for requests, at ``port + 1`` with events, at ``port + 2`` for bytes. With keys all three have CURVE, and a ZAP handler
that admits only keys that are allowed: CURVE by itself admits any. CURVE holds a stream of bytes to 0.9 GB/s, so the operator may take it off
the third; what is read there is still opened by a token that came over the first, and checked by its keyed digest.

A cut is seen by heartbeats: without them ZeroMQ hides it for as long as the kernel does.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import zmq
import zmq.auth
import zmq.auth.thread

from cachebus.chunk import Taken
from cachebus.errors import BusError, BusUnavailable

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 3000
PIECE_BYTES = 4 << 20
"""Bytes are read in pieces of this size at most."""
WINDOW = 4
"""Pieces that one reader has asked for and not got: all the flow control that is needed, since the sender sends nothing unasked."""

_REQUEST_BYTES_MAX = 1 << 20
_REPLY_BYTES_MAX = 64 << 20
_QUEUE_MAX = 10_000
_LINGER_MS = 200
_CONNECT_MS, _HANDSHAKE_MS = 1000, 2000
_RECONNECT_MS, _RECONNECT_MS_MAX = 50, 500
_TCP = b"tcp:"
_READ = struct.Struct("<QQQQ16s")
_TICKET = struct.Struct("<Q")
_IO_THREADS, _BYTES_IO_THREADS = 1, 6
_POLL_MS = 100


@dataclass(frozen=True)
class Pair:
    """A CURVE key pair, Z85."""

    public: bytes
    secret: bytes


@dataclass(frozen=True)
class Listen:
    """Where and how a node listens. ``may_connect(socket, public key)``: asked for every connection, where ``pair`` is given."""

    host: str
    port: int
    pair: Pair | None
    may_connect: Callable[[str, bytes], bool]
    encrypt_bytes: bool


def new_pair() -> tuple[bytes, bytes]:
    """A new public and secret key, Z85."""
    public, secret = zmq.curve_keypair()
    return public, secret


def _limit(socket: zmq.Socket[bytes], inbound_bytes_max: int) -> None:
    for option, value in (
        (zmq.SNDHWM, _QUEUE_MAX),
        (zmq.RCVHWM, _QUEUE_MAX),
        (zmq.MAXMSGSIZE, inbound_bytes_max),
        (zmq.LINGER, _LINGER_MS),
        (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        (zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS),
        (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
        (zmq.RECONNECT_IVL, _RECONNECT_MS),
        (zmq.RECONNECT_IVL_MAX, _RECONNECT_MS_MAX),
        (zmq.CONNECT_TIMEOUT, _CONNECT_MS),
        # An address that is IPv6 works, too.
        (zmq.IPV6, 1),
    ):
        socket.setsockopt(option, value)


class NodeSockets:
    """A daemon's side for other nodes. Raises BusError where a port is taken."""

    def __init__(self, listen: Listen) -> None:
        self._listen = listen
        self._spaces = {"bytes": _Space(listen, _BYTES_IO_THREADS)}
        self._spaces["requests"] = self._spaces["events"] = _Space(listen, _IO_THREADS)
        try:
            self.requests = self._bind(zmq.ROUTER, "requests", 0)
            self._events: zmq.Socket[bytes] | None = self._bind(zmq.PUB, "events", 1)
        except BusError:
            self.close()
            raise

    def receive(self) -> tuple[bytes, bytes, str]:
        """The next request: client, frame ("" where it is malformed) and the client's public key."""
        frames = self.requests.recv_multipart(copy=False)
        user = ""
        with contextlib.suppress(zmq.ZMQError):
            user = str(frames[-1].get("User-Id"))
        return _TCP + frames[0].bytes, frames[1].bytes if len(frames) == 2 else b"", user

    def is_one(self, client: bytes) -> bool:
        """Whether a client came over the network."""
        return client.startswith(_TCP)

    def reply(self, client: bytes, frame: bytes) -> None:
        """Sends to a client; one that is gone is passed over."""
        self.requests.send_multipart([client.removeprefix(_TCP), frame], zmq.NOBLOCK)

    def publish(self, frame: bytes) -> None:
        """Sends to every subscriber of other nodes."""
        if self._events:
            self._events.send(frame)

    def drop_subscribers(self) -> None:
        """Cuts every subscriber off; after ``readmit_subscribers`` those that still may come back, and see what they missed."""
        if self._events:
            self._events.close(0)
            self._events = None

    def readmit_subscribers(self) -> None:
        """Listens for subscribers again where they were cut off. ZeroMQ may need a moment to free the port: then the next call does it."""
        if self._events is None:
            with contextlib.suppress(BusError):
                self._events = self._bind(zmq.PUB, "events", 1)

    def serve_bytes(self, data: memoryview, may_read: Callable[[int, bytes, int, int], bool]) -> None:
        """Starts the thread that answers reads of ``data``. ``may_read``: lease, token, offset, length."""
        self._bytes = BytesServer(self._bind(zmq.ROUTER, "bytes", 2), data, may_read)
        self._bytes.start()

    def close(self) -> None:
        """Closes all sockets; nothing of the data is referred to after it."""
        if hasattr(self, "_bytes"):
            self._bytes.stop()
        for name in ("bytes", "requests"):
            self._spaces[name].close()

    def _bind(self, kind: int, name: str, number: int) -> zmq.Socket[bytes]:
        listen = self._listen
        socket = self._spaces[name].context.socket(kind)
        _limit(socket, _REQUEST_BYTES_MAX)
        if listen.pair and (name != "bytes" or listen.encrypt_bytes):
            socket.setsockopt_string(zmq.ZAP_DOMAIN, name)
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = listen.pair.public, listen.pair.secret
        if name == "bytes":
            socket.setsockopt(zmq.SNDHWM, 4 * WINDOW)
        address = _address(listen.host, listen.port + number)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            place = f"{listen.host}:{listen.port + number}"
            raise BusError(f"cache.node_port: can't listen on {place}: {error}; it takes three ports in a row") from error
        return socket


class _Space:
    """A ZeroMQ context and, where there are keys, who is asked about those that connect to its sockets.

    Bytes have one of their own: ZeroMQ gives a new connection to the thread that has the fewest, whatever they carry, so among all connections two
    streams of bytes shared a thread while others had none.
    """

    def __init__(self, listen: Listen, io_threads: int) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=io_threads)
        self._gate: zmq.auth.thread.ThreadAuthenticator | None = None
        if listen.pair:
            self._gate = zmq.auth.thread.ThreadAuthenticator(self.context)
            self._gate.start()
            for name in ("requests", "events", "bytes"):
                self._gate.configure_curve_callback(name, _Gate(listen.may_connect))

    def close(self) -> None:
        """Ends both, and the sockets."""
        if self._gate:
            self._gate.stop()
        self.context.destroy(linger=0)


class _Gate:
    """What pyzmq's authenticator asks."""

    def __init__(self, may_connect: Callable[[str, bytes], bool]) -> None:
        self._may_connect = may_connect

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the owner of the key may use the socket."""
        return self._may_connect(domain, key)


class BytesServer(threading.Thread):
    """Answers reads with bytes that ZeroMQ takes from where they lie. A read that is not allowed is answered with nothing in it."""

    def __init__(self, socket: zmq.Socket[bytes], data: memoryview, may_read: Callable[[int, bytes, int, int], bool]) -> None:
        super().__init__(name="headstart-bytes", daemon=True)
        self._socket, self._data, self._may_read = socket, data, may_read
        self._ending = threading.Event()
        self.sent_bytes = 0

    def run(self) -> None:
        while not self._ending.is_set():
            if self._socket.poll(_POLL_MS):
                frames = self._socket.recv_multipart()
                if len(frames) == 2 and len(frames[1]) == _READ.size:
                    self._answer(frames[0], frames[1])
        self._socket.close(0)

    def stop(self) -> None:
        """Ends the thread."""
        self._ending.set()
        self.join()

    def _answer(self, client: bytes, request: bytes) -> None:
        ticket, lease, offset, length, token = _READ.unpack(request)
        allowed = length <= PIECE_BYTES and self._may_read(lease, token, offset, length)
        piece = self._data[offset : offset + length] if allowed else memoryview(b"")
        self.sent_bytes += len(piece)
        self._socket.send_multipart([client, _TICKET.pack(ticket), piece], copy=False)


@dataclass(frozen=True)
class PeerAddress:
    """Another node's daemon. ``server``: its public key, where there are keys; then ``pair`` is this node's own."""

    host: str
    port: int
    server: bytes = b""
    pair: Pair | None = None
    encrypted_bytes: bool = True


def _connected(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: PeerAddress, number: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    _limit(socket, _REPLY_BYTES_MAX)
    if address.pair and (number != 2 or address.encrypted_bytes):
        socket.curve_serverkey = address.server
        socket.curve_publickey, socket.curve_secretkey = address.pair.public, address.pair.secret
    if kind == zmq.DEALER:
        # What can't be sent now is not sent later: nobody waits for its answer any more.
        socket.setsockopt(zmq.IMMEDIATE, 1)
    else:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(_address(address.host, address.port + number))
    return socket


class PeerLink:
    """Requests to another node, over the socket ``requests``, and its events. For one thread."""

    def __init__(self, address: PeerAddress, *, events: bool) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self.requests = _connected(self._context, zmq.DEALER, address, 0)
        self._subscriber = _connected(self._context, zmq.SUB, address, 1) if events else None
        self._poller = zmq.Poller()
        for socket in (self.requests, self._subscriber):
            if socket is not None:
                self._poller.register(socket, zmq.POLLIN)

    def send(self, frame: bytes, wait_ms: int = 0) -> bool:
        """Sends a request; False where there is no connection, nor comes one in time."""
        if wait_ms:
            self.requests.poll(wait_ms, zmq.POLLOUT)
        try:
            self.requests.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_ms: float) -> tuple[list[bytes], list[bytes]]:
        """The replies and the batches of events that have come; where there are none, what comes first in time."""
        ready = dict(self._poller.poll(max(0, round(timeout_ms))))
        return _all(self.requests, ready), _all(self._subscriber, ready)

    def close(self) -> None:
        """Closes both sockets."""
        self._context.destroy(linger=0)


def _all(socket: zmq.Socket[bytes] | None, ready: dict[object, int]) -> list[bytes]:
    found: list[bytes] = []
    if socket is None or socket not in ready:
        return found
    with contextlib.suppress(zmq.Again):
        while True:
            found.append(socket.recv(zmq.NOBLOCK))
    return found


@dataclass(frozen=True)
class Wanted:
    """Bytes of another node's region from ``offset`` on, for ``into``. ``taken`` is called with each piece of it once it is there, in order."""

    lease: int
    token: bytes
    offset: int
    into: memoryview
    taken: Taken = lambda piece: None


class _Piece(NamedTuple):
    wanted: Wanted
    start: int
    into: memoryview
    is_last: bool


class _Asked(NamedTuple):
    ticket: int
    piece: _Piece


def _pieces(wanted: Wanted) -> Iterator[_Piece]:
    total = len(wanted.into)
    for start in range(0, total, PIECE_BYTES):
        end = min(start + PIECE_BYTES, total)
        yield _Piece(wanted, start, wanted.into[start:end], end == total)


class BytesReader:
    """Reads another node's region. For one thread. A read that fails leaves no later answer behind: its connection is thrown away."""

    def __init__(self, address: PeerAddress) -> None:
        self._address = address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._ticket = 0
        self._connect()

    def read(self, wanted: Iterable[Wanted], timeout_ms: int) -> Iterator[bool]:
        """Fills each ``into``, in order, and says whether that was allowed as soon as it is done. Raises BusUnavailable where nothing comes for
        ``timeout_ms``.

        While the end of one comes, the beginning of the next is asked for, so ``wanted`` is taken from as far ahead as a window reaches. What was
        said of is not written any more, nor is anything once this has raised.
        """
        self._socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
        self._socket.setsockopt(zmq.SNDTIMEO, timeout_ms)
        try:
            yield from self._read(wanted)
        except zmq.ZMQError as error:
            self._socket.close(0)
            self._connect()
            raise BusUnavailable(f"{self._address.host}:{self._address.port + 2} sends no bytes: {error}") from error

    def close(self) -> None:
        """Closes the connection."""
        self._context.destroy(linger=0)

    def _read(self, wanted: Iterable[Wanted]) -> Iterator[bool]:
        asked: deque[_Asked] = deque()
        pieces = (piece for one in wanted for piece in _pieces(one))
        good, left = True, True
        while left or asked:
            while left and len(asked) < WINDOW:
                if (piece := next(pieces, None)) is None:
                    left = False
                    break
                self._ticket += 1
                one = piece.wanted
                self._socket.send(_READ.pack(self._ticket, one.lease, one.offset + piece.start, len(piece.into), one.token))
                asked.append(_Asked(self._ticket, piece))
            if asked:
                ticket, piece = asked.popleft()
                good &= self._receive(ticket, piece.into)
                piece.wanted.taken(piece.into)
                if piece.is_last:
                    yield good
                    good = True

    def _receive(self, ticket: int, into: memoryview) -> bool:
        if self._socket.recv() != _TICKET.pack(ticket):
            raise zmq.ZMQError(zmq.EFSM, "an answer that was not asked for")
        return int(self._socket.recv_into(into)) == len(into)

    def _connect(self) -> None:
        self._socket = _connected(self._context, zmq.DEALER, self._address, 2)


def _address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
