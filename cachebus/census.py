"""What a directory tells people: its chunks, and its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachebus.messages import ChunkInfo
from cachebus.wire import Tier

if TYPE_CHECKING:
    from cachebus.directory import Directory


@dataclass
class Counters:
    """What happened since the daemon started."""

    stored: int = 0
    evicted: int = 0
    granted: int = 0
    missed: int = 0
    no_room: int = 0
    abandoned: int = 0
    expired: int = 0
    integrity_failures: int = 0


def chunks(directory: Directory) -> list[ChunkInfo]:
    """Every chunk that some tier holds."""
    in_dram = directory.keys()
    where: dict[bytes, list[Tier]] = {key: ["dram"] for key in in_dram}
    for tier, keys in directory.tiers.keys().items():
        for key in keys:
            where.setdefault(key, []).append(tier)
    on_disk = directory.tiers.disk.index if directory.tiers.disk else {}
    found = []
    for key, tiers in where.items():
        entry = directory.dram.index.get(key) or on_disk.get(key)
        known = (entry.length, entry.pinned, entry.used_at, entry.readers, entry.layout) if entry else (0, False, 0, 0, b"")
        found.append(ChunkInfo(key, tiers, *known))
    return found


def statistics(directory: Directory) -> dict[str, float]:
    """Gauges and counters by name."""
    entries = directory.dram.entries.values()
    return {
        "dram_capacity_bytes": directory.dram.capacity,
        "dram_bytes": directory.dram.used_bytes,
        "chunks": sum(1 for e in entries if e.committed and not e.doomed and not e.tail),
        "tail_blocks": sum(1 for e in entries if e.committed and not e.doomed and e.tail),
        "writing": sum(1 for e in entries if not e.committed and not e.filling and not e.doomed),
        **{f"{name}_total": value for name, value in vars(directory.counters).items()},
        **directory.tiers.statistics(),
    }
