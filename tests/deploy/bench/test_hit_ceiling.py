"""Ceilings of hits, against a search over everything that a cache could keep."""

from __future__ import annotations

import functools
import itertools

from hypothesis import given
from hypothesis import strategies as st

from deploy.bench.hit_ceiling import Prompt, hits_lru, hits_optimal, hits_unlimited

A, AB, AC, D = (1,), (1, 2), (1, 3), (4, 5)


@st.composite
def traces(draw: st.DrawFn) -> list[Prompt]:
    """Prompts over a tree of blocks: an id stands for all that it comes after, too."""
    ids: dict[tuple[int, ...], int] = {}
    found = []
    for path in draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1, max_size=5)):
        found.append(tuple(ids.setdefault(tuple(path[: end + 1]), len(ids)) for end in range(len(path))))
    return found


def best_of_all(prompts: list[Prompt], capacity: int) -> int:
    """The most hits that any choice of what to keep gives."""

    @functools.cache
    def search(number: int, kept: frozenset[int]) -> int:
        if number == len(prompts):
            return 0
        prompt = prompts[number]
        hits = next((place for place, block in enumerate(prompt) if block not in kept), len(prompt))
        there = kept | frozenset(prompt)
        size = min(capacity, len(there))
        return hits + max(search(number + 1, frozenset(choice)) for choice in itertools.combinations(there, size))

    return search(0, frozenset())


def test_without_a_limit_everything_seen_is_a_hit() -> None:
    assert hits_unlimited([AB, AC, AB, D, D]) == [0, 1, 2, 0, 2]


def test_lru_forgets_what_was_used_longest_ago_and_ends_before_beginnings() -> None:
    assert hits_lru([AB, AC, AB], 3) == [0, 1, 2]
    assert hits_lru([AB, D, AB], 2) == [0, 0, 0]
    assert hits_lru([AB, A, AB], 1) == [0, 1, 1]


def test_a_cyclic_scan_is_all_misses_for_lru_and_not_for_the_best() -> None:
    scan = [(1,), (2,), (3,)] * 4
    assert sum(hits_lru(scan, 2)) == 0
    assert sum(hits_optimal(scan, 2)) == best_of_all(scan, 2) == 6


def test_what_comes_once_does_not_displace_what_comes_again() -> None:
    assert hits_optimal([(1,), (2,), (1,)], 1) == [0, 0, 1]


@given(traces(), st.integers(0, 5))
def test_the_optimal_is_the_best_of_all_choices(prompts: list[Prompt], capacity: int) -> None:
    optimal = sum(hits_optimal(prompts, capacity))
    assert optimal == best_of_all(prompts, capacity)
    assert sum(hits_lru(prompts, capacity)) <= optimal <= sum(hits_unlimited(prompts))


@given(traces())
def test_with_room_for_all_nothing_is_lost(prompts: list[Prompt]) -> None:
    assert hits_lru(prompts, 20) == hits_optimal(prompts, 20) == hits_unlimited(prompts)
