"""Keeps a tier that does not answer from being asked again and again. A plain state machine; the clock is passed in, in seconds."""

from __future__ import annotations

from dataclasses import dataclass

BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX = 0.25, 5.0


@dataclass
class Breaker:
    """Open from the first failure on; then one attempt is due after a quarter of a second, and after twice as long each time it fails.

    It begins open and due: nothing is known of the tier yet.
    """

    open: bool = True
    _due_at: float = 0.0
    _backoff: float = BACKOFF_SECONDS_MIN

    def failed(self, now: float) -> bool:
        """The tier did not answer; whether it did until now."""
        was_closed = not self.open
        self.open = True
        self._backoff = BACKOFF_SECONDS_MIN if was_closed else min(2 * self._backoff, BACKOFF_SECONDS_MAX)
        self._due_at = now + self._backoff
        return was_closed

    def answered(self) -> bool:
        """An attempt was answered; whether the tier was given up until now."""
        was_open, self.open = self.open, False
        self._backoff = BACKOFF_SECONDS_MIN
        return was_open

    def due(self, now: float) -> bool:
        """Whether an attempt should be made."""
        return self.open and now >= self._due_at
