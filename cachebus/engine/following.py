"""A prompt that another engine is computing: its parts are asked for until all are there, or none comes for too long. A plain state machine."""

from __future__ import annotations

from collections.abc import Sequence

from cachebus.engine.transfer import Coming, Follow, LoadPiece
from cachebus.messages import Acquire, Extent

_ANSWER_GRACE_SECONDS = 0.25
"""What an answer may take beyond the wait that the daemon was asked for; past it the daemon has forgotten the question."""


class Following:
    """What is still to come of one load. ``ask`` is to be sent while ``is_asking`` is false; ``came`` takes the answer."""

    def __init__(self, follow: Follow, now: float) -> None:
        self._follow = follow
        self._coming = list(follow.coming)
        self._last_at = now
        self._asking = self._ended = False

    @property
    def is_asking(self) -> bool:
        """Whether an answer is awaited."""
        return self._asking

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be had."""
        return self._ended or not self._coming

    @property
    def missing(self) -> list[Coming]:
        """What has not come."""
        return list(self._coming)

    def ask(self, now: float) -> Acquire:
        """Asks for all that is to come; the daemon answers when the first of it is there."""
        self._asking = True
        wait_ms = max(1, int(self._follow.wait_ms - 1000 * (now - self._last_at)))
        return Acquire(self._follow.holder, self._follow.layout, [part.key for part in self._coming], wait_ms, expected=True)

    def came(self, extents: Sequence[Extent], now: float) -> list[LoadPiece]:
        """An answer: the pieces that are there by now. Where there are none the wait is over."""
        self._asking, self._ended = False, not extents
        self._last_at = now
        arrived, self._coming = self._coming[: len(extents)], self._coming[len(extents) :]
        return [
            LoadPiece(e.key, e.offset, e.length, e.digest, part.blocks, e.slot, e.generation, e.ready, e.source)
            for part, e in zip(arrived, extents, strict=True)
        ]

    def look(self, now: float) -> None:
        """Time passes: a daemon that does not answer is waited for no longer than for the engine."""
        if self._asking and now > self._last_at + self._follow.wait_ms / 1000 + _ANSWER_GRACE_SECONDS:
            self._ended = True
