"""The day that the scaling benchmark plays: its arrivals, its workers' times, the pools' search, and a short one through the command."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy import cli
from deploy.bench import scaling
from deploy.bench.trace import Arrival
from deploy.scaling.day import DAY_SECONDS, Shape, clock_hour, day_of, rate_at
from deploy.scaling.replay import Goal, Outcome, Plant, Replay
from deploy.scaling.store import Store
from deploy.scaling.worker import BLOCK_TOKENS, GRAIN, Events, SimulatedWorker, coarse
from deploy.sim.profile import Profile
from router.scaling_settings import ScalingSettings

TRACE = [Arrival(0.5 * n, 512 * 8 + 100, 65, tuple(range(9 * n, 9 * n + 9))) for n in range(400)]
SHAPE = Shape(2000, 0.1, False, 1)
PLANT = Plant(scaling.LARGE, 90.0, 4_000_000)
GOAL = Goal(10.0, 0.05, 0.95)
RULE = ScalingSettings(prefill_min=0, prefill_max=8, decode_max=8, backlog_seconds=10.0)


def test_a_day_has_its_requests_and_its_hours() -> None:
    day = day_of(TRACE, SHAPE)
    assert len(day) == SHAPE.requests
    assert [one.at_seconds for one in day] == sorted(one.at_seconds for one in day)
    assert day[0].at_seconds >= 0
    assert day[-1].at_seconds < DAY_SECONDS
    hours = [0] * 24
    for one in day:
        hours[int(clock_hour(one.at_seconds))] += 1
    for hour, count in enumerate(hours):
        assert count / max(hours) == pytest.approx(rate_at(hour + 0.5, SHAPE.low) / rate_at(15.5, SHAPE.low), abs=0.06)
    assert len({one.blocks for one in day}) == SHAPE.requests, "each time the trace is played its prefixes are others"


def test_by_night_only_what_the_evening_asked_is_asked_again() -> None:
    shape = Shape(2000, 0.1, True, 1)
    day = day_of(TRACE, shape)
    night = [one for one in day if clock_hour(one.at_seconds) < 6]
    before = {one.blocks for one in day if clock_hour(one.at_seconds) >= 6}
    assert len(night) > 50
    assert all(one.blocks in before for one in night)
    assert day == day_of(TRACE, shape)
    assert day != day_of(TRACE, Shape(2000, 0.1, True, 2))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 12))
def test_the_fewest_are_found_as_by_trying_all(needs: list[int], prefill_max: int) -> None:
    """``needs``: how many prefill workers it takes for each number of decode workers, never more for more of them."""
    needs = sorted(needs, reverse=True)
    able = [(prefill, decode) for decode, need in enumerate(needs, 1) for prefill in range(need, prefill_max + 1)]
    found = scaling.fewest(lambda prefill, decode: prefill >= needs[decode - 1], (prefill_max, len(needs)))
    assert (found is None) == (not able)
    if found is not None:
        assert found in able
        assert sum(found) == min(map(sum, able))


def test_a_token_of_the_simulation_takes_as_long_as_those_that_it_stands_for() -> None:
    fine = Profile()
    one = coarse(fine)
    assert one.step_seconds([], [8000 // GRAIN] * 8) == pytest.approx(GRAIN * fine.step_seconds([], [8000] * 8), rel=0.01)
    assert one.step_seconds([(0, 4096 // GRAIN)], []) == pytest.approx(fine.step_seconds([(0, 4096)], []), rel=0.01)
    assert one.pull_seconds(4096 // GRAIN) == pytest.approx(fine.pull_seconds(4096))
    assert one.blocks * BLOCK_TOKENS == pytest.approx(fine.blocks * fine.block_size, rel=0.01)


def test_a_worker_computes_pulls_and_generates_in_the_profiles_time() -> None:
    profile, store, events = coarse(Profile()), Store(1000), Events()
    times: dict[str, float] = {}
    for number, (role, answer) in enumerate((("prefill", 1), ("decode", 5))):
        worker = SimulatedWorker(role, role, profile, store, events)  # type: ignore[arg-type]
        begun = events.now
        worker.first = lambda _: times.__setitem__("first", events.now)
        worker.ended = lambda _: times.__setitem__("ended", events.now)
        worker.add(str(number), [7] * 256, answer, [])
        while events.next():
            pass
        assert worker.idle
        if role == "prefill":
            assert times["first"] - begun == pytest.approx(profile.step_seconds([(0, 256)], []))
        else:
            # The last block of 32 tokens is computed again: its last token is needed.
            assert times["first"] - begun == pytest.approx(profile.pull_seconds(224) + profile.step_seconds([(224, 32)], []))
            assert times["ended"] - times["first"] == pytest.approx(sum(profile.step_seconds([], [256 + n]) for n in range(4)))
            assert worker.reading().tokens == 4 * GRAIN


def played(sizes: tuple[int, int], rule: ScalingSettings | None, shape: Shape = SHAPE, *, gives_up: bool = False) -> Outcome:
    return Replay(PLANT, GOAL, sizes, rule, gives_up=gives_up).run(day_of(TRACE, shape), DAY_SECONDS)


def test_fixed_pools_are_paid_for_all_day_and_answer_all() -> None:
    outcome = played((2, 1), None)
    assert outcome.requests == len(outcome.ttft) == SHAPE.requests
    assert outcome.hours == pytest.approx(3 * 24, rel=0.01)
    assert {pools[1:] for pools in outcome.pools} == {(2, 1)}
    assert outcome.share > 0.95


def test_who_can_not_keep_the_goal_is_given_up() -> None:
    slow = Plant(msgspec.structs.replace(scaling.LARGE, prefill_tokens_per_second=((1, 80.0),)), 90.0, 4_000_000)
    outcome = Replay(slow, GOAL, (1, 1), None, gives_up=True).run(day_of(TRACE, SHAPE), DAY_SECONDS)
    assert outcome.broken
    assert SHAPE.requests * (1 - GOAL.share) < outcome.requests < SHAPE.requests


def test_pools_that_are_scaled_follow_the_hours() -> None:
    busy = Shape(12_000, 0.05, False, 1)
    slow = Plant(msgspec.structs.replace(scaling.LARGE, prefill_tokens_per_second=((1, 1000.0),)), 90.0, 4_000_000)
    outcome = Replay(slow, GOAL, (1, 1), RULE).run(day_of(TRACE, busy), DAY_SECONDS)
    assert outcome.requests == busy.requests

    def mean(hours: range) -> float:
        counts = [prefill for at, prefill, _ in outcome.pools if int(clock_hour(at)) in hours]
        return sum(counts) / len(counts)

    assert mean(range(14, 19)) > mean(range(2, 6)) + 0.5
    assert outcome.hours == pytest.approx(sum((prefill + decode) * 300 / 3600 for _, prefill, decode in outcome.pools), rel=0.1)


def test_prefill_goes_by_night_where_the_cache_serves_everything() -> None:
    repeats = Shape(2000, 0.1, True, 1)
    zero, always = played((1, 1), RULE, repeats), played((1, 1), msgspec.structs.replace(RULE, prefill_min=1), repeats)
    assert 0 in {prefill for at, prefill, _ in zero.pools if clock_hour(at) < 6}
    assert 0 not in {prefill for _, prefill, _ in always.pools}
    assert zero.worker_seconds["prefill"] < always.worker_seconds["prefill"]


def test_the_command_writes_rows_and_pools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"timestamp": 1000 * one.at_seconds, "input_length": one.input_tokens, "output_length": 65, "hash_ids": one.blocks} for one in TRACE]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["bench", "scaling", "--trace", str(tmp_path / "t.jsonl"), "--requests", "600", "--prefill-max", "4", "--decode-max", "3", "--json"]
    assert cli.main([*command, "--output", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    found = {(row["system"], row["case"], row["metric"]): row["median"] for row in result["rows"]}
    assert found["rule", scaling.DAY, "goals_met_share"] > 0.9
    assert found["rule", scaling.DAY, "gpu_hours"] > 0
    assert {system for system, case, _ in found if case == scaling.REPEATS} > {scaling.RULE, scaling.NO_ZERO}
    assert len(result["pools"][f"{scaling.RULE}, {scaling.DAY}"]) == 48
    assert cli.main([*command, "--low", "0"]) == 2
    assert "--low" in capsys.readouterr().err
