"""What another engine is computing: asked for again and again, and given up when nothing comes."""

from __future__ import annotations

from cachebus.engine.following import Following
from cachebus.engine.transfer import Coming, Follow
from cachebus.messages import Extent

KEYS = [bytes([number]) * 32 for number in range(5)]


def following(now: float = 0.0) -> Following:
    return Following(Follow("holder", b"l" * 16, 500, [Coming(key, [10 * number]) for number, key in enumerate(KEYS)]), now)


def extents(first: int, last: int) -> list[Extent]:
    return [Extent(KEYS[number], 4096 * number, 4096, b"d" * 32) for number in range(first, last)]


def test_what_is_left_is_asked_for_until_all_is_there() -> None:
    rest = following()
    assert rest.ask(0.0).keys == KEYS
    assert rest.is_asking
    first = rest.came(extents(0, 2), 0.3)
    assert [(piece.key, piece.blocks) for piece in first] == [(KEYS[0], [0]), (KEYS[1], [10])]
    assert not rest.is_asking
    assert not rest.is_over
    asked = rest.ask(0.3)
    assert asked.keys == KEYS[2:]
    assert asked.expected
    assert asked.wait_ms == 500, "each part is waited for anew"
    assert [piece.blocks for piece in rest.came(extents(2, 5), 0.7)] == [[20], [30], [40]]
    assert rest.is_over
    assert rest.missing == []


def test_an_answer_without_anything_ends_it() -> None:
    rest = following()
    rest.ask(0.0)
    rest.came(extents(0, 1), 0.4)
    rest.ask(0.4)
    assert rest.came([], 0.9) == []
    assert rest.is_over
    assert [part.key for part in rest.missing] == KEYS[1:]


def test_a_daemon_that_does_not_answer_is_not_waited_for_long() -> None:
    rest = following()
    rest.ask(0.0)
    rest.look(0.7)
    assert not rest.is_over
    rest.look(0.8)
    assert rest.is_over
    assert len(rest.missing) == len(KEYS)


OFFERS = [Extent(key, 0, 4096, b"d" * 32, memory=b"m", blocks=[100 + number]) for number, key in enumerate(KEYS)]


def test_what_is_offered_comes_from_the_other_engines_blocks() -> None:
    rest = Following(Follow("holder", b"l" * 16, 500, [Coming(key, [10 * number]) for number, key in enumerate(KEYS)]), 0.0, ["a GPU"])
    assert rest.ask(0.0).reaches == ["a GPU"]
    pieces = rest.came([*extents(0, 1), *OFFERS[1:3]], 0.1)
    assert [(piece.memory, piece.blocks, piece.there) for piece in pieces] == [(b"", [0], []), (b"m", [10], [101]), (b"m", [20], [102])]
    assert [part.key for part in rest.missing] == KEYS[3:]


def test_what_had_changed_when_it_arrived_is_asked_of_the_region_and_offers_are_taken_again_after_it() -> None:
    rest = Following(Follow("holder", b"l" * 16, 500, [Coming(key, [10 * number]) for number, key in enumerate(KEYS)]), 0.0, ["a GPU"])
    rest.ask(0.0)
    pieces = rest.came(OFFERS, 0.1)
    assert rest.is_over
    rest.again(pieces[1:2])
    assert not rest.is_over
    asked = rest.ask(0.2)
    assert (asked.keys, asked.reaches) == (KEYS[1:2], [])
    rest.came(extents(1, 2), 0.3)
    assert rest.is_over
    rest.again(pieces[3:5])
    rest.ask(0.4)
    rest.came(extents(3, 4), 0.5)
    assert rest.ask(0.5).reaches == [], "the fourth was refused, too"


def test_an_answer_to_what_was_asked_before_something_came_again_goes_where_it_belongs() -> None:
    rest = Following(Follow("holder", b"l" * 16, 500, [Coming(key, [10 * number]) for number, key in enumerate(KEYS)]), 0.0, ["a GPU"])
    rest.ask(0.0)
    pieces = rest.came(OFFERS[:2], 0.1)
    rest.ask(0.1)
    rest.again(pieces)
    assert [(piece.key, piece.blocks) for piece in rest.came(OFFERS[2:4], 0.2)] == [(KEYS[2], [20]), (KEYS[3], [30])]
    assert rest.ask(0.2).keys == [*KEYS[:2], KEYS[4]]
    assert [(piece.key, piece.blocks) for piece in rest.came(extents(0, 2), 0.3)] == [(KEYS[0], [0]), (KEYS[1], [10])]


def test_a_block_that_is_not_to_be_written_is_not_taken_from_an_offer() -> None:
    rest = Following(Follow("holder", b"l" * 16, 500, [Coming(KEYS[0], [-1, 5]), Coming(KEYS[1], [6, 7])]), 0.0, ["a GPU"])
    rest.ask(0.0)
    assert [piece.key for piece in rest.came(OFFERS[:2], 0.1)] == [KEYS[1]]
    asked = rest.ask(0.1)
    assert (asked.keys, asked.reaches) == (KEYS[:1], [])
