"""The prefix benchmark's own decisions: rounds, comparison of answers, refusals."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cachebus.errors import HeadstartError, SettingsError
from deploy.bench import prefix
from deploy.settings import read_settings


def options(**changes: object) -> argparse.Namespace:
    given = {"lengths": "512", "runs": 1, "systems": "vllm", "lmcache_python": None, "output": None, "json": False}
    return argparse.Namespace(**{**given, **changes})


@pytest.mark.parametrize(
    ("runs", "expected"), [(1, [[0]]), (2, [[0], [1]]), (3, [[0, 1], [2]]), (5, [[0, 1, 2], [3, 4]]), (6, [[0, 1, 2], [3, 4, 5]])]
)
def test_runs_are_shared_out_to_rounds(runs: int, expected: list[list[int]]) -> None:
    assert [list(numbers) for numbers in prefix.rounds(runs)] == expected


def test_only_answers_that_differ_are_told() -> None:
    same, alone, other = {"a": [1, 2], "b": [1, 2]}, {"a": [5]}, {"a": [1, 2], "b": [1, 3]}
    assert prefix.differing({"p": same, "q": alone, "r": other}) == [other]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": "512,many"}, "--lengths 512,many"),
        ({"lengths": "0"}, "--lengths 0"),
        ({"runs": 0}, "--runs 0"),
        ({"systems": "vllm,sglang"}, "'sglang' is unknown"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        prefix.run(read_settings(None, [], {}), options(**changes))


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(HeadstartError, match="/no/such/python"):
        prefix.run(read_settings(None, [], {}), options(systems="lmcache", lmcache_python=Path("/no/such/python")))
