"""What a directory lets go of: a tenant's chunks that are cleared wherever they are, chunks stored for some time, shares of tenants."""

from __future__ import annotations

from cachebus import housekeeping
from cachebus.directory import Directory
from cachebus.effects import Answer, Effect, Job, Outcome, Probe, Read, Start, Wipe, Write
from cachebus.messages import Acquire, Granted, NewEntry, Reserve, Reserved, Slot, WrittenEntry
from cachebus.shelf import Shelf
from cachebus.tiers import Tiers

PAGE, LAYOUT, CLIENT = 4096, b"l" * 16, b"client"
A, B = b"tenant-a", b"tenant-b"


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


class Node:
    """A directory over a disk and a shared tier, and the jobs it asked for."""

    def __init__(self, *, disk_pages: int = 16, pages: int = 8) -> None:
        tiers = Tiers(Shelf(disk_pages * PAGE, 64), usable={"nvme", "redis"}, writable={"nvme", "redis"})
        self.directory = Directory(pages * PAGE, 64, 1, tiers)
        self.jobs: list[Job] = []
        self.granted: Granted | None = None

    def apply(self, effects: list[Effect]) -> None:
        self.jobs += [effect.job for effect in effects if isinstance(effect, Start)]
        for effect in effects:
            if isinstance(effect, Answer) and isinstance(effect.body, Granted):
                self.granted = effect.body
        self.directory.check_integrity()

    def reserve(self, tenant: bytes, *numbers: int, until: int = 0, tail: bool = False) -> list[Slot]:
        entries = [NewEntry(key(n), PAGE, tail, tenant, until) for n in numbers]
        effects = self.directory.reserve(CLIENT, 1, Reserve("w", LAYOUT, entries))
        (answer,) = [effect for effect in effects if isinstance(effect, Answer)]
        assert isinstance(answer.body, Reserved)
        self.apply(effects)
        return answer.body.slots

    def commit(self, slots: list[Slot]) -> None:
        self.apply(self.directory.commit("w", [WrittenEntry(s.slot, s.generation, b"d" * 32) for s in slots], 0))

    def finish(self, kind: type[Job], *, good: bool = True) -> list[Job]:
        """Ends all jobs of a kind."""
        done = [job for job in self.jobs if isinstance(job, kind)]
        self.jobs = [job for job in self.jobs if not isinstance(job, kind)]
        for job in done:
            outcome = Outcome(good, headers=[None] * len(job.keys)) if isinstance(job, Probe) else Outcome(good)
            self.apply(self.directory.done(job.number, outcome, 0))
        return done

    def store(self, tenant: bytes, *numbers: int, until: int = 0) -> None:
        self.commit(self.reserve(tenant, *numbers, until=until))
        self.finish(Write)

    def clear(self, tenant: bytes, *tiers: str) -> int:
        count, effects = housekeeping.clear(self.directory, tiers or ("dram", "nvme", "redis"), tenant)  # type: ignore[arg-type]
        self.apply(effects)
        return count

    def there(self) -> dict[str, set[int]]:
        tiers = {"dram": self.directory.keys(), **self.directory.tiers.keys()}
        return {tier: {int.from_bytes(k, "big") for k in keys} for tier, keys in tiers.items() if tier in ("dram", "nvme")}

    def acquire(self, number: int, now: float = 0.0) -> Granted | None:
        self.granted = None
        self.apply(self.directory.acquire(CLIENT, 2, Acquire("r", LAYOUT, [key(number)], 0), now))
        return self.granted


def test_a_tenants_chunks_go_from_every_tier_and_nobody_elses() -> None:
    node = Node()
    node.store(A, 1, 2)
    node.store(B, 3)
    node.commit(node.reserve(A, 9, tail=True))
    assert node.clear(A) == 5
    assert node.there() == {"dram": {3}, "nvme": {3}}
    assert key(9) not in node.directory.dram.index, "tail blocks are KV, too"
    wipes = [job for job in node.jobs if isinstance(job, Wipe)]
    assert [wipe for wipe in wipes if wipe.tier == "redis"] == [Wipe("redis", tenant=A)]
    assert sum(len(wipe.slots) for wipe in wipes) == 2
    assert node.acquire(1) == Granted(0, [])


