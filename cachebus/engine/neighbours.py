"""Other engines of the node whose memory this one pulls from, until they end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from cachebus import holder
from cachebus.engine.blocks import Blocks, Computed, Handed
from cachebus.engine.transfer import LoadPiece
from cachebus.errors import HandoverError
from cachebus.messages_handover import SharedMemory

log = logging.getLogger("headstart.connector")

LOOK_SECONDS = 1.0
"""How often it is looked whether their engines live. Memory that is open here is free for the next engine only when it is closed."""

_DYING_SECONDS, _POLL_SECONDS = 0.5, 0.02


class Neighbours:
    """``wanted``: whether offers are taken at all; ``key`` is that of the digests, None where nothing is checked.

    ``fetch`` is for the copiers' threads, everything else for the mover's.
    """

    def __init__(self, run_dir: Path, blocks: Blocks, key: bytes | None, *, wanted: bool) -> None:
        self._run_dir, self._blocks, self._key = run_dir, blocks, key
        self.reaches: list[str] = blocks.reaches() if wanted else []
        self._memories: dict[bytes, SharedMemory] = {}
        self._looked_at = 0.0

    @property
    def known(self) -> bool:
        """Whether there is anything to forget."""
        return bool(self._memories)

    def learn(self, memories: Iterable[SharedMemory]) -> None:
        """Where pieces that were granted lie."""
        for memory in memories:
            self._memories.setdefault(memory.id, memory)

    def fetch(self, pieces: Sequence[LoadPiece], computed: Computed) -> list[bool]:
        """Copies pieces into their blocks, once these are ``computed``; of each whether it is what was offered."""
        computed.synchronize()
        good: list[bool] = []
        for name, group in groupby(pieces, lambda piece: piece.memory):
            some = list(group)
            good += self._fetch(self._memories[name], some) if name in self._memories else [False] * len(some)
        return good

    def _fetch(self, memory: SharedMemory, pieces: Sequence[LoadPiece]) -> list[bool]:
        if any(len(piece.there) != len(piece.blocks) for piece in pieces):
            return [False] * len(pieces)
        try:
            digests = self._blocks.fetch(memory, [Handed(piece.blocks, piece.there) for piece in pieces], self._key)
        except HandoverError as error:
            if self._lives(memory.holder) and memory.device in self.reaches:
                log.warning("what other engines offer comes through the region from now on: %s", error)
                self.reaches = [device for device in self.reaches if device != memory.device]
            return [False] * len(pieces)
        return [not self._key or digest == piece.digest for piece, digest in zip(pieces, digests, strict=True)]

    def _lives(self, name: str) -> bool:
        """Whether it does after a moment, too: a process that is killed lets go of its memory before its lock."""
        until = time.monotonic() + _DYING_SECONDS
        while holder.is_alive(self._run_dir, name):
            if time.monotonic() > until:
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def forget_dead(self) -> None:
        """Lets go of the memory of engines that have ended. For when nothing is fetched."""
        now = time.monotonic()
        if now < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at = now
        for memory in [memory for memory in self._memories.values() if not holder.is_alive(self._run_dir, memory.holder)]:
            del self._memories[memory.id]
            try:
                self._blocks.unmap(memory)
            except HandoverError as error:
                log.warning("the memory of an engine that ended is not let go of: %s", error)
