"""DRAM, disk and the shared tier in any order of events, against a model of what the bytes are.

Every extent and every stored chunk is modelled by the text that lies there. A reader that is told that a chunk is ready must find exactly
the text that was committed under its key; whatever is torn, stale or foreign must have been a miss.
"""

from __future__ import annotations

import itertools

import pytest
from directory_node import CLIENT, LAYOUT, PAGE, answer, key
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cachebus import housekeeping
from cachebus.chunk import ChunkHeader
from cachebus.directory import Directory
from cachebus.effects import Answer, Effect, Held, Job, Loan, Outcome, Probe, Publish, Read, Start, WipeRecord, Write, WriteRecord
from cachebus.messages import Acquire, Granted, NewEntry, Removed, Reserve, Reserved, Stored, WrittenEntry
from cachebus.shelf import Shelf
from cachebus.table import Record, State
from cachebus.tiers import Tiers

PAGES, DISK_PAGES, TENANTS = 4, 6, (bytes(8), b"tenant-1")
KEYS = st.integers(0, 5)


class TieredLife(RuleBasedStateMachine):
    """See the module. ``verify`` off is the control: then a torn chunk is served, and the machine must notice."""

    verify = True
    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.texts = itertools.count()
        self.region: dict[int, str] = {}
        self.table: dict[int, Record] = {}
        self.disk_bytes: dict[int, str] = {}
        self.disk_index: dict[int, Record] = {}
        self.redis: dict[bytes, tuple[ChunkHeader, str]] = {}
        self.peers: dict[str, dict[bytes, str]] = {"a": {}, "b": {}}
        self.epoch = 0
        self.now = 0.0
        self.reading: dict[int, Granted] = {}
        self.begin()

    def begin(self) -> None:
        self.epoch += 1
        self.jobs: list[Job] = []
        self.waiting: set[int] = set()
        self.known: dict[str, set[bytes]] = {"dram": set(), "nvme": set(), "redis": set(), "peer": set()}
        tiers = Tiers(Shelf(DISK_PAGES * PAGE, 16, self.policy, tenant_share=0.7), usable={"nvme", "redis"}, writable={"nvme", "redis"})  # type: ignore[arg-type]
        tiers.write_behind_bytes_max = 3 * PAGE
        self.directory = Directory(PAGES * PAGE, 16, self.epoch, tiers, self.policy)  # type: ignore[arg-type]
        self.jobs += tiers.adopt_disk(self.disk_index.items())
        self.apply(self.directory.adopt(self.table.items(), set()))
        self.apply(self.directory.holder_died("cachebus", self.now))
        for tier, keys in {"dram": self.directory.keys(), **tiers.keys()}.items():
            self.known[tier] = set(keys)

    def apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, WriteRecord):
                self.table[effect.slot] = effect.record
            elif isinstance(effect, WipeRecord):
                self.table.pop(effect.slot, None)
            elif isinstance(effect, Start):
                self.jobs.append(effect.job)
            elif isinstance(effect, Publish) and isinstance(effect.event, Stored):
                self.known[effect.event.tier] |= set(effect.event.keys)
            elif isinstance(effect, Publish) and isinstance(effect.event, Removed):
                self.known[effect.event.tier] -= set(effect.event.keys)
            elif isinstance(effect, Answer) and isinstance(effect.body, Granted):
                self.waiting.discard(effect.ticket)
                self.granted(effect.body)

    def granted(self, granted: Granted) -> None:
        if granted.lease:
            self.reading[granted.lease] = granted
        for extent in granted.extents:
            if extent.ready:
                assert self.digest(self.region[extent.offset]) == extent.digest

    @staticmethod
    def digest(text: str) -> bytes:
        return text.encode().ljust(32, b".")

    @rule(
        numbers=st.lists(KEYS, min_size=1, max_size=3, unique=True),
        tenant=st.sampled_from(TENANTS),
        commit=st.booleans(),
        ttl=st.sampled_from([0, 0, 2]),
    )
    def put(self, numbers: list[int], tenant: bytes, commit: bool, ttl: int = 0) -> None:
        until = int(self.now / 1000) + ttl if ttl else 0
        entries = [NewEntry(key(n), PAGE, False, tenant, until) for n in numbers]
        effects = self.directory.reserve(CLIENT, 1, Reserve("w", LAYOUT, entries))
        self.apply(effects)
        body = answer(effects).body
        assert isinstance(body, Reserved)
        busy = {extent.offset for granted in self.reading.values() for extent in granted.extents}
        for slot in body.slots:
            assert slot.offset not in busy
            assert not any(isinstance(job, Read) and job.into == slot.offset for job in self.jobs)
            self.region[slot.offset] = f"{slot.key.hex()[-2:]}:{next(self.texts)}"
        if commit:
            done = [WrittenEntry(s.slot, s.generation, self.digest(self.region[s.offset])) for s in body.slots]
            self.apply(self.directory.commit("w", done, self.now))
        else:
            self.apply(self.directory.abandon("w", [(s.slot, s.generation) for s in body.slots], self.now))

    @rule(numbers=st.lists(KEYS, min_size=1, max_size=3, unique=True), wait_ms=st.sampled_from([0, 100]), ready=st.booleans())
    def get(self, numbers: list[int], wait_ms: int, ready: bool) -> None:
        ticket = next(self.texts)
        self.waiting.add(ticket)
        self.apply(self.directory.acquire(CLIENT, ticket, Acquire("r", LAYOUT, [key(n) for n in numbers], wait_ms, ready), self.now))

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.reading)))
        for extent in self.reading.pop(number).extents:
            record = self.table.get(extent.slot)
            if record is not None and record.generation == extent.generation and record.state == State.COMMITTED:
                assert self.digest(self.region[extent.offset]) == extent.digest == record.digest
        self.apply(self.directory.release([number]))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), count=st.integers(1, 6), fails=st.integers(0, 9).map(lambda n: n == 0))
    def jobs_end(self, data: st.DataObject, count: int, fails: bool) -> None:
        for _ in range(min(count, len(self.jobs))):
            job = self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))
            if job.number:
                self.apply(self.directory.done(job.number, Outcome(False) if fails else self.do(job), self.now))

    def do(self, job: Job) -> Outcome:
        if isinstance(job, Write):
            text = self.region[job.source]
            assert self.digest(text) == job.header.digest, "an extent was given away under its writer"
            if job.tier == "redis":
                self.redis[job.header.key] = (job.header, text)
            else:
                assert job.record is not None
                self.disk_bytes[job.record.offset], self.disk_index[job.slot] = text, job.record
        elif isinstance(job, Read):
            if job.loan:
                text = self.peers[job.loan.peer].get(job.header.key, "")
            else:
                text = self.disk_bytes.get(job.place, "") if job.tier == "nvme" else self.redis.get(job.header.key, (None, ""))[1]
            self.region[job.into] = text
            good = self.digest(text) == job.header.digest or not self.verify
            return Outcome(good, corrupt=not good)
        elif isinstance(job, Probe) and job.peer:
            there = list(itertools.takewhile(self.peers[job.peer].__contains__, job.keys))
            digests = [self.digest(self.peers[job.peer][k]) for k in there]
            headers: list[ChunkHeader | None] = [ChunkHeader(k, LAYOUT, d, PAGE, bytes(8)) for k, d in zip(there, digests, strict=True)]
            return Outcome(True, headers=headers, loans=[Loan(job.peer, 1, b"", 0) for _ in there])
        elif isinstance(job, Probe):
            return Outcome(True, headers=[self.redis[k][0] if k in self.redis else None for k in job.keys])
        return Outcome(True)

    @rule(data=st.data(), tier=st.sampled_from(["nvme", "redis"]))
    def corrupt(self, data: st.DataObject, tier: str) -> None:
        if tier == "nvme" and self.disk_bytes:
            self.disk_bytes[data.draw(st.sampled_from(sorted(self.disk_bytes)))] = "torn"
        elif self.redis:
            victim = data.draw(st.sampled_from(sorted(self.redis)))
            self.redis[victim] = (self.redis[victim][0], "torn")

    @rule(keep_region=st.booleans(), keep_redis=st.booleans())
    def crash(self, keep_region: bool, keep_redis: bool) -> None:
        """The daemon and its readers die; jobs that had not ended are lost."""
        if not keep_region:
            self.table.clear()
            self.region.clear()
        if not keep_redis:
            self.redis.clear()
        self.reading.clear()
        self.begin()
        self.apply(self.directory.tiers.learn(Held("redis", set(self.redis), whole=True)))
        self.apply(self.directory.tiers.learn(Held("peer", set(self.peers["a"]), whole=True, peer="a")))

    @rule(up=st.booleans())
    def redis_comes_and_goes(self, up: bool) -> None:
        for states in (self.directory.tiers.usable, self.directory.tiers.writable):
            (states.add if up else states.discard)("redis")

    @rule(name=st.sampled_from("ab"), numbers=st.lists(KEYS, max_size=3, unique=True), how=st.sampled_from(["whole", "added", "gone", "silent"]))
    def a_peer_changes(self, name: str, numbers: list[int], how: str) -> None:
        """What it holds, and what is known of that here; ``silent``: not at all."""
        there = self.peers[name]
        if how in ("whole", "silent"):
            there.clear()
        added = {key(n): f"{n:02x}:{name}{next(self.texts)}" for n in numbers if key(n) not in there}
        there |= added
        if how != "silent":
            held = Held("peer", set() if how == "gone" else set(added), whole=how == "whole", peer=name, gone=how == "gone")
            self.apply(self.directory.tiers.learn(held))

    @rule(near=st.sampled_from([0.001, 0.1]))
    def distances_change(self, near: float) -> None:
        self.directory.tiers.distances = {"redis": 0.01, "a": near, "b": 0.002}

    @rule(milliseconds=st.sampled_from([1, 200, 5000]), ttl=st.sampled_from([0, 3]))
    def time_passes(self, milliseconds: int, ttl: int) -> None:
        self.now += milliseconds
        self.apply(self.directory.tick(self.now))
        self.apply(housekeeping.upkeep(self.directory, self.now, ttl))

    @rule(numbers=st.lists(KEYS, max_size=2), pinned=st.booleans())
    def pin(self, numbers: list[int], pinned: bool) -> None:
        self.apply(housekeeping.pin(self.directory, [key(n) for n in numbers], pinned)[1])

    @precondition(lambda self: len(self.directory.dram.index) > 2)
    @rule()
    def dram_is_emptied(self) -> None:
        self.clear("dram")

    @rule(tier=st.sampled_from(["dram", "nvme", "redis"]), tenant=st.sampled_from([b"", *TENANTS]))
    def clear(self, tier: str, tenant: bytes = b"") -> None:
        self.apply(housekeeping.clear(self.directory, [tier], tenant)[1])  # type: ignore[list-item]
        assert tenant or not self.known[tier]
        shelf = self.directory.dram if tier == "dram" else self.directory.tiers.disk
        assert shelf is not None
        if tier != "redis":
            assert not [entry for entry in shelf.index.values() if entry.committed and tenant in (b"", entry.tenant)]

    @rule(share=st.sampled_from([0.2, 0.5, 1.0]))
    def shares_change(self, share: float) -> None:
        self.directory.share({TENANTS[1]: share})

    @invariant()
    def holds(self) -> None:
        self.directory.check_integrity()
        assert self.known["dram"] == set(self.directory.keys())
        assert {tier: set(keys) for tier, keys in self.directory.tiers.keys().items()} == {t: self.known[t] for t in ("nvme", "redis", "peer")}

    def teardown(self) -> None:
        while self.jobs:
            job = self.jobs.pop(0)
            if job.number:
                self.apply(self.directory.done(job.number, self.do(job), self.now))
        self.now += 10_000
        self.apply(self.directory.tick(self.now))
        self.apply(self.directory.release(list(self.reading)))
        assert not self.waiting, "an acquire was never answered"
        assert not self.directory.leases()
        assert self.directory.tiers.waiting_bytes == 0
        assert all(not entry.readers and entry.committed for entry in self.directory.dram.entries.values())


TestTieredLife = TieredLife.TestCase
TestTieredLife.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


class ScanResistantLife(TieredLife):
    """The same under the other policy."""

    policy = "s3fifo"


TestScanResistantLife = ScanResistantLife.TestCase
TestScanResistantLife.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class Unverified(TieredLife):
    """The control."""

    verify = False


def served_after_its_copies_were_torn(life: TieredLife) -> None:
    def finish() -> None:
        while life.jobs:
            job = life.jobs.pop(0)
            if job.number:
                life.apply(life.directory.done(job.number, life.do(job), life.now))

    life.put([1], TENANTS[0], True)
    finish()
    life.clear("dram")
    life.disk_bytes = dict.fromkeys(life.disk_bytes, "torn")
    for _ in range(2):
        life.get([1], 0, False)
        finish()


def test_the_machine_notices_a_torn_chunk_that_is_served() -> None:
    served_after_its_copies_were_torn(TieredLife())
    with pytest.raises(AssertionError):
        served_after_its_copies_were_torn(Unverified())
