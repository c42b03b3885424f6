"""A client of the bus for one thread: requests out, replies in, nothing waited for unless asked to."""

from __future__ import annotations

import time
from pathlib import Path

from cachebus import zeromq
from cachebus.codec import decode_reply, encode_request
from cachebus.errors import BusError, BusUnavailable, ProtocolError, Refused
from cachebus.holder import Holder
from cachebus.messages import Denied, Hello, Reply, Request, Welcome


class BusClient:
    """One connection. It belongs to the thread that made it, and is made after the last fork."""

    def __init__(self, run_dir: Path, client: str, holder: Holder | None = None) -> None:
        self._run_dir = run_dir
        self._name = client
        self._holder = holder
        self._socket = zeromq.Requester(f"ipc://{run_dir / zeromq.REQUESTS}")
        self._ticket = 0
        self._replies: list[tuple[int, Reply]] = []

    def connect(self, timeout_ms: int) -> Welcome:
        """Says hello. Raises BusUnavailable where no daemon answers, Refused where it does not want us."""
        welcome = self.call(Hello(self._name, self._holder.id if self._holder else ""), timeout_ms)
        if not isinstance(welcome, Welcome):
            raise BusError(f"the daemon answered hello with {type(welcome).__name__}")
        return welcome

    def submit(self, body: Request) -> int:
        """Queues a request and returns its ticket; ``poll`` brings the reply. A full queue drops it: the reply never comes."""
        self._ticket += 1
        self._socket.send(encode_request(self._ticket, body))
        return self._ticket

    def poll(self, wait_ms: float = 0) -> list[tuple[int, Reply]]:
        """The replies that have come, with their tickets; where there are none, what comes first within ``wait_ms``."""
        replies, self._replies = self._replies, []
        while (frame := self._socket.receive(0 if replies else wait_ms)) is not None:
            replies.append(_decode(frame))
        return replies

    def call(self, body: Request, timeout_ms: int) -> Reply:
        """Waits for the reply to one request. Raises BusUnavailable after ``timeout_ms``, Refused where it is denied.

        Replies to other requests that come meanwhile are kept for ``poll``.
        """
        ticket = self.submit(body)
        deadline = time.monotonic() + timeout_ms / 1000
        while (left := deadline - time.monotonic()) > 0:
            frame = self._socket.receive(left * 1000)
            if frame is None:
                continue
            number, reply = _decode(frame)
            if number != ticket:
                self._replies.append((number, reply))
            elif isinstance(reply, Denied):
                raise Refused(reply.reason)
            else:
                return reply
        raise BusUnavailable(
            f"no cachebus answers at {self._run_dir} within {timeout_ms / 1000:g} s: start one there with `headstart cachebus`, "
            "or correct cache.run_dir"
        )

    def close(self) -> None:
        """Closes the connection; what is queued gets a moment to leave."""
        self._socket.close()


def _decode(frame: bytes) -> tuple[int, Reply]:
    try:
        envelope = decode_reply(frame)
    except ProtocolError as error:
        raise BusError(f"the daemon sent {error}") from error
    return envelope.ticket, envelope.body
