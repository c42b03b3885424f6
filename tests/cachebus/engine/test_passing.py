from __future__ import annotations

from engine_driver import BLOCK, CHUNK, Engine

from cachebus.engine.passing import MOMENTS_MAX, PASSES, Passing
from cachebus.engine.views import RequestView, Scheduled

KEYS = [bytes([number]) * 32 for number in range(8)]
OTHERS = [bytes([number]) * 32 for number in range(100, 108)]


def test_what_another_pull_brings_is_waited_for() -> None:
    passing = Passing()
    passing.begun("a", KEYS)
    assert passing.is_coming("b", KEYS, 0)
    assert passing.is_coming("b", [*KEYS[:6], *OTHERS[6:]], 0), "three quarters of it are its own, too"
    assert not passing.is_coming("b", [*KEYS[:5], *OTHERS[5:]], 0), "most of the pull is not its own"
    assert not passing.is_coming("b", OTHERS, 0)
    assert not passing.is_coming("b", KEYS, 6), "it has that much"
    assert not passing.is_coming("a", KEYS, 0), "nobody waits for itself"
    passing.pulled("a")
    assert not passing.is_coming("b", KEYS, 0)


def test_who_finds_no_room_is_passed_for_a_moment_after_a_prefix_arrived() -> None:
    passing = Passing()
    assert not passing.lets_pass("first", 5, 4, pulls=False), "nothing has arrived"
    passing.stepped([])
    passing.begun("a", KEYS)
    passing.pulled("a")
    passing.stepped(["a"])
    for _ in range(PASSES):
        assert passing.lets_pass("first", 5, 4, pulls=False)
        assert passing.lets_pass("second", 5, 4, pulls=False)
        assert not passing.lets_pass("small", 4, 4, pulls=False)
        passing.stepped([])
    assert not passing.lets_pass("first", 5, 4, pulls=False)


def test_a_step_without_a_round_takes_nothing_from_the_moment() -> None:
    passing = Passing()
    passing.open()
    for _ in range(10):
        passing.stepped([])
    assert passing.lets_pass("first", 5, 4, pulls=False)


def test_the_first_in_line_is_passed_so_often_and_no_more() -> None:
    passing = Passing()
    moments = 0
    for _ in range(3 * MOMENTS_MAX):
        passing.open()
        moments += passing.lets_pass("first", 5, 4, pulls=False)
        for _ in range(PASSES):
            passing.lets_pass("first", 5, 4, pulls=False)
            passing.stepped([])
    assert MOMENTS_MAX <= moments <= MOMENTS_MAX + 1
    assert not passing.lets_pass("next", 5, 4, pulls=False)
    passing.stepped([])
    passing.open()
    assert passing.lets_pass("next", 5, 4, pulls=False), "another one's count begins anew"


def loading() -> Engine:
    """An engine whose request r pulls two chunks, and b, that begins alike, has arrived."""
    engine = Engine(CHUNK * 2 + BLOCK)
    engine.bus.grant(2)
    assert engine.half.matched("r", 0, 0, 1000) == 2 * CHUNK
    engine.half.allocated("r", list(range(8)), 2 * CHUNK)
    engine.half.step([], ())
    engine.half.add(RequestView("b", [*engine.tokens[: 2 * CHUNK], *range(900, 900 + BLOCK)], 2 * CHUNK + BLOCK, "", True, None))
    engine.bus.grant(2, lease=6)
    return engine


def test_a_request_does_not_pull_what_another_one_is_pulling() -> None:
    engine = loading()
    assert engine.half.matched("b", 0, 0, 1000) is None
    engine.half.loaded(["r"])
    assert engine.half.matched("b", 2 * CHUNK, 0, 1000) == 0, "it is in the engine's memory now"


def test_what_did_not_arrive_is_pulled_by_the_next_one() -> None:
    failed, aborted = loading(), loading()
    failed.half.loaded(["r"])
    aborted.half.finished("r")
    for engine in (failed, aborted):
        assert engine.half.matched("b", 0, 0, 1000) == 2 * CHUNK


def test_a_prompt_computed_here_lets_those_pass_that_share_it() -> None:
    engine = Engine(CHUNK * 2)
    engine.bus.grant(0)
    assert engine.half.matched("r", 0, 0, 1000) == 0
    engine.half.add(RequestView("large", list(range(5000, 5000 + CHUNK)), CHUNK, "", True, None))
    engine.bus.grant(0)
    assert engine.half.matched("large", 0, 0, 3) == 0, "it keeps its place in the line"
    engine.half.step([Scheduled("r", list(range(8)), True, 0, 2 * CHUNK)], ())
    assert engine.half.matched("large", 0, 0, 3) is None
    assert engine.half.matched("large", 0, 0, 4) == 0


def test_behind_one_that_is_passed_nobody_pulls() -> None:
    """It would hold memory and stand behind it."""
    passing = Passing()
    passing.open()
    assert not passing.lets_pass("before", 2, 4, pulls=True)
    assert passing.lets_pass("first", 5, 4, pulls=False)
    assert passing.lets_pass("behind", 2, 4, pulls=True)
    assert not passing.lets_pass("shares", 2, 4, pulls=False)


def test_whoever_has_pulled_is_never_held_up_by_one_that_finds_no_room() -> None:
    """Both would wait for ever: the one for memory that the other holds."""
    for end in ("stepped", "gone"):
        passing = Passing()
        passing.begun("pulled", KEYS)
        passing.pulled("pulled")
        for _ in range(3 * PASSES):
            assert passing.lets_pass("first", 5, 4, pulls=False)
            passing.stepped(["another"])
        passing.stepped(["pulled"]) if end == "stepped" else passing.gone("pulled")
        assert not passing.lets_pass("first", 5, 4, pulls=False)
