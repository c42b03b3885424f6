"""The directory's rules, one by one."""

import pytest
from directory_node import CLIENT, PAGE, Node, answer, key, restarted

from cachebus.effects import Answer, Publish, WriteRecord
from cachebus.messages import Granted, Quarantine, Reattach, Removed, Stored


def test_only_the_committed_run_from_the_first_key_is_granted() -> None:
    node = Node()
    node.store(1, 2, 4)
    granted = node.acquire(1, 2, 3, 4)
    assert granted is not None
    assert [extent.key for extent in granted.extents] == [key(1), key(2)]
    assert granted.extents[0].digest == b"digest of " + key(1)
    none = node.acquire(3, 1)
    assert none == Granted(0, [])


def test_what_is_reserved_is_nobody_elses_until_it_is_committed() -> None:
    node = Node()
    slots = node.reserve(1)
    assert node.acquire(1) == Granted(0, [])
    assert node.reserve(1) == []
    assert not node.events
    node.commit(slots)
    assert node.events == [Stored([key(1)])]
    assert node.acquire(1) != Granted(0, [])


def test_a_record_is_written_before_the_event_and_the_answer() -> None:
    node = Node()
    slots = node.reserve(1)
    node.acquire(1, wait_ms=100)
    kinds = [type(effect) for effect in node.commit(slots)]
    assert kinds == [WriteRecord, Publish, Answer]


def test_an_acquire_waits_for_the_writer_and_no_longer() -> None:
    node = Node()
    node.store(1)
    slots = node.reserve(2)
    assert node.acquire(1, 2, 3, wait_ms=100, now=0) is None
    assert node.directory.tick(99) == []
    granted = answer(node.commit(slots)).body
    assert isinstance(granted, Granted)
    assert len(granted.extents) == 2

    node.reserve(9)
    assert node.acquire(1, 9, wait_ms=100, now=0) is None
    late = answer(node.directory.tick(100)).body
    assert isinstance(late, Granted)
    assert len(late.extents) == 1


def test_what_is_expected_is_waited_for_before_anybody_writes_it_and_answered_as_it_comes() -> None:
    node = Node()
    assert node.acquire(1, 2, 3, wait_ms=100, now=0, expected=True) is None
    slots = node.reserve(1, 2)
    first = answer(node.commit(slots)).body
    assert isinstance(first, Granted)
    assert [extent.key for extent in first.extents] == [key(1), key(2)]
    assert node.acquire(3, 4, wait_ms=100, now=0, expected=True) is None
    node.store(4)
    assert node.directory.tick(99) == []
    assert answer(node.directory.tick(100)).body == Granted(0, []), "the first is waited for, no other"


def test_a_tail_that_was_there_and_is_gone_is_not_waited_for() -> None:
    node = Node(pages=2)
    node.store(1)
    node.store(2, tail=True)
    assert node.acquire(3, wait_ms=100, expected=True) is None
    node.store(4)
    assert node.acquire(2, wait_ms=100, expected=True) == Granted(0, [])
    slots = node.reserve(2, tail=True)
    assert node.acquire(2, wait_ms=100, expected=True) is None, "it comes again"
    granted = answer(node.commit(slots)).body
    assert isinstance(granted, Granted)
    assert [extent.key for extent in granted.extents] == [key(2)]


def test_a_tail_that_is_computed_again_stays_the_longer() -> None:
    node = Node(pages=64)
    for tail in range(1, 11):
        node.store(tail, tail=True)
    assert node.reserve(1, tail=True) == []
    node.store(*range(100, 155))
    assert node.acquire(2) == Granted(0, [])
    granted = node.acquire(1)
    assert granted is not None
    assert [extent.key for extent in granted.extents] == [key(1)]


def test_a_writer_that_gives_up_or_dies_lets_the_waiting_go() -> None:
    node = Node()
    (slot,) = node.reserve(1)
    assert node.acquire(1, wait_ms=100) is None
    effects = node.apply(node.directory.abandon("w", [(slot.slot, slot.generation)], 0))
    assert answer(effects).body == Granted(0, [])
    node.reserve(2)
    assert node.acquire(2, wait_ms=100) is None
    assert answer(node.apply(node.directory.holder_died("w", 0))).body == Granted(0, [])
    assert node.stat("dram_bytes") == 0
    assert node.table == {}


