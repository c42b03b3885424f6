"""The last batches of events, so that a subscriber that missed some need not be told everything again."""

from __future__ import annotations

from collections import deque

BATCHES_MAX = 4096
BYTES_MAX = 16 << 20


class Journal:
    """Packed batches, numbered without gaps. The oldest go first when there are too many of them, or too many bytes."""

    def __init__(self) -> None:
        self._batches: deque[bytes] = deque()
        self._last = 0
        self._bytes = 0

    def append(self, seq: int, batch: bytes) -> None:
        """Keeps batch ``seq``, the one after the last that was kept."""
        self._batches.append(batch)
        self._last = seq
        self._bytes += len(batch)
        while len(self._batches) > BATCHES_MAX or self._bytes > BYTES_MAX:
            self._bytes -= len(self._batches.popleft())

    def since(self, seq: int) -> list[bytes] | None:
        """The batches after ``seq``; None where some of them are gone."""
        missed = self._last - seq
        if not 0 <= missed <= len(self._batches):
            return None
        return [self._batches[number] for number in range(len(self._batches) - missed, len(self._batches))]
