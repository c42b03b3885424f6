"""The region's table: one record of fixed size for each extent, so that a new daemon finds what an old one left.

A record is written after the bytes it speaks of (for a committed entry) or before anyone is told of the extent (for a
reserved one), and its checksum goes with it: a torn record reads as a free one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from zlib import crc32

from cachebus.chunk import TENANT_BYTES
from cachebus.keys import KEY_BYTES

LAYOUT_BYTES = 16
DIGEST_BYTES = 32
HOLDER_BYTES = 32
RECORD_BYTES = 192
_RECORD = struct.Struct(f"<IIQQBBQ{KEY_BYTES}s{DIGEST_BYTES}s{LAYOUT_BYTES}s{HOLDER_BYTES}s{TENANT_BYTES}sQ")
_CHECKSUM = struct.Struct("<I")
assert _RECORD.size + _CHECKSUM.size <= RECORD_BYTES
FREE_RECORD = bytes(RECORD_BYTES)
"""What a free slot holds."""


class State(IntEnum):
    """What a record says of its extent. One that is doomed is given to no new reader, and freed when its last one is done."""

    FREE = 0
    RESERVED = 1
    COMMITTED = 2
    DOOMED = 3


@dataclass(frozen=True)
class Record:
    """One extent: ``length`` bytes at ``offset`` of a tier's space, under ``key``; ``holder`` writes it while it is reserved.

    ``used_at`` and ``expires_at`` (0: never) are seconds since 1970, ``tenant`` is derived from the cache_salt (see ``cachebus.keys``).
    """

    state: State
    generation: int
    offset: int
    length: int
    tail: bool
    key: bytes
    digest: bytes
    layout: bytes
    holder: str
    tenant: bytes = bytes(TENANT_BYTES)
    pinned: bool = False
    used_at: int = 0
    expires_at: int = 0


def pack_record(record: Record) -> bytes:
    """A record with its checksum, ``RECORD_BYTES`` long."""
    packed = _RECORD.pack(
        record.state,
        record.generation,
        record.offset,
        record.length,
        record.tail,
        record.pinned,
        record.used_at,
        record.key,
        record.digest,
        record.layout,
        record.holder.encode(),
        record.tenant,
        record.expires_at,
    )
    return (packed + _CHECKSUM.pack(crc32(packed))).ljust(RECORD_BYTES, b"\0")


def unpack_record(packed: bytes) -> Record | None:
    """The record; None where it is torn or free."""
    state, generation, offset, length, tail, pinned, used_at, key, digest, layout, holder, tenant, expires = _RECORD.unpack_from(packed)
    if state not in (State.RESERVED, State.COMMITTED, State.DOOMED):
        return None
    (checksum,) = _CHECKSUM.unpack_from(packed, _RECORD.size)
    if checksum != crc32(packed[: _RECORD.size]):
        return None
    name = holder.rstrip(b"\0").decode("ascii", "replace")
    return Record(State(state), generation, offset, length, bool(tail), key, digest, layout, name, tenant, bool(pinned), used_at, expires)


class Table:
    """Records in ``memory`` (the region's head), by slot number."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self.slots = len(memory) // RECORD_BYTES

    def write(self, slot: int, record: Record) -> None:
        """Writes a record with its checksum."""
        self._put(slot, pack_record(record))

    def wipe(self, slot: int) -> None:
        """Marks a slot free."""
        self._put(slot, FREE_RECORD)

    def record(self, slot: int) -> Record | None:
        """A slot's record as it is now; None where it is free, or just being written."""
        return unpack_record(bytes(self._memory[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES]))

    def read(self) -> Iterator[tuple[int, Record]]:
        """Every slot whose record is whole and not free."""
        for slot in range(self.slots):
            record = self.record(slot)
            if record is not None:
                yield slot, record

    def close(self) -> None:
        """Lets go of the memory."""
        self._memory.release()

    def _put(self, slot: int, packed: bytes) -> None:
        self._memory[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = packed
