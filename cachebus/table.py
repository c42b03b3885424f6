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

from cachebus.keys import KEY_BYTES

LAYOUT_BYTES = 16
DIGEST_BYTES = 32
HOLDER_BYTES = 32
RECORD_BYTES = 192
_RECORD = struct.Struct(f"<IIQQB{KEY_BYTES}s{DIGEST_BYTES}s{LAYOUT_BYTES}s{HOLDER_BYTES}s")
_CHECKSUM = struct.Struct("<I")
assert _RECORD.size + _CHECKSUM.size <= RECORD_BYTES


class State(IntEnum):
    """What a record says of its extent. One that is doomed is given to no new reader, and freed when its last one is done."""

    FREE = 0
    RESERVED = 1
    COMMITTED = 2
    DOOMED = 3


@dataclass(frozen=True)
class Record:
    """One extent: ``length`` bytes at ``offset`` of the region's data, under ``key``; ``holder`` writes it while it is reserved."""

    state: State
    generation: int
    offset: int
    length: int
    tail: bool
    key: bytes
    digest: bytes
    layout: bytes
    holder: str


class Table:
    """Records in ``memory`` (the region's head), by slot number."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self.slots = len(memory) // RECORD_BYTES

    def write(self, slot: int, record: Record) -> None:
        """Writes a record with its checksum."""
        packed = _RECORD.pack(
            record.state,
            record.generation,
            record.offset,
            record.length,
            record.tail,
            record.key,
            record.digest,
            record.layout,
            record.holder.encode(),
        )
        self._put(slot, packed)

    def wipe(self, slot: int) -> None:
        """Marks a slot free."""
        self._put(slot, bytes(_RECORD.size))

    def read(self) -> Iterator[tuple[int, Record]]:
        """Every slot whose record is whole and not free."""
        for slot in range(self.slots):
            start = slot * RECORD_BYTES
            packed = bytes(self._memory[start : start + _RECORD.size])
            state, generation, offset, length, tail, key, digest, layout, holder = _RECORD.unpack(packed)
            if state not in (State.RESERVED, State.COMMITTED, State.DOOMED):
                continue
            (checksum,) = _CHECKSUM.unpack_from(self._memory, start + _RECORD.size)
            if checksum == crc32(packed):
                name = holder.rstrip(b"\0").decode("ascii", "replace")
                yield slot, Record(State(state), generation, offset, length, bool(tail), key, digest, layout, name)

    def close(self) -> None:
        """Lets go of the memory."""
        self._memory.release()

    def _put(self, slot: int, packed: bytes) -> None:
        start = slot * RECORD_BYTES
        self._memory[start : start + len(packed)] = packed
        _CHECKSUM.pack_into(self._memory, start + len(packed), crc32(packed))
