"""What daemons of different nodes say to each other, beside ``cachebus.messages``."""

from __future__ import annotations

from cachebus.chunk import TENANT_BYTES
from cachebus.wire import Message


class Lend(Message, frozen=True):
    """Asks another node for the longest run of ``keys`` that its own tiers hold; what lies on its disk is brought up first, ``wait_ms`` at most."""

    layout: bytes
    keys: list[bytes]
    wait_ms: int


class LentChunk(Message, frozen=True):
    """A chunk that may be read: ``length`` bytes at ``offset`` of the lender's region. ``digest`` is what they must have."""

    key: bytes
    offset: int
    length: int
    digest: bytes
    tenant: bytes = bytes(TENANT_BYTES)
    expires_at: int = 0


class Lent(Message, frozen=True):
    """Reply to Lend. Whoever shows ``token`` (16 bytes) with ``lease`` may read the chunks' bytes for some seconds."""

    lease: int
    token: bytes
    chunks: list[LentChunk]


class Missed(Message, frozen=True):
    """Reply to a Snapshot that says what its asker knows: the batches of events since then, each packed as it was published."""

    batches: list[bytes]