def test_the_least_recently_used_goes_first_and_a_prefix_from_its_end() -> None:
    node = Node(pages=3)
    node.store(1, 2, 3)
    granted = node.acquire(1, 2, 3)
    assert granted is not None
    node.directory.release([granted.lease])
    node.store(4)
    assert node.events[-2:] == [Removed([key(3)]), Stored([key(4)])]


def test_tails_go_before_chunks_and_are_no_news() -> None:
    node = Node(pages=2)
    node.store(1)
    node.store(2, tail=True)
    node.store(3)
    assert node.events == [Stored([key(1)]), Stored([key(3)])]
    assert node.stat("tail_blocks") == 0


def test_where_chunks_fill_a_tier_the_last_tails_stay() -> None:
    node = Node(pages=64)
    node.store(*range(60))
    for tail in range(100, 104):
        node.store(tail, tail=True)
    node.store(*range(60, 70))
    assert node.stat("tail_blocks") == 4, "a prompt that was just computed can be handed over"
    assert node.events[-1] == Stored([key(number) for number in range(60, 70)])
    assert node.acquire(9) == Granted(0, [])
    node.store(104, tail=True)
    node.store(70)
    assert node.stat("tail_blocks") == 4
    assert node.acquire(100) == Granted(0, []), "those written before make room"
    granted = node.acquire(104)
    assert granted is not None
    assert [extent.key for extent in granted.extents] == [key(104)]
    node.directory.check_integrity()


def test_what_is_leased_or_being_written_is_never_evicted() -> None:
    node = Node(pages=2)
    node.store(1)
    granted = node.acquire(1)
    assert granted is not None
    writing = node.reserve(2)
    assert node.reserve(3) == []
    assert node.stat("no_room_total") == 1
    node.directory.release([granted.lease])
    assert [slot.key for slot in node.reserve(3)] == [key(3)]
    node.commit(writing)


def test_an_entry_larger_than_the_region_evicts_nothing() -> None:
    node = Node(pages=2)
    node.store(1)
    assert node.reserve(2, pages=3) == []
    assert node.stat("chunks") == 1


def test_a_quarantined_entry_is_gone_at_once_but_its_extent_only_after_its_readers() -> None:
    node = Node(pages=1)
    node.store(1)
    granted = node.acquire(1)
    assert granted is not None
    node.apply(node.directory.quarantine(Quarantine(key(1), b"another digest")))
    assert node.stat("chunks") == 1
    node.apply(node.directory.quarantine(Quarantine(key(1), b"digest of " + key(1))))
    assert node.acquire(1) == Granted(0, [])
    assert node.events[-1] == Removed([key(1)])
    assert node.reserve(2) == []
    node.apply(node.directory.release([granted.lease]))
    assert len(node.reserve(2)) == 1


def test_only_the_holder_commits_and_only_once() -> None:
    node = Node()
    (slot,) = node.reserve(1)
    node.commit([slot], holder="other")
    assert node.stat("chunks") == 0
    node.apply(node.directory.abandon("w", [(slot.slot, slot.generation)], 0))
    (again,) = node.reserve(1)
    assert again.slot == slot.slot
    node.commit([slot])
    assert node.stat("chunks") == 0, "a commit of an older generation must not publish unwritten bytes"
    node.commit([again])
    assert node.stat("chunks") == 1


def test_another_layout_is_a_miss_and_takes_the_place_when_idle() -> None:
    node = Node()
    node.store(1)
    assert node.acquire(1, layout=b"m" * 16) == Granted(0, [])
    node.store(1, layout=b"m" * 16)
    assert node.acquire(1) == Granted(0, [])
    assert node.acquire(1, layout=b"m" * 16) != Granted(0, [])


