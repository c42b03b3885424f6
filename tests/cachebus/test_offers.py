"""What engines offer of their own memory, and how long they keep it: the directory with offers, without a bus."""

from __future__ import annotations

from directory_node import CLIENT, LAYOUT, PAGE, Node, answer, key

from cachebus import offers
from cachebus.effects import Answer, Effect
from cachebus.messages import Acquire, Done, Extent, Granted
from cachebus.messages_handover import Hold, Offer, OfferedEntry, SharedMemory, Stale

GPU = "one GPU"
OTHER = b"other client"


def memory(holder: str = "p", device: str = GPU, name: bytes = b"m" * 16, layout: bytes = LAYOUT) -> SharedMemory:
    return SharedMemory(name, holder, layout, device, [(b"handle", 0), (b"handle", PAGE)], 100, PAGE, PAGE)


class Follower(Node):
    """A node with an engine that offers and one that follows."""

    def offer(self, *numbers: int, now: float = 0, valid_ms: int = 1000, of: SharedMemory | None = None) -> list[Effect]:
        entries = [OfferedEntry(key(n), b"digest of " + key(n), [10 * n, 10 * n + 1]) for n in numbers]
        return self.apply(self.directory.hand_over(OTHER, 8, Offer(of or memory(), entries, valid_ms), now))

    def follow(self, *numbers: int, now: float = 0, reaches: tuple[str, ...] = (GPU,), wait_ms: int = 500, holder: str = "d") -> list[Effect]:
        request = Acquire(holder, LAYOUT, [key(n) for n in numbers], wait_ms, expected=True, reaches=list(reaches))
        return self.apply(self.directory.acquire(CLIENT, 2, request, now))

    def hold(self, *numbers: int, now: float = 0, wait_ms: int = 300, holder: str = "p") -> list[Effect]:
        return self.apply(self.directory.hand_over(OTHER, 9, Hold(holder, [key(n) for n in numbers], wait_ms), now))

    def tick(self, now: float) -> list[Effect]:
        return self.apply(self.directory.tick(now))


def granted(effects: list[Effect]) -> Granted:
    (found,) = [effect.body for effect in effects if isinstance(effect, Answer) and effect.client == CLIENT]
    assert isinstance(found, Granted)
    return found


def held_is_over(effects: list[Effect]) -> bool:
    return [effect for effect in effects if isinstance(effect, Answer) and effect.client == OTHER] == [Answer(OTHER, 9, Done())]


def test_who_follows_is_told_of_an_offer_at_once_and_how_to_reach_it() -> None:
    node = Follower()
    assert node.follow(1, 2, 3) == []
    found = granted(node.offer(1, 2))
    assert found.extents == [Extent(key(n), 0, 4 * PAGE, b"digest of " + key(n), memory=b"m" * 16, blocks=[10 * n, 10 * n + 1]) for n in (1, 2)]
    assert found.memories == [memory()]
    assert found.lease
    assert node.stat("offers_granted_total") == 2
    node.directory.release([found.lease])
    node.directory.check_integrity()


def test_the_region_and_offers_make_one_run_and_an_offer_goes_first() -> None:
    node = Follower()
    node.store(1, 2, 4)
    node.offer(2, 3)
    found = granted(node.follow(1, 2, 3, 4, 5))
    assert [(extent.key, bool(extent.memory)) for extent in found.extents] == [(key(1), False), (key(2), True), (key(3), True), (key(4), False)]
    assert node.directory.dram.index[key(1)].readers == 1
    assert node.directory.dram.index[key(2)].readers == 0
    node.directory.check_integrity()
    node.directory.release([found.lease])
    node.directory.check_integrity()


def test_only_who_reaches_the_device_and_has_the_layout_is_given_an_offer() -> None:
    node = Follower()
    node.offer(1, of=memory(device="a GPU elsewhere"))
    node.offer(2, of=memory(layout=b"x" * 16))
    node.offer(3)
    for number in (1, 2):
        assert node.follow(number) == [], "it waits for the region"
    assert node.follow(3, reaches=()) == []
    assert granted(node.follow(3, reaches=("another", GPU))).extents
    (stored,) = granted(node.commit(node.reserve(1))).extents
    assert not stored.memory


