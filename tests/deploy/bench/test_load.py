"""What is computed from a load's answers, and the prompts that seeds make."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from deploy.bench.load import Command, Empty, Load, Piece, Request, Served, begun, gaps, hit_share, in_windows, token_ids


def served(last: float | None, finished: bool = True, **changes: Any) -> Served:
    given = {"number": 0, "submitted": 0.0, "prompt": 100, "first": last, "last": last, "finished": finished}
    return Served(**{**given, **changes})


def test_a_seed_makes_the_same_tokens_everywhere_and_longer_ones_begin_with_shorter_ones() -> None:
    ids = token_ids([Piece(7, 50), Piece(8, 10)])
    assert ids == token_ids([Piece(7, 50)]) + token_ids([Piece(8, 10)])
    assert token_ids([Piece(7, 20)]) == ids[:20]
    assert token_ids([Piece(9, 20)]) != ids[:20]
    assert all(100 <= token < 4000 for token in ids)
    assert token_ids([Piece(7, 3), Piece(0, 0, [1, 2])]) == [*ids[:3], 1, 2]


def test_commands_survive_the_way_to_the_engine() -> None:
    load = Load([Request([Piece(1, 5), Piece(0, 0, [4, 5])], 3, at=0.5, background=True)], 9.0, 2, detail=True)
    for command in (load, Empty()):
        assert msgspec.json.decode(msgspec.json.encode(command), type=Command) == command


def test_windows_count_what_was_finished_in_them() -> None:
    ends = [served(1.9), served(2.0), served(2.9), served(3.0), served(4.99), served(5.0), served(2.5, finished=False), served(None, finished=False)]
    assert [len(window) for window in in_windows(ends, 2.0, 1.0, 3)] == [2, 1, 1]
    assert [one.first for one in begun(ends, 2.0, 3.0)] == [2.0, 2.9, 2.5]


def test_the_hit_share_is_of_tokens() -> None:
    assert hit_share([served(1.0, prompt=300, cached=300), served(1.0, prompt=100, cached=0)]) == 0.75
    assert hit_share([]) == 0.0


def test_gaps_are_within_an_answer_and_within_the_time() -> None:
    one, two = served(4.0, times=[1.0, 1.5, 2.5, 4.0]), served(3.0, times=[2.0, 2.25])
    assert gaps([one, two], 1.2, 4.0) == [0.5, 1.0, 0.25]


def test_the_time_to_the_first_token_starts_when_it_was_sent() -> None:
    assert served(5.0, submitted=2.0).ttft == 3.0
    with pytest.raises(AssertionError):
        assert served(None).ttft
