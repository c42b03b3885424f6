"""What the daemon's state machines decide: messages, records, and work for the threads that move bytes between tiers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from cachebus.chunk import ChunkHeader
from cachebus.messages import Event, Reply
from cachebus.table import Record
from cachebus.wire import Tier


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
class Loan:
    """What opens a chunk at another node, for some seconds: ``offset`` is its place there."""

    peer: str
    lease: int
    token: bytes
    offset: int


@dataclass(frozen=True)
class Read:
    """Bring a chunk from ``tier`` to ``into`` (offset in the region), and check it. ``place``: its offset on disk."""

    number: int
    tier: Tier
    header: ChunkHeader
    into: int
    place: int = 0
    loan: Loan | None = None


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
    """Ask ``tier`` for the headers of ``keys``; ``peer`` (a node's name) also for the loan of them."""

    number: int
    tier: Tier
    keys: list[bytes]
    peer: str = ""
    layout: bytes = b""


@dataclass(frozen=True)
class Wipe:
    """Forget chunks: ``slots`` on disk; in the shared tier ``keys``, or all of ``tenant``, or all. ``number`` is 0: nobody waits for it."""

    tier: Tier
    slots: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    number: int = 0
    tenant: bytes = b""


Job = Read | Write | Probe | Wipe


@dataclass(frozen=True)
class Start:
    """Have a job done by the tier's threads; its outcome comes back under its number."""

    job: Job


@dataclass(frozen=True)
class Outcome:
    """How a job ended. ``corrupt``: the bytes or the header are not what was written; ``headers`` and ``loans``: a probe's answer."""

    good: bool
    corrupt: bool = False
    headers: list[ChunkHeader | None] = field(default_factory=list)
    loans: list[Loan] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """What is known anew of a place that this daemon does not rule: the shared tier, or the node ``peer``.

    ``whole``: it holds what ``added`` says and nothing else; else, of the shared tier, ``removed`` was too much for its tenants. ``gone``: it
    can't be reached, so nothing of it can be had.
    """

    tier: Tier
    added: Collection[bytes] = ()
    removed: Collection[bytes] = ()
    whole: bool = False
    peer: str = ""
    gone: bool = False


Effect = Answer | Publish | WriteRecord | WipeRecord | Start