def test_who_looks_a_prompt_up_and_does_not_follow_gets_nothing_out_of_an_engine() -> None:
    node = Follower()
    node.offer(1)
    found = node.acquire(1)
    assert found == Granted(0, [])


def test_an_offer_ends_with_its_time_with_its_engine_and_with_a_newer_one() -> None:
    node = Follower()
    node.offer(1, 2, valid_ms=100)
    node.offer(3, 4, of=memory("q", name=b"q" * 16))
    assert len(granted(node.follow(1, 2, now=99)).extents) == 2
    node.tick(100)
    assert node.stat("offers") == 2
    assert node.follow(1, now=100) == []
    node.offer(4, of=memory("r", name=b"r" * 16))
    node.apply(node.directory.holder_died("q", 100))
    assert [extent.memory for extent in granted(node.follow(4, now=101)).extents] == [b"r" * 16]
    assert node.follow(3, now=101) == []
    node.apply(node.directory.holder_died("d", 102))
    node.directory.check_integrity()
    assert node.stat("waiters") == 0


def test_offers_are_bounded_and_the_oldest_goes(monkeypatch: object) -> None:
    node = Follower()
    monkeypatch.setattr(offers, "OFFERS_MAX", 3)  # type: ignore[attr-defined]
    node.offer(1, 2)
    node.offer(3, 4)
    assert node.stat("offers") == 3
    assert node.follow(1) == []
    assert granted(node.follow(2)).extents


def test_an_offer_that_was_read_and_is_not_what_it_was_ends() -> None:
    node = Follower()
    node.offer(1, 2)
    node.apply(node.directory.hand_over(CLIENT, 7, Stale([key(2), key(3)]), 0))
    assert len(granted(node.follow(1, 2)).extents) == 1
    assert node.stat("offers_stale_total") == 1


def test_a_hold_ends_at_once_where_nobody_follows() -> None:
    node = Follower()
    node.offer(1)
    assert held_is_over(node.hold(1))
    node.follow(2)
    assert held_is_over(node.hold(1)), "somebody follows another prompt"
    node.follow(1, reaches=(), holder="cpu")
    assert held_is_over(node.hold(1)), "who can't read it is not waited for"


def test_a_hold_lasts_until_all_who_follow_have_read() -> None:
    node = Follower()
    node.follow(1, 2, 3)
    assert not node.hold(1, 2, 3), "the engine ends its request before its last chunks are offered"
    first = granted(node.offer(1, 2))
    node.follow(3)
    effects = node.apply(node.directory.release([first.lease]))
    assert not held_is_over(effects + node.tick(1))
    second = granted(node.offer(3, now=2))
    assert not held_is_over(node.tick(3))
    node.apply(node.directory.release([second.lease]))
    assert held_is_over(node.tick(4))
    assert node.stat("holds") == 0


def test_a_hold_ends_with_its_time_with_who_follows_and_with_its_engine() -> None:
    node = Follower()
    node.follow(1, wait_ms=10_000)
    assert not node.hold(1)
    assert not held_is_over(node.tick(299))
    assert held_is_over(node.tick(300))
    assert not node.hold(1, now=300)
    assert held_is_over(node.apply(node.directory.holder_died("d", 301)))
    node.follow(1, wait_ms=10_000)
    assert not node.hold(1, now=302)
    node.apply(node.directory.holder_died("p", 303))
    assert node.stat("holds") == 0
    assert not held_is_over(node.tick(9000))


def test_an_offer_takes_no_room_and_no_extent_of_the_region() -> None:
    node = Follower(pages=1)
    node.store(1)
    node.offer(2, 3)
    found = granted(node.follow(2, 3))
    assert len(found.extents) == 2
    assert node.stat("chunks") == 1
    assert answer(node.apply(node.directory.acquire(CLIENT, 3, Acquire("r", LAYOUT, [key(1)], 0), 0))).body != Granted(0, [])
