"""The node's directory: what is cached where, who reads it, who writes it. A plain state machine.

Requests, ended jobs and the passing of time go in, effects come out, in the order in which they must happen: a record reaches the
region's table before anybody hears of it, and a wiped record before its extent can be given to another. No I/O and no
clock here; ``now_ms`` is any monotonic clock.

An extent goes back to the free space only when its writer has committed or abandoned it and every lease on it is
released, or when the holder in question is dead: never because time has passed, since a stalled worker's copy still
lands after it wakes.

A lookup is answered for the whole prefix at once. What lies in a lower tier is granted with an extent that the daemon is still filling:
its reader waits for its record to say that it is committed (or doomed, where it could not be had).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from cachebus import census
from cachebus.effects import Answer, Effect, Outcome, Publish, WipeRecord, WriteRecord
from cachebus.leases import Leases
from cachebus.messages import Acquire, Granted, Quarantine, Reattach, Removed, Reserve, Reserved, Slot, Stored, WrittenEntry
from cachebus.messages_handover import HandoverRequest
from cachebus.offers import Offered, Offers, entries_of
from cachebus.placement import Policy
from cachebus.shelf import Entry, Shelf, Wanted
from cachebus.table import Record
from cachebus.tiers import PROBED_AT_ONCE, REMOTE, Tiers
from cachebus.waiter import Waiter

WAITERS_MAX = 4096
"""Acquires that may wait for a writer at one time; one more is answered at once with what is there."""

LOST_TAILS_MAX = 1024
"""So many of the tail blocks that were evicted last are remembered: they have been, and nobody need wait for them to come."""

CACHEBUS = "cachebus"
"""The holder of extents that the daemon itself fills; it has no lock, so a new daemon takes them for abandoned."""


@dataclass
class Directory:
    """See the module. ``capacity`` is the region's data in bytes, ``slots`` the table's length, ``epoch`` this life's number.

    ``wall_s`` is the time of day, in seconds since 1970, when ``now_ms`` was 0.
    """

    capacity: int
    slots: int
    epoch: int
    tiers: Tiers = field(default_factory=Tiers)
    policy: Policy = "lru"
    tenant_share: float = 1.0
    wall_s: float = 0.0
    counters: census.Counters = field(default_factory=census.Counters)

    def __post_init__(self) -> None:
        self.dram = Shelf(self.capacity, self.slots, self.policy, tenant_share=self.tenant_share)
        self.offers = Offers()
        self._leases = Leases(self.epoch)
        self._waiters: list[Waiter] = []
        self._unattached: set[str] = set()
        self._lost_tails: OrderedDict[bytes, None] = OrderedDict()

    # What engines ask.

    def acquire(self, client: bytes, ticket: int, request: Acquire, now_ms: float) -> list[Effect]:
        """Leases the run of the request's keys that is there or on its way up, or waits for the writer of the next one."""
        return self._serve(Waiter(client, ticket, request, now_ms + request.wait_ms), now_ms)

    def withdraw(self, client: bytes, ticket: int) -> list[Effect]:
        """Ends the wait of an acquire, or the lease it was granted; nothing where that has ended already."""
        self._waiters = [waiter for waiter in self._waiters if (waiter.client, waiter.ticket) != (client, ticket)]
        return self.release(self._leases.of_acquire((client, ticket)))

    def release(self, leases: Iterable[int]) -> list[Effect]:
        """Ends leases; unknown ones are passed over, since a lease may have ended with its holder."""
        effects: list[Effect] = []
        for number in leases:
            self.offers.ended(number)
            effects += [effect for entry in self._leases.end(number) for effect in self._let_go(entry)]
        return effects

    def hand_over(self, client: bytes, ticket: int, request: HandoverRequest, now_ms: float) -> list[Effect]:
        """What engines say of blocks of their own: who waits for them is told."""
        self.offers.take(client, ticket, request, now_ms)
        return self.tick(now_ms)

    def reserve(self, client: bytes, ticket: int, request: Reserve) -> list[Effect]:
        """Gives an extent to each entry that is neither there nor being written, evicting what is to go first."""
        effects: list[Effect] = []
        granted = []
        for new in request.entries:
            known = self.dram.index.get(new.key)
            if known is not None:
                if known.layout == request.layout or not known.may_go() or self.dram.frozen:
                    if known.tail:
                        # Somebody computed it again, and is about to hand it over.
                        self.dram.use(known, known.used_at)
                    continue
                effects += self._evicted([known], free=True)
            entry = self._place(Wanted(new.key, new.length, request.layout, request.holder, new.tail, new.tenant, new.expires_at), effects)
            if entry is not None:
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
            if self.dram.is_outlawed(entry):
                effects += self.drop(entry)
                continue
            self.dram.commit(entry, item.digest, self.now_s(now_ms))
            self.counters.stored += 1
            effects.append(WriteRecord(entry.slot, entry.record()))
            effects += self.tiers.store(entry)
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
                effects += self.drop(entry)
        return effects + self.tick(now_ms)

    def quarantine(self, request: Quarantine) -> list[Effect]:
        """Takes an entry that failed its check out of the index; its extent is freed when its readers are done."""
        entry = self.dram.index.get(request.key)
        if entry is None or not entry.committed or entry.digest != request.digest:
            return []
        self.counters.integrity_failures += 1
        return self.drop(entry)

    def done(self, number: int, outcome: Outcome, now_ms: float) -> list[Effect]:
        """A job that was started has ended."""
        effects: list[Effect] = []
        now_s = self.now_s(now_ms)
        if (read := self.tiers.read_done(number, outcome, now_s)) is not None:
            entry, found, effects = read
            if outcome.good and not entry.doomed and not self.dram.is_outlawed(entry):
                self.dram.commit(entry, found.header.digest, now_s)
                effects = [WriteRecord(entry.slot, entry.record()), Publish(Stored([entry.key])), *self.tiers.store(entry), *effects]
            elif not entry.doomed:
                effects = [*self.drop(entry), *effects]
            effects += self._let_go(entry)
        elif (write := self.tiers.write_done(number, outcome, now_s)) is not None:
            entry, effects = write
            effects += self._let_go(entry)
        elif self.tiers.probe_done(number, outcome, now_ms):
            for waiter in self._waiters:
                if waiter.probe == number:
                    waiter.probe = 0
        return effects + self.tick(now_ms)

    # Life and death of holders and of the daemon.

    def holder_died(self, holder: str, now_ms: float) -> list[Effect]:
        """Ends the leases and reservations of a holder that is shown dead."""
        effects = self.release(self._leases.of_holder(holder))
        self.offers.holder_died(holder)
        self._waiters = [waiter for waiter in self._waiters if waiter.request.holder != holder]
        writing = [(e.slot, e.generation) for e in self.dram.entries.values() if not e.committed and not e.filling and e.holder == holder]
        return effects + self.abandon(holder, writing, now_ms) + self.attach(holder)

    def adopt(self, records: Iterable[tuple[int, Record]], living: set[str]) -> list[Effect]:
        """Takes over what an earlier daemon left. Until every holder in ``living`` reattaches or dies, nothing is evicted:

        one of them may be copying from or to any extent. Records that overlap another one are wiped.
        """
        effects: list[Effect] = [WipeRecord(slot) for slot in self.dram.adopt(records)]
        for entry in self.dram.index.values():
            entry.copied = bool(self.tiers.holds(entry.key))
        self._unattached = set(living)
        return effects + self._sweep()

    def reattach(self, request: Reattach, now_ms: float) -> list[Effect]:
        """Renews a living holder's leases and reservations after a restart, and frees those it has no more."""
        by_offset = {entry.offset: entry for entry in self.dram.entries.values() if entry.committed}
        for number, offsets in request.reading.items():
            self._leases.renew(number, request.holder, [by_offset[offset] for offset in offsets if offset in by_offset])
        gone = [
            (entry.slot, entry.generation)
            for entry in self.dram.entries.values()
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
        self.offers.tick(now_ms)
        waiters, self._waiters = self._waiters, []
        effects = [effect for waiter in waiters for effect in self._serve(waiter, now_ms)]
        return effects + self.offers.answers((waiter.request.keys for waiter in self._waiters if waiter.request.reaches), now_ms)

    # What others look at.

    def keys(self) -> list[bytes]:
        """Every committed chunk in DRAM."""
        return [key for key, entry in self.dram.index.items() if entry.committed and not entry.tail]

    def statistics(self) -> dict[str, float]:
        """Gauges and counters by name."""
        waiting = {"leases": len(self._leases), "waiters": len(self._waiters), "unattached_holders": len(self._unattached)}
        return {**census.statistics(self), **waiting, **self.offers.counts()}

    def leases(self) -> set[int]:
        """The numbers of all leases."""
        return self._leases.numbers()

    def check_integrity(self) -> None:
        """Asserts what must always hold. For tests."""
        self.dram.check_integrity()
        held = [*self._leases.entries(), *self.tiers.held()]
        assert all(e.readers == held.count(e) for e in self.dram.entries.values()), "a hold leaked"
        if self.tiers.disk:
            self.tiers.disk.check_integrity()

    # For housekeeping.

    @property
    def settled(self) -> bool:
        """Whether it is known of everybody what they read and write, so that something may be dropped."""
        return not self._unattached

    def drop(self, entry: Entry) -> list[Effect]:
        """Takes an entry out of the index; its extent is freed when its readers are done."""
        freed = self.dram.drop(entry)
        record: Effect = WipeRecord(entry.slot) if freed else WriteRecord(entry.slot, entry.record())
        return [record, *self._removed(entry)]

    def now_s(self, now_ms: float) -> int:
        """The time of day, in seconds since 1970."""
        return int(self.wall_s + now_ms / 1000)

    def share(self, shares: dict[bytes, float]) -> None:
        """From now on these tenants may take these shares of each tier of this node."""
        for shelf in (self.dram, self.tiers.disk):
            if shelf is not None:
                shelf.share(shares)

    # Inner workings.

    def _serve(self, waiter: Waiter, now_ms: float) -> list[Effect]:
        effects: list[Effect] = []
        run = self._run(waiter.request, effects, now_ms)
        if now_ms < waiter.deadline_ms and len(self._waiters) < WAITERS_MAX and self._worth_waiting(waiter, run, effects):
            self._waiters.append(waiter)
        else:
            effects.append(self._grant(waiter, run, now_ms))
        for entry in entries_of(run):
            effects += self._let_go(entry)
        return effects

    def _run(self, request: Acquire, effects: list[Effect], now_ms: float) -> list[Entry | Offered]:
        """The entries of the request's keys, each held, up to the first that is neither there nor can be brought up."""
        run: list[Entry | Offered] = []
        for key in request.keys:
            if request.reaches and (offered := self.offers.find(key, request.layout, request.reaches, now_ms)) is not None:
                run.append(offered)
                continue
            entry = self.dram.index.get(key) or self._promote(key, request.layout, effects, now_ms)
            if entry is None or entry.layout != request.layout or not (entry.committed or entry.filling) or entry.is_overdue(self.now_s(now_ms)):
                break
            entry.readers += 1
            run.append(entry)
        return run

    def _promote(self, key: bytes, layout: bytes, effects: list[Effect], now_ms: float) -> Entry | None:
        found = self.tiers.locate(key, layout, now_ms)
        if found is None or 0 < found.header.expires_at <= self.now_s(now_ms):
            return None
        header = found.header
        entry = self._place(Wanted(key, header.length, layout, CACHEBUS, False, header.tenant, header.expires_at), effects)
        if entry is not None:
            entry.filling, entry.digest = True, found.header.digest
            # The job's own hold, until it ends.
            entry.readers += 1
            effects += self.tiers.promote(found, entry)
        return entry

    def _worth_waiting(self, waiter: Waiter, run: list[Entry | Offered], effects: list[Effect]) -> bool:
        request, found = waiter.request, len(run)
        if request.ready_only and any(entry.filling for entry in entries_of(run)):
            return True
        if found == len(request.keys):
            return False
        if request.expected:
            return not found and request.keys[0] not in self._lost_tails
        if waiter.probe:
            return True
        entry = self.dram.index.get(request.keys[found])
        if entry is not None:
            return not entry.committed and not entry.filling and entry.layout == request.layout
        # Only its own tiers are asked for another node, so that two of them can't ask each other in a circle.
        if request.ready_only or request.wait_ms == 0:
            return False
        passed_over = {name for name, number in waiter.probed_to.items() if found < number}
        name, count = self.tiers.choose(request.keys[found:], passed_over)
        if not name:
            return False
        if name == REMOTE:
            count = min(count, max(PROBED_AT_ONCE, 8 * (found - 1)))
        waiter.probe, started = self.tiers.ask(name, request.keys[found : found + count], request.layout)
        waiter.probed_to[name] = found + count
        effects += started
        return True

    def _grant(self, waiter: Waiter, run: list[Entry | Offered], now_ms: float) -> Answer:
        request = waiter.request
        if request.ready_only:
            run = run[: next((i for i, one in enumerate(run) if isinstance(one, Entry) and one.filling), len(run))]
        entries = entries_of(run)
        self.counters.granted += len(run)
        self.counters.missed += len(request.keys) - len(run)
        number = 0
        if run:
            number = self._leases.grant(request.holder, entries, (waiter.client, waiter.ticket))
        # Deeper chunks first, so that a prefix's end is evicted before its beginning.
        for entry in reversed(entries):
            self.dram.use(entry, self.now_s(now_ms))
        extents = [one.extent() for one in run]
        for entry in entries:
            entry.source = "dram" if entry.committed else entry.source
        memories = self.offers.read(number, [one for one in run if isinstance(one, Offered)])
        return Answer(waiter.client, waiter.ticket, Granted(number, extents, memories))

    def _let_go(self, entry: Entry) -> list[Effect]:
        entry.readers -= 1
        if entry.doomed and not entry.readers and not self._unattached:
            self.dram.free(entry)
            return [WipeRecord(entry.slot)]
        return []

    def _reserved(self, holder: str, slot: int, generation: int) -> Entry | None:
        entry = self.dram.entries.get(slot)
        if entry is None or entry.committed or entry.filling or entry.generation != generation or entry.holder != holder:
            return None
        return entry

    def _place(self, wanted: Wanted, effects: list[Effect]) -> Entry | None:
        self.dram.frozen = bool(self._unattached)
        entry, gone = self.dram.place(wanted)
        effects += self._evicted(gone)
        if entry is None:
            self.counters.no_room += 1
            return None
        self._lost_tails.pop(wanted.key, None)
        effects.append(WriteRecord(entry.slot, entry.record()))
        return entry

    def _evicted(self, gone: list[Entry], *, free: bool = False) -> list[Effect]:
        effects: list[Effect] = []
        for entry in gone:
            self.counters.evicted += 1
            if entry.tail:
                self._lost_tails[entry.key] = None
                if len(self._lost_tails) > LOST_TAILS_MAX:
                    self._lost_tails.popitem(last=False)
            if free:
                effects += self.drop(entry)
            else:
                effects += [WipeRecord(entry.slot), *self._removed(entry)]
        return effects

    def _removed(self, entry: Entry) -> list[Effect]:
        return [] if entry.tail or not entry.committed else [Publish(Removed([entry.key]))]

    def _sweep(self) -> list[Effect]:
        """Frees what an earlier daemon left doomed and no living holder reads any more."""
        if self._unattached:
            return []
        done = [entry for entry in self.dram.entries.values() if entry.doomed and not entry.readers]
        for entry in done:
            self.dram.free(entry)
        return [WipeRecord(entry.slot) for entry in done]
