"""The rule that sizes the pools: what it promises of any load, and what it does with some."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.scaling import Reading, Sizes, State, decide, guard
from router.scaling_settings import ScalingSettings

RULE = ScalingSettings(prefill_min=0, prefill_max=20, decode_max=40)
STEP = 15.0

rules = st.builds(
    ScalingSettings,
    prefill_min=st.integers(0, 3),
    prefill_max=st.integers(3, 30),
    decode_min=st.integers(1, 3),
    decode_max=st.integers(3, 30),
    prefill_per_decode_min=st.floats(0, 1),
    prefill_per_decode_max=st.floats(1, 5),
    shrink_seconds=st.integers(0, 600),
    zero_seconds=st.integers(0, 900),
).filter(lambda rule: not rule.problems())
readings = st.builds(
    Reading,
    prefill=st.integers(0, 30),
    decode=st.integers(0, 30),
    backlog_seconds=st.floats(0, 100),
    prompts=st.floats(0, 50),
    prefill_load=st.floats(0, 30),
    lacking=st.integers(0, 5),
    kv_used=st.floats(0, 40),
    inter_token_seconds=st.none() | st.floats(0, 0.5),
    alone_seconds=st.floats(0, 0.1),
    places=st.floats(0, 40),
    decode_load=st.floats(0, 20),
)


def run(rule: ScalingSettings, given: Sequence[Reading]) -> Iterator[tuple[State, Sizes]]:
    state = None
    for number, reading in enumerate(given):
        state, sizes = decide(rule, state, reading, number * STEP)
        yield state, sizes


@given(rules, st.lists(readings, min_size=1, max_size=60))
def test_bounds_and_guard_hold_whatever_comes(rule: ScalingSettings, given: list[Reading]) -> None:
    for _, sizes in run(rule, given):
        prefill, decode = sizes.prefill.wanted, sizes.decode.wanted
        assert rule.prefill_min <= prefill <= rule.prefill_max
        assert rule.decode_min <= decode <= rule.decode_max
        if prefill:
            assert math.floor(rule.prefill_per_decode_min * decode) <= prefill <= math.ceil(rule.prefill_per_decode_max * decode)
        assert sizes.decode.reasons


@given(rules, st.lists(st.tuples(readings, readings), min_size=1, max_size=40))
def test_more_load_never_wants_fewer(rule: ScalingSettings, pairs: list[tuple[Reading, Reading]]) -> None:
    """The same workers, and at no moment less of anything."""

    def less(one: Reading, other: Reading) -> Reading:
        paces = [pace for pace in (one.inter_token_seconds, other.inter_token_seconds) if pace is not None]
        return replace(
            one,
            backlog_seconds=min(one.backlog_seconds, other.backlog_seconds),
            prompts=min(one.prompts, other.prompts),
            prefill_load=min(one.prefill_load, other.prefill_load),
            lacking=min(one.lacking, other.lacking),
            places=min(one.places, other.places),
            kv_used=min(one.kv_used, other.kv_used),
            inter_token_seconds=min(paces) if one.inter_token_seconds is not None else None,
        )

    more = [one for one, _ in pairs]
    for (_, high), (_, low) in zip(run(rule, more), run(rule, [less(*pair) for pair in pairs]), strict=True):
        assert low.prefill.wanted <= high.prefill.wanted
        assert low.decode.wanted <= high.decode.wanted


@given(
    load=st.floats(0, 12),
    kv=st.floats(0, 20),
    streams=st.floats(0, 2000),
    learnt=st.floats(0, 0.009),
    start=st.tuples(st.integers(0, 20), st.integers(1, 40)),
)
@settings(deadline=None)
def test_a_constant_load_comes_to_rest(load: float, kv: float, streams: float, learnt: float, start: tuple[int, int]) -> None:
    """Workers come and go as they are wanted; time between tokens is a step's own time and each stream's share, as engines have it."""
    state, (prefill, decode), seen = None, start, []
    for number in range(400):
        pace = 0.008 + 0.00008 * streams / max(1, decode) if streams else None
        reading = Reading(prefill, decode, 0.1 * load, load, load, int(load > 0), kv, pace, learnt)
        state, sizes = decide(RULE, state, reading, number * STEP)
        prefill, decode = sizes.prefill.wanted, sizes.decode.wanted
        seen.append((prefill, decode))
    assert len(set(seen[-100:])) == 1, "it swings"
    grown = [now for before, now in pairwise(seen[10:]) if now[0] > before[0] or now[1] > before[1]]
    assert not grown, "it shrank below what it needs"


def settled(reading: Callable[[int, int], Reading], rule: ScalingSettings = RULE, start: tuple[int, int] = (1, 1)) -> list[tuple[int, int]]:
    state, (prefill, decode), seen = None, start, []
    for number in range(200):
        state, sizes = decide(rule, state, reading(prefill, decode), number * STEP)
        prefill, decode = sizes.prefill.wanted, sizes.decode.wanted
        seen.append((prefill, decode))
    return seen


def test_pools_follow_their_own_load() -> None:
    assert settled(lambda p, d: Reading(p, d, prefill_load=4.2, lacking=3))[-1] == (6, 2), "the guard has decode at 2: 6 prefill workers are 3 each"
    assert settled(lambda p, d: Reading(p, d, lacking=1, kv_used=8.0))[-1] == (1, 10)
    assert settled(lambda p, d: Reading(p, d, lacking=1, inter_token_seconds=0.4 / d))[-1] == (1, 8)
    assert settled(lambda p, d: Reading(p, d, lacking=1, places=2.5))[-1] == (1, 3)


def test_what_a_stream_alone_waits_wants_no_workers() -> None:
    """30 of 50 ms are a step's own time: without knowing that a second worker would never go, though one is enough."""

    def reading(prefill: int, decode: int) -> Reading:
        return Reading(prefill, decode, lacking=1, inter_token_seconds=0.03 + 0.008 / max(1, decode))

    assert settled(reading, start=(1, 2))[-1] == (1, 2)
    assert settled(lambda p, d: replace(reading(p, d), alone_seconds=0.03), start=(1, 2))[-1] == (1, 1)


