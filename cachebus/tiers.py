"""What lies below DRAM: which chunk is on disk or in the shared tier, and what is on its way up or down. A plain state machine.

Going down, a chunk is written behind as soon as it is committed; what the queue can't take is written before DRAM evicts it. Going up, a
chunk comes when a lookup asks for it. While bytes move, the entries on both sides are held, so neither extent is given to another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cachebus.chunk import ChunkHeader
from cachebus.effects import Effect, Outcome, Probe, Publish, Read, Start, Wipe, Write
from cachebus.messages import Removed, Stored, Tier
from cachebus.shelf import Entry, Shelf, Wanted
from cachebus.table import Record

FOUND_MS = 1000
"""How long the answer to a probe is good for."""

REMOTE_KEYS_MAX = 4_000_000
"""Keys of the shared tier that are remembered; more are found by asking."""


@dataclass
class TierCounters:
    """What happened on one tier since the daemon started."""

    stored: int = 0
    evicted: int = 0
    promoted: int = 0
    missed: int = 0
    integrity_failures: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Found:
    """Where a chunk can be had."""

    tier: Tier
    header: ChunkHeader
    on_disk: Entry | None = None


@dataclass
class Tiers:
    """``disk`` is None without an NVMe tier. ``usable`` and ``writable`` are set by the daemon as the tiers come and go."""

    disk: Shelf | None = None
    key_id: bytes = bytes(8)
    write_behind_bytes_max: int = 1 << 30
    usable: set[Tier] = field(default_factory=set)
    writable: set[Tier] = field(default_factory=set)
    counters: dict[Tier, TierCounters] = field(default_factory=lambda: {"nvme": TierCounters(), "redis": TierCounters()})
    described: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    """Shape and element type by layout, for headers."""

    def __post_init__(self) -> None:
        self._number = 0
        self._reads: dict[int, tuple[Entry, Found]] = {}
        self._writes: dict[int, tuple[Entry, Tier, Entry | None]] = {}
        self._writing: set[tuple[Tier, bytes]] = set()
        self._probes: dict[int, Probe] = {}
        self._found: dict[bytes, tuple[ChunkHeader, float]] = {}
        self._remote: set[bytes] = set()
        self.waiting_bytes = 0

    # Up.

    def locate(self, key: bytes, layout: bytes, now_ms: float) -> Found | None:
        """Where the chunk can be had without asking anybody."""
        entry = self.disk.index.get(key) if self.disk and "nvme" in self.usable else None
        if entry is not None and entry.committed and entry.layout == layout:
            header = ChunkHeader(key, layout, entry.digest, entry.length, self.key_id, entry.tenant)
            return Found("nvme", header, entry)
        header_until = self._found.get(key)
        if header_until and header_until[0].layout == layout and now_ms < header_until[1] and "redis" in self.usable:
            return Found("redis", header_until[0])
        return None

    def promote(self, found: Found, into: Entry) -> list[Effect]:
        """Brings a chunk to an entry of DRAM that was made for it."""
        self._number += 1
        self._reads[self._number] = (into, found)
        into.source = found.tier
        place = 0
        if found.on_disk is not None:
            found.on_disk.readers += 1
            place = found.on_disk.offset
        return [Start(Read(self._number, found.tier, found.header, into.offset, place))]

    def read_done(self, number: int, outcome: Outcome, now_s: int) -> tuple[Entry, Found, list[Effect]] | None:
        """The DRAM entry that a read was for, where it came from, and what follows for the lower tier; None for an unknown job."""
        if number not in self._reads:
            return None
        into, found = self._reads.pop(number)
        effects: list[Effect] = []
        counters = self.counters[found.tier]
        if found.on_disk is not None:
            effects += self._release(found.on_disk)
        if outcome.good:
            counters.promoted += 1
            into.copied = True
            # Besides the job's own hold: a lookup was granted it while it was on its way.
            if into.readers > 1:
                into.source = "dram"
            if self.disk and found.on_disk is not None:
                self.disk.use(found.on_disk, now_s)
            return into, found, effects
        counters.missed += 1
        counters.integrity_failures += outcome.corrupt
        if found.on_disk is not None and outcome.corrupt and not found.on_disk.doomed:
            effects += self._drop_disk(found.on_disk)
        if found.tier == "redis":
            self._found.pop(found.header.key, None)
            effects += self._forget_remote([found.header.key])
            if outcome.corrupt:
                effects.append(Start(Wipe("redis", keys=[found.header.key])))
        return into, found, effects

    def ask(self, keys: list[bytes]) -> tuple[int, list[Effect]]:
        """Asks the shared tier for headers; the job's number, 0 where there is nobody to ask."""
        if "redis" not in self.usable:
            return 0, []
        self._number += 1
        probe = Probe(self._number, "redis", keys)
        self._probes[self._number] = probe
        return self._number, [Start(probe)]

    def probe_done(self, number: int, outcome: Outcome, now_ms: float) -> bool:
        """Takes a probe's answer in; False for an unknown job."""
        probe = self._probes.pop(number, None)
        if probe is None:
            return False
        self._found = {key: item for key, item in self._found.items() if item[1] > now_ms}
        for key, header in zip(probe.keys, outcome.headers, strict=False):
            if header is not None and header.key == key and header.key_id == self.key_id:
                self._found[key] = (header, now_ms + FOUND_MS)
        return True

    # Down.

    def store(self, entry: Entry, *, demote: bool = False) -> list[Effect]:
        """Writes a committed chunk to the tiers that lack it; ``demote``: to the first one that takes it, since DRAM is about to drop it."""
        effects: list[Effect] = []
        if entry.tail or not entry.committed or entry.doomed:
            return effects
        for tier in ("nvme", "redis"):
            if tier not in self.writable or self._has(tier, entry.key):
                entry.copied = entry.copied or self._has(tier, entry.key)
                continue
            if self.waiting_bytes + entry.length > self.write_behind_bytes_max:
                self.counters[tier].skipped += 1
                continue
            effects += self._write(entry, tier)
            if demote:
                break
        return effects

    def write_done(self, number: int, outcome: Outcome, now_s: int) -> tuple[Entry, list[Effect]] | None:
        """The DRAM entry that a write was from and what follows; None for an unknown job."""
        if number not in self._writes:
            return None
        entry, tier, on_disk = self._writes.pop(number)
        self._writing.discard((tier, entry.key))
        self.waiting_bytes -= entry.length
        if not outcome.good:
            if self.disk and on_disk is not None:
                self.disk.free(on_disk)
            return entry, []
        entry.copied = True
        self.counters[tier].stored += 1
        if self.disk and on_disk is not None:
            self.disk.commit(on_disk, entry.digest, now_s)
        elif len(self._remote) < REMOTE_KEYS_MAX:
            self._remote.add(entry.key)
        return entry, [Publish(Stored([entry.key], tier))]

    # What is there.

    def adopt_disk(self, records: Iterable[tuple[int, Record]]) -> list[Wipe]:
        """Takes over what the disk holds; what is to be forgotten of it."""
        assert self.disk is not None
        left = self.disk.adopt(records)
        return [Wipe("nvme", slots=left)] if left else []

    def remote_index(self, keys: Iterable[bytes]) -> list[Effect]:
        """The shared tier came (back): these are its chunks."""
        now = set(keys)
        gone, new = self._remote - now, now - self._remote
        self._remote = now
        effects: list[Effect] = [Publish(Removed(list(gone), "redis"))] if gone else []
        return [*effects, Publish(Stored(list(new), "redis"))] if new else effects

    def keys(self) -> dict[Tier, list[bytes]]:
        """Every chunk below DRAM, by tier."""
        on_disk = [key for key, entry in self.disk.index.items() if entry.committed] if self.disk else []
        return {"nvme": on_disk, "redis": list(self._remote)}

    def holds(self, key: bytes) -> list[Tier]:
        """The tiers below DRAM that hold the chunk."""
        return [tier for tier in ("nvme", "redis") if self._has(tier, key) and (tier, key) not in self._writing]

    def clear(self, tier: Tier) -> list[Effect]:
        """Forgets a whole tier."""
        if tier == "redis":
            gone, self._found = list(self._remote), {}
            return [*self._forget_remote(gone), Start(Wipe("redis", keys=[]))]
        entries = list(self.disk.index.values()) if self.disk else []
        return [effect for entry in entries if entry.committed for effect in self._drop_disk(entry)]

    def expire(self, before_s: int) -> list[Effect]:
        """Drops what was not used since."""
        return [effect for entry in (self.disk.expired(before_s) if self.disk else []) for effect in self._drop_disk(entry)]

    def held(self) -> list[Entry]:
        """The entries of DRAM that jobs hold, once for each job."""
        return [into for into, _ in self._reads.values()] + [entry for entry, _, _ in self._writes.values()]

    def statistics(self) -> dict[str, float]:
        """Gauges and counters by name, each with its tier before it."""
        found: dict[str, float] = {
            f"{tier}_{name}_total": value for tier, counters in self.counters.items() for name, value in vars(counters).items()
        }
        if self.disk:
            found |= {"nvme_bytes": self.disk.used_bytes, "nvme_capacity_bytes": self.disk.capacity, "nvme_chunks": len(self.disk.index)}
        found |= {f"{tier}_usable": float(tier in self.usable) for tier in self.counters}
        return {**found, "redis_chunks": len(self._remote), "write_behind_bytes": self.waiting_bytes, "promoting": len(self._reads)}

    # Inner workings.

    def _has(self, tier: Tier, key: bytes) -> bool:
        if (tier, key) in self._writing:
            return True
        return key in self._remote if tier == "redis" else self.disk is not None and key in self.disk.index

    def _write(self, entry: Entry, tier: Tier) -> list[Effect]:
        effects: list[Effect] = []
        on_disk, slot, record = None, 0, None
        if tier == "nvme":
            assert self.disk is not None
            on_disk, gone = self.disk.place(Wanted(entry.key, entry.length, entry.layout, tenant=entry.tenant))
            effects += self._evicted(gone)
            if on_disk is None:
                self.counters[tier].skipped += 1
                return effects
            on_disk.pinned, on_disk.used_at = entry.pinned, entry.used_at
            done = Entry(on_disk.slot, on_disk.generation, on_disk.offset, entry.length, False, entry.key, entry.layout, "", entry.digest, True)
            done.tenant, done.pinned, done.used_at = entry.tenant, entry.pinned, entry.used_at
            slot, record = on_disk.slot, done.record()
        self._number += 1
        self._writes[self._number] = (entry, tier, on_disk)
        self._writing.add((tier, entry.key))
        self.waiting_bytes += entry.length
        entry.readers += 1
        shape, dtype = self.described.get(entry.layout, ("", ""))
        header = ChunkHeader(entry.key, entry.layout, entry.digest, entry.length, self.key_id, entry.tenant, entry.used_at, shape, dtype)
        return [*effects, Start(Write(self._number, tier, header, entry.offset, slot, record))]

    def _evicted(self, gone: list[Entry]) -> list[Effect]:
        if not gone:
            return []
        self.counters["nvme"].evicted += len(gone)
        return [Start(Wipe("nvme", slots=[entry.slot for entry in gone])), Publish(Removed([entry.key for entry in gone], "nvme"))]

    def _drop_disk(self, entry: Entry) -> list[Effect]:
        assert self.disk is not None
        effects: list[Effect] = [Publish(Removed([entry.key], "nvme"))]
        if self.disk.drop(entry):
            effects.append(Start(Wipe("nvme", slots=[entry.slot])))
        return effects

    def _release(self, on_disk: Entry) -> list[Effect]:
        assert self.disk is not None
        on_disk.readers -= 1
        if on_disk.doomed and not on_disk.readers:
            self.disk.free(on_disk)
            return [Start(Wipe("nvme", slots=[on_disk.slot]))]
        return []

    def _forget_remote(self, keys: list[bytes]) -> list[Effect]:
        known = [key for key in keys if key in self._remote]
        self._remote.difference_update(known)
        return [Publish(Removed(known, "redis"))] if known else []
