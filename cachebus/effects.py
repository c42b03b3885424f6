"""What the daemon's state machines decide (effects), and the entries they decide about."""

from __future__ import annotations

from dataclasses import dataclass

from cachebus.messages import Event, Reply
from cachebus.table import Record, State


@dataclass(frozen=True)
class Answer:
    """Send ``body`` to ``client`` under its ticket."""

    client: bytes
    ticket: int
    body: Reply


@dataclass(frozen=True)
class Publish:
    """Tell every subscriber."""

    event: Event


@dataclass(frozen=True)
class WriteRecord:
    """Write the slot's record into the region's table."""

    slot: int
    record: Record


@dataclass(frozen=True)
class WipeRecord:
    """Mark the slot free in the region's table."""

    slot: int


Effect = Answer | Publish | WriteRecord | WipeRecord


@dataclass(slots=True)
class Entry:
    """A chunk or a tail block and the extent that holds it. ``doomed``: out of the index, freed when its last reader is done."""

    slot: int
    generation: int
    offset: int
    length: int
    tail: bool
    key: bytes
    layout: bytes
    holder: str
    digest: bytes = b""
    committed: bool = False
    readers: int = 0
    doomed: bool = False

    def record(self) -> Record:
        """The entry as the table keeps it."""
        state = State.DOOMED if self.doomed else State.COMMITTED if self.committed else State.RESERVED
        return Record(state, self.generation, self.offset, self.length, self.tail, self.key, self.digest, self.layout, self.holder)