def test_a_new_daemon_serves_what_was_committed_and_keeps_what_is_being_written() -> None:
    node = Node()
    node.store(1, 2)
    slots = node.reserve(3)
    new = restarted(node, {"w"})
    assert new.directory.keys() == [key(1), key(2)]
    assert new.reserve(3) == []
    new.commit(slots)
    assert new.acquire(1, 2, 3) is not None


def test_nothing_is_evicted_until_every_living_holder_has_spoken() -> None:
    node = Node(pages=8)
    node.store(*range(8))
    granted = node.acquire(0)
    assert granted is not None
    new = restarted(node, {"r", "w"})
    assert new.reserve(100) == []
    new.directory.reattach(Reattach("r", {granted.lease: [granted.extents[0].offset]}, []), 0)
    assert new.reserve(100) == []
    new.directory.holder_died("w", 0)
    assert new.stat("leases") == 1
    placed = new.reserve(*range(100, 107))
    assert len(placed) == 7
    assert granted.extents[0].offset not in {slot.offset for slot in placed}
    new.directory.release([granted.lease])
    assert new.stat("leases") == 0


def test_what_was_quarantined_under_its_reader_stays_out_of_use_through_a_restart() -> None:
    node = Node(pages=2)
    node.store(0, 1)
    granted = node.acquire(0)
    assert granted is not None
    (extent,) = granted.extents
    node.apply(node.directory.quarantine(Quarantine(extent.key, extent.digest)))
    new = restarted(node, {"r"})
    assert new.directory.keys() == [key(1)]
    new.apply(new.directory.reattach(Reattach("r", {granted.lease: [extent.offset]}, []), 0))
    assert extent.offset not in {slot.offset for slot in new.reserve(5)}, "it is still read"
    new.apply(new.directory.release([granted.lease]))
    assert extent.offset in {slot.offset for slot in new.reserve(6)}

    alone = restarted(node, {"r"})
    alone.apply(alone.directory.holder_died("r", 0))
    assert extent.offset in {slot.offset for slot in alone.reserve(7)}
    assert len(restarted(node, set()).table) == 1


def test_reservations_that_a_holder_no_longer_writes_are_freed() -> None:
    node = Node()
    kept, dropped = node.reserve(1, 2)
    new = restarted(node, {"w"})
    new.apply(new.directory.reattach(Reattach("w", {}, [kept.slot]), 0))
    assert new.stat("writing") == 1
    new.commit([kept, dropped])
    assert new.directory.keys() == [key(1)]


def test_records_that_overlap_are_not_served() -> None:
    node = Node()
    node.store(1)
    (slot,) = node.table
    twin = {slot: node.table[slot], slot + 1: node.table[slot]}
    new = Node()
    new.table = dict(twin)
    new.apply(new.directory.adopt(twin.items(), set()))
    assert len(new.directory.keys()) == 1
    assert len(new.table) == 1


def test_a_withdrawn_acquire_ends_its_wait_or_its_lease() -> None:
    node = Node()
    node.store(1)
    granted = node.acquire(1)
    assert granted is not None
    (slot,) = node.reserve(2)
    assert node.acquire(2, wait_ms=50) is None
    assert (node.stat("leases"), node.stat("waiters")) == (1, 1)
    assert node.directory.withdraw(b"another", 2) == []
    assert (node.stat("leases"), node.stat("waiters")) == (1, 1)
    node.apply(node.directory.withdraw(CLIENT, 2))
    assert (node.stat("leases"), node.stat("waiters")) == (0, 0)
    assert not [effect for effect in node.commit([slot]) if isinstance(effect, Answer)]
    assert node.directory.release([granted.lease]) == []


def test_lease_numbers_of_two_lives_differ() -> None:
    one, two = Node(epoch=1), Node(epoch=2)
    for node in (one, two):
        node.store(1)
    first, second = one.acquire(1), two.acquire(1)
    assert first is not None
    assert second is not None
    assert first.lease != second.lease


def test_integrity_check_can_fail() -> None:
    node = Node()
    node.store(1)
    node.directory.dram._extents.allocate(PAGE)
    next(iter(node.directory.dram.entries.values())).readers = 3
    with pytest.raises(AssertionError):
        node.directory.check_integrity()
