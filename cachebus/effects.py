"""What the daemon's state machines decide: messages, records, and work for the threads that move bytes between tiers."""

from __future__ import annotations

from dataclasses import dataclass, field

from cachebus.chunk import ChunkHeader
from cachebus.messages import Event, Reply, Tier
from cachebus.table import Record


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


@dataclass(frozen=True)
class Read:
    """Bring a chunk from ``tier`` to ``into`` (offset in the region), and check it. ``place``: its offset on disk."""

    number: int
    tier: Tier
    header: ChunkHeader
    into: int
    place: int = 0


@dataclass(frozen=True)
class Write:
    """Copy the chunk at ``source`` (offset in the region) to ``tier``; on disk under ``record`` in ``slot``."""

    number: int
    tier: Tier
    header: ChunkHeader
    source: int
    slot: int = 0
    record: Record | None = None


@dataclass(frozen=True)
class Probe:
    """Ask ``tier`` for the headers of ``keys``."""

    number: int
    tier: Tier
    keys: list[bytes]


@dataclass(frozen=True)
class Wipe:
    """Forget chunks: ``slots`` on disk, ``keys`` in the shared tier. ``number`` is 0: nobody waits for it."""

    tier: Tier
    slots: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    number: int = 0


Job = Read | Write | Probe | Wipe


@dataclass(frozen=True)
class Start:
    """Have a job done by the tier's threads; its outcome comes back under its number."""

    job: Job


@dataclass(frozen=True)
class Outcome:
    """How a job ended. ``corrupt``: the bytes or the header are not what was written; ``headers``: a probe's answer."""

    good: bool
    corrupt: bool = False
    headers: list[ChunkHeader | None] = field(default_factory=list)


Effect = Answer | Publish | WriteRecord | WipeRecord | Start
