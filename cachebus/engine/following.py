"""A prompt that another engine is computing: its parts are asked for until all are there, or none comes for too long. A plain state machine."""

from __future__ import annotations

from collections.abc import Sequence

from cachebus.engine.transfer import Coming, Follow, LoadPiece
from cachebus.messages import Acquire, Extent

_ANSWER_GRACE_SECONDS = 0.25
"""What an answer may take beyond the wait that the daemon was asked for; past it the daemon has forgotten the question."""


class Following:
    """What is still to come of one load. ``ask`` is to be sent while ``is_asking`` is false; ``came`` takes the answer.

    ``reaches``: devices that other engines' blocks are read from; what has changed when it arrives comes ``again``, from the region.
    """

    def __init__(self, follow: Follow, now: float, reaches: Sequence[str] = ()) -> None:
        self._follow, self._reaches = follow, list(reaches)
        self._refused: set[bytes] = set()
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
        keys = [part.key for part in self._coming]
        reaches = [] if self._refused.intersection(keys) else self._reaches
        return Acquire(self._follow.holder, self._follow.layout, keys, wait_ms, expected=True, reaches=reaches)

    def came(self, extents: Sequence[Extent], now: float) -> list[LoadPiece]:
        """An answer: the pieces that are there by now. Where there are none the wait is over."""
        self._asking, self._ended = False, not extents
        self._last_at = now
        # By their keys: what came ``again`` since they were asked for stands before them.
        blocks, arrived = {part.key: part.blocks for part in self._coming}, {extent.key for extent in extents}
        self._coming = [part for part in self._coming if part.key not in arrived]
        pieces = [
            LoadPiece(e.key, e.offset, e.length, e.digest, blocks[e.key], e.slot, e.generation, e.ready, e.source, e.memory, e.blocks)
            for e in extents
        ]
        # Only an extent says what the digest of a block is that is not to be written.
        parted = [piece for piece in pieces if piece.memory and min(piece.blocks) < 0]
        self.again(parted)
        return [piece for piece in pieces if piece not in parted]

    def again(self, pieces: Sequence[LoadPiece]) -> None:
        """These were not what was offered."""
        self._refused.update(piece.key for piece in pieces)
        self._coming = [*(Coming(piece.key, piece.blocks) for piece in pieces), *self._coming]

    def look(self, now: float) -> None:
        """Time passes: a daemon that does not answer is waited for no longer than for the engine."""
        if self._asking and now > self._last_at + self._follow.wait_ms / 1000 + _ANSWER_GRACE_SECONDS:
            self._ended = True
