"""What goes first, asked of the orders alone and of a shelf without lower tiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from cachebus.placement import Lru, Order, S3Fifo
from cachebus.shelf import Shelf, Wanted

LAYOUT = b"layout"


def filled(kind: type[Lru] | type[S3Fifo], slots: int) -> Order:
    made = kind()
    for slot in range(slots):
        made.add(slot, b"%d" % slot)
    return made


def gone(order: Order, may_go: Callable[[int], bool], count: int) -> list[int | None]:
    return [order.evict(may_go) for _ in range(count)]


@pytest.mark.parametrize("kind", [Lru, S3Fifo])
def test_asking_in_vain_changes_nothing(kind: type[Lru] | type[S3Fifo]) -> None:
    asked, left_alone = filled(kind, 100), filled(kind, 100)
    for each in (asked, left_alone):
        for slot in range(50):
            each.use(slot)
    for _ in range(20):
        assert asked.evict(lambda slot: False) is None
        assert asked.evict(lambda slot: False, looks_max=10) is None
    everything = gone(asked, lambda slot: True, 101)
    assert everything == gone(left_alone, lambda slot: True, 101)
    assert set(everything[:40]) <= set(range(50, 100)), "what nobody asked for goes first"
    assert everything[100] is None


@pytest.mark.parametrize("kind", [Lru, S3Fifo])
def test_no_more_slots_are_asked_about_than_allowed(kind: type[Lru] | type[S3Fifo]) -> None:
    order, asked = filled(kind, 100), set[int]()

    def may_go(slot: int) -> bool:
        asked.add(slot)
        return False

    assert order.evict(may_go, looks_max=7) is None
    assert len(asked) == 7


def test_what_may_not_go_keeps_its_place_in_the_small_queue() -> None:
    order = filled(S3Fifo, 10)
    assert gone(order, lambda slot: slot not in (0, 1), 3) == [2, 3, 4]
    assert gone(order, lambda slot: True, 2) == [0, 1], "they were held, not asked for"


def test_all_of_the_small_queue_goes_at_last_though_it_has_less_than_its_share() -> None:
    order = filled(S3Fifo, 100)
    for slot in range(95):
        order.use(slot)
    assert gone(order, lambda slot: slot >= 95, 6) == [95, 96, 97, 98, 99, None]


def placed(shelf: Shelf, tenant: bytes, keys: Sequence[bytes], copied: bool) -> list[bytes]:
    """Stores an entry for each key; the keys of what had to go for them."""
    went = []
    for key in keys:
        entry, evicted = shelf.place(Wanted(key, 4096, LAYOUT, tenant=tenant))
        assert entry is not None
        shelf.commit(entry, b"digest", 0)
        entry.copied = copied
        went += [one.key for one in evicted]
    return went


@pytest.mark.parametrize("copied", [False, True], ids=["dram alone", "all of it in a lower tier"])
def test_prompts_that_come_once_do_not_flush_what_was_asked_for_again(copied: bool) -> None:
    shelf = Shelf(4096 * 100, 200, "s3fifo")
    again = [b"again %d" % n for n in range(60)]
    assert placed(shelf, b"a", again, copied) == []
    for wave in range(3):
        for key in again:
            shelf.use(shelf.index[key], 1)
        went = placed(shelf, b"b", [b"once %d %d" % (wave, n) for n in range(200)], copied)
        assert len(went) >= 160
        assert not set(went) & set(again)
