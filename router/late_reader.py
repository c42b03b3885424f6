"""A stream of events that is read only when somebody wants to know what it said: nearly every one ends well and is never read. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod

from router.usage import EVENT_END

_UNREAD_BYTES_MAX = 128 << 10


class LateReader(ABC):
    """What has passed and is not read yet. ``done``: the client has the stream's end."""

    def __init__(self) -> None:
        self._unread: list[bytes] = []
        self._unread_bytes = 0
        self._rest = b""
        self._again = self._blind = self._finished = False
        self.done = False

    @property
    def finished(self) -> bool:
        """Whether the client has all that the engine generated; what may be missing is the end of the stream."""
        self._read()
        return self._finished

    @property
    def resumable(self) -> bool:
        """Whether all that the client has is understood."""
        self._read()
        return not self._blind

    def _whole(self, piece: bytes) -> tuple[bytes, bytes]:
        """The events that are whole with the next bytes, without the last one's end, and that end; nothing where none is."""
        whole, end, self._rest = (self._rest + piece).rpartition(EVENT_END)
        return whole, end

    def _later(self, events: bytes) -> None:
        """They have passed, and are read when somebody asks, or when there are too many."""
        self._unread.append(events)
        self._unread_bytes += len(events)
        if self._unread_bytes > _UNREAD_BYTES_MAX:
            self._read()

    def _now(self, events: bytes) -> bytes:
        """Reads them, and what passed before; what the client gets of them."""
        self._read()
        return b"".join(self._event(event) for event in events.split(EVENT_END))

    def _read(self) -> None:
        unread, self._unread, self._unread_bytes = self._unread, [], 0
        for events in unread:
            for event in events.split(EVENT_END):
                self._event(event)

    @abstractmethod
    def _event(self, event: bytes) -> bytes:
        """Writes an event down; what the client gets of it."""