def test_tokens_that_wait_for_prompts_want_no_decode_workers() -> None:
    """Half of the time goes to prompts: 60 ms apart are 30 for the streams alone, which two workers keep, and prefill gets what the prompts take."""

    def reading(prefill: int, decode: int) -> Reading:
        return Reading(prefill, decode, prefill_load=1.0, lacking=1, inter_token_seconds=0.12 / decode, decode_load=0.5 * decode)

    assert settled(reading, start=(1, 2))[-1] == (2, 2)
    assert settled(lambda p, d: replace(reading(p, d), decode_load=0.0), start=(1, 2))[-1][1] == 3


def test_a_pool_grows_at_once_and_shrinks_late_and_by_steps() -> None:
    high, low = Reading(10, 10, prefill_load=7.0, lacking=1), Reading(10, 10, prefill_load=0.7, lacking=1)
    seen = [sizes.prefill.wanted for _, sizes in run(RULE, [low, *[high] * 60, *[low] * 100])]
    assert seen[0] == 10
    rest = seen[61:]
    assert rest[int(300 / STEP) - 2] == max(seen), "for five minutes nothing goes"
    assert all(before - after in (0, 1) for before, after in pairwise(rest))
    drops = [(62 + number) * STEP // 60 for number, (before, after) in enumerate(pairwise(rest)) if after < before]
    assert len(drops) == len(set(drops)) > 3, "one a minute"
    assert rest[-1] == 2


def test_a_backlog_wants_no_more_workers_than_it_has_prompts() -> None:
    one_long_prompt, many = Reading(2, 2, 60.0, 1.0, 0.7, 1), Reading(2, 2, 60.0, 10.0, 0.7, 1)
    assert max(sizes.prefill.wanted for _, sizes in run(RULE, [one_long_prompt] * 10)) == 2
    assert max(sizes.prefill.wanted for _, sizes in run(RULE, [many] * 10)) == 10
    calm = Reading(2, 2, 0.5, 1.0, 0.7, 1)
    assert max(sizes.prefill.wanted for _, sizes in run(RULE, [*[calm] * 10, replace(many, backlog_seconds=6.0), *[calm] * 10])) <= 3, "a peak"


def test_prefill_goes_to_zero_when_nobody_lacks_anything_and_comes_back_at_the_first_that_does() -> None:
    served = Reading(2, 4, backlog_seconds=0.05, prefill_load=0.02, kv_used=2.0)
    sizes = [found for _, found in run(RULE, [served] * 60)]
    assert sizes[int(RULE.zero_seconds / STEP) - 2].prefill.wanted == 1
    assert sizes[-1].prefill.wanted == 0
    back = [found for _, found in run(RULE, [*[served] * 60, replace(served, prefill=0, lacking=1), *[replace(served, prefill=0)] * 10])]
    assert [found.prefill.wanted for found in back[59:62]] == [0, 1, 1]
    assert any("wakes" in reason for reason in back[60].prefill.reasons)
    assert settled(lambda p, d: served, replace_rule(prefill_min=1))[-1][0] == 1
    short = replace(served, prefill=0, backlog_seconds=9.0, prompts=40.0)
    assert {found.prefill.wanted for _, found in run(RULE, [*[served] * 60, *[short] * 60])} == {2, 1, 0}, "short prompts wait for decode workers"


def test_a_worker_that_another_router_woke_is_not_taken_away_at_once() -> None:
    served = Reading(0, 4, kv_used=2.0)
    sizes = [found for _, found in run(RULE, [*[served] * 60, *[replace(served, prefill=1)] * 30])]
    assert [found.prefill.wanted for found in sizes[59:]] == [0, *[1] * 30]


def replace_rule(**changes: float) -> ScalingSettings:
    return ScalingSettings(**{**{key: getattr(RULE, key) for key in RULE.__struct_fields__}, **changes})


def test_the_guard_lets_the_smaller_pool_grow_and_else_the_larger_one_shrink() -> None:
    rule = replace_rule(prefill_per_decode_min=0.25, prefill_per_decode_max=2.0)
    assert guard(rule, 6, 1) == (6, 3)
    assert guard(rule, 1, 12) == (3, 12)
    assert guard(rule, 0, 12) == (0, 12), "none is no ratio"
    assert guard(replace_rule(prefill_per_decode_max=2.0, decode_max=2), 9, 1) == (4, 2)
    assert guard(replace_rule(prefill_per_decode_min=0.5, prefill_max=3), 1, 30) == (3, 7)
    (_, sizes) = next(run(rule, [Reading(6, 1, prefill_load=4.0, lacking=1)]))
    assert any(reason.startswith("guard") for reason in sizes.decode.reasons)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"decode_min": 0}, "decode_min"),
        ({"prefill_max": 0}, "prefill_max"),
        ({"decode_min": 5, "decode_max": 4}, "decode_max"),
        ({"prefill_busy": 1.5}, "prefill_busy"),
        ({"kv_blocks_used": 0.0}, "kv_blocks_used"),
        ({"prefill_per_decode_min": 2.0, "prefill_per_decode_max": 1.0}, "prefill_per_decode_max"),
        ({"prefill_min": 9, "prefill_max": 9, "prefill_per_decode_max": 1.0, "decode_max": 3}, "prefill_per_decode_max"),
        ({"decode_min": 9, "decode_max": 9, "prefill_per_decode_min": 1.0, "prefill_max": 3}, "prefill_per_decode_min"),
    ],
)
def test_settings_that_no_size_could_keep_to_are_refused(changes: dict[str, float], key: str) -> None:
    assert [problem[0] for problem in replace_rule(**changes).problems()] == [key]
    assert not ScalingSettings().problems()
