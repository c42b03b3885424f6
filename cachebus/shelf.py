"""One tier's space: which entry lies in which extent, and what makes room for another. A plain state machine.

The DRAM region and the NVMe tier are a shelf each. A shelf decides nothing about who is told; it changes its own books and says what left.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cachebus.chunk import TENANT_BYTES
from cachebus.extents import Extents, aligned
from cachebus.messages import Extent
from cachebus.placement import Lru, Order, Policy, order
from cachebus.table import Record, State
from cachebus.wire import Tier

COPIED_AMONG = 256
"""Among so many of the coldest entries one is looked for that a lower tier has, too; without lower tiers there is none."""
TAILS_SHARE = 1 / 16
"""Share of a full shelf that tail blocks keep, the newest of them."""


@dataclass(slots=True, eq=False)
class Entry:
    """A chunk or a tail block and the extent that holds it. ``doomed``: out of the index, freed when its last reader is done.

    ``filling``: the daemon itself brings its bytes up from a lower tier; ``copied``: a lower tier has it, too; ``source``: where whoever is
    granted it next has it from, which is a lower tier for the lookup that it was brought up for; ``expires_at``: seconds since 1970, 0: never.
    """

    slot: int
    generation: int
    offset: int
    length: int
    tail: bool
    key: bytes
    layout: bytes
    holder: str
    digest: bytes = b""
    committed: bool = False
    readers: int = 0
    doomed: bool = False
    tenant: bytes = bytes(TENANT_BYTES)
    pinned: bool = False
    used_at: int = 0
    filling: bool = False
    copied: bool = False
    source: Tier = "dram"
    expires_at: int = 0

    def extent(self) -> Extent:
        """How it is told to who asked."""
        return Extent(self.key, self.offset, self.length, self.digest, self.slot, self.generation, self.committed, self.source)

    def record(self) -> Record:
        """The entry as a table keeps it."""
        state = State.DOOMED if self.doomed else State.COMMITTED if self.committed else State.RESERVED
        return Record(
            state,
            self.generation,
            self.offset,
            self.length,
            self.tail,
            self.key,
            self.digest,
            self.layout,
            self.holder,
            self.tenant,
            self.pinned,
            self.used_at,
            self.expires_at,
        )

    def is_overdue(self, now_s: int) -> bool:
        """Whether the time that it was stored for is over."""
        return 0 < self.expires_at <= now_s

    def may_go(self) -> bool:
        """Whether it may be evicted now."""
        return self.committed and not self.readers and not self.doomed and not self.pinned


@dataclass(frozen=True)
class Wanted:
    """What an entry is to be made for."""

    key: bytes
    length: int
    layout: bytes
    holder: str = ""
    tail: bool = False
    tenant: bytes = bytes(TENANT_BYTES)
    expires_at: int = 0


class Shelf:
    """``capacity`` bytes in extents, ``slots`` entries. ``header_bytes`` go before each entry's own; a tenant may take ``tenant_share``."""

    def __init__(self, capacity: int, slots: int, policy: Policy = "lru", header_bytes: int = 0, tenant_share: float = 1.0) -> None:
        self._extents = Extents(capacity)
        self._slots = slots
        self._free_slots = list(range(slots - 1, -1, -1))
        self._header_bytes = header_bytes
        self._tenant_share = tenant_share
        self._shares: dict[bytes, float] = {}
        # Those who have more than their share since it became smaller.
        self._over: set[bytes] = set()
        # By tenant, the last entry that was made before all of theirs were cleared.
        self._outlawed: dict[bytes, int] = {}
        self._expiring: list[tuple[int, int, int]] = []
        self._tenants: Counter[bytes] = Counter()
        self._tail_bytes = self._tail_slots = 0
        self._generation = 0
        self._chunks, self._tails = order(policy), Lru()
        self.entries: dict[int, Entry] = {}
        self.index: dict[bytes, Entry] = {}
        self.frozen = False
        """While it is set nothing is evicted: somebody unknown may read or write any extent."""

    @property
    def capacity(self) -> int:
        """Bytes in all."""
        return self._extents.size

    @property
    def used_bytes(self) -> int:
        """Bytes in extents that are not free."""
        return self._extents.size - self._extents.free_bytes

    def place(self, wanted: Wanted) -> tuple[Entry | None, list[Entry]]:
        """An entry with an extent, not committed yet, and what was evicted for it; None where there is no room."""
        gone: list[Entry] = []
        need = self._taken(wanted.length)
        bytes_max = self._bytes_max(wanted.tenant)
        if need > bytes_max:
            return None, gone
        while self._tenants[wanted.tenant] + need > bytes_max:
            if not self._evict(gone, lambda entry: entry.tenant == wanted.tenant, wanted.tenant):
                return None, gone
        self._over.discard(wanted.tenant)
        while (offset := self._extents.allocate(need) if self._free_slots else None) is None:
            if not self._evict(gone, lambda entry: entry.copied, looks_max=COPIED_AMONG) and not self._evict(gone, lambda entry: True):
                return None, gone
        self._generation += 1
        entry = Entry(
            self._free_slots.pop(),
            self._generation,
            offset,
            wanted.length,
            wanted.tail,
            wanted.key,
            wanted.layout,
            wanted.holder,
            tenant=wanted.tenant,
            expires_at=wanted.expires_at,
        )
        self._enter(entry)
        return entry, gone

    def commit(self, entry: Entry, digest: bytes, now_s: int) -> None:
        """The entry's bytes are in place."""
        entry.committed, entry.filling, entry.digest, entry.used_at = True, False, digest, now_s
        self._order(entry).add(entry.slot, entry.key)

    def use(self, entry: Entry, now_s: int) -> None:
        """The entry was asked for."""
        entry.used_at = now_s
        self._order(entry).use(entry.slot)

    def drop(self, entry: Entry) -> bool:
        """Takes the entry out of the index; True where its extent is free, too, and False where a reader still holds it."""
        if self.index.get(entry.key) is entry:
            del self.index[entry.key]
        self._order(entry).drop(entry.slot)
        if entry.readers:
            entry.doomed = True
            return False
        self.free(entry)
        return True

    def free(self, entry: Entry) -> None:
        """Gives the extent and the slot back."""
        del self.entries[entry.slot]
        if self.index.get(entry.key) is entry:
            del self.index[entry.key]
        need = self._taken(entry.length)
        self._free_slots.append(entry.slot)
        self._extents.release(entry.offset, need)
        self._tenants[entry.tenant] -= need
        if entry.tail:
            self._tail_bytes -= need
            self._tail_slots -= 1
        if not self._tenants[entry.tenant]:
            del self._tenants[entry.tenant]

    def adopt(self, records: Iterable[tuple[int, Record]]) -> list[int]:
        """Takes over what an earlier daemon left, the newest first where two overlap. Returns the slots that were not taken over."""
        ordered = sorted(records, key=lambda pair: (pair[1].state != State.COMMITTED, -pair[1].generation))
        left = [slot for slot, record in ordered if self._adopt(slot, record) is None]
        self._free_slots = [slot for slot in range(self._slots - 1, -1, -1) if slot not in self.entries]
        # The oldest goes first.
        oldest_first = sorted(self.entries.values(), key=lambda entry: (entry.used_at, entry.generation))
        self.index = {entry.key: entry for entry in oldest_first if not entry.doomed}
        for entry in self.index.values():
            if entry.committed:
                self._order(entry).add(entry.slot, entry.key)
        return left

    def _adopt(self, slot: int, record: Record) -> Entry | None:
        doomed = record.state == State.DOOMED
        if slot >= self._slots or slot in self.entries or (record.key in self.index and not doomed):
            return None
        if not self._extents.take(record.offset, self._taken(record.length)):
            return None
        entry = Entry(
            slot,
            record.generation,
            record.offset,
            record.length,
            record.tail,
            record.key,
            record.layout,
            record.holder,
            record.digest,
            record.state != State.RESERVED,
            doomed=doomed,
            tenant=record.tenant,
            pinned=record.pinned,
            used_at=record.used_at,
            expires_at=record.expires_at,
        )
        self._generation = max(self._generation, record.generation)
        self._enter(entry)
        return entry

    def coldest(self, count: int) -> list[Entry]:
        """The chunks that go next."""
        return [self.entries[slot] for slot in self._chunks.coldest(count)]

    def expired(self, before_s: int) -> list[Entry]:
        """What may go and was not used since ``before_s``."""
        return [entry for entry in self.entries.values() if entry.used_at < before_s and entry.may_go()]

    def overdue(self, now_s: int) -> list[Entry]:
        """What was stored for a time that is over, whoever reads it; each is named once."""
        found = []
        while self._expiring and self._expiring[0][0] <= now_s:
            _, slot, generation = heapq.heappop(self._expiring)
            entry = self.entries.get(slot)
            if entry is None or entry.generation != generation or entry.doomed:
                continue
            if entry.committed:
                found.append(entry)
            else:
                # Its writer is still at it.
                heapq.heappush(self._expiring, (now_s + 1, slot, generation))
        return found

    def share(self, shares: Mapping[bytes, float]) -> None:
        """From now on these tenants may take these shares, where they are below that of all. Who has more loses it when it stores again."""
        self._shares = dict(shares)
        self._over = {tenant for tenant, taken in self._tenants.items() if taken > self._bytes_max(tenant)}

    def outlaw(self, tenant: bytes) -> None:
        """What the tenant is having written at this moment is not to be committed."""
        self._outlawed[tenant] = self._generation

    def is_outlawed(self, entry: Entry) -> bool:
        """Whether the entry was made before all of its tenant's were cleared."""
        return entry.generation <= self._outlawed.get(entry.tenant, -1)

    def check_integrity(self) -> None:
        """Asserts what must always hold. For tests."""
        extents = sorted((e.offset, self._taken(e.length)) for e in self.entries.values())
        assert all(a + n <= b for (a, n), (b, _) in pairwise(extents)), "extents overlap"
        assert sum(n for _, n in extents) == self.used_bytes <= self.capacity
        assert len(self.entries) + len(self._free_slots) == self._slots
        assert all(self.entries[e.slot] is e and not e.doomed for e in self.index.values())
        assert all(n <= self._bytes_max(tenant) or tenant in self._over for tenant, n in self._tenants.items())
        assert sum(self._tenants.values()) == self.used_bytes
        assert all(entry.readers >= 0 for entry in self.entries.values())

    def _evict(self, gone: list[Entry], chosen: Callable[[Entry], bool], of: bytes | None = None, looks_max: int | None = None) -> bool:
        if self.frozen:
            return False
        for queue in self._queues(last_resort=looks_max is None):
            slot = queue.evict(lambda slot: self._goes(self.entries[slot], chosen, of), looks_max)
            if slot is not None:
                entry = self.entries[slot]
                self.free(entry)
                gone.append(entry)
                return True
        return False

    def _queues(self, *, last_resort: bool) -> Sequence[Order]:
        """Where to look for what goes, in that order. Tails go first, but a prompt is handed over by those just written: so some stay."""
        if max(self._tail_bytes / self._extents.size, self._tail_slots / self._slots) > TAILS_SHARE:
            return self._tails, self._chunks
        return (self._chunks, self._tails) if last_resort else (self._chunks,)

    @staticmethod
    def _goes(entry: Entry, chosen: Callable[[Entry], bool], of: bytes | None) -> bool:
        return entry.may_go() and (chosen(entry) or (entry.tail and of in (None, entry.tenant)))

    def _bytes_max(self, tenant: bytes) -> int:
        return int(min(self._tenant_share, self._shares.get(tenant, 1.0)) * self._extents.size)

    def _enter(self, entry: Entry) -> None:
        self.entries[entry.slot] = entry
        if not entry.doomed:
            self.index[entry.key] = entry
        self._tenants[entry.tenant] += self._taken(entry.length)
        if entry.tail:
            self._tail_bytes += self._taken(entry.length)
            self._tail_slots += 1
        if entry.expires_at:
            heapq.heappush(self._expiring, (entry.expires_at, entry.slot, entry.generation))

    def _order(self, entry: Entry) -> Order:
        return self._tails if entry.tail else self._chunks

    def _taken(self, length: int) -> int:
        return aligned(length) + self._header_bytes
