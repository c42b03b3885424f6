"""The node's directory: what is cached where, who reads it, who writes it. A plain state machine.

Requests and the passing of time go in, effects come out, in the order in which they must happen: a record reaches the
region's table before anybody hears of it, and a wiped record before its extent can be given to another. No I/O and no
clock here; ``now_ms`` is any monotonic clock.

An extent goes back to the free space only when its writer has committed or abandoned it and every lease on it is
released, or when the holder in question is dead: never because time has passed, since a stalled worker's copy still
lands after it wakes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from cachebus.effects import Answer, Effect, Entry, Publish, WipeRecord, WriteRecord
from cachebus.extents import Extents
from cachebus.messages import (
    Acquire,
    Extent,
    Granted,
    NewEntry,
    Quarantine,
    Reattach,
    Removed,
    Reserve,
    Reserved,
    Slot,
    Stored,
    WrittenEntry,
)
from cachebus.table import Record, State

WAITERS_MAX = 4096
"""Acquires that may wait for a writer at one time; one more is answered at once with what is there."""

LEASES_PER_EPOCH_BITS = 20


@dataclass(frozen=True)
class _Lease:
    holder: str
    entries: list[Entry]
    acquire: tuple[bytes, int] | None = None
    """Client and ticket of the Acquire that it answered; None where it outlived the daemon that granted it."""


@dataclass(frozen=True)
class _Waiter:
    client: bytes
    ticket: int
    request: Acquire
    deadline_ms: float


@dataclass
class Counters:
    """What happened since the daemon started."""

    stored: int = 0
    evicted: int = 0
    granted: int = 0
    missed: int = 0
    no_room: int = 0
    abandoned: int = 0
    integrity_failures: int = 0


@dataclass
class Directory:
    """See the module. ``capacity`` is the region's data in bytes, ``slots`` the table's length, ``epoch`` this life's number."""

    capacity: int
    slots: int
    epoch: int
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self._extents = Extents(self.capacity)
        self._free_slots = list(range(self.slots - 1, -1, -1))
        self._generation = 0
        self._index: dict[bytes, Entry] = {}
        self._entries: dict[int, Entry] = {}
        # Least recently used first; entries that are read or written are in neither.
        self._idle_chunks: OrderedDict[int, Entry] = OrderedDict()
        self._idle_tails: OrderedDict[int, Entry] = OrderedDict()
        self._leases: dict[int, _Lease] = {}
        self._lease_number = self.epoch << LEASES_PER_EPOCH_BITS
        self._waiters: list[_Waiter] = []
        self._unattached: set[str] = set()

    # What engines ask.

    def acquire(self, client: bytes, ticket: int, request: Acquire, now_ms: float) -> list[Effect]:
        """Leases the committed run of the request's keys, or waits for the writer of the next one."""
        waiter = _Waiter(client, ticket, request, now_ms + request.wait_ms)
        run = self._run(request)
        if self._worth_waiting(request, len(run)) and request.wait_ms > 0 and len(self._waiters) < WAITERS_MAX:
            self._waiters.append(waiter)
            return []
        return [self._grant(waiter, run)]

    def withdraw(self, client: bytes, ticket: int) -> list[Effect]:
        """Ends the wait of an acquire, or the lease it was granted; nothing where that has ended already."""
        self._waiters = [waiter for waiter in self._waiters if (waiter.client, waiter.ticket) != (client, ticket)]
        return self.release([number for number, lease in self._leases.items() if lease.acquire == (client, ticket)])

    def release(self, leases: Iterable[int]) -> list[Effect]:
        """Ends leases; unknown ones are passed over, since a lease may have ended with its holder."""
        effects: list[Effect] = []
        for number in leases:
            lease = self._leases.pop(number, None)
            # Deeper chunks first, so that a prefix's end is evicted before its beginning.
            for entry in reversed(lease.entries if lease else []):
                entry.readers -= 1
                if entry.readers == 0:
                    effects += self._free(entry) if entry.doomed else self._make_idle(entry)
        return effects

    def reserve(self, client: bytes, ticket: int, request: Reserve) -> list[Effect]:
        """Gives an extent to each entry that is neither there nor being written, evicting what is idle longest."""
        effects: list[Effect] = []
        granted = []
        for new in request.entries:
            known = self._index.get(new.key)
            if known is not None:
                if known.layout == request.layout or not self._is_idle(known):
                    continue
                effects += self._evict(known)
            entry = self._place(new, request, effects)
            if entry is None:
                self.counters.no_room += 1
                continue
            effects.append(WriteRecord(entry.slot, entry.record()))
            granted.append(Slot(entry.key, entry.slot, entry.generation, entry.offset))
        effects.append(Answer(client, ticket, Reserved(granted)))
        return effects

    def commit(self, holder: str, written: Iterable[WrittenEntry], now_ms: float) -> list[Effect]:
        """Publishes entries whose bytes are in place; what the holder no longer has reserved is passed over."""
        effects: list[Effect] = []
        stored = []
        for item in written:
            entry = self._reserved(holder, item.slot, item.generation)
            if entry is None:
                continue
            entry.committed, entry.digest = True, item.digest
            self.counters.stored += 1
            effects.append(WriteRecord(entry.slot, entry.record()))
            effects += self._make_idle(entry)
            if not entry.tail:
                stored.append(entry.key)
        if stored:
            effects.append(Publish(Stored(stored)))
        return effects + self.tick(now_ms)

    def abandon(self, holder: str, slots: Iterable[tuple[int, int]], now_ms: float) -> list[Effect]:
        """Frees reserved extents whose holder will not write them."""
        effects: list[Effect] = []
        for slot, generation in slots:
            entry = self._reserved(holder, slot, generation)
            if entry is not None:
                self.counters.abandoned += 1
                del self._index[entry.key]
                effects += self._free(entry)
        return effects + self.tick(now_ms)

    def quarantine(self, request: Quarantine) -> list[Effect]:
        """Takes an entry that failed its check out of the index; its extent is freed when its readers are done."""
        entry = self._index.get(request.key)
        if entry is None or not entry.committed or entry.digest != request.digest:
            return []
        self.counters.integrity_failures += 1
        return self._drop(entry)

    # Life and death of holders and of the daemon.

    def holder_died(self, holder: str, now_ms: float) -> list[Effect]:
        """Ends the leases and reservations of a holder that is shown dead."""
        effects = self.release([number for number, lease in self._leases.items() if lease.holder == holder])
        self._waiters = [waiter for waiter in self._waiters if waiter.request.holder != holder]
        writing = [(e.slot, e.generation) for e in self._entries.values() if not e.committed and e.holder == holder]
        return effects + self.abandon(holder, writing, now_ms) + self.attach(holder)

    def adopt(self, records: Iterable[tuple[int, Record]], living: set[str]) -> list[Effect]:
        """Takes over what an earlier daemon left. Until every holder in ``living`` reattaches or dies, nothing is evicted:

        one of them may be copying from or to any extent. Records that overlap an earlier one are wiped.
        """
        effects: list[Effect] = []
        taken = []
        for slot, record in sorted(records, key=lambda pair: (pair[1].state != State.COMMITTED, pair[1].generation)):
            doomed = record.state == State.DOOMED
            twin = record.key in self._index and not doomed
            if twin or slot >= self.slots or not self._extents.take(record.offset, record.length):
                effects.append(WipeRecord(slot))
                continue
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
            )
            taken.append(slot)
            self._entries[slot] = entry
            self._generation = max(self._generation, record.generation)
            if not doomed:
                self._index[entry.key] = entry
            if entry.committed and not doomed:
                self._make_idle(entry)
        self._free_slots = sorted(set(self._free_slots) - set(taken), reverse=True)
        self._unattached = set(living)
        return effects + self._sweep()

    def reattach(self, request: Reattach, now_ms: float) -> list[Effect]:
        """Renews a living holder's leases and reservations after a restart, and frees those it has no more."""
        by_offset = {entry.offset: entry for entry in self._entries.values() if entry.committed}
        for number, offsets in request.reading.items():
            entries = [by_offset[offset] for offset in offsets if offset in by_offset]
            if entries and number not in self._leases:
                self._lease(number, _Lease(request.holder, entries))
        gone = [
            (entry.slot, entry.generation)
            for entry in self._entries.values()
            if not entry.committed and entry.holder == request.holder and entry.slot not in request.writing
        ]
        return self.abandon(request.holder, gone, now_ms) + self.attach(request.holder)

    def attach(self, holder: str) -> list[Effect]:
        """All that the holder reads and writes is known: nothing yet where it is new to this daemon."""
        self._unattached.discard(holder)
        return self._sweep()

    def is_attached(self, holder: str) -> bool:
        """Whether this epoch knows what the holder reads and writes."""
        return holder not in self._unattached

    def tick(self, now_ms: float) -> list[Effect]:
        """Answers the waiting acquires whose next key is decided or whose time is up."""
        effects: list[Effect] = []
        still = []
        for waiter in self._waiters:
            run = self._run(waiter.request)
            if now_ms < waiter.deadline_ms and self._worth_waiting(waiter.request, len(run)):
                still.append(waiter)
            else:
                effects.append(self._grant(waiter, run))
        self._waiters = still
        return effects

    # What others look at.

    def keys(self) -> list[bytes]:
        """Every committed chunk."""
        return [key for key, entry in self._index.items() if entry.committed and not entry.tail]

    def statistics(self) -> dict[str, float]:
        """Gauges and counters by name."""
        entries = self._entries.values()
        return {
            "dram_capacity_bytes": self._extents.size,
            "dram_bytes": self._extents.size - self._extents.free_bytes,
            "chunks": sum(1 for e in entries if e.committed and not e.doomed and not e.tail),
            "tail_blocks": sum(1 for e in entries if e.committed and not e.doomed and e.tail),
            "writing": sum(1 for e in entries if not e.committed),
            "leases": len(self._leases),
            "waiters": len(self._waiters),
            "unattached_holders": len(self._unattached),
            **{f"{name}_total": value for name, value in vars(self.counters).items()},
        }

    def check_integrity(self) -> None:
        """Asserts what must always hold. For tests and for a daemon that idles."""
        entries = list(self._entries.values())
        extents = sorted((e.offset, e.length) for e in entries)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(extents)), "extents overlap"
        assert len(self._entries) + len(self._free_slots) == self.slots
        assert all(self._entries[e.slot] is e for e in self._index.values())
        leased = [e for lease in self._leases.values() for e in lease.entries]
        assert all(e.readers == sum(1 for other in leased if other is e) for e in entries)
        idle = {*self._idle_chunks, *self._idle_tails}
        assert idle == {e.slot for e in entries if e.committed and not e.readers and not e.doomed}

    # Inner workings.

    def _run(self, request: Acquire) -> list[Entry]:
        run: list[Entry] = []
        for key in request.keys:
            entry = self._index.get(key)
            if entry is None or not entry.committed or entry.layout != request.layout:
                break
            run.append(entry)
        return run

    def _worth_waiting(self, request: Acquire, found: int) -> bool:
        if found == len(request.keys):
            return False
        entry = self._index.get(request.keys[found])
        return entry is not None and not entry.committed and entry.layout == request.layout

    def _grant(self, waiter: _Waiter, run: list[Entry]) -> Answer:
        request = waiter.request
        self.counters.granted += len(run)
        self.counters.missed += len(request.keys) - len(run)
        number = 0
        if run:
            self._lease_number += 1
            number = self._lease_number
            self._lease(number, _Lease(request.holder, run, (waiter.client, waiter.ticket)))
        extents = [Extent(entry.key, entry.offset, entry.length, entry.digest) for entry in run]
        return Answer(waiter.client, waiter.ticket, Granted(number, extents))

    def _lease(self, number: int, lease: _Lease) -> None:
        self._leases[number] = lease
        for entry in lease.entries:
            entry.readers += 1
            self._idle(entry).pop(entry.slot, None)

    def _reserved(self, holder: str, slot: int, generation: int) -> Entry | None:
        entry = self._entries.get(slot)
        if entry is None or entry.committed or entry.generation != generation or entry.holder != holder:
            return None
        return entry

    def _place(self, new: NewEntry, request: Reserve, effects: list[Effect]) -> Entry | None:
        while True:
            offset = self._extents.allocate(new.length) if self._free_slots else None
            if offset is not None:
                break
            victims = self._idle_tails or self._idle_chunks
            if not victims or self._unattached or new.length > self._extents.size:
                return None
            effects += self._evict(next(iter(victims.values())))
        self._generation += 1
        slot = self._free_slots.pop()
        entry = Entry(slot, self._generation, offset, new.length, new.tail, new.key, request.layout, request.holder)
        self._entries[slot] = self._index[new.key] = entry
        return entry

    def _evict(self, entry: Entry) -> list[Effect]:
        self.counters.evicted += 1
        return self._drop(entry)

    def _drop(self, entry: Entry) -> list[Effect]:
        del self._index[entry.key]
        self._idle(entry).pop(entry.slot, None)
        entry.doomed = True
        effects: list[Effect] = [WriteRecord(entry.slot, entry.record())] if entry.readers else self._free(entry)
        if not entry.tail:
            effects.append(Publish(Removed([entry.key])))
        return effects

    def _sweep(self) -> list[Effect]:
        """Frees what an earlier daemon left doomed and no living holder reads any more."""
        if self._unattached:
            return []
        done = [entry for entry in self._entries.values() if entry.doomed and not entry.readers]
        return [effect for entry in done for effect in self._free(entry)]

    def _free(self, entry: Entry) -> list[Effect]:
        del self._entries[entry.slot]
        self._free_slots.append(entry.slot)
        self._extents.release(entry.offset, entry.length)
        return [WipeRecord(entry.slot)]

    def _idle(self, entry: Entry) -> OrderedDict[int, Entry]:
        return self._idle_tails if entry.tail else self._idle_chunks

    def _is_idle(self, entry: Entry) -> bool:
        return entry.slot in self._idle(entry) and not self._unattached

    def _make_idle(self, entry: Entry) -> list[Effect]:
        self._idle(entry)[entry.slot] = entry
        return []
