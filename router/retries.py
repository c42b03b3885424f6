"""How often requests may be tried again: a share of those that come and a little more, so that a failing cluster is not asked thrice. Pure."""

from __future__ import annotations

SHARE = 0.2
"""Retries for each request that comes."""
FLOOR_PER_SECOND = 5.0
"""And so many a second where few come."""
SAVED_MAX = 100.0
"""What may be saved up: a worker that dies takes all that it has along."""


class RetryBudget:
    """One a router. Streams that are resumed are no retries: their clients wait in the middle of an answer."""

    def __init__(self, now: float) -> None:
        self._saved, self._at = SAVED_MAX, now

    def came(self) -> None:
        """A request has come."""
        self._saved = min(SAVED_MAX, self._saved + SHARE)

    def take(self, now: float) -> bool:
        """Whether one more retry may be made now; it counts as made."""
        self._saved = min(SAVED_MAX, self._saved + FLOOR_PER_SECOND * (now - self._at))
        self._at = now
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
