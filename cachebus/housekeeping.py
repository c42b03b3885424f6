"""What a directory lets go of though nobody needs the room: what people clear, what nobody used for long, what was stored for some time only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cachebus.effects import Effect, WriteRecord
from cachebus.wire import Tier

if TYPE_CHECKING:
    from cachebus.directory import Directory

DEMOTED_AHEAD = 64
"""How many of the chunks that DRAM drops next are looked at for a copy in a lower tier."""


def upkeep(directory: Directory, now_ms: float, ttl_seconds: int) -> list[Effect]:
    """Now and then: what DRAM drops next gets a copy in a lower tier; what nobody used for ``ttl_seconds`` (0: for ever) goes, and what expired."""
    effects = [e for entry in directory.dram.coldest(DEMOTED_AHEAD) if not entry.copied for e in directory.tiers.store(entry, demote=True)]
    if directory.settled:
        now_s = directory.now_s(now_ms)
        before = now_s - ttl_seconds if ttl_seconds else 0
        old = directory.dram.expired(before) if ttl_seconds else []
        old += [entry for entry in directory.dram.overdue(now_s) if entry not in old]
        directory.counters.expired += len(old)
        effects += [effect for entry in old for effect in directory.drop(entry)] + directory.tiers.expire(before, now_s)
    return effects


def pin(directory: Directory, keys: Iterable[bytes], pinned: bool) -> tuple[int, list[Effect]]:
    """Keeps chunks from being evicted, or lets them go again; how many there were, and the effects."""
    entries = [entry for key in keys if (entry := directory.dram.index.get(key)) is not None and entry.committed]
    for entry in entries:
        entry.pinned = pinned
    return len(entries), [WriteRecord(entry.slot, entry.record()) for entry in entries]


def clear(directory: Directory, tiers: Iterable[Tier], tenant: bytes = b"") -> tuple[int, list[Effect]]:
    """Drops what is committed in these tiers, pinned or not: all, or with ``tenant`` (8 bytes) what is its own. How many chunks, and the effects.

    Of a tenant also that goes which is on its way into these tiers: it is dropped when it arrives. In the shared tier a tenant's chunks have to be
    looked for, so they are not counted.
    """
    effects: list[Effect] = []
    count = 0
    for tier in tiers:
        if tier == "dram":
            entries = [entry for entry in directory.dram.index.values() if entry.committed and tenant in (b"", entry.tenant)]
            count += len(entries)
            effects += [effect for entry in entries for effect in directory.drop(entry)]
            if tenant:
                directory.dram.outlaw(tenant)
        else:
            dropped, more = directory.tiers.clear(tier, tenant)
            count += dropped
            effects += more
    return count, effects
