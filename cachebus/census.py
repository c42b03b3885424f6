"""What a directory tells people: its chunks, and its numbers."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachebus.messages_tools import ChunkInfo, Chunks
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


def chunks(directory: Directory, after: bytes, count_max: int) -> Chunks:
    """The first chunks that some tier holds, in the order of their keys, from the first key after ``after``."""
    where: dict[bytes, list[Tier]] = {}
    for tier, keys in {"dram": directory.keys(), **directory.tiers.keys()}.items():
        # One more than wanted shows whether there are more. What comes first in all tiers together comes first in each that holds it.
        for key in heapq.nsmallest(count_max + 1, (key for key in keys if key > after)):
            where.setdefault(key, []).append(tier)
    on_disk = directory.tiers.disk.index if directory.tiers.disk else {}
    found = []
    for key in sorted(where)[:count_max]:
        entry = directory.dram.index.get(key) or on_disk.get(key)
        known = (entry.length, entry.pinned, entry.used_at, entry.readers, entry.layout) if entry else (0, False, 0, 0, b"")
        found.append(ChunkInfo(key, where[key], *known))
    return Chunks(found, len(where) > count_max, directory.tiers.described)


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
