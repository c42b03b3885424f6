"""What one tenant has on one server of the shared tier, as a bus knows it. A plain state machine; times are seconds since 1970, passed in.

In the server it is a sorted set: a member is a chunk's key and its length, the score is when it was stored or read last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from cachebus.chunk import HEADER_BYTES
from cachebus.redis_names import PART_BYTES, part_count

MEMBER_BYTES = 40
"""A key of 32 bytes and the length."""

_KEY_BYTES = 32
_VALUE_BYTES = 224
"""What the server keeps of a value besides its bytes: name, expiry, places in two tables. Measured."""
_STRING_BYTES = 10


class Chunk(NamedTuple):
    """A chunk of an account; ``length`` is bytes of payload."""

    key: bytes
    length: int

    def member(self) -> bytes:
        """How the server's account calls it."""
        return self.key + self.length.to_bytes(MEMBER_BYTES - _KEY_BYTES, "big")


def chunk_of(member: bytes) -> Chunk:
    """The chunk that a member stands for."""
    return Chunk(member[:_KEY_BYTES], int.from_bytes(member[_KEY_BYTES:], "big"))


class Account:
    """A tenant's chunks, what was used longest ago first. ``taken_bytes`` of the server's memory; ``learnt_at``: when the server was asked last."""

    def __init__(self, learnt_at: float) -> None:
        self.learnt_at = learnt_at
        self.taken_bytes = 0
        self._chunks: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._chunks

    def keys(self) -> set[bytes]:
        """All chunks."""
        return set(self._chunks)

    def put(self, chunk: Chunk, used_at: float) -> list[Chunk]:
        """A chunk is stored, or was used. What has its key and another length is no longer there, and is returned."""
        before = self.drop(chunk.key)
        self._chunks[chunk.key] = (chunk.length, used_at)
        self.taken_bytes += taken_bytes(chunk.length)
        return [old for old in before if old != chunk]

    def drop(self, key: bytes) -> list[Chunk]:
        """A chunk is not there any more; the chunk, where it was counted."""
        if key not in self._chunks:
            return []
        length, _ = self._chunks.pop(key)
        self.taken_bytes -= taken_bytes(length)
        return [Chunk(key, length)]

    def drop_until(self, used_at: float) -> None:
        """Others removed all that was used before that."""
        while self._chunks and next(iter(self._chunks.values()))[1] < used_at:
            self.drop(next(iter(self._chunks)))

    def drop_beyond(self, bytes_max: int) -> list[Chunk]:
        """Takes out what was used longest ago until the rest takes ``bytes_max`` at most."""
        gone: list[Chunk] = []
        while self.taken_bytes > bytes_max:
            gone += self.drop(next(iter(self._chunks)))
        return gone

    def learn(self, first_at: float, new: Iterable[tuple[Chunk, float]], now: float) -> None:
        """Takes in what the server says: nothing is older than ``first_at``, and these were stored or used since ``learnt_at`` or so."""
        self.drop_until(first_at)
        for chunk, used_at in new:
            self.put(chunk, used_at)
        self.learnt_at = now


def taken_bytes(length: int) -> int:
    """Bytes of a server's memory that a chunk with so much payload takes, header and all, as Redis and Valkey allocate with jemalloc."""
    whole, rest = divmod(length, PART_BYTES)
    return whole * _allocated(PART_BYTES) + (_allocated(rest) if rest else 0) + _allocated(HEADER_BYTES) + (part_count(length) + 1) * _VALUE_BYTES


def _allocated(length: int) -> int:
    # There are four sizes from one power of two to the next.
    wanted = length + _STRING_BYTES
    step = max(16, 1 << max(0, (wanted - 1).bit_length() - 3))
    return -(-wanted // step) * step
