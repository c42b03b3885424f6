"""The payload path of the shared tier: Redis's protocol on a bare socket, values received straight into memory that is given."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence

from cachebus.errors import TierError

_LINE_BYTES = 64 << 10


class Answered(TierError):
    """The server answered with an error."""


class Line:
    """A connection to a server, used directly, one command or pipeline at a time. Raises OSError where no byte moves for ``timeout`` seconds."""

    def __init__(self, connected: socket.socket, disconnect: Callable[[], None], timeout: float) -> None:
        self._socket, self._disconnect = connected, disconnect
        self._socket.settimeout(timeout)
        self._buffer = bytearray(_LINE_BYTES)
        self._start = self._end = 0

    def close(self) -> None:
        """Closes the connection: what may still come on it must not be taken for another answer."""
        with contextlib.suppress(OSError):
            self._disconnect()

    def wait_at_most(self, seconds: float) -> None:
        """The longest silence from now on."""
        self._socket.settimeout(seconds)

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Sends all of it, payloads straight from where they are."""
        left = [memoryview(part).cast("B") for part in parts]
        if isinstance(self._socket, ssl.SSLSocket):
            for part in left:
                self._socket.sendall(part)
            return
        while left:
            sent = self._socket.sendmsg(left[:64])
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def receive_value(self, into: memoryview) -> int:
        """Receives a value of exactly ``len(into)`` bytes into it; its length, or -1 where there is none. A value of another length is skipped."""
        line = self._receive_line()
        if line[:1] == b"-":
            raise Answered(line[1:].decode("utf-8", "replace"))
        if line == b"_":
            return -1
        if line[:1] != b"$":
            raise OSError(f"an answer that is no value: {line[:40]!r}")
        length = int(line[1:])
        if length < 0:
            return -1
        if length == len(into):
            self._fill(into)
        else:
            self._skip(length)
        self._skip(2)
        return length

    def receive_status(self) -> str:
        """Receives a status; "" where it is good, else what the server says."""
        line = self._receive_line()
        return "" if line[:1] in (b"+", b":") else line[1:].decode("utf-8", "replace")

    def _receive_line(self) -> bytes:
        while True:
            end = self._buffer.find(b"\r\n", self._start, self._end)
            if end >= 0:
                line = bytes(self._buffer[self._start : end])
                self._start = end + 2
                return line
            if self._start:
                self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
                self._start, self._end = 0, self._end - self._start
            if self._end == len(self._buffer):
                raise OSError("an answer without an end")
            self._end += self._receive(memoryview(self._buffer)[self._end :])

    def _fill(self, into: memoryview) -> None:
        ready = min(len(into), self._end - self._start)
        into[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        while ready < len(into):
            ready += self._receive(into[ready:])

    def _skip(self, length: int) -> None:
        while length:
            if self._start == self._end:
                self._start, self._end = 0, self._receive(memoryview(self._buffer))
            step = min(length, self._end - self._start)
            self._start += step
            length -= step

    def _receive(self, into: memoryview) -> int:
        count = self._socket.recv_into(into)
        if not count:
            raise OSError("the server closed the connection")
        return count


def command(*words: bytes) -> bytes:
    """A command of short words."""
    return b"".join([b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)])


def command_parts(words: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """A command in which long words stay where they are."""
    parts: list[bytes | memoryview] = [b"*%d\r\n" % len(words)]
    for word in words:
        parts += [b"$%d\r\n" % len(word), word, b"\r\n"]
    return parts
