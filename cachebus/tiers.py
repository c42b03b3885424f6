"""What lies below DRAM: which chunk is on disk, at another node or in the shared tier, and what is on its way up or down. A plain state machine.

Going down, a chunk is written behind as soon as it is committed; what the queue can't take is written before DRAM evicts it. Going up, a
chunk comes when a lookup asks for it. While bytes move, the entries on both sides are held, so neither extent is given to another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cachebus.chunk import ChunkHeader
from cachebus.effects import Effect, Held, Loan, Outcome, Probe, Publish, Read, Start, Wipe, Write
from cachebus.messages import Removed, Stored
from cachebus.shelf import Entry, Shelf, Wanted
from cachebus.table import Record
from cachebus.wire import Tier

FOUND_MS = 1000
"""How long the answer to a probe is good for."""

REMOTE_KEYS_MAX = 4_000_000
"""Keys of the shared tier that are remembered; more are found by asking."""

PROBED_AT_ONCE = 8
"""Keys that a lookup asks the shared tier for first; each further question asks for eight times as many."""

NEARER = 2.0
"""Another node is asked before the shared tier where its round trip is at most this many times as long: its bytes come from DRAM."""

REMOTE = "redis"


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
    loan: Loan | None = None


@dataclass
class Tiers:
    """``disk`` is None without an NVMe tier. ``usable`` and ``writable`` are set by the daemon as the tiers come and go."""

    disk: Shelf | None = None
    key_id: bytes = bytes(8)
    write_behind_bytes_max: int = 1 << 30
    usable: set[Tier] = field(default_factory=set)
    writable: set[Tier] = field(default_factory=set)
    counters: dict[Tier, TierCounters] = field(default_factory=lambda: {"nvme": TierCounters(), "redis": TierCounters(), "peer": TierCounters()})
    described: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    """Shape and element type by layout, for headers."""

    def __post_init__(self) -> None:
        self._number = 0
        self._reads: dict[int, tuple[Entry, Found]] = {}
        self._writes: dict[int, tuple[Entry, Tier, Entry | None]] = {}
        self._writing: set[tuple[Tier, bytes]] = set()
        self._called_off: set[int] = set()
        """Writes whose chunk was cleared meanwhile."""
        self._probes: dict[int, Probe] = {}
        self._found: dict[bytes, tuple[Found, float]] = {}
        self._remote: set[bytes] = set()
        self._peers: dict[str, set[bytes]] = {}
        self.distances: dict[str, float] = {}
        self.waiting_bytes = 0

    # Up.

    def locate(self, key: bytes, layout: bytes, now_ms: float) -> Found | None:
        """Where the chunk can be had without asking anybody."""
        entry = self.disk.index.get(key) if self.disk and "nvme" in self.usable else None
        if entry is not None and entry.committed and entry.layout == layout:
            header = ChunkHeader(key, layout, entry.digest, entry.length, self.key_id, entry.tenant, expires_at=entry.expires_at)
            return Found("nvme", header, entry)
        found, until = self._found.get(key, (None, 0.0))
        if found is not None and found.header.layout == layout and now_ms < until and self._reachable(found):
            return found
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
        return [Start(Read(self._number, found.tier, found.header, into.offset, place, found.loan))]

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
        if found.on_disk is None:
            self._found.pop(found.header.key, None)
            effects += self._not_there(found, corrupt=outcome.corrupt)
        return into, found, effects

    def choose(self, keys: list[bytes], passed_over: set[str]) -> tuple[str, int]:
        """Who to ask for a run of keys that this node lacks, and for how many of them; ("", 0): nobody. Names of peers, or "redis"."""
        near = self.distances.get(REMOTE)
        peers = [(self.distances.get(name, 0.0), name) for name, held in self._peers.items() if keys[0] in held and name not in passed_over]
        remote = REMOTE in self.usable and REMOTE not in passed_over
        if peers:
            distance, name = min(peers)
            if not remote or near is None or distance <= NEARER * near or keys[0] not in self._remote:
                held = self._peers[name]
                return name, next((number for number, key in enumerate(keys) if key not in held), len(keys))
        return (REMOTE, len(keys)) if remote else ("", 0)

    def ask(self, name: str, keys: list[bytes], layout: bytes) -> tuple[int, list[Effect]]:
        """Asks whom ``choose`` named for headers; the job's number."""
        self._number += 1
        probe = Probe(self._number, "redis", keys) if name == REMOTE else Probe(self._number, "peer", keys, name, layout)
        self._probes[self._number] = probe
        return self._number, [Start(probe)]

    def probe_done(self, number: int, outcome: Outcome, now_ms: float) -> bool:
        """Takes a probe's answer in; False for an unknown job."""
        probe = self._probes.pop(number, None)
        if probe is None:
            return False
        self._found = {key: item for key, item in self._found.items() if item[1] > now_ms}
        loans: list[Loan | None] = [*outcome.loans] if outcome.loans else [None] * len(outcome.headers)
        for key, header, loan in zip(probe.keys, outcome.headers, loans, strict=False):
            if header is not None and header.key == key and header.key_id == self.key_id:
                self._found[key] = (Found(probe.tier, header, loan=loan), now_ms + FOUND_MS)
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
        called_off = number in self._called_off
        self._called_off.discard(number)
        self._writing.discard((tier, entry.key))
        self.waiting_bytes -= entry.length
        if not outcome.good or called_off:
            effects: list[Effect] = []
            if self.disk and on_disk is not None:
                self.disk.free(on_disk)
                effects = [Start(Wipe("nvme", slots=[on_disk.slot]))] if outcome.good else []
            return entry, effects
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

    def learn(self, held: Held) -> list[Effect]:
        """The shared tier or another node came, went or changed."""
        if held.tier == "redis" and not held.whole:
            self.counters["redis"].evicted += len(held.removed)
            gone = self._remote.intersection(held.removed)
            self._remote -= gone
            return _told("redis", set(), gone)
        if held.tier == "redis":
            before, self._remote = self._remote, set(held.added)
            return _told("redis", self._remote - before, before - self._remote)
        known = self._peers.setdefault(held.peer, set())
        added = set(held.added)
        removed = set(known) if held.gone else known - added if held.whole else set(held.removed)
        new = {key for key in added if not self._at_a_peer(key)}
        known |= added
        known -= removed
        if held.gone:
            del self._peers[held.peer]
        return _told("peer", new, {key for key in removed if not self._at_a_peer(key)})

    def keys(self) -> dict[Tier, list[bytes]]:
        """Every chunk below DRAM, by tier."""
        on_disk = [key for key, entry in self.disk.index.items() if entry.committed] if self.disk else []
        return {"nvme": on_disk, "redis": list(self._remote), "peer": list(set().union(*self._peers.values()))}

    def holds(self, key: bytes) -> list[Tier]:
        """The tiers below DRAM that hold the chunk."""
        return [tier for tier in ("nvme", "redis") if self._has(tier, key) and (tier, key) not in self._writing]

    def clear(self, tier: Tier, tenant: bytes = b"") -> tuple[int, list[Effect]]:
        """Forgets a whole tier, or what is a tenant's there; how many chunks that were, as far as it is known here whose they are."""
        if tier == "peer":
            return 0, []
        if tenant:
            self._called_off |= {number for number, (entry, where, _) in self._writes.items() if where == tier and entry.tenant == tenant}
        if tier == "redis":
            self._found = {key: item for key, item in self._found.items() if tenant and item[0].header.tenant != tenant}
            if tenant:
                return 0, [Start(Wipe("redis", tenant=tenant))]
            before, self._remote = self._remote, set()
            return len(before), [*_told("redis", set(), before), Start(Wipe("redis", keys=[]))]
        entries = [e for e in (self.disk.index.values() if self.disk else ()) if e.committed and tenant in (b"", e.tenant)]
        return len(entries), [effect for entry in entries for effect in self._drop_disk(entry)]

    def expire(self, before_s: int, now_s: int) -> list[Effect]:
        """Drops what was not used since ``before_s``, and what was stored for a time that is over."""
        if self.disk is None:
            return []
        old = self.disk.expired(before_s)
        return [effect for entry in [*old, *(e for e in self.disk.overdue(now_s) if e not in old)] for effect in self._drop_disk(entry)]

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
        found |= {f"{tier}_usable": float(tier in self.usable) for tier in ("nvme", "redis")} | {"peer_usable": float(bool(self._peers))}
        found |= {"redis_chunks": len(self._remote), "peer_chunks": sum(map(len, self._peers.values())), "peers": len(self._peers)}
        found |= {f"round_trip_seconds_{name}": seconds for name, seconds in self.distances.items()}
        return {**found, "write_behind_bytes": self.waiting_bytes, "promoting": len(self._reads)}

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
            on_disk, gone = self.disk.place(Wanted(entry.key, entry.length, entry.layout, tenant=entry.tenant, expires_at=entry.expires_at))
            effects += self._evicted(gone)
            if on_disk is None:
                self.counters[tier].skipped += 1
                return effects
            on_disk.pinned, on_disk.used_at = entry.pinned, entry.used_at
            done = Entry(on_disk.slot, on_disk.generation, on_disk.offset, entry.length, False, entry.key, entry.layout, "", entry.digest, True)
            done.tenant, done.pinned, done.used_at, done.expires_at = entry.tenant, entry.pinned, entry.used_at, entry.expires_at
            slot, record = on_disk.slot, done.record()
        self._number += 1
        self._writes[self._number] = (entry, tier, on_disk)
        self._writing.add((tier, entry.key))
        self.waiting_bytes += entry.length
        entry.readers += 1
        shape, dtype = self.described.get(entry.layout, ("", ""))
        known = (entry.key, entry.layout, entry.digest, entry.length, self.key_id, entry.tenant, entry.used_at)
        header = ChunkHeader(*known, shape, dtype, expires_at=entry.expires_at)
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

    def _reachable(self, found: Found) -> bool:
        return found.loan.peer in self._peers if found.loan else found.tier in self.usable

    def _not_there(self, found: Found, *, corrupt: bool) -> list[Effect]:
        """What was believed to be elsewhere is not, or is not what it should be: nobody is asked for it there again."""
        key = found.header.key
        if found.loan:
            held = self._peers.get(found.loan.peer, set())
            gone = {key} & held
            held -= gone
            return _told("peer", set(), {key for key in gone if not self._at_a_peer(key)})
        gone = {key} & self._remote
        self._remote -= gone
        return [*_told("redis", set(), gone), *([Start(Wipe("redis", keys=[key]))] if corrupt else [])]

    def _at_a_peer(self, key: bytes) -> bool:
        return any(key in held for held in self._peers.values())


def _told(tier: Tier, new: set[bytes], gone: set[bytes]) -> list[Effect]:
    effects: list[Effect] = [Publish(Removed(list(gone), tier))] if gone else []
    return [*effects, Publish(Stored(list(new), tier))] if new else effects
