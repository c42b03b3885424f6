"""Who may be admitted before whom in an engine whose memory is full. Pure.

vLLM admits in order: where the next request finds no room, all behind it wait, also those that would need a block or two beside a prefix that is
there already. With a dozen long system prompts, of which memory holds three, an engine then runs three requests at a time, whatever waits. So, for a
moment after a prefix arrived, who finds no room lets those pass that share what is there; only those who need no pull, since one that had pulled
and stood behind it would hold memory that neither gets on with. And a request does not pull what another one's pull is about to bring: it would
take as much memory again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

PASSES = 2
"""Rounds of admission that a moment lasts: a step may have been scheduled before the engine knew what had arrived."""

MOMENTS_MAX = 8
"""In which one request is passed. What arrives is mostly pulled for those who were first in line, so they wait about as long as somebody else runs;
a prompt that was computed beside them counts, too, and of those there may be any number."""

_SHARED = 3 / 4
"""How much of a pull a request must have in common with it to wait for the whole."""


class Passing:
    """The state of one engine's line. A round of admission ends with ``stepped``."""

    def __init__(self) -> None:
        self._coming: dict[str, Sequence[bytes]] = {}
        self._arrived: set[str] = set()
        """Requests whose pulls ended and that were not scheduled since."""
        self._passes_left = 0
        self._first = ""
        self._moments = 0
        self._asked = self._blocked = False

    def begun(self, request_id: str, keys: Sequence[bytes]) -> None:
        """A pull began that brings a prompt up to the last of its chunks' ``keys``."""
        if keys:
            self._coming[request_id] = keys

    def pulled(self, request_id: str) -> None:
        """It ended: its request can be scheduled."""
        if self._coming.pop(request_id, None) is not None:
            self._arrived.add(request_id)
            self.open()

    def gone(self, request_id: str) -> None:
        """The request ended, however far it was."""
        self._coming.pop(request_id, None)
        self._arrived.discard(request_id)

    def open(self) -> None:
        """A moment begins: a prefix is in memory that others may share."""
        if self._moments < MOMENTS_MAX:
            self._moments += 1
            self._passes_left = PASSES

    def is_coming(self, request_id: str, keys: Sequence[bytes], chunks: int) -> bool:
        """Whether another request's pull brings what a prompt with these chunks' ``keys`` lacks after its first ``chunks``, and little else."""
        for other, coming in self._coming.items():
            common = math.ceil(len(coming) * _SHARED)
            # A key names all before it.
            if other != request_id and chunks < common <= len(keys) and keys[common - 1] == coming[common - 1]:
                return True
        return False

    def lets_pass(self, request_id: str, blocks: int, free_blocks: int, *, pulls: bool) -> bool:
        """Whether a request whose turn it is is passed over in this round: it needs so many ``blocks`` more, and ``pulls`` into some of them."""
        self._asked = True
        if blocks <= free_blocks:
            return pulls and self._blocked
        if not self._blocked:
            self._blocked = True
            if self._first != request_id:
                self._first, self._moments = request_id, 0
        # Whoever has pulled holds memory, and may stand behind.
        return self._passes_left > 0 or bool(self._arrived)

    def stepped(self, request_ids: Iterable[str]) -> None:
        """A step was scheduled, of these requests. One in which nobody was asked, since others took all its tokens, is no round."""
        self._arrived.difference_update(request_ids)
        if self._asked:
            self._passes_left = max(0, self._passes_left - 1)
        self._asked = self._blocked = False