def test_what_is_on_its_way_when_a_tenant_is_cleared_does_not_arrive() -> None:
    writing = Node()
    mine, other = writing.reserve(A, 1), writing.reserve(B, 2)
    writing.clear(A)
    writing.commit(mine)
    writing.commit(other)
    assert writing.there()["dram"] == {2}
    writing.store(A, 4)
    assert 4 in writing.there()["dram"], "what comes later is stored as ever"

    demoting = Node()
    demoting.commit(demoting.reserve(A, 1))
    demoting.commit(demoting.reserve(B, 2))
    demoting.clear(A)
    demoting.finish(Write)
    assert demoting.there() == {"dram": {2}, "nvme": {2}}
    assert any(isinstance(job, Wipe) and job.tier == "nvme" for job in demoting.jobs), "its record was written and must not be found again"

    promoting = Node()
    promoting.store(A, 1)
    promoting.clear(b"", "dram")
    promoting.acquire(1)
    promoting.clear(A)
    promoting.finish(Read)
    assert promoting.there() == {"dram": set(), "nvme": set()}


def test_what_is_read_while_it_is_cleared_keeps_its_place_until_it_is_read() -> None:
    node = Node(pages=1)
    node.store(A, 1)
    granted = node.acquire(1)
    assert granted is not None
    node.clear(A)
    assert node.reserve(B, 2) == [], "the only extent is still being read"
    node.apply(node.directory.release([granted.lease]))
    assert len(node.reserve(B, 2)) == 1


def test_a_chunk_that_was_stored_for_a_time_is_given_to_nobody_after_it_and_goes_everywhere() -> None:
    node = Node()
    node.store(A, 1, until=10)
    node.store(A, 2)
    granted = node.acquire(1, now=9_999)
    assert granted is not None
    assert len(granted.extents) == 1
    assert node.acquire(1, now=10_000) == Granted(0, []), "whether or not anybody looked after it since"
    node.apply(housekeeping.upkeep(node.directory, 10_000, 0))
    assert node.there() == {"dram": {2}, "nvme": {2}}
    assert node.directory.statistics()["expired_total"] == 1
    node.apply(node.directory.release([granted.lease]))
    assert len(node.directory.dram.entries) == 1


def test_the_time_lasts_through_disk_and_restart() -> None:
    node = Node()
    node.store(A, 1, until=10)
    records = [(slot, entry.record()) for slot, entry in node.directory.dram.entries.items()]
    assert node.directory.tiers.disk is not None
    on_disk = [(slot, entry.record()) for slot, entry in node.directory.tiers.disk.entries.items()]
    again = Node()
    again.directory.tiers.adopt_disk(on_disk)
    again.apply(again.directory.adopt(records, set()))
    assert again.there() == {"dram": {1}, "nvme": {1}}
    again.apply(housekeeping.upkeep(again.directory, 10_000, 0))
    assert again.there() == {"dram": set(), "nvme": set()}

    promoted = Node()
    promoted.directory.tiers.adopt_disk(on_disk)
    promoted.acquire(1, now=9_000)
    promoted.finish(Read)
    assert promoted.directory.dram.index[key(1)].expires_at == 10
    late = Node()
    late.directory.tiers.adopt_disk(on_disk)
    assert late.acquire(1, now=10_000) == Granted(0, [])
    assert late.jobs == []


def test_while_somebody_unknown_may_be_reading_nothing_expires() -> None:
    node = Node()
    node.store(A, 1, until=10)
    again = Node()
    again.apply(again.directory.adopt([(slot, entry.record()) for slot, entry in node.directory.dram.entries.items()], {"somebody"}))
    again.apply(housekeeping.upkeep(again.directory, 20_000, 0))
    assert len(again.directory.dram.entries) == 1
    again.apply(again.directory.attach("somebody"))
    again.apply(housekeeping.upkeep(again.directory, 20_000, 0))
    assert again.there()["dram"] == set()
    again.finish(Write)
    assert again.directory.dram.entries == {}


def test_a_tenants_share_holds_in_each_tier_and_takes_nothing_from_others() -> None:
    node = Node()
    node.directory.share({A: 0.25})
    node.commit(node.reserve(B, 20, tail=True))
    node.store(B, 10, 11)
    for number in range(6):
        node.store(A, number)
    assert node.there()["dram"] == {4, 5, 10, 11}
    assert key(20) in node.directory.dram.index, "not even what is evicted first"
    node.directory.share({A: 0.125})
    node.store(A, 6)
    assert node.there()["dram"] == {6, 10, 11}
