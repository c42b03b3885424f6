"""What the tiers benchmark moves and how fast that went."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

KEY_BYTES = 32
PATIENCE_MS = 2000
"""Tiers may be silent for so long here: on a machine where others work a chunk that is late is slow, not a failed measurement."""
_TILE_BYTES = 1 << 20
PUT, GET = "put_bytes_per_second", "get_bytes_per_second"


@dataclass(frozen=True)
class Load:
    """``count`` chunks of ``size`` bytes, all moved in one measurement."""

    size: int
    count: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.size * self.count

    @property
    def label(self) -> str:
        """The chunk's size, to be read by people."""
        return f"{self.size / 2**20:g} MiB"


@dataclass(frozen=True)
class Subject:
    """One system on one tier. ``measure`` gives bytes per second by metric; ``concurrency`` is how many threads or connections each metric had.

    ``warms_itself``: it moves everything once before it measures.
    """

    system: str
    case: str
    concurrency: dict[str, int]
    measure: Callable[[], dict[str, float]]
    warms_itself: bool = False


def key(number: int) -> bytes:
    """The key of a chunk."""
    return number.to_bytes(KEY_BYTES, "big")


def fill(data: memoryview, load: Load) -> None:
    """Fills the beginning of ``data`` with chunks that differ and do not compress."""
    tile = random.Random(load.size).randbytes(_TILE_BYTES)
    for start in range(0, load.total, _TILE_BYTES):
        end = min(start + _TILE_BYTES, load.total)
        data[start:end] = tile[: end - start]
    for number in range(load.count):
        data[number * load.size : number * load.size + KEY_BYTES] = key(number)
